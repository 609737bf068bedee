"""Catalogue documents: reading YAML, checking every field, and saying precisely what is wrong."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from service.core.types import AnswerType, Sampling
from service.errors import InvalidCatalogue

_PLAIN = Sampling()

Samples = Annotated[int, Field(ge=1, le=64)]
Tokens = Annotated[int, Field(ge=1, le=8192)]
Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
Confidence = Annotated[float, Field(ge=0.5, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=8000, pattern=r"\S")]
Variant = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,47}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class AnswerBody(_Body):
    """Kind of answer; labels of a closed set, and other spellings per label."""

    type: Annotated[AnswerType, Field(strict=False)]
    labels: list[Annotated[str, StringConstraints(min_length=1, max_length=100)]] = Field([], max_length=64)
    aliases: dict[str, list[Annotated[str, StringConstraints(min_length=1, max_length=100)]]] = {}

    @model_validator(mode="after")
    def _closed_set(self) -> AnswerBody:
        if self.type is not AnswerType.LABEL:
            if self.labels or self.aliases:
                raise ValueError(f"labels and aliases are for type 'label', not {self.type.value!r}")
            return self
        if len(self.labels) < 2:
            raise ValueError(f"type 'label' needs at least 2 labels, got {len(self.labels)}")
        owner: dict[str, str] = {}
        if len({label.lower() for label in self.labels}) < len(self.labels):
            raise ValueError(f"a label stands twice in {self.labels}; case does not tell labels apart")
        for label, spelling in [(x, x) for x in self.labels] + [(x, s) for x, ss in self.aliases.items() for s in ss]:
            if label not in self.labels:
                raise ValueError(f"aliases name {label!r}, which is not among the labels {self.labels}")
            if owner.setdefault(spelling.lower(), label) != label:
                raise ValueError(f"{spelling!r} stands for both {owner[spelling.lower()]!r} and {label!r}")
        return self


class SamplingBody(_Body):
    """How samples are drawn: see `core.types.Sampling`."""

    min_samples: Samples = _PLAIN.min_samples
    max_samples: Samples = _PLAIN.max_samples
    in_flight: Samples = _PLAIN.in_flight
    temperature: Temperature = _PLAIN.temperature
    top_p: TopP = _PLAIN.top_p
    max_tokens: Tokens = _PLAIN.max_tokens
    confidence: Confidence = _PLAIN.confidence

    @model_validator(mode="after")
    def _ordered(self) -> SamplingBody:
        if self.min_samples > self.max_samples:
            raise ValueError(f"min_samples {self.min_samples} is above max_samples {self.max_samples}")
        return self


class ThresholdsBody(_Body):
    """Targets for monitoring: see `catalogue.Thresholds`."""

    accuracy: Share | None = None
    consensus: Share | None = None
    samples_per_answer: Annotated[float, Field(ge=1, le=64)] | None = None
    parse_failures: Share | None = None
    completion_tokens: Annotated[float, Field(ge=1, le=8192)] | None = None
    latency_p95_s: Annotated[float, Field(gt=0, le=3600)] | None = None


class Range(_Body):
    """Bounds, both inclusive, either may be left out."""

    min: Annotated[float, Field(ge=0)] | None = None
    max: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min is None and self.max is None:
            raise ValueError("needs min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class WhenBody(_Body):
    """Conditions on signals; all must hold. Words may be one or a list of which one must match."""

    characters: Range | None = None
    words: Range | None = None
    numbers: Range | None = None
    options: Range | None = None
    sentences: Range | None = None
    nature: Annotated[list[Literal["prose", "list", "table", "code", "json"]], BeforeValidator(_as_list)] = []
    outcome: Annotated[list[Literal["answer", "explanation"]], BeforeValidator(_as_list)] = []
    answer_type: Annotated[
        list[Literal["number", "choice", "boolean", "label", "text", "free"]], BeforeValidator(_as_list)
    ] = []

    @model_validator(mode="after")
    def _something(self) -> WhenBody:
        if not self.model_fields_set:
            raise ValueError("names no signal")
        for name in self.model_fields_set:
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        return self


class SetBody(_Body):
    """What a rule sets: the anchor variant and any field of `sampling`."""

    anchor: str = ""
    min_samples: Samples = _PLAIN.min_samples
    max_samples: Samples = _PLAIN.max_samples
    in_flight: Samples = _PLAIN.in_flight
    temperature: Temperature = _PLAIN.temperature
    top_p: TopP = _PLAIN.top_p
    max_tokens: Tokens = _PLAIN.max_tokens
    confidence: Confidence = _PLAIN.confidence

    @model_validator(mode="after")
    def _something(self) -> SetBody:
        if not self.model_fields_set:
            raise ValueError("sets nothing")
        return self


class RuleBody(_Body):
    """`when` these signals are seen, `set` these parameters."""

    when: WhenBody
    set: SetBody


class TaskBody(_Body):
    """A task as written in a catalogue file or sent to be registered."""

    id: Variant
    description: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    examples: list[Text] = Field([], max_length=2000)
    anchors: dict[Variant, Annotated[str, StringConstraints(max_length=2000)]] = Field(min_length=1, max_length=16)
    answer: AnswerBody
    sampling: SamplingBody = SamplingBody()
    thresholds: ThresholdsBody = ThresholdsBody()
    rules: list[RuleBody] = Field([], max_length=64)

    @model_validator(mode="after")
    def _consistent(self) -> TaskBody:
        if "default" not in self.anchors:
            raise ValueError(f"field anchors: the variant 'default' is missing; given: {', '.join(self.anchors)}")
        free = self.answer.type is AnswerType.FREE
        for name, text in self.anchors.items():
            if not free and not text.strip():
                raise ValueError(f"field anchors.{name}: is empty; only tasks with free answers may go without")
        if free and "max_samples" in self.sampling.model_fields_set and self.sampling.max_samples > 1:
            raise ValueError(
                f"field sampling.max_samples: {self.sampling.max_samples} is above the bound 1, "
                "for free text is never voted on"
            )
        for i, rule in enumerate(self.rules):
            self._check_rule(f"rules[{i}].set", rule.set, free)
        return self

    def _check_rule(self, where: str, change: SetBody, free: bool) -> None:
        given = change.model_fields_set
        if "anchor" in given and change.anchor not in self.anchors:
            known = ", ".join(self.anchors)
            raise ValueError(f"field {where}.anchor: there is no variant {change.anchor!r}; given: {known}")
        if free and (samples := given & {"min_samples", "max_samples", "in_flight"}):
            raise ValueError(f"field {where}.{min(samples)}: free text is never voted on, it takes one sample")
        if {"min_samples", "max_samples"} <= given and change.min_samples > change.max_samples:
            raise ValueError(
                f"field {where}.min_samples: {change.min_samples} is above max_samples {change.max_samples}"
            )


class CatalogueBody(BaseModel):
    """A checked catalogue file."""

    source: str
    extends: str | None
    tasks: list[TaskBody]


def read(path: Path) -> CatalogueBody:
    """Read and check a catalogue file.

    Raises:
        InvalidCatalogue: unreadable, not YAML, or a wrong field; names the place and the bound.
    """
    source = path.name
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as e:
        raise InvalidCatalogue(f"{path}: cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InvalidCatalogue(f"{source}: is not UTF-8: byte {e.object[e.start]:#04x} at offset {e.start}") from e
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown place"
        raise InvalidCatalogue(f"{source}: {place}: {e.problem or e.context}") from e
    except yaml.YAMLError as e:
        raise InvalidCatalogue(f"{source}: {e}") from e
    if not isinstance(document, dict):
        raise InvalidCatalogue(f"{source}: must be a mapping with the field tasks, got {_kind(document)}")
    return _check_catalogue(document, source)


def check_task(body: Any, source: str) -> TaskBody:
    """Check one task's document.

    Raises:
        InvalidCatalogue: names source, task and field, and the value and the bound it broke.
    """
    name = body.get("id") if isinstance(body, Mapping) else None
    place = f"{source}: task {name!r}" if isinstance(name, str) else f"{source}: task without id"
    if not isinstance(body, Mapping):
        raise InvalidCatalogue(f"{source}: a task must be a mapping, got {_kind(body)}")
    try:
        return TaskBody.model_validate(dict(body))
    except ValidationError as e:
        field, text = _describe(e)
        raise InvalidCatalogue(f"{place}: {text}", param=field or None) from e


def _check_catalogue(document: dict[str, Any], source: str) -> CatalogueBody:
    for key in document:
        if key not in ("extends", "tasks"):
            raise InvalidCatalogue(f"{source}: field {key}: unknown field; known fields: extends, tasks")
    extends, listed = document.get("extends"), document.get("tasks")
    if extends not in (None, "default"):
        raise InvalidCatalogue(f"{source}: field extends: {extends!r} is not 'default'")
    if not isinstance(listed, list):
        raise InvalidCatalogue(f"{source}: field tasks: must be a list, got {_kind(listed)}")
    tasks, places = [], {}
    for i, item in enumerate(listed):
        body = check_task(item, source)
        if body.id in places:
            raise InvalidCatalogue(
                f"{source}: task {body.id!r}: field id: stands twice, at tasks[{places[body.id]}] and tasks[{i}]"
            )
        if not body.examples:
            raise InvalidCatalogue(f"{source}: task {body.id!r}: field examples: has 0 items; at least 1 is needed")
        places[body.id] = i
        tasks.append(body)
    return CatalogueBody(source=source, extends=extends, tasks=tasks)


def _describe(e: ValidationError) -> tuple[str, str]:
    """Dotted path and description of the first mistake."""
    mistakes = e.errors()
    first = next((m for m in mistakes if m["type"] == "extra_forbidden"), mistakes[0])
    path = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"] if x != "[key]").lstrip(".")
    value, bound, kind = _short(first["input"]), first.get("ctx", {}), first["type"]
    match kind:
        case "missing":
            text = "is missing"
        case "extra_forbidden":
            text = f"unknown field; known fields: {', '.join(_known(first['loc']))}"
        case "greater_than_equal":
            text = f"{value} is below the bound {bound['ge']}"
        case "greater_than":
            text = f"{value} is not above the bound {bound['gt']}"
        case "less_than_equal":
            text = f"{value} is above the bound {bound['le']}"
        case "string_too_short" | "string_pattern_mismatch" if not str(first["input"]).strip():
            text = "is empty"
        case "string_too_long":
            text = f"has {len(first['input'])} characters, above the bound {bound['max_length']}"
        case "string_pattern_mismatch":
            text = f"{value} does not match {bound['pattern']}"
        case "string_type":
            text = f"{value} is not a text; put it in quotes"
        case "too_short" | "too_long":
            limit = bound.get("min_length", bound.get("max_length"))
            text = f"has {bound['actual_length']} items; the bound is {limit}"
        case "enum" | "literal_error":
            text = f"{value} is not one of {bound['expected']}"
        case "value_error":
            text = str(bound["error"])
        case _:
            text = f"{value}: {first['msg'][0].lower()}{first['msg'][1:]}"
    if named := re.match(r"field ([^:]+): ", text):  # a check over several fields names the one at fault itself
        return named[1], text
    return path, f"field {path}: {text}" if path else text


def _known(loc: tuple[int | str, ...]) -> list[str]:
    """Fields of the body that holds the field at `loc`."""
    model: Any = TaskBody
    inner: dict[str, Any] = {
        "answer": AnswerBody, "sampling": SamplingBody, "thresholds": ThresholdsBody, "rules": RuleBody,
        "when": WhenBody, "set": SetBody,
    }  # fmt: skip
    for step in loc[:-1]:
        model = inner.get(str(step), Range if model is WhenBody else model)
    return list(model.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    return {type(None): "nothing", dict: "a mapping", list: "a list", str: "a text"}.get(type(value), repr(value))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, refusing duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
