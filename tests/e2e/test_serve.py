"""`detot serve` as a user runs it, with the scripted engine: real processes, real Valkey, real signals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from redis import Redis

from tests.live import clean_environment, free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

T = TypeVar("T")


@dataclass(frozen=True)
class Serve:
    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def said(self) -> str:
        return self.log.read_text()

    def tree(self) -> dict[int, str]:
        """Every process below the supervisor: pid -> command line."""
        return {pid: command_line(pid) for pid in descendants(self.process.pid)}

    def pid(self, part: str) -> int | None:
        return next((pid for pid, command in self.tree().items() if part in command), None)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def figures(self) -> dict[str, Any]:
        return json.loads(self.said().splitlines()[-1])


@contextmanager
def serve(folder: Path, **env: str) -> Iterator[Serve]:
    port = free_port()
    settings = {"PORT": str(port), "WORKER_PORT": "0", "ENGINE": "scripted", "DATA_DIR": str(folder / "data"), **env}
    log = folder / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            env=clean_environment() | {f"DETOT_{k}": v for k, v in settings.items()},
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    service = Serve(process, log, f"http://127.0.0.1:{port}")
    try:
        until(lambda: "curl -s" in service.said() or process.poll() is not None, service.said, 90)
        yield service
    finally:
        process.kill()
        process.wait()


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = [int(child) for child in path.read_text().split()]
        except OSError:
            continue
        found += [*below, *(pid for child in below for pid in descendants(child))]
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def until(condition: Callable[[], T], explain: Callable[[], object] = str, seconds: float = 30.0) -> T:
    give_up = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < give_up, f"it did not happen: {explain()}"
        time.sleep(0.05)
    return value


def gone(tree: dict[int, str]) -> dict[int, str]:
    """Wait a few seconds for all of these processes to end; what is left."""
    give_up = time.monotonic() + 10
    while (left := {p: c for p, c in tree.items() if c and command_line(p) == c}) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left


def ask(service: Serve, text: str = "What is 2 + 2?") -> httpx.Response:
    body = {"model": service_model(service), "messages": [{"role": "user", "content": text}]}
    return httpx.post(f"{service.url}/v1/chat/completions", json=body, timeout=30)


def service_model(service: Serve) -> str:
    return httpx.get(f"{service.url}/v1/models", timeout=10).json()["data"][0]["id"]


def test_the_printed_curl_works_and_ctrl_c_leaves_no_process(tmp_path):
    with serve(tmp_path) as service:
        line = next(line for line in service.said().splitlines() if line.startswith("curl"))
        words = shlex.split(line)
        body = json.loads(words[words.index("-d") + 1])
        answer = httpx.post(words[2], json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        assert "42" in answer.json()["choices"][0]["message"]["content"]
        tree = service.tree()
        assert len(tree) >= 3
        os.killpg(service.process.pid, signal.SIGINT)
        assert service.process.wait(45) == 0, service.said()
        assert gone(tree) == {}
        assert service.figures()["restarts"] == {}


def test_an_outcome_of_the_last_moment_is_kept(tmp_path):
    with serve(tmp_path) as service:
        identity = ask(service).json()["id"]
        service.process.terminate()
        assert service.process.wait(45) == 0
    with serve(tmp_path) as service:
        assert any(identity in entries for entries in outcomes(tmp_path))
        service.process.terminate()
        assert service.process.wait(45) == 0


def outcomes(folder: Path) -> list[str]:
    """The outcomes in the embedded Valkey as text, one a task."""
    url = (folder / "data" / "valkey.url").read_text().strip()
    with Redis.from_url(url) as client:
        return [str(client.xrange(key)) for key in client.scan_iter("detot:*:outcomes")]


def test_killed_parts_come_back(tmp_path):
    with serve(tmp_path) as service:
        api, valkey = until(lambda: service.pid("service api")), until(lambda: service.pid("valkey"))
        assert api and valkey
        os.kill(valkey, signal.SIGKILL)
        assert ask(service).status_code == 200
        again = until(lambda: (pid := service.pid("valkey")) not in (None, valkey) and pid, service.said)
        os.kill(api, signal.SIGKILL)
        until(lambda: service.pid("service api") not in (None, api), service.said)
        until(service.ready, service.said)
        assert ask(service).status_code == 200
        assert service.pid("valkey") == again
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(45) == 0
        assert service.figures()["restarts"] == {"api": 1}


def test_kill_9_of_the_supervisor_leaves_no_process(tmp_path):
    with serve(tmp_path) as service:
        assert ask(service).status_code == 200
        tree = service.tree()
        assert len(tree) >= 3
        service.process.kill()
        service.process.wait()
        assert gone(tree) == {}
    with serve(tmp_path) as service:  # and the data directory is free again
        assert ask(service).status_code == 200


def test_a_wrong_configuration_ends_with_2_and_its_reason(tmp_path):
    catalogue = tmp_path / "tasks.yaml"
    catalogue.write_text("tasks: 3\n")
    with serve(tmp_path, TASKS=str(catalogue)) as service:
        assert service.process.wait(45) == 2
        assert "tasks.yaml" in service.said()
        assert service.figures()["stopped"] == "wrong configuration"


def test_a_taken_port_is_one_clear_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with serve(tmp_path, PORT=str(taken.getsockname()[1])) as service:
            assert service.process.wait(45) == 2
            assert "DETOT_PORT: cannot listen on 127.0.0.1 port" in service.said()
            assert "Traceback" not in service.said()
