"""Reads a completion's answer and gives it the canonical key that it votes with.

The last place that states an answer decides (`claims`); where none does, the final sentence counts only as far as it is
unambiguous. What cannot be read is None: an unparseable sample is counted, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from service.core.claims import EXAMINED, claims, plain, sentences, text_key
from service.core.closed import DENIED, boolean, choice, label, polarity
from service.core.numerals import canonical, numerals, spelled
from service.core.types import AnswerSpec, AnswerType

_MAX_TEXT = 100  # longest short-text answer, in characters
_MAX_EXPRESSION = 160


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer read from text.

    Attributes:
        key: canonical key; equal answers have equal keys.
        answer: the answer as the text writes it, for people.
        symbolic: a mathematical expression that plain rules could not normalise; `key` is then only its text without
            spaces, and a computer algebra system may find a better one (serve.symbolic).
    """

    key: str
    answer: str
    symbolic: str | None = None


def extract(text: str, spec: AnswerSpec, question: str = "", *, finished: bool = True) -> Reading | None:
    """The answer that a completion gives, None if it gives none or is ambiguous.

    Args:
        text: the completion; its last 8 KiB are examined.
        spec: what kind of answer to read.
        question: the request's text; a `choice` takes its options from there.
        finished: False if the completion was cut off by its length limit: then only a complete statement of the answer
            counts, not the last number of an unfinished derivation.

    Keys: number -> exact rational (`18`, `0.5`, `1/3`; units, currency and percent signs are dropped); choice -> the
    option's label in upper case; boolean -> `yes` or `no`; label -> canonical label; text -> case-folded without
    articles and punctuation, letters spelled out one by one joined. Free text has no answer.
    """
    reader = _READERS.get(spec.type)
    return reader(text[-EXAMINED:], spec, question, finished) if reader and text else None


def key_of(answer: str, spec: AnswerSpec, question: str = "") -> str | None:
    """Canonical key of a bare answer such as a gold string, None if it is no answer of this type."""
    reading = extract(answer, spec, question)
    if reading is None and spec.type is AnswerType.TEXT:
        return text_key(plain(answer[:EXAMINED])) or None
    return reading.key if reading else None


def same(a: str, gold: str, spec: AnswerSpec, question: str = "") -> bool:
    """Whether two bare answers are the same by their canonical keys; False if one of them cannot be read.

    Expressions are compared as written: algebra is not for here (serve.symbolic).
    """
    key = key_of(a, spec, question)
    return key is not None and key == key_of(gold, spec, question)


# --- number ----------------------------------------------------------------------------------------------------------

_ASIDE = re.compile(
    r"(?<=\S) \((?!\))|;|, (?:because|since|as|which|so|with|where|not|but|after|assuming|rounded)\b"
    r"|\b(?:because|since|rounded)\b",
    re.IGNORECASE,
)
_SEVERAL = re.compile(r"\b(?:or|and)\b|, ", re.IGNORECASE)
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])(?<![^A-Za-z][xyzn])(?<!^[xyzn]) ?\^\(?-?\d+\)?")
_EXPRESSION = re.compile(
    r"√|π|∞|\\|\b(?:sqrt|pi)\b|[\d)]\s?\^|\d ?[+*×] ?[\d(]|(?<![a-z'])[xyzn](?![a-z'\d])(?! \d)|\d\(|\)\(",
    re.IGNORECASE,
)
_MATH_TEXT = re.compile(r"[\w\s^{}()\[\]+\-*×/.,√π!\\|°]+")
_LATIN = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MATH_WORDS = frozenset("sqrt pi log ln sin cos tan exp".split())  # noqa: SIM905
_COURTESY = re.compile(r"\b(?:hope|let me know|feel free|thank|help)", re.IGNORECASE)


def _number(text: str, spec: AnswerSpec, question: str, finished: bool) -> Reading | None:
    for claim in claims(text, finished=finished):
        reading = _number_in(plain(claim))
        if reading is not None:
            return reading
    for sentence in islice(sentences(text), 2 if finished else 0):
        if not _COURTESY.search(sentence):
            return None if sentence.rstrip().endswith("?") else _number_in(plain(sentence), prose=True)
    return None


def _number_in(claim: str, *, prose: bool = False) -> Reading | None:
    """The one number of a claim: the result of its equation, or its only number. None if there are several."""
    aside = _ASIDE.search(claim)
    if aside and aside.start() > 0:
        claim = claim[: aside.start()]
    if "=" in claim:
        before, _, claim = claim.rpartition("=")
        if "=" in before and _SEVERAL.search(before):
            return None
        claim = re.sub(r"^\s*-\s+", "-", claim).strip()
    if "^" in claim:
        claim = _UNIT_POWER.sub("", claim)
    found = list(islice(numerals(claim), 2))
    if len(found) != 1 or _EXPRESSION.search(f"{claim[: found[0].start]}0{claim[found[0].stop :]}"):
        expression = None if prose else _expression(claim)
        if expression or found or (prose and len(claim.split()) > 4):
            return expression
        found = list(islice(spelled(claim), 2))
    if len(found) != 1 or found[0].value is None or DENIED.search(claim, 0, found[0].start):
        return None
    return Reading(canonical(found[0].value), claim[found[0].start : found[0].stop].strip())


def _expression(claim: str) -> Reading | None:
    """A claim that is a mathematical expression, to be normalised by algebra; a unit at its end is dropped."""
    claim = claim.replace("$", "").strip()
    if len(claim) > _MAX_EXPRESSION or not _EXPRESSION.search(claim) or not _MATH_TEXT.fullmatch(claim):
        return None
    claim = re.sub(r"(?<=[\w)}]) +(?!pi$)[A-Za-z]{2,}$", "", claim)
    if any(word.lower() not in _MATH_WORDS for word in _LATIN.findall(claim)):
        return None
    if not any(c.isdecimal() or c in "xyzπ√\\" for c in claim):
        return None
    return Reading(re.sub(r"[\s\\]", "", claim), claim, claim)


# --- text ------------------------------------------------------------------------------------------------------------

_QUOTED = re.compile(r"[\"“”]([^\"“”\n]{1,100})[\"“”]|\*\*([^*\n]{1,100})\*\*")
_REASON = re.compile(r",? (?:because|since|as (?:it|the|they)|which)\b| \((?!\))", re.IGNORECASE)


def _text(text: str, spec: AnswerSpec, question: str, finished: bool) -> Reading | None:
    for claim in claims(text, finished=finished):
        reading = _text_in(claim)
        if reading is not None:
            return reading
    if not finished:
        return None
    if "\n" not in text.strip() and len(text.split()) <= 5:
        return _text_in(text)
    last = next(sentences(text), "")
    quoted = {text_key(a or b): (a or b) for a, b in _QUOTED.findall(last)}
    if len(quoted) == 1:
        return _text_in(*quoted.values())
    if "=" in last:
        return _text_in(last)
    key = boolean(text, spec, question, finished)
    return Reading(key, key) if key else None


def _text_in(claim: str) -> Reading | None:
    quoted = _QUOTED.findall(claim)
    shown = plain((quoted[0][0] or quoted[0][1]) if len(quoted) == 1 else claim)
    reason = _REASON.search(shown)
    if reason and reason.start() > 0:
        shown = shown[: reason.start()].rstrip(" ,.;:")
    if "=" in shown:
        shown = plain(shown.rpartition("=")[2])
    key = polarity(shown)
    if key:
        return Reading(key, key)
    if "\\" in shown or "√" in shown or "π" in shown:
        return _expression(shown)
    key = text_key(shown) if len(shown) <= _MAX_TEXT else ""
    return Reading(key, shown) if key else None


def _by_key(read: Callable[[str, AnswerSpec, str, bool], str | None]) -> Callable[..., Reading | None]:
    """A reader of keys as a reader of answers: a closed answer is shown as its key."""

    def reading(text: str, spec: AnswerSpec, question: str, finished: bool) -> Reading | None:
        key = read(text, spec, question, finished)
        return None if key is None else Reading(key, key)

    return reading


_READERS: dict[AnswerType, Callable[[str, AnswerSpec, str, bool], Reading | None]] = {
    AnswerType.NUMBER: _number,
    AnswerType.CHOICE: _by_key(choice),
    AnswerType.BOOLEAN: _by_key(boolean),
    AnswerType.LABEL: _by_key(label),
    AnswerType.TEXT: _text,
}
