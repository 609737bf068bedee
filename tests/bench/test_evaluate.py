"""`detot eval` against real API processes with the scripted engine, whose every sample says that the answer is 42."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.auth import Scope, add_key
from service.bench.evaluate import Question, read_questions, run_eval
from service.bench.summary import Record, by_task, paired, summarise
from service.errors import DetotError, InvalidRequest, Unavailable
from tests.live import LiveServer, free_port, live_server

RIGHT = "Ann has 40 apples and buys 2 more. How many apples does she have now?"
WRONG = "Ben has 30 apples and buys 5 more. How many apples does he have now?"


def line(number: int, question: str = RIGHT, answer: Any = "42", **more: Any) -> dict[str, Any]:
    return {"id": f"q-{number}", "task": "math_word_problem", "question": question, "answer": answer, **more}


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "set.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return file


@pytest.fixture(scope="module")
def narrow(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One request at a time, small bodies, samples that take a while."""
    folder = tmp_path_factory.mktemp("narrow")
    with live_server(
        redis_url, folder, LIMITS__CONCURRENCY="1", LIMITS__BODY_BYTES="1000", SCRIPTED__LATENCY="0.1"
    ) as server:
        yield server


# --- the file ---------------------------------------------------------------------------------------------------------


def test_questions_are_read_in_order_up_to_the_limit(tmp_path):
    file = write(tmp_path, line(1), "", line(2, answer=35), {"id": "x", "question": "Why?", "answer": "no"}, "{broken")
    assert read_questions(file, 3) == [
        Question("q-1", RIGHT, "42", "math_word_problem"),
        Question("q-2", RIGHT, "35", "math_word_problem"),
        Question("x", "Why?", "no", None),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", r"set.jsonl, line 2: not JSON: .*column 2"),
        ("[1]", r"line 2: not an object but '\[1\]'"),
        ({"id": "a", "question": "Why?"}, "line 2: field answer is missing or not a text"),
        (line(2, answer=True), "line 2: field answer"),
        (line(2, question=" "), "line 2: field question"),
        (line(2, id=["7"]), "line 2: field id is missing"),
        (line(2, task=7), "line 2: field task is not a text but 7"),
        (line(1), "line 2: field id: 'q-1' was there before"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, row, message):
    with pytest.raises(InvalidRequest, match=message):
        read_questions(write(tmp_path, line(1), row))


def test_a_file_without_questions(tmp_path):
    with pytest.raises(InvalidRequest, match="holds no questions"):
        read_questions(write(tmp_path, ""))
    with pytest.raises(InvalidRequest, match="No such file"):
        read_questions(tmp_path / "missing.jsonl")


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_counts_right_wrong_and_misclassified(live, tmp_path, capsys):
    untold = {"id": "q-4", "question": RIGHT, "answer": "$42.00"}
    file = write(tmp_path, line(1), line(2, WRONG, "35"), line(3, task="symbolic"), untold)
    before = live.metric("detot_outcomes_written_total")
    figures = run_eval(file, url=live.url, samples=3, json_out=tmp_path / "out.json")
    assert (figures["questions"], figures["answered"], figures["failed"], figures["correct"]) == (4, 4, 0, 3)
    assert (figures["accuracy"], figures["accuracy_answered"], figures["misclassified"]) == (0.75, 0.75, 1)
    assert (figures["mean_samples"], figures["errors"], figures["interrupted"]) == (3.0, {}, False)
    assert figures["completion_tokens"] > 0 < figures["prompt_tokens"] and figures["p95_s"] >= figures["p50_s"] > 0
    assert figures["tasks"]["math_word_problem"]["misclassified"] == 1
    shown = capsys.readouterr().out
    assert "math_word_problem" in shown and "75.0% (30-95)" in shown
    stored = json.loads((tmp_path / "out.json").read_text())
    assert [r["correct"] for r in stored["records"]] == [True, False, True, True]
    assert stored["records"][1]["report"]["votes"] == {"42": 3}
    assert {k: stored[k] for k in figures} == figures and stored["settings"]["samples"] == 3
    time.sleep(0.3)
    assert live.metric("detot_outcomes_written_total") == before, "measuring leaves nothing in the store"


@pytest.mark.parametrize("other", ["control", "greedy"])
def test_a_comparison_asks_every_question_twice(live, tmp_path, capsys, other):
    file = write(tmp_path, line(1), line(2, WRONG, "35"), line(3))
    figures = run_eval(file, url=live.url, compare=other, seed=5, json_out=tmp_path / "out.json")
    second = figures["compare"]
    assert (second["with"], second["both"], second["neither"], second["pairs"], second["p"]) == (other, 2, 1, 3, 1.0)
    assert second["difference"] == 0.0 and second["accuracy"] == figures["accuracy"] == 0.6667
    stored = json.loads((tmp_path / "out.json").read_text())
    reports = [[r["report"] for r in stored[name]] for name in ("records", "compare_records")]
    assert {r["arm"] for r in reports[0]} == {"champion"}
    assert [a["plan"]["seed"] for a in reports[0]] == [b["plan"]["seed"] for b in reports[1]]
    assert len({a["plan"]["seed"] for a in reports[0]}) == 3
    if other == "control":
        assert {r["arm"] for r in reports[1]} == {"control"}
    else:
        assert {(r["samples"], r["plan"]["temperature"]) for r in reports[1]} == {(1, 0.0)}
    assert "McNemar p = 1" in capsys.readouterr().out


def test_a_full_service_is_asked_again(narrow, tmp_path):
    """One permit and three requests at once: two of them get real 429s with Retry-After, and none fails."""
    figures = run_eval(write(tmp_path, line(1), line(2), line(3)), url=narrow.url, concurrency=3)
    assert (figures["answered"], figures["correct"], figures["errors"]) == (3, 3, {})
    assert figures["retries"] >= 2


def test_failed_requests_are_counted_as_wrong_and_by_kind(narrow, tmp_path, capsys):
    file = write(tmp_path, line(1), line(2, question="word " * 500))
    figures = run_eval(file, url=narrow.url, concurrency=1, compare="greedy", json_out=tmp_path / "out.json")
    assert (figures["answered"], figures["failed"], figures["errors"]) == (1, 1, {"body_too_large": 1})
    assert (figures["accuracy"], figures["accuracy_answered"]) == (0.5, 1.0)
    assert (figures["compare"]["pairs"], figures["compare"]["unpaired"]) == (1, 1)
    shown = capsys.readouterr().out
    assert "1 failed, counted as wrong: 1 x body_too_large" in shown and "of those answered: 100.0%" in shown
    record = json.loads((tmp_path / "out.json").read_text())["records"][1]
    assert (record["correct"], record["task"]) == (False, None) and "1000" in record["detail"].replace(",", "")


def test_nothing_answered_in_time(narrow, tmp_path):
    figures = run_eval(write(tmp_path, line(1)), url=narrow.url, deadline=0.05)
    assert (figures["answered"], figures["errors"], figures["accuracy"]) == (0, {"timeout": 1}, 0.0)
    assert figures["mean_samples"] is figures["p50_s"] is figures["accuracy_answered"] is None


def test_nobody_there_and_bad_arguments(tmp_path, live):
    file = write(tmp_path, line(1))
    with pytest.raises(Unavailable, match="no service answers at"):
        run_eval(file, url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InvalidRequest, match="compare is 'best'; it must be one of control, greedy"):
        run_eval(file, url=live.url, compare="best")
    with pytest.raises(InvalidRequest, match="--json"):
        run_eval(file, url=live.url, json_out=tmp_path / "no" / "out.json")


def test_a_wrong_key_ends_the_run_at_once(redis_url, tmp_path):
    keys = tmp_path / "keys.json"
    key = add_key(keys, "eval", frozenset({Scope.CALL}))
    file = write(tmp_path, line(1))
    with live_server(redis_url, tmp_path, KEYS_FILE=str(keys)) as server:
        with pytest.raises(DetotError) as refused:
            run_eval(file, url=server.url, key="wrong")
        assert refused.value.status == 401
        assert run_eval(file, url=server.url, key=key)["correct"] == 1


def test_ctrl_c_shows_what_was_measured(narrow, tmp_path):
    file = write(tmp_path, *(line(i) for i in range(200)))
    before = answered(narrow)
    command = [sys.executable, "-m", "service", "eval", str(file), "--url", narrow.url, "--concurrency", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 30
    while answered(narrow) < before + 3 and time.monotonic() < give_up:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    figures = json.loads(out.splitlines()[-1])
    assert process.returncode == 0, err
    assert figures["interrupted"] and 2 <= figures["answered"] < 200 and "Traceback" not in err


def answered(server: LiveServer) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("detot_requests_total") and 'status="200"' in x)


# --- figures ----------------------------------------------------------------------------------------------------------


def record(correct: bool, error: str | None = None, **changes: Any) -> Record:
    values = {"task": None if error else "a", "answer": None if error else "1", "samples": 4, "latency_s": 1.0}
    return Record("q", "a", "1", correct=correct, error=error, **values | changes)


def test_pairs_with_a_failure_are_left_out_of_the_comparison():
    right, wrong, failed = record(True), record(False), record(False, "timeout")
    pairs = [(right, wrong)] * 8 + [(wrong, right)] * 2 + [(right, right)] * 10 + [(failed, right), (right, failed)]
    figures = paired(pairs)
    assert [figures[k] for k in ("both", "only_first", "only_second", "neither")] == [10, 8, 2, 0]
    assert (figures["pairs"], figures["unpaired"], figures["difference"]) == (20, 2, 0.3)
    assert figures["p"] == pytest.approx(2 * (1 + 10 + 45) / 1024)
    low, high = figures["difference_interval"]
    assert low < 0.3 < high


def test_a_failure_cannot_raise_the_accuracy():
    figures = summarise([record(True)] * 3 + [record(False), record(False, "timeout")])
    assert (figures["accuracy"], figures["accuracy_answered"]) == (0.6, 0.75)
    assert figures["accuracy_interval"][0] < 0.6 < figures["accuracy_interval"][1]


def test_tasks_are_those_the_service_chose():
    figures = by_task([record(True), record(True, task="b"), record(False, "timeout")])
    assert {task: (row["questions"], row["misclassified"]) for task, row in figures.items()} == {
        "a": (1, 0),
        "b": (1, 1),
    }
