"""Canonical keys of mathematical expressions, by math-verify and sympy in a separate process.

Algebra may take for ever and any amount of memory, so it is bounded from outside: one child process with limits on
memory and CPU time, killed when an expression takes longer than its timeout. Votes are on keys, never on pairwise
`verify`, which is asymmetric. Only whitelisted LaTeX reaches the parser, and that parser is a grammar, not `eval`.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import re
import signal
import sys
import time
from collections import OrderedDict
from contextlib import suppress
from fractions import Fraction
from typing import Any

from service.core.numerals import canonical as canonical_number

log = logging.getLogger(__name__)

MAX_LENGTH = 200  # characters of an expression and of a key
MAX_WAITING = 16  # expressions that may queue; further ones go unnormalised
START_SECONDS, RETRY_SECONDS = 20.0, 30.0
_MEMORY = 512 * 2**20
_CPU_SECONDS = 3  # per expression; the wall-clock timeout comes first unless the parent is stuck

_COMMANDS = frozenset("sqrt frac dfrac tfrac pi cdot times div log ln sin cos tan exp left right".split())  # noqa: SIM905
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_ALLOWED = re.compile(r"[0-9A-Za-z\s\\^{}()\[\]+\-*/.,=!%|]+")
_WORDY = (
    (re.compile(r"√\s?\(|(?<!\\)\bsqrt\s?\("), r"\\sqrt("),
    (re.compile(r"√\s?([0-9.]+|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"π|(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"[*×]"), r"\\cdot "),
    (re.compile(r"(?<![\\A-Za-z])(log|ln|sin|cos|tan|exp)\b"), r"\\\1 "),
)


class SymbolicPool:
    """One lazily started child that normalises expressions, one at a time, with a cache in front. Needs a Unix.

    `canonical` never raises; whatever goes wrong, the answer keeps its plain key. A dead child is replaced.
    """

    def __init__(self, *, timeout: float = 1.0, cache: int = 4096) -> None:
        self._timeout, self._size = timeout, cache
        self._cache: OrderedDict[str, str | None] = OrderedDict()
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        self._waiting = 0
        self._not_before = 0.0
        self._closed = False

    async def canonical(self, expression: str) -> str | None:
        """The key of an expression; None if it is no expression, takes too long, or too many are waiting.

        Rationals get the key of the same number written plainly (`18`, `0.5`, `1/3`), other constants their value to
        15 digits, expressions with variables their simplified form.
        """
        latex = to_latex(expression)
        if latex is None:
            return None
        if latex in self._cache:
            self._cache.move_to_end(latex)
            return self._cache[latex]
        if self._waiting >= MAX_WAITING:
            return None
        self._waiting += 1
        try:
            async with self._lock:
                return await self._through_cache(latex)
        finally:
            self._waiting -= 1

    async def aclose(self) -> None:
        """End the child. Later calls give None."""
        self._closed = True
        await self._kill()

    async def _through_cache(self, latex: str) -> str | None:
        if latex not in self._cache:
            try:
                self._cache[latex] = await self._ask(latex)
            except OSError as e:  # not this expression's fault: do not remember it
                log.warning("symbolic answers are not normalised for %g s: %s", RETRY_SECONDS, e)
                self._not_before = time.monotonic() + RETRY_SECONDS
                return None
            while len(self._cache) > self._size:
                self._cache.popitem(last=False)
        return self._cache.get(latex)

    async def _ask(self, latex: str) -> str | None:
        """What the child says, None also for an expression that it does not survive. Raises OSError without a child."""
        for _ in range(2):
            child = await self._started()
            try:
                child.stdin.write(latex.encode() + b"\n")  # type: ignore[union-attr]
                line = await asyncio.wait_for(child.stdout.readline(), self._timeout)  # type: ignore[union-attr]
            except TimeoutError:
                await self._kill()
                return None
            except ConnectionError:
                line = b""
            except BaseException:  # cancelled: the child would answer the next question with this one's answer
                await self._kill()
                raise
            if line.endswith(b"\n"):
                return line.decode().strip() or None
            await self._kill()
        return None

    async def _started(self) -> asyncio.subprocess.Process:
        if self._closed or time.monotonic() < self._not_before:
            raise OSError("closed" if self._closed else "the process could not be started")
        if self._child is not None and self._child.returncode is None:
            return self._child
        self._child = child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.serve.symbolic", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            ready = await asyncio.wait_for(child.stdout.readline(), START_SECONDS)  # type: ignore[union-attr]
        except BaseException as e:
            await self._kill()
            if isinstance(e, TimeoutError):
                raise OSError(f"the process was not ready after {START_SECONDS:g} s") from e
            raise
        if ready != b"ready\n":
            await self._kill()
            raise OSError("the process ended while starting")
        return child

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def to_latex(expression: str) -> str | None:
    """An expression as LaTeX with whitelisted commands, None if it holds anything else. No time to speak of."""
    text = expression.strip()
    if not text or len(text) > MAX_LENGTH:
        return None
    for pattern, replacement in _WORDY:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    if not _ALLOWED.fullmatch(text) or not _COMMANDS.issuperset(_COMMAND.findall(text)):
        return None
    return text


# --- in the child ----------------------------------------------------------------------------------------------------


def canonical_latex(latex: str) -> str | None:
    """The key of an expression in LaTeX, None if it is none. May take for ever: call it where that can be ended."""
    import sympy
    from math_verify import LatexExtractionConfig, parse

    config = [LatexExtractionConfig()]
    parsed = parse(f"${latex}$", config, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]
    if len(parsed) != 1:
        return None
    found: Any = parsed[0]
    if isinstance(found, sympy.Equality):
        found = found.rhs
    if not isinstance(found, sympy.Expr):
        return None
    return _key(sympy.nsimplify(found.doit(), rational=True))


def _key(value: Any) -> str | None:
    import sympy

    value = sympy.simplify(sympy.expand(value))
    if value.has(sympy.zoo, sympy.oo, sympy.nan):
        return None
    if value.is_Rational:
        key = canonical_number(Fraction(int(value.p), int(value.q)))
    elif not value.free_symbols and value.is_real:
        key = str(sympy.N(value, 15))
    else:
        key = str(value).replace(" ", "")
    return key if len(key) <= MAX_LENGTH else None


def _main(parent: int) -> None:
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    canonical_latex(r"\sqrt{12}x+1")  # imports, and what is slow only once
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        _limit_cpu()
        try:
            key = canonical_latex(line.rstrip("\n"))
        except Exception:  # sympy raises anything; an expression that it cannot handle has no key
            key = None
        sys.stdout.write(f"{key or ''}\n")
        sys.stdout.flush()


def _limit_cpu() -> None:
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + _CPU_SECONDS, hard))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
