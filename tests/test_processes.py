"""Real processes: a parent that supervises small scripts, watched from outside through their pid files."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service.processes import CONFIG_EXIT, Child, Supervisor

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")

POLITE = "signal.signal(signal.SIGTERM, lambda *_: (note('ended'), sys.exit(0)))"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def child(folder: Path, name: str, body: str = POLITE, grace: float = 20.0) -> Child:
    """A script that notes its pid (one line a start) and runs until it is told to end."""
    code = f"""
        import os, signal, subprocess, sys, time
        def note(what):
            with open({str(folder / "notes")!r}, "a") as f:
                f.write(f"{name} {{what}} {{os.getpid()}}\\n")
        {body}
        print("hello from {name}", flush=True)
        note("began")
        time.sleep(600)
    """
    return Child(name, (sys.executable, "-c", textwrap.dedent(code)), grace=grace)


def notes(folder: Path, what: str) -> list[tuple[str, int]]:
    """(name, pid) of the notes of one kind, in order."""
    path = folder / "notes"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(name, int(pid)) for name, kind, pid in lines if kind == what]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        await asyncio.sleep(0.02)


async def test_children_end_in_order_and_their_output_is_prefixed(tmp_path):
    said: list[str] = []
    supervisor = Supervisor(said.append)
    run = asyncio.create_task(supervisor.run([child(tmp_path, "api"), child(tmp_path, "worker")]))
    await until(lambda: len(said) == 2)
    supervisor.stop()
    assert await run == 0
    assert sorted(said) == ["api    | hello from api", "worker | hello from worker"]
    assert [name for name, _ in notes(tmp_path, "ended")] == ["api", "worker"]
    assert supervisor.restarts == {}


async def test_a_killed_child_comes_back_and_nothing_of_it_stays(tmp_path):
    said: list[str] = []
    supervisor = Supervisor(said.append)
    helper = "note('helper') if (pid := os.fork()) == 0 else None"
    run = asyncio.create_task(supervisor.run([child(tmp_path, "api", helper)]))
    await until(lambda: notes(tmp_path, "began") and notes(tmp_path, "helper"))
    _, first = notes(tmp_path, "helper")[0]
    leader = os.getsid(first)
    os.kill(leader, signal.SIGKILL)
    await until(lambda: len(notes(tmp_path, "helper")) == 2)
    await until(lambda: not alive(first))
    supervisor.stop()
    await run
    assert supervisor.restarts == {"api": 1}
    assert "api ended (signal 9); starting it again in 0.5 s" in said


async def test_delays_double(tmp_path, monkeypatch):
    monkeypatch.setattr("service.processes.FIRST_DELAY", 0.01)
    monkeypatch.setattr("service.processes.LAST_DELAY", 0.04)
    said: list[str] = []
    supervisor = Supervisor(said.append)
    run = asyncio.create_task(supervisor.run([Child("api", (sys.executable, "-c", "raise SystemExit(1)"))]))
    await until(lambda: len(said) >= 4)
    supervisor.stop()
    assert await run == 0
    waits = [line.rsplit(" ", 2)[1] for line in said[:4]]
    assert waits == ["0.01", "0.02", "0.04", "0.04"]


async def test_a_wrong_configuration_stops_everything(tmp_path):
    said: list[str] = []
    wrong = Child("worker", (sys.executable, "-c", f"raise SystemExit({CONFIG_EXIT})"))
    assert await Supervisor(said.append).run([child(tmp_path, "api"), wrong]) == CONFIG_EXIT
    assert not any(alive(pid) for _, pid in notes(tmp_path, "began"))
    assert any("worker cannot run with this configuration" in line for line in said)


async def test_a_child_that_ignores_sigterm_is_killed_when_its_time_is_up(tmp_path):
    said: list[str] = []
    supervisor = Supervisor(said.append)
    run = asyncio.create_task(supervisor.run([child(tmp_path, "api", STUBBORN, grace=0.2)]))
    await until(lambda: notes(tmp_path, "began"))
    supervisor.stop()
    await run
    assert not alive(notes(tmp_path, "began")[0][1])
    assert "api is killed (it had 0.2 s)" in said


async def test_hurry_does_not_wait_for_grace(tmp_path):
    said: list[str] = []
    supervisor = Supervisor(said.append)
    run = asyncio.create_task(supervisor.run([child(tmp_path, "api", STUBBORN, grace=3600)]))
    await until(lambda: notes(tmp_path, "began"))
    supervisor.stop()
    await asyncio.sleep(0.05)
    supervisor.stop(hurry=True)
    await asyncio.wait_for(run, 20)
    assert "api is killed (as asked)" in said


@pytest.mark.parametrize("turns", range(8))
async def test_a_stop_while_children_are_being_started_is_not_lost(tmp_path, turns):
    supervisor = Supervisor(print)
    run = asyncio.create_task(supervisor.run([child(tmp_path, "api"), child(tmp_path, "worker")]))
    for _ in range(turns):
        await asyncio.sleep(0)
    supervisor.stop()
    assert await asyncio.wait_for(run, 20) == 0


async def test_a_command_that_does_not_exist_ends_the_others(tmp_path):
    missing = Child("worker", (str(tmp_path / "nothing"),))
    with pytest.raises(FileNotFoundError):
        await Supervisor(print).run([child(tmp_path, "api"), missing])
    assert not any(alive(pid) for _, pid in notes(tmp_path, "began"))


async def test_endless_lines_are_dropped_not_fatal(tmp_path):
    said: list[str] = []
    supervisor = Supervisor(said.append)
    code = "print('x' * 5_000_000); print('after', flush=True); import time; time.sleep(600)"
    run = asyncio.create_task(supervisor.run([Child("api", (sys.executable, "-c", code))]))
    await until(lambda: "api    | after" in said)
    supervisor.stop()
    await run


@linux_only
async def test_kill_9_of_the_parent_leaves_no_child(tmp_path):
    spec = child(tmp_path, "api", STUBBORN)
    code = f"""
        import asyncio
        from service.processes import Child, Supervisor
        asyncio.run(Supervisor(print).run([Child("api", {spec.argv!r})]))
    """
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(code), stdout=subprocess.DEVNULL
    )
    await until(lambda: notes(tmp_path, "began"))
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(notes(tmp_path, "began")[0][1]))


@linux_only
async def test_a_process_bound_to_a_parent_that_is_gone_ends_at_once():
    code = "import signal; from service.processes import bind_to_parent; bind_to_parent(signal.SIGTERM, 1 << 22)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == -signal.SIGTERM
