"""The task catalogue: what a task is, and the rules that turn a request's metadata into its initial parameters.

A catalogue is immutable; `with_task` and `without` return new ones. Documents (YAML files, JSON bodies) are read and
checked in `documents`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from service.core.types import AnswerSpec, AnswerType, Sampling
from service.errors import InvalidCatalogue, UnknownTask
from service.tasks import documents
from service.tasks.signals import Signals

GENERAL = "general"  # always there: takes what no other task takes
DEFAULT = Path(__file__).with_name("default.yaml")


@dataclass(frozen=True, slots=True)
class Condition:
    """One signal in `[low, high]` (either may be open) or, when `among` is given, one of its values."""

    signal: str
    low: float | None = None
    high: float | None = None
    among: tuple[str, ...] = ()

    def holds(self, seen: Signals) -> bool:
        value = getattr(seen, self.signal)
        if self.among:
            return value in self.among
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True, slots=True)
class Rule:
    """When all conditions hold, `anchor` (if any) and `changes` (fields of Sampling) replace what stood before."""

    when: tuple[Condition, ...]
    anchor: str | None
    changes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Targets for monitoring; None is not monitored.

    Attributes:
        accuracy, consensus: at least, in [0, 1].
        parse_failures: at most, share of samples in [0, 1].
        samples_per_answer, completion_tokens, latency_p95_s: at most; tokens are per sample, latency in seconds.
    """

    accuracy: float | None = None
    consensus: float | None = None
    samples_per_answer: float | None = None
    parse_failures: float | None = None
    completion_tokens: float | None = None
    latency_p95_s: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Initial parameters of one request: the anchor variant, its text, and how samples are drawn."""

    anchor: str
    anchor_text: str
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of request.

    Attributes:
        id: `^[a-z][a-z0-9_]{0,47}$`.
        anchors: instruction text per variant name, `default` first.
        rules: applied in order by `plan`; later ones override earlier ones.
    """

    id: str
    description: str
    examples: tuple[str, ...]
    anchors: Mapping[str, str]
    answer: AnswerSpec
    sampling: Sampling = field(default_factory=Sampling)
    thresholds: Thresholds = field(default_factory=Thresholds)
    rules: tuple[Rule, ...] = ()

    def plan(self, seen: Signals) -> Plan:
        """The initial parameters for a request with this metadata; `min_samples` never exceeds `max_samples`."""
        anchor, changes = "default", {}
        for rule in self.rules:
            if all(condition.holds(seen) for condition in rule.when):
                anchor = rule.anchor or anchor
                changes.update(rule.changes)
        sampling = self.sampling.but(**changes) if changes else self.sampling
        if sampling.min_samples > sampling.max_samples:
            sampling = sampling.but(min_samples=sampling.max_samples)
        return Plan(anchor, self.anchors[anchor], sampling)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Tasks by id, in order; `general` is always among them."""

    tasks: Mapping[str, Task]

    def with_task(self, task: Task) -> Catalogue:
        """A catalogue with this task, in place of one of the same id if there is one.

        Raises:
            InvalidCatalogue: the task is `general` and its answer is not free text.
        """
        if task.id == GENERAL and task.answer.type is not AnswerType.FREE:
            raise InvalidCatalogue(
                f"task {GENERAL!r}: field answer.type: {task.answer.type.value!r} must be 'free', "
                "for it takes everything that no other task takes",
                param="answer.type",
            )
        return Catalogue({**self.tasks, task.id: task})

    def without(self, task_id: str) -> Catalogue:
        """A catalogue without this task.

        Raises:
            UnknownTask: there is none of that id.
            InvalidCatalogue: `general` cannot be removed.
        """
        if task_id not in self.tasks:
            raise UnknownTask(f"there is no task {task_id!r}; known tasks: {', '.join(self.tasks)}")
        if task_id == GENERAL:
            raise InvalidCatalogue(f"task {GENERAL!r} cannot be removed: it takes what no other task takes")
        return Catalogue({k: v for k, v in self.tasks.items() if k != task_id})


def load_catalogue(path: Path | str | None = None) -> Catalogue:
    """Read a catalogue file, or the shipped one.

    A file with `extends: default` adds to the shipped tasks and replaces those of the same id; without it only the
    shipped `general` is kept, unless the file has its own.

    Raises:
        InvalidCatalogue: names the file, and the line and column or the task and field, of the first mistake.
    """
    if path is None:
        return _build(Catalogue({}), documents.read(DEFAULT))
    shipped = load_catalogue()
    document = documents.read(Path(path))
    base = shipped if document.extends == "default" else Catalogue({GENERAL: shipped.tasks[GENERAL]})
    return _build(base, document)


def parse_task(body: Mapping[str, Any], source: str = "request body") -> Task:
    """A task from a document, as registered at run time. It may come without examples: see `classify.MIN_EXAMPLES`.

    Raises:
        InvalidCatalogue: names source, task and field, and the value and the bound it broke.
    """
    return _task(documents.check_task(body, source))


def to_dict(task: Task) -> dict[str, Any]:
    """The document of a task, JSON-ready: `parse_task(to_dict(task)) == task`."""
    answer: dict[str, Any] = {"type": task.answer.type.value}
    if task.answer.labels:
        answer["labels"] = list(task.answer.labels)
    if task.answer.aliases:
        answer["aliases"] = {
            label: [spelling for spelling, of in task.answer.aliases if of == label]
            for label in dict.fromkeys(of for _, of in task.answer.aliases)
        }
    sampling = asdict(task.sampling)
    return {
        "id": task.id,
        "description": task.description,
        "examples": list(task.examples),
        "anchors": dict(task.anchors),
        "answer": answer,
        "sampling": {name: sampling[name] for name in documents.SamplingBody.model_fields},
        "thresholds": {k: v for k, v in asdict(task.thresholds).items() if v is not None},
        "rules": [_rule_dict(rule) for rule in task.rules],
    }


def _build(base: Catalogue, document: documents.CatalogueBody) -> Catalogue:
    for body in document.tasks:
        try:
            base = base.with_task(_task(body))
        except InvalidCatalogue as e:
            raise InvalidCatalogue(f"{document.source}: {e.message}", param=e.param) from e
    general = base.tasks[GENERAL]
    return Catalogue({**{k: v for k, v in base.tasks.items() if k != GENERAL}, GENERAL: general})


def _task(body: documents.TaskBody) -> Task:
    spec = body.answer
    aliases = tuple((s.lower(), label) for label, spellings in spec.aliases.items() for s in spellings)
    anchors = {"default": body.anchors["default"], **body.anchors}
    sampling = Sampling(**body.sampling.model_dump())
    if spec.type is AnswerType.FREE:
        sampling = replace(sampling, min_samples=1, max_samples=1, in_flight=1)
    return Task(
        id=body.id,
        description=body.description,
        examples=tuple(body.examples),
        anchors=anchors,
        answer=AnswerSpec(spec.type, tuple(spec.labels), aliases),
        sampling=sampling,
        thresholds=Thresholds(**body.thresholds.model_dump()),
        rules=tuple(_rule(rule) for rule in body.rules),
    )


def _rule(body: documents.RuleBody) -> Rule:
    when = []
    for name in body.when.model_fields_set:
        value = getattr(body.when, name)
        if isinstance(value, documents.Range):
            when.append(Condition(name, value.min, value.max))
        else:
            when.append(Condition(name, among=tuple(value)))
    changes = body.set.model_dump(exclude_unset=True, exclude={"anchor"})
    return Rule(tuple(sorted(when, key=lambda c: c.signal)), body.set.anchor, tuple(sorted(changes.items())))


def _rule_dict(rule: Rule) -> dict[str, Any]:
    when: dict[str, Any] = {}
    for c in rule.when:
        bounds = {"min": c.low, "max": c.high}
        when[c.signal] = list(c.among) if c.among else {k: v for k, v in bounds.items() if v is not None}
    anchor = {"anchor": rule.anchor} if rule.anchor else {}
    return {"when": when, "set": {**anchor, **dict(rule.changes)}}
