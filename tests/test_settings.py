from __future__ import annotations

import pytest

from service.api.app import open_keyring
from service.errors import ConfigError
from service.settings import load_settings


def test_mistakes_name_variable_value_and_bound(monkeypatch):
    monkeypatch.setenv("DETOT_PORT", "99999")
    monkeypatch.setenv("DETOT_LIMITS__CONCURRENCY", "0")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "DETOT_PORT='99999': Input should be less than or equal to 65535" in caught.value.message
    assert "DETOT_LIMITS__CONCURRENCY='0'" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DETOT_LIMITS__RATE", "fast", "600/minute"),
        ("DETOT_REDIS__URL", "http://127.0.0.1", "the scheme is 'http'"),
        ("DETOT_TASKS", "/nowhere/tasks.yaml", "no such file"),
    ],
)
def test_values_of_a_form_are_refused_by_name(monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert f"{name}={value!r}" in caught.value.message
    assert says in caught.value.message


def test_an_unknown_group_member_is_an_error(monkeypatch):
    monkeypatch.setenv("DETOT_LIMITS__CONCURENCY", "5")
    with pytest.raises(ConfigError, match="DETOT_LIMITS__CONCURENCY"):
        load_settings()


def test_a_password_never_appears_in_an_error_or_repr(monkeypatch):
    monkeypatch.setenv("DETOT_REDIS__PASSWORD", "hunter2")
    assert "hunter2" not in repr(load_settings())


def test_a_missing_secret_file_is_named(monkeypatch):
    monkeypatch.setenv("DETOT_REDIS__PASSWORD_FILE", "/nowhere/secret")
    with pytest.raises(ConfigError, match="/nowhere/secret"):
        _ = load_settings().redis_password


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("example.com", False)],
)
def test_loopback(host, loopback):
    assert load_settings(host=host).loopback is loopback


def test_binding_beyond_loopback_needs_keys():
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*keys"):
        open_keyring(load_settings(host="0.0.0.0"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("DETOT_RECORD_ENABLED", "DETOT_RECORD__ENABLED"),
        ("DETOT_PORTT", "DETOT_PORT"),
        ("DETOT_TYPO", "no such"),
    ],
)
def test_a_misspelled_setting_is_refused_with_what_was_meant(monkeypatch, name, hint):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert name in caught.value.message
    assert hint in caught.value.message
