"""The import rule, read from the sources: who may import whom, and where torch, vLLM and the environment may appear."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A layer (longest matching prefix decides) and what of `service` it may import, besides itself.
LAYERS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "core": ("errors",),
    "metrics": (),
    "settings": ("errors",),
    "tasks": ("core", "errors"),
    "engine.base": ("core.types", "errors"),
    "engine": ("core.types", "errors"),
    "store": ("core.types", "errors"),
    "serve": ("core", "tasks", "engine.base", "store", "metrics", "errors"),
    "refine": ("core", "tasks", "engine.base", "store", "metrics", "errors"),
    "wiring": ("engine", "store", "serve", "settings", "core", "tasks", "metrics", "errors"),
    "api": ("serve", "wiring", "core", "tasks", "settings", "metrics", "errors", "version"),
    "version": (),
    "cli": ("*",),
}
IN_CLI_LAYER = ("__main__", "bench", "client", "commands", "processes", "supervise", "work")
ONLY_IN = {
    "vllm": ("engine/vllm",),
    "torch": ("engine/local", "engine/vllm_core.py", "refine/gradient"),
    "transformers": ("engine/local", "engine/convert.py", "refine/gradient"),
    "accelerate": ("engine/local", "engine/convert.py", "refine/gradient"),
    "gguf": ("engine/convert.py",),
}
PURE = {"__future__", "abc", "collections", "dataclasses", "decimal", "enum", "fractions", "functools", "itertools"} | {
    *("math", "operator", "re", "statistics", "string", "typing", "unicodedata", "hashlib", "json", "struct", "base64"),
    *("numpy", "scipy", "sympy", "latex2sympy2_extended", "math_verify", "safetensors", "jinja2", "orjson"),
}


def modules() -> list[Path]:
    return sorted((ROOT / "service").rglob("*.py"))


def dotted(path: Path) -> str:
    """`service/core/vote.py` -> `core.vote`; a package is named like its folder, service/__init__.py is `version`."""
    parts = path.relative_to(ROOT / "service").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "version"


def layer(module: str) -> str | None:
    if module.split(".")[0] in IN_CLI_LAYER:
        return "cli"
    fits = [name for name in LAYERS if covers(name, module)]
    return max(fits, key=len, default=None)


def covers(name: str, module: str) -> bool:
    return name == "*" or module == name or module.startswith(name + ".")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a module, also inside functions; each imported name is spelled out."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def own(name: str) -> str | None:
    """The module of `service` that an imported dotted name lies in, None for foreign ones."""
    if name.split(".")[0] != "service":
        return None
    parts = name.split(".")[1:]
    while parts:
        path = ROOT.joinpath("service", *parts)
        if path.with_suffix(".py").exists() or path.is_dir():
            return ".".join(parts)
        parts.pop()
    return "version"


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def violations(path: Path) -> list[str]:
    me = dotted(path)
    mine = layer(me)
    if mine is None:
        return [f"{path.relative_to(ROOT)}: belongs to no layer; add it to LAYERS"]
    allowed = (*LAYERS[mine], mine)
    targets = [(line, target) for line, name in imports(path) if (target := own(name)) is not None]
    return [
        f"{where(path, line)}: {mine} must not import {target}"
        for line, target in targets
        if not any(covers(a, target) for a in allowed)
    ]


def test_imports_point_down():
    assert [v for path in modules() for v in violations(path)] == []


def test_the_rule_notices_a_violation(tmp_path, monkeypatch):
    root = tmp_path / "service"
    for name, text in {
        "serve/a.py": "def f():\n    from service.refine import b\n",
        "refine/b.py": "import service.serve.a\n",
        "core/c.py": "from service.store import d\n",
        "store/d.py": "from service.core.types import X\n",
        "core/types.py": "X = 1\n",
        "stray.py": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [v for path in modules() for v in violations(path)] == [
        "service/core/c.py:1: core must not import store.d",
        "service/refine/b.py:1: refine must not import serve.a",
        "service/serve/a.py:2: serve must not import refine.b",
        "service/stray.py: belongs to no layer; add it to LAYERS",
    ]


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_stay_where_they_belong(package):
    strays = [
        where(path, line)
        for path in modules()
        for line, name in imports(path)
        if name.split(".")[0] == package
        and not path.relative_to(ROOT / "service").as_posix().startswith(ONLY_IN[package])
    ]
    assert strays == []


def core_modules() -> list[Path]:
    return [p for p in modules() if dotted(p).split(".")[0] == "core"]


def test_core_is_pure():
    impure = [
        f"{where(path, line)}: {name}"
        for path in core_modules()
        for line, name in imports(path)
        if own(name) is None and name.split(".")[0] not in PURE
    ]
    assert impure == [], "core takes values and gives values; randomness and time are arguments"


def test_core_does_nothing_asynchronous_and_opens_nothing():
    found = [
        where(path, node.lineno)
        for path in core_modules()
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await))
        or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("open", "input", "print")
        )
        or (isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("np.random.default", "np.random.seed")))
    ]
    assert found == []


def test_only_settings_read_the_environment():
    readers = {
        path.relative_to(ROOT / "service").as_posix()
        for path in modules()
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb"))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        )
    }
    assert readers <= {"settings.py"}


def test_every_module_says_what_it_is():
    silent = [
        str(path.relative_to(ROOT))
        for path in modules()
        if not path.name.startswith("__init__") and not ast.get_docstring(tree(path))
    ]
    assert silent == []


def test_the_base_install_imports_without_the_heavy_packages():
    code = """
        import importlib.abc, sys

        HEAVY = {"torch", "transformers", "accelerate", "gguf", "vllm"}

        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in HEAVY:
                    raise ImportError(f"{name} is not part of the base install")

        sys.meta_path.insert(0, Block())
        import service.cli
        import service.api.app, service.wiring, service.supervise, service.work
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
