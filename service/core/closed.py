"""Answers that are one of a few: options, yes or no, labels. Read as keys; an undecided text gives None."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import islice

from service.core.claims import CLAIM, claims, plain, sentences, text_key
from service.core.options import options
from service.core.types import AnswerSpec

DENIED = re.compile(r"\b(?:not|never|cannot|unknown)\b|n't\b", re.IGNORECASE)
_HEAD = 200  # characters in which a completion may open with its answer

# --- choice ----------------------------------------------------------------------------------------------------------

_LABEL = re.compile(
    r"(?:(?:it'?s|is|that|the|probably|clearly|definitely|likely|most|best|correct|right|answer|number) ){0,4}"
    r"(?P<named>(?:option|choice|letter|alternative)(?P<says> is)? ?:? ?)?"
    r"(?P<open>[(\[\"']?)(?P<label>[A-Za-z]|\d{1,2})(?!\w)(?P<close>[)\]\"']?)(?=(?P<after>[\s\W]?))",
    re.IGNORECASE,
)
_AND_ANOTHER = re.compile(
    r"[)\]\"']?\s?(?:,|/|&|\+|\band\b|\bor\b)\s?(?:(?:and|or)\s)?(?:option )?[(\[\"']?([A-Z])(?![A-Za-z'])"
)
_AFTER_LETTER = re.compile(r"\s+(?:is|was|because|since|as|would|seems)\b")
_NAMED = re.compile(r"[(\[]([A-Za-z]|\d)[)\]]|\b(?:[Oo]ption|[Cc]hoice) (?:is )?([A-Z]|\d)(?!\w)")
_LISTED = re.compile(r"^[\s*(\[-]{0,6}([A-Z]|\d{1,2})[)\].:]", re.MULTILINE)
_ANY_LABEL = {chr(c): "" for c in range(ord("A"), ord("K"))}


def choice(text: str, spec: AnswerSpec, question: str, finished: bool) -> str | None:
    """The label of the chosen option: one of the question's, or A to J if the question shows none."""
    valid = (options(question) if question else {}) or _ANY_LABEL
    for claim in claims(text, finished=finished):
        label = _label_in(plain(claim), valid)
        if label is not None:
            return label
    return _choice_in_prose(text, valid) if finished else None


def _label_in(claim: str, valid: dict[str, str]) -> str | None:
    m = _LABEL.match(claim)
    if m and m["label"].upper() in valid and _is_label(m, claim, valid):
        another = _AND_ANOTHER.match(claim, m.end("label"))
        return None if another and another[1] in valid else m["label"].upper()
    return None if DENIED.search(claim) else _option_named(claim, valid)


def _is_label(m: re.Match[str], claim: str, valid: dict[str, str]) -> bool:
    """Whether a lone letter or digit at the start of a claim is a label, not an article, a pronoun or a number."""
    label, after = m["label"], m["after"]
    if m["close"] in (")", "]") or not after:
        return True
    if after in ".,:;!/&=-" and not claim[m.end() + 1 : m.end() + 2].isdecimal():
        return m["named"] is not None or not label.islower()
    if not after.isspace():
        return False
    if (m["named"] and not (m["says"] and label.islower())) or text_key(claim[m.end() :]) == text_key(
        valid[label.upper()]
    ) != "":
        return True
    return label.isupper() and (label not in "AI" or _AFTER_LETTER.match(claim, m.end()) is not None)


def _option_named(claim: str, valid: dict[str, str]) -> str | None:
    """The one option whose text the claim is, or else contains as whole words."""
    key = text_key(claim)
    texts = {label: text_key(text) for label, text in valid.items() if text}
    equal = [label for label, text in texts.items() if text == key]
    if equal:
        return equal[0] if len(equal) == 1 else None
    padded, found = f" {key} ", []
    for label in sorted(texts, key=lambda label: -len(texts[label])):  # `department store` before `store`
        if texts[label] and f" {texts[label]} " in padded:
            found.append(label)
            padded = padded.replace(f" {texts[label]} ", " \n ")
    return found[0] if len(found) == 1 else None


def _choice_in_prose(text: str, valid: dict[str, str]) -> str | None:
    """Without a claim: a lone label, or the only option that the final sentence names. A list of options is none."""
    last = text.strip().rsplit("\n", 1)[-1][:CLAIM]
    listed = sum(m[1] in valid for m in _LISTED.finditer(text))
    if listed > 1 and _LISTED.match(last):
        return None
    line = plain(last)
    m = _LABEL.match(line)
    if m and m["label"].upper() in valid and (m["close"] or m["after"] in (".", ":", "")):
        return _label_in(line, valid)
    sentence = next(sentences(text), "")
    if DENIED.search(sentence):
        return None
    named = {(a or b).upper() for a, b in _NAMED.findall(sentence)} & valid.keys()
    if named:
        return named.pop() if len(named) == 1 else None
    return _option_named(plain(sentence), valid)


# --- boolean ---------------------------------------------------------------------------------------------------------

_OPENING = (
    r"\W{0,4}(?:(?:so|thus|therefore|hence|and|but|then|well|that|it'?s|it is|is|a|overall|in conclusion|definitely"
    r"|probably|likely|most|clearly|simply|the statement is|this is|that is),? ){0,5}"
)
_YES_NO = re.compile(
    rf"{_OPENING}[\"'*(]{{0,3}}(?:(?P<yes>yes)|no)(?![\w'-])(?P<end>[\"'*)]{{0,3}}"
    r"(?=$|[.,:;!\n]|\s[-–—(]|\s(?:because|since|as|it|they|he|she|we|you|the|this|that|there|i)\b))?",
    re.IGNORECASE,
)
_OR_NOT = re.compile(r"\W{0,3}(?:(?:or|and)\W{1,3}|/\W{0,3})(?:yes|no|true|false)\b", re.IGNORECASE)
_TRUE_FALSE = re.compile(rf"{_OPENING}(?P<not>not )?[\"'*]{{0,3}}(?P<word>true|false)(?!\w)", re.IGNORECASE)
_IS_TRUE = re.compile(
    r"\b(?:is|was|are|would be)(?P<not>n't| not)? (?:\w{1,20} )?(?P<word>true|false)(?![\w-])", re.IGNORECASE
)


def boolean(text: str, spec: AnswerSpec, question: str, finished: bool) -> str | None:
    """`yes` or `no`; true counts as yes, not true and false as no."""
    for claim in claims(text, finished=finished):
        key = polarity(plain(claim))
        if key is not None:
            return key
    return _polarity_in_prose(text, finished)


def polarity(claim: str) -> str | None:
    """`yes` or `no` if the claim opens with it. "No" needs an end: no doubt, no evidence and no one are not answers."""
    m = _YES_NO.match(claim)
    if m and (m["yes"] or m["end"] is not None):
        return None if _OR_NOT.match(claim, m.end()) else "yes" if m["yes"] else "no"
    m = _TRUE_FALSE.match(claim)
    return _truth(m) if m and not _OR_NOT.match(claim, m.end()) else None


def _truth(m: re.Match[str]) -> str:
    return "yes" if (m["word"].lower() == "true") != bool(m["not"]) else "no"


def _polarity_in_prose(text: str, finished: bool) -> str | None:
    """The final sentence if it opens with the answer, else the first word, else what the final sentence calls true."""
    last = next(sentences(text), "") if finished else ""
    for part in (last, text[:_HEAD]):
        key = polarity(plain(part))
        if key is not None:
            return key
    said = {_truth(m) for m in _IS_TRUE.finditer(last)}
    return said.pop() if len(said) == 1 and not last.rstrip().endswith("?") else None


# --- label -----------------------------------------------------------------------------------------------------------

_CONCESSION = re.compile(r"[,;(]|\b(?:but|although|though|despite|because|since|while|whereas|even)\b", re.IGNORECASE)
_DENIAL = (
    r"(?:\b(?:not|never|neither|nor|hardly|without|no|than|instead of|less|over)|n't)"
    r"(?: (?!and\b|or\b|but\b)\w{1,20}){0,2} "
)


def label(text: str, spec: AnswerSpec, question: str, finished: bool) -> str | None:
    """The label that the last claim, or else the last of three final sentences that speaks of labels, affirms."""
    pattern, names = _labels(spec)
    for claim in claims(text, finished=finished):
        found = _affirmed(plain(claim), pattern, names)
        if found:
            return found
    for sentence in islice(sentences(text), 3 if finished else 0):
        if pattern.search(sentence):
            return _affirmed(plain(sentence), pattern, names)
    return None


@lru_cache(maxsize=256)
def _labels(spec: AnswerSpec) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern for every spelling of every label as whole words, with a group for what denies it."""
    names = {alias.lower(): label for alias, label in spec.aliases} | {label.lower(): label for label in spec.labels}
    words = "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) or r"(?!)"
    return re.compile(rf"(?P<denied>{_DENIAL})?(?<![\w-])[\"'*]?(?P<word>{words})(?![\w-])", re.IGNORECASE), names


def _affirmed(claim: str, pattern: re.Pattern[str], names: dict[str, str]) -> str | None:
    """The one label that a statement affirms; its main clause comes first."""
    concession = _CONCESSION.search(claim)
    for part in (claim[: concession.start()], claim) if concession else (claim,):
        affirmed = {names[m["word"].lower()] for m in pattern.finditer(part) if not m["denied"]}
        if affirmed:
            return affirmed.pop() if len(affirmed) == 1 else None
    return None
