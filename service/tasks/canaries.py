"""Canary items: questions whose answer a program computed, for the gate and never for a refiner.

`generate` draws fresh ones for the catalogue's verifiable tasks; `read_canaries` reads labelled ones that users bring
for any task. `next_level` keeps the difficulty where a model is neither always right nor always wrong, for only there
can two versions differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from service.core.answers import extract, key_of
from service.core.types import AnswerSpec, AnswerType
from service.errors import InvalidRequest
from service.tasks import canaries_choice, canaries_stories, canaries_symbolic, canaries_yes_no

LEVELS = 5
LOW, HIGH = 0.35, 0.8  # accuracy outside of which the level changes
BLOCK = 16  # items before it may
_TRIES = 200
_MAX_QUESTION, _MAX_ANSWER = 20_000, 200  # characters of a user's canary

Template = Callable[[Random, int], tuple[str, str]]

TEMPLATES: Mapping[str, Mapping[str, Template]] = {
    "math_word_problem": canaries_stories.TEMPLATES,
    "symbolic": canaries_symbolic.TEMPLATES,
    "choice": canaries_choice.TEMPLATES,
    "yes_no": canaries_yes_no.TEMPLATES,
}
SPECS: Mapping[str, AnswerSpec] = {
    "math_word_problem": AnswerSpec(AnswerType.NUMBER),
    "symbolic": AnswerSpec(AnswerType.TEXT),
    "choice": AnswerSpec(AnswerType.CHOICE),
    "yes_no": AnswerSpec(AnswerType.BOOLEAN),
}


@dataclass(frozen=True, slots=True)
class CanaryItem:
    """A question with its computed or given answer.

    Attributes:
        id: of task and question; equal questions of a task have equal ids.
        key: canonical key of the answer, as votes have it (`core.answers`).
        template: name of the template, "user" for an uploaded item.
        level: difficulty from 1 to LEVELS, 0 for an uploaded item.
    """

    id: str
    task: str
    question: str
    answer: str
    key: str
    template: str
    level: int


def generate(task: str, *, level: int, count: int, rng: Random) -> list[CanaryItem]:
    """Fresh items on distinct questions, the templates of the task equally often as far as they go, in random order.

    Args:
        task: one of TEMPLATES.
        level: difficulty, 1 to LEVELS.
        count: how many, at least 0.
        rng: a fresh seed each round gives fresh items.

    Raises:
        InvalidRequest: the task has no templates, or level or count is out of range, or so many distinct questions
            are not to be had.
    """
    templates = TEMPLATES.get(task)
    if templates is None:
        known = ", ".join(TEMPLATES)
        raise InvalidRequest(f"task {task!r} has no canary templates; those of {known} are shipped", param="task")
    if not 1 <= level <= LEVELS:
        raise InvalidRequest(f"level must be from 1 to {LEVELS}, not {level}", param="level")
    if count < 0:
        raise InvalidRequest(f"count must be at least 0, not {count}", param="count")
    open_templates = list(templates)
    rng.shuffle(open_templates)
    items: dict[str, CanaryItem] = {}
    while open_templates and len(items) < count:
        name = open_templates.pop(0)
        item = _fresh(task, name, level, rng, items)
        if item is not None:
            items[item.id] = item
            open_templates.append(name)
    if len(items) < count:
        raise InvalidRequest(f"{task} has only {len(items)} questions at level {level}, not {count}", param="count")
    drawn = list(items.values())
    rng.shuffle(drawn)
    return drawn


def next_level(level: int, right: int, asked: int) -> int:
    """The level of the next block, given how many of a block at `level` the zero offset got right.

    A blocked up-and-down staircase (Levitt 1971, Transformed up-down methods in psychoacoustics): one level up above
    HIGH, one down below LOW, none between or before BLOCK items. Change the level between challengers, not while one
    is compared, so that all its evidence is on one kind of item.

    Raises:
        ValueError: level or counts are out of range.
    """
    if not 1 <= level <= LEVELS:
        raise ValueError(f"level must be from 1 to {LEVELS}, not {level}")
    if not 0 <= right <= asked:
        raise ValueError(f"right must be from 0 to asked ({asked}), not {right}")
    if asked < BLOCK:
        return level
    accuracy = right / asked
    return min(max(level + (accuracy > HIGH) - (accuracy < LOW), 1), LEVELS)


def read_canaries(
    text: str, specs: Mapping[str, AnswerSpec], source: str = "canaries", task: str | None = None
) -> list[CanaryItem]:
    """Labelled canaries from JSON lines: objects with `task`, `question` and `answer`, all strings; others are ignored.

    Args:
        specs: answer specification of each task of the catalogue.
        source: what an error calls the text.
        task: the task of all lines, whatever they say; None where each names its own.

    Raises:
        InvalidRequest: names source, line, field and value: no JSON object, a field missing, empty or too long, an
            unknown task or one of free text, an answer that cannot be read as the task's, a question asked twice.
    """
    items: dict[str, CanaryItem] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        item = _labelled(line, specs, f"{source}, line {number}", task)
        if item.id in items:
            raise InvalidRequest(f"{source}, line {number}: question {_shown(item.question)} is there already")
        items[item.id] = item
    return list(items.values())


def _fresh(task: str, name: str, level: int, rng: Random, taken: Mapping[str, CanaryItem]) -> CanaryItem | None:
    """A sound item that is not taken, None if the template seems to have no further ones."""
    for _ in range(_TRIES):
        question, answer = TEMPLATES[task][name](rng, level)
        item = _item(task, question, answer, SPECS[task], name, level)
        if item is not None and item.id not in taken and not _gives_itself_away(item):
            return item
    return None


def _item(task: str, question: str, answer: str, spec: AnswerSpec, template: str, level: int) -> CanaryItem | None:
    """None if the answer, given in the usual form, would not be read as what it is."""
    key = key_of(answer, spec, question)
    given = extract(f"The answer is {answer}.", spec, question)
    if key is None or given is None or given.key != key:
        return None
    digest = hashlib.sha256(f"{task}\n{question}".encode()).hexdigest()[:16]
    return CanaryItem(f"canary-{task}-{digest}", task, question, answer, key, template, level)


def _gives_itself_away(item: CanaryItem) -> bool:
    """Whether an open answer stands in the question."""
    closed = item.task in ("choice", "yes_no") or item.key in ("yes", "no")
    return not closed and item.answer.lower() in item.question.lower()


def _labelled(line: str, specs: Mapping[str, AnswerSpec], where: str, task: str | None) -> CanaryItem:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest(f"{where}: no JSON: {e}") from e
    if not isinstance(body, dict):
        raise InvalidRequest(f"{where}: must be a JSON object, not {_shown(body)}")
    if task is not None:
        body["task"] = task
    task, question, answer = (_field(body, name, most, where) for name, most in _FIELDS)
    spec = specs.get(task)
    if spec is None or spec.type is AnswerType.FREE:
        known = ", ".join(t for t, s in specs.items() if s.type is not AnswerType.FREE)
        raise InvalidRequest(f"{where}: field task: {task!r} must be one of {known}", param="task")
    item = _item(task, question, answer, spec, "user", 0)
    if item is None:
        message = f"{where}: field answer: {_shown(answer)} cannot be read as an answer of type {spec.type.value}"
        raise InvalidRequest(message, param="answer")
    return item


_FIELDS = (("task", 48), ("question", _MAX_QUESTION), ("answer", _MAX_ANSWER))


def _field(body: Mapping[str, Any], name: str, most: int, where: str) -> str:
    if name not in body:
        raise InvalidRequest(f"{where}: field {name} is missing", param=name)
    value = body[name]
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest(f"{where}: field {name}: must be text that is not empty, not {_shown(value)}", param=name)
    if len(value) > most:
        raise InvalidRequest(f"{where}: field {name}: {len(value)} characters are more than {most}", param=name)
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InvalidRequest(f"{where}: field {name}: {_shown(value)} holds half a surrogate pair", param=name)
    return value.strip()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
