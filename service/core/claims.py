"""Where a completion says its answer, and how to read that place without its markup.

Every pattern here is bounded and is tried from a literal cue, so that the time is linear in the text examined.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from service.core.numerals import canonical, numerals

EXAMINED = 8192  # characters at the end of a completion that are looked at
CLAIM = 300  # longest claim, in characters
_MAX_CLAIMS = 8
_SENTENCES = 1000  # characters at the end that count as final sentences

_CUES = ("answer", "boxed{", "####")
_ANSWER = re.compile(
    r"(?<!\w)answers?(?!\w)(?:[^\n.?!:=>]{0,80}?(?:\b(?:is|are|was|be|equals)\b[ ]{0,3}[:=]?|[:=>])|[ *_]{0,4}\n)",
    re.IGNORECASE,
)
_LEAD = re.compile(r"(?:[\s*_`:]|\$\$|\\[\[(](?!\\)){0,60}")
_END = re.compile(r"\n|</|(?<!\b[A-Z])[.!?](?=[\s*_\"'”’)\]$\\]|$)|[.!?]$")
_SPLIT = re.compile(r"(?<=[.!?])[\s*_)\"'”]+|\n+")
_LIST_MARK = re.compile(
    r"^[ \t#>*-]{0,8}(?:step[ ]?)?(?:\d{1,2}[.):](?=[ \t])|[•-][ \t])", re.IGNORECASE | re.MULTILINE
)

_NUMBER_STARTS = frozenset("0123456789-$.€£")
_PADDED = re.compile(r"0\d")
_WORD = re.compile(r"\d+(?:[.,:/-]\d+)*|[^\W_]+(?:'[^\W_]+)?")
_ARTICLES = frozenset(("a", "an", "the"))

_CHARACTERS = str.maketrans(
    {"−": "-", "‐": "-", "‑": "-", "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\u00a0": " ", "\u202f": " "}
    | {"\u2009": " ", "⁄": "/", "∕": "/", "％": "%", "＄": "$", "≈": "=", "→": "=", "⋅": "*", "·": "*"}
    | {"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅛": " 1/8", "⅜": " 3/8", "⅝": " 5/8"}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]{1,9}")
_STYLED = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|mathit|operatorname|boxed|textrm)\s?\{([^{}]*)\}")
_FRACTION = re.compile(
    r"(?P<whole>\d\s?)?\\[dtc]?frac\s?(?:\{\s?(?P<n>\d{1,99})\s?\}\s?\{\s?(?P<d>\d{1,99})\s?\}|(?P<a>\d)(?P<b>\d))"
)
_SPACING = re.compile(r"\\(?:left|right|quad|qquad|displaystyle)(?![a-z])|\\[,;!: ()\[\]]|~")
_MATH_MODE = re.compile(r"(?<!\\)\$")  # next to LaTeX, a bare dollar sign is no currency
_DEGREES = re.compile(r"\^\s?\{?\\circ\}?")


def claims(text: str, *, finished: bool = True) -> Iterator[str]:
    """What follows "the answer is", "Answer:", "####" or stands in a box, last claim first, markup included.

    Args:
        text: a completion; at most EXAMINED characters are of use.
        finished: False for a completion cut off by its length limit, whose very last claim may lack its end.
    """
    low = lower(text)
    end = len(text)
    for _ in range(_MAX_CLAIMS):
        at = max([low.rfind(cue, 0, end) for cue in _CUES])
        if at < 0:
            return
        claim = _boxed(text, at) if low[at] == "b" else _stated(text, at, finished)
        if claim:
            yield claim
        end = at


def lower(text: str) -> str:
    """Lower case of the same length (one Unicode letter, the dotted capital I, would grow)."""
    low = text.lower()
    return low if len(low) == len(text) else text.replace("İ", "I").lower()


def sentences(text: str) -> Iterator[str]:
    """The final sentences and lines, last first, without list marks. Empty ones are left out."""
    parts = _SPLIT.split(text[-_SENTENCES:])
    if len(text) > _SENTENCES and len(parts) > 1:
        del parts[0]  # it starts in the middle
    for part in reversed(parts):
        mark = _LIST_MARK.match(part)
        stripped = part[mark.end() if mark else 0 :]
        if stripped and not stripped.isspace():
            yield stripped


def plain(claim: str) -> str:
    """A claim without emphasis, quotes around it, LaTeX wrappers and closing punctuation; one kind of each sign."""
    if not claim.isascii():
        claim = _SUPERSCRIPT.sub(lambda m: "^" + m[0].translate(_SUPERSCRIPTS), claim.translate(_CHARACTERS))
    if "\\" in claim or "{" in claim:
        claim = _without_latex(claim)
    if "*" in claim or "`" in claim:
        claim = claim.replace("**", "").replace("`", "")
    return claim.lstrip(" \t\n*_\"',;:").rstrip(" \t\n*_\"',;:.!?\\")


def text_key(text: str) -> str:
    """Canonical key of a short text: a number's one spelling, else case-folded words without articles.

    Letters spelled out one by one (`y a j o`, `Y-A-J-O`) are joined.
    """
    if text[:1] in _NUMBER_STARTS and not _PADDED.match(text):
        first = next(numerals(text), None)
        if first and (first.start, first.stop) == (0, len(text)) and first.value is not None:
            return canonical(first.value)
    words = _WORD.findall(text.casefold())
    if len(words) > 1 and all(len(w) == 1 and w.isalpha() for w in words):
        return "".join(words)
    return " ".join([w for w in words if w not in _ARTICLES] or words)


def _boxed(text: str, at: int) -> str | None:
    """The content of the box whose cue starts at `at`, None if its braces do not close."""
    depth, start = 0, at + len("boxed")
    for i in range(start, min(len(text), start + CLAIM)):
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : i]
    return None


def _stated(text: str, at: int, finished: bool) -> str | None:
    """The statement after the cue at `at`: up to the end of its sentence or line."""
    if text[at] == "#":
        start = at + 4
    else:
        cue = _ANSWER.match(text, at)
        if cue is None:
            return None
        start = cue.end()
    start = _lead_end(text, start)
    end = _END.search(text, start, start + CLAIM)
    if end is None and not finished and start + CLAIM >= len(text):
        return None
    return text[start : end.start() if end else start + CLAIM]


def _lead_end(text: str, start: int) -> int:
    lead = _LEAD.match(text, start)
    return lead.end() if lead else start


def _slashed(m: re.Match[str]) -> str:
    whole = f"{m['whole'].strip()} " if m["whole"] else ""
    return f"{whole}{m['n'] or m['a']}/{m['d'] or m['b']}"


def _without_latex(claim: str) -> str:
    claim = _MATH_MODE.sub("", claim)
    for _ in range(2):  # \textbf{\text{...}}
        claim = _STYLED.sub(r" \1 ", claim)
    claim = _FRACTION.sub(_slashed, claim)
    claim = _DEGREES.sub("°", claim.replace("{,}", ","))
    claim = _SPACING.sub(" ", claim.replace("\\$", "$").replace("\\%", "%").replace("\\!", ""))
    claim = claim.replace("\\times", "×").replace("\\cdot", "*").replace("\\approx", "=")
    return claim.replace("^{", "^").replace("}", "") if "\\" not in claim and "{" in claim else claim
