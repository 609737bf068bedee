from __future__ import annotations

import json
import shlex
import socket

import pytest

from service.errors import ConfigError
from service.settings import child_environment, load_settings
from service.supervise import free_port, welcome


def test_a_taken_port_is_named_with_its_setting():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"DETOT_WORKER_PORT: cannot listen on .* port {port}: .*in use"):
            free_port(load_settings(worker_port=port), "worker_port")


def test_port_zero_becomes_a_real_one():
    settings = load_settings(port=0)
    assert 0 < (free_port(settings, "port") or 0) < 65_536


def test_an_unknown_host_is_named():
    with pytest.raises(ConfigError, match=r"no-such-host\.invalid"):
        free_port(load_settings(host="no-such-host.invalid"), "port")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_base_url(host, url):
    assert load_settings(host=host).base_url == url


def test_the_curl_line_is_one_line_of_valid_shell_and_json():
    *_, line = welcome(load_settings(), "http://127.0.0.1:8000", "some 'model'")
    words = shlex.split(line)
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert "\n" not in line
    assert json.loads(words[words.index("-d") + 1])["model"] == "some 'model'"
    assert "authorization" not in line


def test_with_keys_the_curl_line_asks_for_one(tmp_path):
    *_, line = welcome(load_settings(keys_file=tmp_path / "keys"), "http://127.0.0.1:8000", "m")
    assert '-H "authorization: Bearer $DETOT_KEY"' in line


def test_a_child_reads_the_very_same_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("DETOT_PORT", "9999")
    monkeypatch.setenv("UNRELATED", "kept")
    groups = {
        "redis": {"url": "unix:///tmp/a b.sock", "password": "hunter2"},
        "record": {"prompts": False},
        "local": {"context": None},
    }
    settings = load_settings(port=7777, data_dir=tmp_path, worker_port=None, **groups)
    settings = settings.model_copy(update={"worker_port": None})
    environment = child_environment(settings)
    assert environment["UNRELATED"] == "kept"
    monkeypatch.delenv("DETOT_PORT")
    for name, value in environment.items():
        if name.startswith("DETOT_"):
            monkeypatch.setenv(name, value)
    assert load_settings() == settings
    assert load_settings().redis_password == "hunter2"
