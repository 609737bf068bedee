"""Symbolic keys through the real child process: canonical, bounded, and gone when it should be."""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from service.serve import symbolic
from service.serve.symbolic import SymbolicPool, to_latex

ROOT = Path(__file__).parents[2]
TOWER = "9^{9^{9^{9}}}"


fresh = itertools.count(1000)  # expressions that no cache holds

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[SymbolicPool]:
    pool = SymbolicPool()
    yield pool
    await pool.aclose()


def child_pid(pool: SymbolicPool) -> int:
    assert pool._child is not None
    return pool._child.pid


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def gone(pid: int) -> bool:
    for _ in range(200):
        if not alive(pid):
            return True
        await asyncio.sleep(0.05)
    return False


async def test_equal_expressions_get_equal_keys(pool: SymbolicPool):
    for group in (
        [r"2\sqrt{3}", "sqrt(12)", "√12", r"\sqrt{12}", "2*sqrt(3)"],
        [r"\frac{\sqrt{3}}{2}", "√3/2", r"\sqrt{0.75}"],
        [r"5\pi", "5π", "5 pi", r"\pi \times 5"],
        ["x+1", "1 + x", r"\frac{x^2-1}{x-1}"],
        ["(x+1)^2", "x^2 + 2x + 1"],
    ):
        keys = {await pool.canonical(e) for e in group}
        assert len(keys) == 1, group
        assert None not in keys


async def test_rationals_get_the_key_of_the_plain_number(pool: SymbolicPool):
    expected = {"2**10": "1024", "6 × 7": "42", "sqrt(4)": "2", "18.5 + 3": "21.5", r"\frac{1}{3}": "1/3", "x = 3": "3"}
    assert {e: await pool.canonical(e) for e in expected} == expected


async def test_what_is_no_expression_has_no_key(pool: SymbolicPool):
    hostile = ["", " ", "x" * 1000, r"\int x dx", "__import__('os').system('true')", "a;b", r"\frac{1}{0}", "1,2", "(("]
    assert {e: await pool.canonical(e) for e in [*hostile, "\x00", "\ud800", "9**9**9**9"]} == dict.fromkeys(
        [*hostile, "\x00", "\ud800", "9**9**9**9"]
    )


async def test_only_known_commands_pass():
    assert to_latex(r"\sqrt{2}") == r"\sqrt{2}"
    assert to_latex(r"\input{/etc/passwd}") is None
    assert to_latex("x.__class__") is None
    assert to_latex("a\nb") == "a b", "one line is one question to the child"


async def test_the_process_starts_on_first_use_and_ends_with_the_pool():
    pool = SymbolicPool()
    assert pool._child is None
    await pool.canonical("sqrt(2)")
    pid = child_pid(pool)
    assert alive(pid)
    await pool.aclose()
    assert await gone(pid)
    assert await pool.canonical("sqrt(3)") is None


async def test_a_hostile_expression_is_ended_and_remembered(pool: SymbolicPool):
    await pool.canonical(f"1+{next(fresh)}")
    pid = child_pid(pool)
    assert await pool.canonical(TOWER) is None
    assert await gone(pid), "it was killed"
    assert await pool.canonical("3+4") == "7", "and replaced"
    second = child_pid(pool)
    assert await pool.canonical(TOWER) is None
    assert child_pid(pool) == second, "answered from the cache"


async def test_memory_is_bounded(pool: SymbolicPool):
    await pool.canonical(f"1+{next(fresh)}")
    assert resource.prlimit(child_pid(pool), resource.RLIMIT_AS) == (symbolic._MEMORY, symbolic._MEMORY)


async def test_a_dead_child_is_replaced(pool: SymbolicPool):
    await pool.canonical(f"1+{next(fresh)}")
    pid = child_pid(pool)
    os.kill(pid, signal.SIGKILL)
    assert await gone(pid)
    assert await pool.canonical("5+4") == "9"


async def test_answers_do_not_get_mixed_up_after_a_cancelled_question(pool: SymbolicPool):
    await pool.canonical(f"1+{next(fresh)}")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(pool.canonical("8^{9^{9^{9}}}"), 0.05)
    keys = await asyncio.gather(*(pool.canonical(f"{n}+{n}") for n in range(2, 10)))
    assert keys == [str(2 * n) for n in range(2, 10)]


async def test_a_long_queue_is_refused(pool: SymbolicPool):
    await pool.canonical(f"1+{next(fresh)}")
    keys = await asyncio.gather(*(pool.canonical(f"{n}+100") for n in range(2 * symbolic.MAX_WAITING)))
    assert keys[: symbolic.MAX_WAITING] == [str(n + 100) for n in range(symbolic.MAX_WAITING)]
    assert set(keys[symbolic.MAX_WAITING :]) == {None}
    assert await pool.canonical(f"{2 * symbolic.MAX_WAITING - 1}+100") is not None, "nor remembered"


async def test_without_a_process_there_are_plain_keys(monkeypatch: pytest.MonkeyPatch):
    pool = SymbolicPool()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert await pool.canonical("sqrt(2)") is None
    monkeypatch.undo()
    assert await pool.canonical("sqrt(2)") is None, "not tried again at once"
    pool._not_before = 0.0
    assert await pool.canonical("sqrt(2)") is not None, "the failure was not remembered as the expression's"
    await pool.aclose()


async def test_the_cache_is_bounded():
    pool = SymbolicPool(cache=3)
    for n in range(6):
        await pool.canonical(f"{n}+1")
    assert len(pool._cache) == 3
    await pool.aclose()


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal")
@pytest.mark.parametrize("busy", [False, True])
async def test_the_child_does_not_outlive_a_killed_parent(busy: bool):
    code = f"""
        import asyncio
        from service.serve.symbolic import SymbolicPool

        async def main():
            pool = SymbolicPool(timeout=60)
            await pool.canonical("1+1")
            if {busy}:
                hard = asyncio.create_task(pool.canonical("{TOWER}"))
                await asyncio.sleep(0.2)
            print(pool._child.pid, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:  # noqa: ASYNC220
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    started = time.monotonic()
    assert await gone(pid), f"still there after {time.monotonic() - started:.1f} s"
