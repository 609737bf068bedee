"""The `detot` command as a user runs it: a real process against a real service."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import pytest

from service.core.artifact import decode
from tests.live import clean_environment


def detot(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *args]
    return subprocess.run(command, capture_output=True, text=True, env=clean_environment() | env, timeout=60)


def last_json(done: subprocess.CompletedProcess[str]):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def served(url: str) -> int:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "x"}],
        "detot": {"task": "choice", "arm": "champion"},
    }
    return httpx.post(f"{url}/v1/chat/completions", json=body).json()["detot"]["version"]


def test_an_offset_is_made_put_served_and_rolled_back(live, tmp_path):
    file, at = str(tmp_path / "offset.safetensors"), ("--url", live.url)
    before = served(live.url)
    assert detot("offsets", "new", "choice", file, "--noise", "0.1", "--seed", "3", *at).returncode == 0
    version = last_json(detot("offsets", "put", "choice", file, *at))["version"]
    assert served(live.url) == version > before
    assert last_json(detot("offsets", "rollback", "choice", "--reason", "test", *at))["version"] == before
    assert served(live.url) == before
    history = json.loads(detot("offsets", "list", "choice", *at).stdout)["history"]
    assert [(d["action"], d["reason"]) for d in history[:2]] == [("rollback", "test"), ("publish", "published by hand")]


def test_a_challenger_is_put_promoted_pinned_explained_and_withdrawn(live, tmp_path):
    file, at = str(tmp_path / "offset.safetensors"), ("--url", live.url)
    assert detot("offsets", "new", "symbolic", file, "--noise", "0.1", *at).returncode == 0
    put = last_json(detot("offsets", "put", "symbolic", file, "--as", "challenger", "--share", "0.25", *at))
    assert (put["version"], put["share"]) == (0, 0.25)
    assert last_json(detot("offsets", "withdraw", "symbolic", "--reason", "test", *at))["challenger"] is None
    last_json(detot("offsets", "put", "symbolic", file, "--as", "challenger", *at))
    version = last_json(detot("offsets", "promote", "symbolic", *at))["version"]
    assert version > put["challenger"]
    shown = detot("offsets", "show", "symbolic", str(version), *at)
    assert shown.returncode == 0, shown.stderr
    assert "anchor:" in shown.stdout
    explained = json.loads(detot("offsets", "show", "symbolic", str(version), "--json", *at).stdout)
    assert explained["version"] == version
    assert last_json(detot("offsets", "pin", "symbolic", "--version", "0", *at))["pinned"] is True
    assert last_json(detot("offsets", "unpin", "symbolic", *at))["pinned"] is False
    wrong = detot("offsets", "put", "symbolic", file, "--as", "king", *at)
    assert wrong.returncode == 1
    assert "king" in wrong.stderr


def test_a_peft_adapter_goes_out_and_comes_back(live, tmp_path):
    file, folder, at = str(tmp_path / "offset.safetensors"), tmp_path / "adapter", ("--url", live.url)
    assert detot("offsets", "new", "symbolic", file, "--noise", "0.1", *at).returncode == 0
    first = last_json(detot("offsets", "put", "symbolic", file, *at))["version"]
    last_json(detot("offsets", "export", "symbolic", str(first), str(folder), *at))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    second = last_json(detot("offsets", "import", "symbolic", str(folder), *at))["version"]
    blobs = [httpx.get(f"{live.url}/v1/tasks/symbolic/offsets/{v}").content for v in (first, second)]
    one, two = (decode(blob).offset for blob in blobs)
    assert abs(one - two).max() < 1e-7
    wrong = detot("offsets", "import", "choice", str(folder), *at)
    assert wrong.returncode == 1
    assert f"{len(one)} virtual tokens; the anchor of 'choice' has" in wrong.stderr
    missing = detot("offsets", "import", "symbolic", str(tmp_path / "nowhere"), *at)
    assert missing.returncode == 2
    assert "adapter_config.json" in missing.stderr
    last_json(detot("offsets", "rollback", "symbolic", "--to", "0", *at))


def test_canaries_are_put_shown_and_removed(live, tmp_path):
    file, at = tmp_path / "canaries.jsonl", ("--url", live.url)
    file.write_text('{"question": "Is 7 larger than 3?", "answer": "yes"}\n')
    assert last_json(detot("canaries", "put", "yes_no", str(file), *at))["count"] == 1
    assert json.loads(detot("canaries", "show", "yes_no", *at).stdout)["canaries"][0]["answer"] == "yes"
    assert detot("canaries", "remove", "yes_no", *at).returncode == 0
    file.write_text('{"question": "Is 7 larger than 3?", "answer": "blue"}\n')
    wrong = detot("canaries", "put", "yes_no", str(file), *at)
    assert wrong.returncode == 1
    assert "line 1: field answer: 'blue'" in wrong.stderr


def test_a_refusal_is_one_line_with_the_reason(live, tmp_path):
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"not an artifact")
    done = detot("offsets", "put", "choice", str(file), "--url", live.url)
    assert done.returncode == 1
    assert done.stderr.startswith("detot: ")
    assert "Traceback" not in done.stderr


def test_commands_go_where_the_settings_say_the_service_listens(live):
    done = detot("tasks", "list", DETOT_PORT=live.url.rsplit(":", 1)[1])
    assert done.returncode == 0, done.stderr
    assert "sentiment" in done.stdout


def test_eval_and_bench_end_with_json_also_when_they_fail():
    done = detot("eval", "/nowhere.jsonl")
    assert done.returncode == 2
    assert "/nowhere.jsonl" in json.loads(done.stdout.splitlines()[-1])["error"]


def test_no_service_there_says_how_to_start_one():
    done = detot("tasks", "list", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "start one with `detot serve`" in done.stderr


def test_tasks_list_show_and_check(live, tmp_path):
    assert "math_word_problem" in detot("tasks", "list", "--url", live.url).stdout
    assert json.loads(detot("tasks", "show", "yes_no", "--url", live.url).stdout)["answer"]["type"] == "boolean"
    file = tmp_path / "mine.yaml"
    file.write_text("tasks:\n  - id: mine\n    description: d\n    sampling: {max_samples: 9999}\n")
    done = detot("tasks", "check", str(file))
    assert done.returncode == 2
    assert "mine.yaml" in done.stderr
    assert "'mine'" in done.stderr


def test_keys_are_printed_once_and_listed_without_the_key(tmp_path):
    file = str(tmp_path / "keys.json")
    key = detot("keys", "add", "app", "--scope", "call", "--rate", "5/minute", "--file", file).stdout.strip()
    listed = detot("keys", "list", "--file", file).stdout
    assert key.startswith("dt-")
    assert key not in listed
    assert "app" in listed
    assert detot("keys", "add", "b", "--scope", "fly", "--file", file).returncode == 2
    assert detot("keys", "remove", "app", "--file", file).returncode == 0


def test_models_list_names_sources_and_a_missing_model_says_how_to_get_it(tmp_path):
    listed = detot("models", "list", DETOT_CACHE_DIR=str(tmp_path)).stdout
    assert "Qwen2.5-Coder-0.5B-Instruct" in listed
    assert "wheels" in listed
    done = detot("models", "path", DETOT_CACHE_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "detot models pull" in done.stderr


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"DETOT_PORT": "99999"}, "DETOT_PORT"),
        ({"DETOT_HOST": "0.0.0.0", "DETOT_ENGINE": "scripted", "DETOT_REDIS__URL": "redis://127.0.0.1:9"}, "keys"),
        ({"DETOT_ENGINE": "scripted"}, "DETOT_REDIS__URL"),
        (
            {"DETOT_ENGINE": "scripted", "DETOT_REDIS__URL": "redis://127.0.0.1:9", "DETOT_TASKS": "/none.yaml"},
            "none.yaml",
        ),
        ({"DETOT_REDIS__URL": "http://x", "DETOT_ENGINE": "scripted"}, "http"),
    ],
)
def test_wrong_settings_exit_with_2_and_name_the_setting(env, named):
    done = detot("api", DETOT_WORKER_PORT="none", **{"DETOT_PORT": "0", **env})
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]


def test_the_worker_drains_in_burst_mode_and_the_api_shows_its_monitor(live, redis_url):
    httpx.post(
        f"{live.url}/v1/chat/completions",
        json={"model": "default", "messages": [{"role": "user", "content": "Is it?"}], "detot": {"task": "sentiment"}},
    )
    for _ in range(50):
        if last_json(detot("worker", "--burst", DETOT_REDIS__URL=redis_url))["entries"]:
            break
    monitor = httpx.get(f"{live.url}/v1/tasks/sentiment").json()["monitor"]
    assert monitor["outcomes"] >= 1
    assert monitor["lag"] == 0
    assert monitor["arms"]["all"]["samples_per_answer"] >= 3
