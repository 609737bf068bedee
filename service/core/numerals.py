"""Numbers as people and models write them, as exact rationals with one spelling each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_MAX_DIGITS = 200  # of a number; also the largest power of ten
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "k": 3}

_BLOB = r"(?:\d+(?:[.,']\d+|[ ]\d{3}(?!\d))*|\.\d+)"
_DIGIT = re.compile(r"\d")
_PREFIX = 20  # longest sign with currency before a number's first digit
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)])[-]|\b(?:minus|negative)[ ])?
    (?:(?:(?<![A-Za-z])(?:USD|EUR|GBP|INR|Rs\.?|(?:US|A|C)?[$€£¥₹])[ ]?(?P<inner>-)?)|(?<![A-Za-z_^\d.]))
    (?:(?P<whole>\d{{1,99}})[ ]{{1,2}}(?P<num>\d{{1,99}})/(?P<den>\d{{1,99}})(?![\d.,]*\d)
      |(?P<blob>{_BLOB})(?:[ ]?/[ ]?(?P<over>{_BLOB}))?)
    (?:[eE](?P<e>[-+]?\d+)|[ ]?[*x×][ ]?10[ ]?\^[ ]?[{{(]?(?P<power>-?\d+)[)}}]?)?
    (?P<scale>k\b|[ ](?:thousand|million|billion|trillion)\b)?
    (?P<unit>[ ]?%)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
# How digits may be grouped: (pattern, decimal mark). 1,234.5 / 1,00,000 / 1 234,5 / 1.234,5 / 12,5 and 0,125
_GROUPED = tuple(
    (re.compile(pattern), mark)
    for pattern, mark in (
        (r"\d*\.\d+", "."),
        (r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", "."),
        (r"[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?", "."),
        (r"[1-9]\d{0,2}(?:[ ']\d{3})+(?:\.\d+)?", "."),
        (r"[1-9]\d{0,2}(?:[ ']\d{3})+,\d+", ","),
        (r"[1-9]\d{0,2}(?:\.\d{3})+,\d+", ","),
        (r"[1-9]\d{0,2}(?:\.\d{3}){2,}", ","),
        (r"\d+,\d{1,2}|0,\d+", ","),
    )
)
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sept?|Oct|Nov|Dec)[a-z]{0,6}"
_DATE = re.compile(rf"\b{_MONTH}\.?[ ]\d|\d(?:st|nd|rd|th)?[ ](?:of[ ])?{_MONTH}\b")

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {w: i for i, w in enumerate(_UNITS.split())} | {w: 20 + 10 * i for i, w in enumerate(_TENS.split())}
_BIG = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fifth": 5, "fifths": 5}
_WORD = "|".join([*_SMALL, *_BIG, "hundred", "half"])
_WORDS = re.compile(
    rf"\b(?:(?P<sign>minus|negative) )?"
    rf"(?P<words>(?:{_WORD})(?:(?:[ -]| and (?:an? )?)(?:{_WORD}|{'|'.join(_PARTS)})){{0,30}})\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number found in text: its exact value (None when it cannot be told), and where it stands, `[start, stop)`."""

    value: Fraction | None
    start: int
    stop: int


def numerals(text: str) -> Iterator[Numeral]:
    """The numbers written in digits, left to right, with sign, currency and percent sign in their span.

    A value is None where digits are grouped in no known way (`1,2345`), the number has more than 200 digits or an
    exponent beyond 200, divides by zero, or is a date with its month's name.
    """
    stop = 0
    while digit := _DIGIT.search(text, stop):  # most of a text is none: the large pattern is only tried around digits
        m = _NUMBER.search(text, max(stop, digit.start() - _PREFIX))
        if m is None:
            return
        start, stop = m.span()
        dated = any(a < stop and start < b for a, b in (d.span() for d in _DATE.finditer(text)))
        yield Numeral(None if dated else _value(m), start, stop)


def spelled(text: str) -> Iterator[Numeral]:
    """The numbers written in words: twelve, forty-two, one hundred and five, two and a half, three quarters."""
    for m in _WORDS.finditer(text):
        yield Numeral(_of_words(m["words"].lower(), -1 if m["sign"] else 1), *m.span())


def canonical(value: Fraction) -> str:
    """The one spelling of a rational: an integer, a finite decimal (0.5), or a reduced fraction (1/3)."""
    top, bottom = value.numerator, value.denominator
    if bottom == 1:
        return str(top)
    twos = (bottom & -bottom).bit_length() - 1
    rest, fives = bottom >> twos, 0
    while rest % 5 == 0:
        rest //= 5
        fives += 1
    if rest != 1:
        return f"{top}/{bottom}"
    places = max(twos, fives)
    digits = str(abs(top) * 10**places // bottom).zfill(places + 1)
    return f"{'-' if top < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _value(m: re.Match[str]) -> Fraction | None:
    if m["blob"] is None:
        value = _ratio(Fraction(int(m["num"])), Fraction(int(m["den"])))
        value = None if value is None else value + int(m["whole"])
    else:
        value = _decimal(m["blob"])
        if value is not None and m["over"] is not None:
            value = _ratio(value, _decimal(m["over"]))
    if value is None:
        return None
    exponent = m["e"] or m["power"]
    if exponent or m["scale"]:
        if len(exponent or "") > 5:
            return None
        shift = int(exponent or 0) + (_SCALES[m["scale"].strip().lower()] if m["scale"] else 0)
        if abs(shift) > _MAX_DIGITS:
            return None
        value *= Fraction(10) ** shift
    return -value if m["sign"] or m["inner"] else value


def _ratio(top: Fraction, bottom: Fraction | None) -> Fraction | None:
    return top / bottom if bottom else None


def _decimal(blob: str) -> Fraction | None:
    if len(blob) > _MAX_DIGITS:
        return None
    if blob.isdecimal():
        return Fraction(int(blob))
    for pattern, mark in _GROUPED:
        if pattern.fullmatch(blob):
            whole, _, part = blob.rpartition(mark) if mark in blob else (blob, "", "")
            digits = "".join(c for c in whole if c.isdecimal())
            return Fraction(int(digits + part or "0"), 10 ** len(part))
    return None


def _of_words(text: str, sign: int) -> Fraction | None:
    """Value of number words; None for sequences that are not one number (`two three`)."""
    words = text.replace("-", " ").split()
    total = current = Fraction(0)
    room = 100  # the next unit or ten must be smaller than this
    for i, word in enumerate(words):
        if word in ("and", "a", "an"):
            continue
        if word in _PARTS:
            joined = i == 0 or words[i - 1] in ("a", "an", "and")
            if i + 1 < len(words) or not (joined or (room == 0 and not total)):
                return None
            current = current + Fraction(1, _PARTS[word]) if joined else current / _PARTS[word]
        elif word == "hundred":
            if current >= 10:
                return None
            current, room = (current or Fraction(1)) * 100, 100
        elif word in _BIG:
            if total and _BIG[word] >= total:
                return None
            total, current, room = total + (current or 1) * _BIG[word], Fraction(0), 100
        else:
            value = _SMALL[word]
            if value >= room:
                return None
            current, room = current + value, 10 if value >= 20 else 0
    return sign * (total + current)
