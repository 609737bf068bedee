"""Signals read off the text of a request."""

from __future__ import annotations

import pytest

from service.tasks.signals import HEAD, TAIL, Signals, clip, signals

SEEN = [
    ("", {"characters": 0, "words": 0, "numbers": 0, "options": 0, "sentences": 0, "nature": "prose"}),
    ("She has 1,200 nails, 3/4 of a board and two saws.", {"numbers": 3, "sentences": 1, "words": 11}),
    ("How many days are left? It is 3 May.", {"answer_type": "number", "sentences": 2}),
    ("Pick one.\n(A) salt (B) sand (C) silt", {"options": 3, "answer_type": "choice"}),
    ("Which?\n1. a pear\n2. a plum", {"options": 2, "nature": "list"}),
    ("Which?\nOptions:\n- a pear\n- a plum\n- a fig", {"options": 3, "answer_type": "choice"}),
    ("He ran 1.5 km and then 2.5 km.", {"options": 0}),
    ("Is salt soluble?", {"answer_type": "boolean", "outcome": "answer"}),
    ("Fact: salt is soluble. Does it dissolve?", {"answer_type": "boolean"}),
    ("Is it positive or negative? Nice soup.", {"answer_type": "label"}),
    ("Could you please write a poem?", {"answer_type": "free"}),
    ("Reverse the word lamp.", {"answer_type": "text"}),
    ("Why is it so? Explain step by step.", {"outcome": "explanation"}),
    ('{"a": [1, 2]}', {"nature": "json"}),
    ("def f(x):\n    return x", {"nature": "code"}),
    ("a,b,c\n1,2,3\n4,5,6", {"nature": "table"}),
]


@pytest.mark.parametrize(("text", "want"), SEEN, ids=[t[:24] for t, _ in SEEN])
def test_signals(text: str, want: dict[str, object]) -> None:
    seen = signals(text)
    assert {name: getattr(seen, name) for name in want} == want


def test_long_texts_are_clipped_but_measured_whole() -> None:
    text = "word " * 200_000
    seen = signals(text)
    assert seen.characters == 1_000_000
    assert seen.words <= (HEAD + TAIL) // 5 + 1
    assert clip(text)[:HEAD] == text[:HEAD]
    assert clip(text)[-TAIL:] == text[-TAIL:]
    assert clip("short") == "short"


@pytest.mark.parametrize(
    "text", ["?" * 10**6, "a." * 10**5, "(" * 10**6, "|" * 10**6, "😂" * 10**5, "\ud800", "1" * 10**6]
)
def test_any_text_will_do(text: str) -> None:
    assert isinstance(signals(text), Signals)
