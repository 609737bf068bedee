"""Child processes that are kept running: start, show their output, start again, end in order.

Children lead sessions of their own, so that a terminal's Ctrl-C reaches their parent alone. On Linux they die with it,
also on `kill -9`, by the kernel's parent-death signal; it is tied to the forking thread: run this in the main one.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

CONFIG_EXIT = 2
FIRST_DELAY, LAST_DELAY, HEALTHY_AFTER = 0.5, 30.0, 60.0
_LINE_LIMIT = 2**20
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Child:
    """A process to keep running. `grace`: seconds between SIGTERM and SIGKILL. Its output is shown after its name."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] | None = None
    grace: float = 30.0


class Supervisor:
    """Keeps children running until `stop()` is called or one of them says that its configuration is wrong.

    Attributes:
        stopping: set once everything is to end.
        code: exit status the supervisor should end with.
        restarts: per child, how often it was started again.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._hurry = asyncio.Event()
        self.stopping = asyncio.Event()
        self.code = 0
        self.restarts: Counter[str] = Counter()

    def stop(self, *, hurry: bool = False) -> None:
        """Ask for the end. `hurry` cuts the grace of what still runs."""
        self.stopping.set()
        if hurry:
            self._hurry.set()

    async def run(self, children: Sequence[Child]) -> int:
        """Start all children at once, keep them running, end them in the order given. Returns the exit status."""
        keepers = [asyncio.create_task(self._keep(child)) for child in children]
        try:
            stop = asyncio.create_task(self.stopping.wait())
            await asyncio.wait([stop, *keepers], return_when=asyncio.FIRST_COMPLETED)
            self.stop()
            for child in children:
                await self._end(child)
            for ended in await asyncio.gather(*keepers, return_exceptions=True):  # all of them, also when one failed
                if isinstance(ended, BaseException):
                    raise ended
        finally:
            for name in list(self._processes):
                self._kill(name)
        return self.code

    async def _keep(self, child: Child) -> None:
        delay = FIRST_DELAY
        while not self.stopping.is_set():
            started = time.monotonic()
            status = await self._once(child)
            if self.stopping.is_set():
                return
            if status == CONFIG_EXIT:
                self._say(f"{child.name} cannot run with this configuration, its message is above; stopping")
                self.code = CONFIG_EXIT
                self.stop()
                return
            if time.monotonic() - started >= HEALTHY_AFTER:
                delay = FIRST_DELAY
            self._say(f"{child.name} ended ({_describe(status)}); starting it again in {delay:g} s")
            with suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), delay)
            delay = min(2 * delay, LAST_DELAY)
            self.restarts[child.name] += 1

    async def _once(self, child: Child) -> int:
        process, output = await _spawn(child)
        self._processes[child.name] = process
        if self.stopping.is_set():  # the end began while it was being started
            self._kill(child.name)
        forward = asyncio.create_task(_forward(child.name, output, self._say))
        status = await process.wait()
        self._kill(child.name)  # what it may have left behind in its session
        del self._processes[child.name]
        await asyncio.wait([forward], timeout=1.0)
        forward.cancel()
        return status

    async def _end(self, child: Child) -> None:
        process = self._processes.get(child.name)
        if process is None or process.returncode is not None:
            return
        process.terminate()
        ended, hurry = asyncio.create_task(process.wait()), asyncio.create_task(self._hurry.wait())
        await asyncio.wait([ended, hurry], timeout=child.grace, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            self._say(f"{child.name} is killed ({'as asked' if hurry.done() else f'it had {child.grace:g} s'})")
            self._kill(child.name)
        hurry.cancel()
        await ended

    def _kill(self, name: str) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._processes[name].pid, signal.SIGKILL)


def bind_to_parent(sig: signal.Signals, parent: int) -> None:
    """Have the kernel send `sig` to this process when the thread that forked it ends; at once if `parent` is gone.

    Linux only; elsewhere this does nothing.
    """
    if _libc is not None:
        if _libc.prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
        if os.getppid() != parent:
            os.kill(os.getpid(), sig)


async def _spawn(child: Child) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader]:
    """The process and its output. The pipe is our own: asyncio's would make `wait()` wait for grandchildren."""
    parent = os.getpid()
    read, write = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *child.argv,
            env=child.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write,
            stderr=write,
            start_new_session=True,
            preexec_fn=lambda: bind_to_parent(signal.SIGKILL, parent),
        )
    except OSError:
        os.close(read)
        raise
    finally:
        os.close(write)
    output = asyncio.StreamReader(limit=_LINE_LIMIT)
    pipe = os.fdopen(read, "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), pipe)
    return process, output


async def _forward(name: str, output: asyncio.StreamReader, say: Say) -> None:
    while True:
        try:
            line = await output.readline()
        except ValueError:  # a line beyond the limit has been thrown away
            continue
        if not line:
            return
        say(f"{name:<6} | {line.decode(errors='replace').rstrip()}")


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"code {status}"
