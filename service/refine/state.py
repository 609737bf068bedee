"""Where a task's refinement stands: what one round leaves for the next, as bytes for the store."""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import orjson

from service.core import gate
from service.errors import InvalidArtifact
from service.store.rounds import Round


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A challenger on its way: on trial before the gate, or already in traffic.

    Attributes:
        offset: float32 `(k, d)`, on the anchor of the champion it is measured against.
        parent: that champion's version.
        refiner, report: what made it, and its figures.
        evidence: the gate's state.
        canaries, held_out: items of each kind asked so far; they number the seeds, and no item is asked twice.
        version: 0 on trial, else as published.
        seen: outcomes of the challenger arm when its share was last raised.
        cost: samples, tokens and seconds spent on judging it.
    """

    offset: np.ndarray
    parent: int
    refiner: str
    report: dict[str, Any]
    evidence: gate.State
    canaries: int = 0
    held_out: int = 0
    version: int = 0
    seen: int = 0
    cost: dict[str, float] = field(default_factory=lambda: {"samples": 0, "tokens": 0, "seconds": 0.0})


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """A task's refinement so far.

    Attributes:
        rounds: rounds run.
        challengers: challengers ever put before the gate; the next one's number, and with it its alpha, follows.
        outcomes: outcomes the monitor had seen at the last round.
        finished: Unix time of the last round's end, in seconds.
        ladder: difficulty of the canaries (see `tasks.canaries`), JSON values.
        candidate: the challenger under way, if any.
        last: the last round's result and reason, for the API.
    """

    rounds: int = 0
    challengers: int = 0
    outcomes: int = 0
    finished: float = 0.0
    ladder: dict[str, Any] = field(default_factory=dict)
    candidate: Candidate | None = None
    last: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Progress:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_round(self) -> Round:
        """For the store."""
        body = {name: getattr(self, name) for name in _PLAIN}
        body["candidate"] = None if self.candidate is None else _encode(self.candidate)
        return Round(cursor=str(self.outcomes), gate=orjson.dumps(body))

    @classmethod
    def of(cls, kept: Round) -> Progress:
        """From the store. What another version of the service wrote and this one cannot read is begun anew, but for
        the number of challengers: alpha that was spent stays spent."""
        if not kept.gate:
            return cls()
        body = orjson.loads(kept.gate)
        plain = {name: body[name] for name in _PLAIN if name in body}
        try:
            return cls(**plain, candidate=None if body["candidate"] is None else _decode(body["candidate"]))
        except (KeyError, TypeError, ValueError, InvalidArtifact):
            return cls(**plain)


_PLAIN = ("rounds", "challengers", "outcomes", "finished", "ladder", "last")
_CANDIDATE = ("parent", "refiner", "report", "canaries", "held_out", "version", "seen", "cost")


def _encode(candidate: Candidate) -> dict[str, Any]:
    raw = np.ascontiguousarray(candidate.offset, "<f4").tobytes()
    return {name: getattr(candidate, name) for name in _CANDIDATE} | {
        "offset": base64.b64encode(raw).decode(),
        "shape": list(candidate.offset.shape),
        "evidence": candidate.evidence.to_dict(),
    }


def _decode(body: dict[str, Any]) -> Candidate:
    offset = np.frombuffer(base64.b64decode(body["offset"]), "<f4").astype(np.float32).reshape(body["shape"])
    plain = {name: body[name] for name in _CANDIDATE}
    return Candidate(offset=offset, evidence=gate.State.from_dict(body["evidence"]), **plain)


def figures(candidate: Candidate) -> dict[str, Any]:
    """A candidate for people and metrics: the gate's e-values and counts, and what it cost."""
    seen = gate.verdict(candidate.evidence)
    return {
        "parent": candidate.parent,
        "version": candidate.version,
        "refiner": candidate.refiner,
        "e_value": seen.e_value,
        "threshold": seen.threshold,
        "e_values": seen.e_values,
        "counts": asdict(seen.counts),
        "reason": seen.reason,
        "cost": dict(candidate.cost),
    }
