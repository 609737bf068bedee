from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis import Redis

from service.errors import ConfigError, Unavailable
from service.store.embedded import EmbeddedValkey, running_url
from tests.valkey import until

_PARENT = """
import sys, time
from service.store.embedded import EmbeddedValkey
server = EmbeddedValkey(sys.argv[1])
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


def _gone(pid: int, wait: float = 15.0) -> bool:
    give_up = time.monotonic() + wait
    while time.monotonic() < give_up:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # dead; whoever adopted it has not collected it yet
        time.sleep(0.02)
    return False


def test_private_socket_and_no_port(valkey: EmbeddedValkey) -> None:
    client = Redis.from_url(valkey.url)
    assert client.ping()
    assert client.config_get("port") == {"port": "0"} or client.config_get("port") == {b"port": b"0"}
    folder = Path(valkey.url.removeprefix("unix://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert running_url(folder) == valkey.url


def test_data_survive_a_restart(tmp_path: Path) -> None:
    for expected in (None, b"1", b"2"):
        with EmbeddedValkey(tmp_path) as server:
            client = Redis.from_url(server.url)
            assert client.get("n") == expected
            client.incr("n")
    assert running_url(tmp_path) is None
    assert not (tmp_path / "valkey.sock").exists()


def test_stop_leaves_no_process(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.start()
    pid = server.pid
    assert pid
    server.stop()
    assert _gone(pid)
    assert server.pid is None
    with pytest.raises(Unavailable):
        _ = server.url


def test_a_second_service_on_the_same_data_is_refused(valkey: EmbeddedValkey) -> None:
    folder = Path(valkey.url.removeprefix("unix://")).parent
    with pytest.raises(ConfigError, match=f"in use by another service .process {os.getpid()}"):
        EmbeddedValkey(folder).start()
    assert Redis.from_url(valkey.url).ping(), "the refused one must not harm the running one"


def test_starting_twice_is_refused_and_harmless(valkey: EmbeddedValkey) -> None:
    with pytest.raises(Unavailable, match="already"):
        valkey.start()
    assert Redis.from_url(valkey.url).ping()


def test_a_long_path_falls_back_to_a_short_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    with EmbeddedValkey(folder) as server:
        sock = Path(server.url.removeprefix("unix://"))
        assert len(str(sock)) < 100
        assert Redis.from_url(server.url).ping()
        assert running_url(folder) == server.url
    assert not sock.parent.exists()


def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        EmbeddedValkey(tmp_path / "file").start()


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("not a directory")
    with pytest.raises(Unavailable, match="code 1"):
        EmbeddedValkey(tmp_path).start()
    (tmp_path / "appendonlydir").unlink()
    with EmbeddedValkey(tmp_path) as server:
        assert server.pid


async def test_a_killed_server_is_started_again(tmp_path: Path) -> None:
    async with EmbeddedValkey(tmp_path) as server:
        first, url = server.pid, server.url
        assert first
        os.kill(first, signal.SIGKILL)
        await until(lambda: server.restarts == 1 and running_url(tmp_path) == url)
        assert server.pid not in (None, first)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a parent-death signal")
def test_it_dies_with_a_killed_parent_and_the_data_are_free_again(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    Redis.from_url(f"unix://{tmp_path}/valkey.sock").set("kept", "yes")
    parent.kill()
    parent.wait()
    with EmbeddedValkey(tmp_path) as server:  # waits for the old server to let go
        assert _gone(pid, wait=1.0)
        assert Redis.from_url(server.url).get("kept") == b"yes"
