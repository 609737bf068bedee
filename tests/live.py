"""Real processes for tests: an API process with the scripted engine on a free port, against a real Valkey."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class LiveServer:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels, 0 if it is not there."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.split("{")[0].split(" ")[0] == name)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("DETOT_")}


@contextmanager
def live_server(redis_url: str, folder: Path, wait: float = 60.0, **env: str) -> Iterator[LiveServer]:
    """`python -m service api` with the scripted engine; `env` holds settings without their DETOT_ prefix."""
    port = free_port()
    settings = {"PORT": str(port), "ENGINE": "scripted", "REDIS__URL": redis_url, "DATA_DIR": str(folder), **env}
    log = folder / f"api-{port}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "api"],
            env=clean_environment() | {f"DETOT_{k}": v for k, v in settings.items()},
            stdout=sink,
            stderr=sink,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _until_ready(url, process, log, wait)
        yield LiveServer(url, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path, wait: float) -> None:
    give_up = time.monotonic() + wait
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise AssertionError(f"the API exited with {process.returncode}: {log.read_text()}")
        try:
            if httpx.get(f"{url}/health/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError(f"the API was not ready within {wait} s: {log.read_text()}")
