"""A real API process with the scripted engine on a core of its own, to be measured from the other cores. Linux only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from service.errors import Unavailable
from service.processes import bind_to_parent
from service.settings import child_environment, load_settings


@dataclass(frozen=True, slots=True)
class PinnedServer:
    """A running server and the core it has."""

    url: str
    port: int
    pid: int
    core: int

    def metrics(self) -> dict[str, float]:
        """Every Prometheus sample: name with labels -> value."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def cpu_times(self) -> tuple[float, float]:
        """Seconds since boot that the core was busy, and that this process (with its threads) had a core."""
        tick = os.sysconf("SC_CLK_TCK")
        lines = Path("/proc/stat").read_text().splitlines()
        line = next(x for x in lines if x.startswith(f"cpu{self.core} "))
        user, nice, system, _idle, _wait, irq, softirq, *_ = (int(x) for x in line.split()[1:])
        own = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (user + nice + system + irq + softirq) / tick, (int(own[11]) + int(own[12])) / tick


@contextmanager
def cores_apart() -> Iterator[list[int]]:
    """Yields the usable cores, the server's first. This process keeps off that one meanwhile, and so do the children
    it starts, unless they are pinned. With a single core all share it.

    Raises:
        Unavailable: this system cannot pin processes.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise Unavailable("this benchmark pins processes to cores, which this system cannot; run it on Linux")
    cores = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, cores[1:] or cores)
        yield cores
    finally:
        os.sched_setaffinity(0, cores)


def on_core(core: int | None) -> Callable[[], None]:
    """A `preexec_fn`: the child dies with this process, and runs on that core (None: where this process runs)."""
    parent = os.getpid()

    def prepare() -> None:
        bind_to_parent(signal.SIGKILL, parent)
        if core is not None:
            os.sched_setaffinity(0, {core})

    return prepare


@contextmanager
def start_server(
    folder: Path, redis_url: str, core: int, connections: int, profile: Path | None
) -> Iterator[PinnedServer]:
    """The real server, ready to answer; asked to leave at the end, with its profile written if one was asked for.

    Settings are the defaults, or what `DETOT_BENCH_...` says in place of `DETOT_...`.

    Raises:
        Unavailable: it does not start; the message ends with its last words.
    """
    settings = load_settings(
        _env_prefix="DETOT_BENCH_",
        engine="scripted",
        port=_free_port(),
        data_dir=folder,
        redis={"url": redis_url},
        limits={"concurrency": max(64, connections)},
    )
    profiler = ["-m", "cProfile", "-o", str(profile.absolute())] if profile else []
    log = folder / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *profiler, "-m", "service", "api"],
            env=child_environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which then ends the server
            preexec_fn=on_core(core),
        )
    server = PinnedServer(f"http://127.0.0.1:{settings.port}", settings.port, process.pid, core)
    try:
        _until_ready(server.url, process, log)
        yield server
    finally:
        process.send_signal(signal.SIGINT)  # cProfile writes at a KeyboardInterrupt, not at a SIGTERM
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_model() -> str:
    """The processor's name, as the kernel gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "unknown")


def _until_ready(url: str, process: subprocess.Popen[bytes], log: Path, timeout: float = 60.0) -> None:
    give_up = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < give_up:
        try:
            if httpx.get(f"{url}/health/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise Unavailable(f"the server was not ready within {timeout:g} s: {log.read_text(errors='replace')[-500:]}")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
