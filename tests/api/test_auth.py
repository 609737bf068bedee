from __future__ import annotations

import json
import stat

import pytest

from service.api.auth import Keyring, Scope, add_key, load_keys, remove_key
from service.errors import ConfigError, Forbidden, RateLimited, Unauthorized


def test_keys_are_hashed_at_rest_and_the_file_is_private(tmp_path):
    path = tmp_path / "keys.json"
    plain = add_key(path, "app", [Scope.CALL])
    assert plain not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (key,) = load_keys(path).values()
    assert (key.name, key.scopes) == ("app", (Scope.CALL,))


def test_names_are_unique_and_removal_of_an_unknown_one_names_the_known(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, "app", [Scope.CALL])
    with pytest.raises(ConfigError, match="named 'app' already"):
        add_key(path, "app", [Scope.CALL])
    with pytest.raises(ConfigError, match="known: app"):
        remove_key(path, "other")


async def test_scopes(tmp_path):
    path = tmp_path / "keys.json"
    caller, admin = add_key(path, "caller", [Scope.CALL]), add_key(path, "boss", [Scope.ADMIN])
    ring = Keyring(path, None)
    assert (await ring.admit(f"Bearer {caller}", Scope.CALL)).name == "caller"
    with pytest.raises(Forbidden, match="has scopes call; this needs admin"):
        await ring.admit(f"Bearer {caller}", Scope.ADMIN)
    for scope in Scope:
        assert (await ring.admit(f"bearer {admin}", scope)).name == "boss"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer dt-unknown"])
async def test_no_or_unknown_key_is_unauthorized(tmp_path, header):
    path = tmp_path / "keys.json"
    add_key(path, "app", [Scope.CALL])
    with pytest.raises(Unauthorized):
        await Keyring(path, None).admit(header, Scope.CALL)


async def test_rate_limit_says_when_to_come_back(tmp_path):
    path = tmp_path / "keys.json"
    plain = add_key(path, "app", [Scope.CALL], "2/minute")
    ring = Keyring(path, None)
    for _ in range(2):
        await ring.admit(f"Bearer {plain}", Scope.CALL)
    with pytest.raises(RateLimited) as caught:
        await ring.admit(f"Bearer {plain}", Scope.CALL)
    assert 1 <= (caught.value.retry_after or 0) <= 60


async def test_a_removed_key_stops_working_without_a_restart(tmp_path):
    path = tmp_path / "keys.json"
    plain = add_key(path, "app", [Scope.CALL])
    add_key(path, "other", [Scope.CALL])
    ring = Keyring(path, None)
    await ring.admit(f"Bearer {plain}", Scope.CALL)
    remove_key(path, "app")
    ring._looked = 0.0  # as if half a second had passed
    with pytest.raises(Unauthorized):
        await ring.admit(f"Bearer {plain}", Scope.CALL)


async def test_a_file_broken_later_keeps_the_keys_that_were_good(tmp_path):
    path = tmp_path / "keys.json"
    plain = add_key(path, "app", [Scope.CALL])
    ring = Keyring(path, None)
    path.write_text("{")
    ring._looked = 0.0
    assert (await ring.admit(f"Bearer {plain}", Scope.CALL)).name == "app"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "cannot be read"),
        ('{"keys": [{"name": "a"}]}', "key 1"),
        ('{"keys": [{"name": "a", "sha256": "00", "scopes": ["call"]}]}', "64 hex digits"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "scopes": ["fly"]}]}), "fly"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "scopes": ["call"], "rate": "often"}]}), "often"),
    ],
)
def test_a_malformed_keys_file_says_what_is_wrong(tmp_path, content, match):
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=match):
        load_keys(path)
