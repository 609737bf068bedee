"""What can be read off a request's text without a model: the metadata that planning rules and the classifier use."""

from __future__ import annotations

import re
from dataclasses import dataclass

from service.tasks.vocabulary import AUXILIARIES, EXPLAIN, FOREIGN, IMPERATIVES, NUMBER_WORDS, WORD

HEAD, TAIL = 4_000, 1_000  # characters looked at from either end of a long text

_NUMBER = re.compile(r"\d+(?:[.,/:]\d+)*")
_SENTENCE = re.compile(r"[^.!?。？！\n]{2,}(?:[.!?。？！]+(?=\s|$|[\"'”)])|[。？！\n]|$)")
_OPTION = re.compile(r"(?:^|(?<=[\s:?.;,]))[(\[]?([a-j]|\d)(?:[)\]](?=\s*\S)|[.:](?=\s+\S))")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", re.MULTILINE)
_OPTION_BULLETS = re.compile(r"\b(?:options|choices)\s*:\s*\n(?:\s*[-*•]\s+\S.*\n?){2,}")
_CODE = re.compile(
    r"```|^\s*(?:(?:def|class|import|from \w+ import|function|const|let|var|public|#include|select .+ from)\b"
    r"|(?:for|if) ?\()|[;{]\s*$|=>|\w\(\w*\)\s*[{;:]",
    re.MULTILINE,
)
_TABLE_ROW = re.compile(r"^(?:.*\|.*\|.*|[^,\n]+(?:,[^,\n]+){2,}|[^\t\n]+\t.*)$", re.MULTILINE)
_EXPLAIN = re.compile(r"step[- ]by[- ]step|in detail|show (?:your|the|all) (?:work|steps)")
_QUANTITY = re.compile(
    r"\bhow (?:many|much|old|far|long|tall|fast|heavy)\b|\b(?:calculate|compute)\b"
    r"|\bwhat do(?:es)? [^.?\n]{1,60} cost\b|\bwhat is [\d(]|\d ?% of |\d ?[-+*/×÷=] ?[\d(?]"
    r"|\bwhat (?:is|was|are|were|will be) (?:the|his|her|their|its) (?:\w+ ){0,2}"
    r"(?:sum|total|average|difference|product|area|price|cost|speed|profit|number|ratio|perimeter|percentage)\b"
)
_CLAUSE_START = re.compile(r"[.,:!?\n]\s*(?:question:\s*)?([a-z']+)\b[^.?\n]*\?\W*$")
_PICK = re.compile(r"\?|___|:\s*[(\[]?[a1][)\].:]|\b(?:pick|choose|select|which|correct|options?|choices)\b")
_YES_NO = re.compile(r"yes (?:or|/) ?no\b|true or false\b")
_LABEL = re.compile(r"sentiment\b|positive or negative\b|negative or positive\b|favou?rable\b")
_POLITE = re.compile(
    r"\W*(?:(?:please|pls|plz|kindly|now|then|ok|okay|hey|hi|(?:can|could|would|will) (?:you|u)|would you mind|"
    r"i(?:'d| would) like you to|i (?:want|need) you to|help me)\b[ ,]*)*"
)


@dataclass(frozen=True, slots=True)
class Signals:
    """Metadata of one request. Counts are of the clipped text (`clip`), except `characters`.

    Attributes:
        characters: length of the whole text.
        words: runs of non-space characters.
        numbers: numerals and number words.
        options: lettered or numbered options that follow each other (A B C ... or 1 2 3 ...), or bullets after
            "Options:"; 0 if fewer than two.
        sentences: sentences and non-empty lines.
        nature: what the text is made of: prose, list, table, code or json.
        outcome: explanation if the text asks for reasons, else answer.
        answer_type: kind of answer the text seems to ask for: number, choice, boolean, label, text or free (the
            task's own answer type decides how the answer is read).
    """

    characters: int
    words: int
    numbers: int
    options: int
    sentences: int
    nature: str
    outcome: str
    answer_type: str


def signals(text: str) -> Signals:
    """The metadata of a request's text; looks at HEAD + TAIL characters at most."""
    low = clip(text).lower()
    words = WORD.findall(low)
    options = _count_options(low)
    return Signals(
        characters=len(text),
        words=len(low.split()),
        numbers=len(_NUMBER.findall(low)) + sum(w in NUMBER_WORDS for w in words),
        options=options,
        sentences=len(_SENTENCE.findall(low)),
        nature=_nature(low),
        outcome="explanation" if not EXPLAIN.isdisjoint(words) or _EXPLAIN.search(low) else "answer",
        answer_type=_answer_type(low, words, options),
    )


def clip(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    """The text itself, or its first `head` and last `tail` characters: a question stands at one of the two ends."""
    return text if len(text) <= head + tail else f"{text[:head]}\n{text[-tail:]}"


def opening_word(low: str) -> str:
    """First word of a lower-cased text after words of politeness ("could you please ..."); empty if there is none."""
    polite = _POLITE.match(low)
    found = WORD.search(low, polite.end() if polite else 0)
    return found.group() if found else ""


def _count_options(low: str) -> int:
    """Length of the longest run of option marks in order, starting at a or 1."""
    longest = run = 0
    for mark in _OPTION.findall(low):
        if mark in "a1":
            run = 1
        elif run and mark in ("abcdefghij"[run : run + 1], "123456789"[run : run + 1]):
            run += 1
        longest = max(longest, run)
    if longest < 2 and (bullets := _OPTION_BULLETS.search(low)):
        longest = max(2, len(_BULLET.findall(bullets.group())))
    return longest if longest >= 2 else 0


def _nature(low: str) -> str:
    stripped = low.lstrip()
    if stripped[:1] in ("{", "[") and re.search(r"[\"\]]\s*[:,}\]]", stripped):
        return "json"
    if _CODE.search(low):
        return "code"
    if len(_TABLE_ROW.findall(low)) >= 3:
        return "table"
    return "list" if len(_BULLET.findall(low)) >= 2 else "prose"


def _answer_type(low: str, words: list[str], options: int) -> str:
    if _LABEL.search(low):
        return "label"
    asked = "?" in low
    if options and _PICK.search(low):
        return "choice"
    if opening_word(low) in IMPERATIVES:
        return "free"
    clause = _CLAUSE_START.search(low) if asked else None
    one_sentence = low.count(".") + low.count("\n") == 0
    if words and words[0] in AUXILIARIES and (asked or one_sentence) and len(FOREIGN & set(words)) < 2:
        return "boolean"
    if (clause and clause.group(1) in AUXILIARIES) or _YES_NO.search(low):
        return "boolean"
    return "number" if _QUANTITY.search(low) else "text"
