"""The options of a multiple-choice question, read from its text."""

from __future__ import annotations

import re
from functools import lru_cache

_EXAMINED = 8192
_MARK = re.compile(r"(?:(?<=\s)|(?<=[:;,.?])|^)([(\[]?)([A-Za-z]|\d{1,2})([)\].:])(?=\s|\S)", re.MULTILINE)
_BULLETS = re.compile(r"\b(?:options|choices)\s*:[ \t]*\n((?:\s*[-*•][ \t]+\S[^\n]*(?:\n|$))+)", re.IGNORECASE)
_BULLET = re.compile(r"[-*•][ \t]+([^\n]+)")

Mark = re.Match[str]


def options(question: str) -> dict[str, str]:
    """Label -> text of the options, in order; empty if fewer than two are found.

    Read are runs `A B C ...` or `1 2 3 ...` of one style, as in `(A) foo (B) bar`, `a) foo b) bar`, `A. foo` a line;
    the last run counts. Bullets after "Options:" get the labels A, B, C. Letter labels are upper case.
    """
    return _options(question[-_EXAMINED:])


@lru_cache(maxsize=512)
def _options(question: str) -> dict[str, str]:
    run = _last_run(question)
    if len(run) < 2:
        bullets = _BULLETS.findall(question)
        texts = _BULLET.findall(bullets[-1]) if bullets else []
        return {chr(65 + i): text.strip() for i, text in enumerate(texts[:26])} if len(texts) > 1 else {}
    ends = [m.start() for m in run[1:]] + [len(question)]
    return {m[2].upper(): _text(question[m.end() : end]) for m, end in zip(run, ends, strict=True)}


def _last_run(question: str) -> list[Mark]:
    """The last maximal run of consecutive labels in one style that has at least two of them."""
    best: list[Mark] = []
    open_runs: dict[tuple[str, str, str], list[Mark]] = {}
    for mark in _MARK.finditer(question):
        style = (mark[1], mark[3], "digit" if mark[2].isdecimal() else "upper" if mark[2].isupper() else "lower")
        run = open_runs.get(style, [])
        if mark[2] in ("A", "a", "1"):
            open_runs[style] = run = [mark]
        elif run and mark[2] == _next(run[-1][2]):
            run.append(mark)
        else:
            continue
        if len(run) >= 2 and (run is not best) and run[-1].start() > (best[-1].start() if best else -1):
            best = run
    return best


def _next(label: str) -> str:
    return str(int(label) + 1) if label.isdecimal() else chr(ord(label) + 1)


def _text(raw: str) -> str:
    """An option's text: its first line, without what separates it from the next option."""
    stripped = raw.strip()
    return stripped.split("\n", 1)[0].strip(" \t,;|") if stripped else ""
