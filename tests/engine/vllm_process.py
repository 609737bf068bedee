"""A real vLLM server for tests, in processes of its own that end with the test run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.processes import bind_to_parent
from tests.live import clean_environment, free_port

CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class VllmProcess:
    """`log` holds what the server printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        """Sum of one of vLLM's own metrics."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.split("{")[0] == f"vllm:{name}")

    def kill(self) -> None:
        """As the kernel does when memory runs out: server, engine and worker at once."""
        with_children = os.getpgid(self.process.pid)
        os.killpg(with_children, signal.SIGKILL)
        self.process.wait()


@contextmanager
def vllm_server(
    model: Path, folder: Path, *flags: str, port: int | None = None, wait: float = 300.0
) -> Iterator[VllmProcess]:
    """`python -m vllm.entrypoints.openai.api_server` on a free port of this machine, ready to answer."""
    port, me = port or free_port(), os.getpid()
    log = folder / f"vllm-{port}-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "64", *flags]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=clean_environment() | CPU,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            preexec_fn=lambda: bind_to_parent(signal.SIGTERM, me),
        )
    server = VllmProcess(f"http://127.0.0.1:{port}", process, log)
    try:
        _until_healthy(server, wait)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
        try:
            os.killpg(process.pid, signal.SIGKILL)  # whoever of its group is left
        except ProcessLookupError:
            pass


def _until_healthy(server: VllmProcess, wait: float) -> None:
    give_up = time.monotonic() + wait
    while time.monotonic() < give_up:
        if server.process.poll() is not None:
            break
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(f"the vLLM server did not come up: {server.log.read_text()[-3_000:]}")
