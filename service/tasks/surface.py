"""Surface features: what the form of a request says about its task, next to the meaning that the embedding carries.

They are of the English language, as the shipped catalogue is; texts in other languages have few of them and are judged
by their embedding.
"""

from __future__ import annotations

import re
from math import log1p

import numpy as np

from service.tasks.signals import Signals, clip, opening_word
from service.tasks.vocabulary import (
    FIRST_PERSON,
    FOREIGN,
    IMPERATIVES,
    LETTER_WORDS,
    OPINION,
    QUESTION_WORDS,
    REVIEWED,
    STATE_WORDS,
    WORD,
)

_SENTENCE_START = re.compile(r"(?:^|[.!?:]\s+|\n)\W*([^\W\d_]+(?:['’][a-z]+)?)")
_TO_ASSISTANT = re.compile(r"\W*(?:can|could|would|will|do|did|are|have) (?:you|u)\b")
_SPACED_MARK = re.compile(r"\w [.,!?;:](?: |$)")  # " ." as in tokenised corpora
_QUOTED = re.compile(r"[\"“][^\"”]+[\"”]")
_TOPIC = re.compile(
    r"\W*(?:(?:brief|short) )?(?:history|pros|cons|ideas?|tips|advice|differences?|steps|ways?|examples?|summary|"
    r"overview|meaning|recipes?|reasons|causes|origins?|tl;?dr|best (?:way|ways|time|place|places)|top \w+)\b"
)
_CLOSES_WITH = " \n\t\"')”"


def surface(text: str, seen: Signals) -> np.ndarray:
    """Features of a text, float32 `(40,)`, each of the order of 1; looks at as much of the text as the signals do."""
    text = clip(text)
    low = text.lower()
    words = WORD.findall(low)
    vocabulary = set(words)
    commanded = opening_word(low) in IMPERATIVES
    commands = commanded or any(w in IMPERATIVES for w in _SENTENCE_START.findall(low))
    topic = _TOPIC.match(low) is not None
    asked, asks = "?" in text, seen.answer_type
    statement = not (asked or commands or topic)
    questions = vocabulary & QUESTION_WORDS
    ends_asking = text.rstrip(_CLOSES_WITH).endswith("?")
    opens_asking = bool(words) and words[0] in QUESTION_WORDS
    opinions, reviewed = sum(w in OPINION for w in words), len(vocabulary & REVIEWED)
    wide, accented = _letters(text)
    features = (
        # size
        log1p(seen.words) / 3,
        log1p(seen.sentences),
        min(seen.numbers, 8) / 4,
        seen.numbers > 0,
        seen.numbers > 1,
        min(seen.options, 5) / 4,
        seen.options > 0,
        # what is asked for
        asks == "number",
        asks == "boolean",
        asks == "label",
        asks == "free",
        asks == "choice",
        seen.outcome == "explanation",
        # what it is made of
        seen.nature == "code",
        seen.nature == "json",
        seen.nature in ("list", "table"),
        _QUOTED.search(text) is not None,
        _SPACED_MARK.search(text) is not None,
        len(vocabulary & FOREIGN) > 1,
        wide > 0.2,
        accented > 0.008,
        # form of the sentence
        asked,
        ends_asking,
        (ends_asking or asks == "boolean") and not commands and questions <= {"when"},
        opens_asking,
        opens_asking and asks != "number" and seen.options == 0,
        commanded,
        commands,
        topic,
        statement,
        # who is spoken of
        not vocabulary.isdisjoint(FIRST_PERSON),
        _TO_ASSISTANT.match(low) is not None,
        "you" in vocabulary or "your" in vocabulary,
        # subject
        not vocabulary.isdisjoint(LETTER_WORDS),
        len(vocabulary & STATE_WORDS) > 1,
        min(opinions, 3) / 3 * statement,
        4 * opinions / (seen.words + 3),
        min(reviewed, 2) / 2 * statement,
        statement and not opinions and not reviewed,
        statement and text.rstrip()[-1:].isalnum(),
    )
    return np.array(features, dtype=np.float32)


def _letters(text: str) -> tuple[float, float]:
    """Shares of characters beyond the Latin alphabets, and of accented Latin letters."""
    if text.isascii():
        return 0.0, 0.0
    wide = sum(c > "\u02ff" and not "\u2000" <= c <= "\u20cf" for c in text)
    accented = sum("\u00bf" <= c <= "\u02ff" for c in text)
    return wide / len(text), accented / len(text)
