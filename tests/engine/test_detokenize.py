"""Text that grows token by token: whole characters, cut before stop strings."""

from __future__ import annotations

import pytest

from service.engine.detokenize import Text, stepper
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SAYING = "naïve 🥐 croissants, 三つ. The answer is 42.\n\nQ: next"


def grown(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Text]:
    text, pieces = Text(stepper(TOKENIZER), stop), []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish(TOKENIZER.decode(ids)))
    return pieces, text


def test_pieces_make_up_the_text_and_split_no_character():
    ids = TOKENIZER.encode(SAYING).ids
    pieces, text = grown(ids)
    assert "".join(pieces) == text.text == SAYING
    assert len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("cut", range(1, 20))
def test_an_unfinished_character_at_the_end_is_told_as_the_tokenizer_does(cut: int):
    ids = TOKENIZER.encode(SAYING).ids[:cut]
    pieces, text = grown(ids)
    assert "".join(pieces) == text.text == TOKENIZER.decode(ids)


@pytest.mark.parametrize("stop", [("\n\nQ:",), ("nothing", "\n\n"), ("Q", "\n\nQ")])
def test_the_text_ends_before_the_earliest_stop_string(stop: tuple[str, ...]):
    pieces, text = grown(TOKENIZER.encode(SAYING).ids, stop)
    first = min(SAYING.index(s) for s in stop if s in SAYING)
    assert text.stopped
    assert "".join(pieces) == text.text == SAYING[:first]


def test_what_only_looks_like_a_stop_string_is_told_in_the_end():
    pieces, text = grown(TOKENIZER.encode(SAYING).ids, ("next question",))
    assert not text.stopped
    assert "".join(pieces) == text.text == SAYING


def test_special_tokens_are_left_out():
    ids = TOKENIZER.encode("Done.<|im_end|>").ids
    text = Text(stepper(TOKENIZER))
    assert "".join(text.push(i) for i in ids) == "Done."
