"""The catalogue: the shipped file, mistakes named precisely, planning rules, immutability."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from service.core.types import AnswerType
from service.errors import InvalidCatalogue, UnknownTask
from service.tasks.catalogue import GENERAL, load_catalogue, parse_task, to_dict
from service.tasks.signals import signals

TASK: dict[str, Any] = {
    "id": "triage",
    "description": "Which department a ticket goes to.",
    "examples": ["The invoice is wrong.", "The app crashes."],
    "anchors": {"default": "Name the department.", "brief": "Department?"},
    "answer": {"type": "label", "labels": ["billing", "technical"], "aliases": {"billing": ["Money"]}},
    "sampling": {"min_samples": 2, "max_samples": 6},
    "thresholds": {"consensus": 0.6},
    "rules": [{"when": {"words": {"min": 50}, "nature": "code"}, "set": {"anchor": "brief", "max_samples": 9}}],
}


def but(path: str, value: Any) -> dict[str, Any]:
    """TASK with one field changed; `...` removes it."""
    task = copy.deepcopy(TASK)
    at: Any = task
    *parents, last = [int(x) if x.isdigit() else x for x in path.split(".")]
    for step in parents:
        at = at[step]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return task


def test_shipped_catalogue_is_complete() -> None:
    tasks = load_catalogue().tasks
    assert list(tasks) == ["math_word_problem", "symbolic", "choice", "yes_no", "sentiment", GENERAL]
    for task in tasks.values():
        assert len(task.examples) >= 12
        assert len(set(task.examples)) == len(task.examples), task.id
        assert task.id == GENERAL or {"default", "brief", "careful"} <= set(task.anchors)
        assert task.id == GENERAL or task.thresholds.accuracy is not None
    assert tasks[GENERAL].answer.type is AnswerType.FREE
    everything = [x for task in tasks.values() for x in task.examples]
    assert len(set(everything)) == len(everything)


def test_documents_round_trip() -> None:
    for task in load_catalogue().tasks.values():
        assert parse_task(json.loads(json.dumps(to_dict(task)))) == task
    assert parse_task(to_dict(parse_task(TASK))) == parse_task(TASK)


MISTAKES = [
    ("id", "Foo", "field id: 'Foo' does not match ^[a-z][a-z0-9_]{0,47}$"),
    ("id", ..., "field id: is missing"),
    ("description", "", "field description: is empty"),
    ("examples", ["  "], "field examples[0]: is empty"),
    ("examples", "one", "field examples"),
    ("anchors", {"brief": "x"}, "field anchors: the variant 'default' is missing; given: brief"),
    ("anchors.default", " ", "field anchors.default: is empty"),
    ("answer.type", "nummer", "field answer.type: 'nummer' is not one of"),
    ("answer.labels", [], "field answer: type 'label' needs at least 2 labels, got 0"),
    ("answer.labels", ["yes", True], "field answer.labels[1]: True is not a text; put it in quotes"),
    ("answer.labels", ["a", "A"], "field answer: a label stands twice in ['a', 'A']"),
    ("answer.aliases", {"sales": ["x"]}, "aliases name 'sales', which is not among the labels"),
    ("answer.aliases", {"billing": ["technical"]}, "'technical' stands for both"),
    ("answer.type", "number", "labels and aliases are for type 'label', not 'number'"),
    ("sampling.max_samples", 99, "field sampling.max_samples: 99 is above the bound 64"),
    ("sampling.min_samples", 0, "field sampling.min_samples: 0 is below the bound 1"),
    ("sampling.min_samples", 7, "field sampling: min_samples 7 is above max_samples 6"),
    ("sampling.max_samples", "6", "field sampling.max_samples: '6'"),
    ("sampling.top_p", 0, "field sampling.top_p: 0 is not above the bound 0"),
    ("sampling.temperature", float("nan"), "field sampling.temperature: nan"),
    ("sampling.tmperature", 1, "field sampling.tmperature: unknown field; known fields: min_samples"),
    ("thresholds.consensus", 1.5, "field thresholds.consensus: 1.5 is above the bound 1"),
    ("rules.0.when.wrods", {"min": 1}, "field rules[0].when.wrods: unknown field; known fields: characters, words"),
    ("rules.0.when.words", {"min": 9, "max": 3}, "field rules[0].when.words: min 9 is above max 3"),
    ("rules.0.when.words", {}, "field rules[0].when.words: needs min or max"),
    ("rules.0.when.nature", "poem", "field rules[0].when.nature[0]: 'poem' is not one of"),
    ("rules.0.when", {}, "field rules[0].when: names no signal"),
    ("rules.0.set", {}, "field rules[0].set: sets nothing"),
    ("rules.0.set.anchor", "long", "field rules[0].set.anchor: there is no variant 'long'; given: default, brief"),
    ("rules.0.set.max_samples", 65, "field rules[0].set.max_samples: 65 is above the bound 64"),
    ("colour", "red", "field colour: unknown field; known fields: id, description"),
]


@pytest.mark.parametrize(("path", "value", "says"), MISTAKES, ids=[f"{p}={str(v)[:12]}" for p, v, _ in MISTAKES])
def test_a_mistake_names_source_task_and_field(path: str, value: Any, says: str) -> None:
    with pytest.raises(InvalidCatalogue) as e:
        parse_task(but(path, value), source="tasks.yaml")
    name = "task without id" if (path, value) == ("id", ...) else f"task {value if path == 'id' else 'triage'!r}"
    assert e.value.message.startswith(f"tasks.yaml: {name}: ")
    assert says in e.value.message


def test_free_text_is_never_voted_on() -> None:
    free = but("answer", {"type": "free"}) | {"rules": [], "sampling": {}}
    sampling = parse_task(free).sampling
    assert (sampling.min_samples, sampling.max_samples, sampling.in_flight) == (1, 1, 1)
    with pytest.raises(InvalidCatalogue, match=r"field sampling\.max_samples: 4 is above the bound 1"):
        parse_task(free | {"sampling": {"max_samples": 4}})
    with pytest.raises(InvalidCatalogue, match=r"field rules\[0\]\.set\.max_samples: free text"):
        parse_task(free | {"rules": TASK["rules"]})


YAML_MISTAKES = [
    ("tasks: [", "tasks.yaml: line 1, column 9"),
    ("tasks:\n- id: a\n  id: b\n", "tasks.yaml: line 3, column 3: duplicate key 'id'"),
    ("", "tasks.yaml: must be a mapping with the field tasks, got nothing"),
    ("tasks: 3", "tasks.yaml: field tasks: must be a list, got 3"),
    ("extends: mine\ntasks: []", "tasks.yaml: field extends: 'mine' is not 'default'"),
    ("task: []", "tasks.yaml: field task: unknown field"),
    ("tasks: [seven]", "tasks.yaml: a task must be a mapping, got a text"),
]


def test_a_check_over_several_fields_names_the_one_at_fault():
    rule = {"when": {"words": {"min": 1}}, "set": {"anchor": "nope"}}
    with pytest.raises(InvalidCatalogue, match="there is no variant 'nope'") as caught:
        parse_task(
            {"id": "x", "description": "d", "anchors": {"default": "a"}, "answer": {"type": "number"}, "rules": [rule]}
        )
    assert caught.value.param == "rules[0].set.anchor"


@pytest.mark.parametrize(("text", "says"), YAML_MISTAKES)
def test_a_broken_file_names_the_place(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "tasks.yaml"
    file.write_text(text)
    with pytest.raises(InvalidCatalogue) as e:
        load_catalogue(file)
    assert e.value.message.startswith(says)


def write(path: Path, *tasks: dict[str, Any], **top: Any) -> Path:
    path.write_text(json.dumps({**top, "tasks": list(tasks)}))  # JSON is YAML
    return path


def test_files_need_examples_and_unique_ids(tmp_path: Path) -> None:
    with pytest.raises(InvalidCatalogue, match=r"mine\.yaml: task 'triage': field examples: has 0 items"):
        load_catalogue(write(tmp_path / "mine.yaml", but("examples", [])))
    with pytest.raises(InvalidCatalogue, match=r"field id: stands twice, at tasks\[0\] and tasks\[1\]"):
        load_catalogue(write(tmp_path / "mine.yaml", TASK, TASK))
    with pytest.raises(InvalidCatalogue, match="cannot be read"):
        load_catalogue(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"tasks: [\xe9]")
    with pytest.raises(InvalidCatalogue, match="not UTF-8: byte 0xe9 at offset 8"):
        load_catalogue(tmp_path / "latin.yaml")
    assert parse_task(but("examples", [])).examples == ()


def test_a_file_extends_or_replaces_the_shipped_tasks(tmp_path: Path) -> None:
    shipped = list(load_catalogue().tasks)
    extended = load_catalogue(write(tmp_path / "a.yaml", TASK, extends="default"))
    assert list(extended.tasks) == [*shipped[:-1], "triage", GENERAL]
    replaced = load_catalogue(write(tmp_path / "b.yaml", TASK))
    assert list(replaced.tasks) == ["triage", GENERAL]
    own = load_catalogue(write(tmp_path / "c.yaml", but("id", "yes_no"), extends="default"))
    assert own.tasks["yes_no"].answer.labels == ("billing", "technical")
    with pytest.raises(InvalidCatalogue, match=r"d.yaml: task 'general': field answer.type: 'label' must be 'free'"):
        load_catalogue(write(tmp_path / "d.yaml", but("id", GENERAL)))


def test_catalogues_are_immutable() -> None:
    shipped = load_catalogue()
    more = shipped.with_task(parse_task(TASK))
    assert "triage" in more.tasks
    assert "triage" not in shipped.tasks
    assert more.without("triage") == shipped
    with pytest.raises(UnknownTask, match="no task 'triage'"):
        shipped.without("triage")
    with pytest.raises(InvalidCatalogue, match="cannot be removed"):
        shipped.without(GENERAL)


def test_rules_apply_in_order_and_later_ones_win() -> None:
    rules = [
        {"when": {"numbers": {"min": 3}}, "set": {"anchor": "brief", "max_samples": 9, "temperature": 0.2}},
        {"when": {"outcome": ["explanation"]}, "set": {"max_samples": 1}},
    ]
    task = parse_task(but("rules", rules))
    plain = task.plan(signals("nothing special"))
    assert (plain.anchor, plain.anchor_text) == ("default", "Name the department.")
    assert plain.sampling == task.sampling
    numbers = task.plan(signals("1, 2 and 3"))
    assert (numbers.anchor, numbers.sampling.max_samples, numbers.sampling.temperature) == ("brief", 9, 0.2)
    both = task.plan(signals("Explain why 1, 2 and 3"))
    assert (both.anchor, both.sampling.max_samples, both.sampling.min_samples) == ("brief", 1, 1)
    assert both.sampling.temperature == 0.2


def test_shipped_rules_follow_the_metadata_of_a_request() -> None:
    math = load_catalogue().tasks["math_word_problem"]
    assert math.plan(signals("What is 7 times 8?")).anchor == "brief"
    long = "He sold 3, 4, 5, 6, 7, 8, 9 and 10 crates. How many crates did he sell in total over all of the days?"
    assert math.plan(signals(long)).anchor == "careful"
    assert math.plan(signals(long)).sampling.max_samples > math.sampling.max_samples
    general = load_catalogue().tasks[GENERAL]
    assert general.plan(signals("def f():\n    return 1\nmake it faster")).sampling.temperature == 0.2
    assert general.plan(signals("hello")).sampling.max_samples == 1
