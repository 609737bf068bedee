from __future__ import annotations

import numpy as np

from service.core.gate import CanaryPair, HeldoutPair
from service.core.types import AnswerSpec, AnswerType, Sampling
from service.engine.scripted import Cue, ScriptedEngine
from service.refine.evaluate import Item, Side, Spent, compare

PLAN = Sampling(min_samples=3, max_samples=8, in_flight=4)
SPEC = AnswerSpec(AnswerType.NUMBER)
ANCHOR = "End with: The answer is N."


def items(count: int, canary: bool = True) -> list[Item]:
    return [
        Item(({"role": "user", "content": f"How much is {i} + 0?"},), f"{i} + 0", str(i), canary) for i in range(count)
    ]


def right_with_an_offset(cue: Cue) -> str:
    """Says the number asked for under an offset, and something else every time under none."""
    asked = cue.text.split("How much is ")[1].split(" ")[0]
    return f"The answer is {asked if cue.soft else 1000 + cue.index}."


async def run(script, given, **options):
    engine, spent = ScriptedEngine(script), Spent()
    k = len(engine.chat.encode(ANCHOR))
    soft = np.ones((k, engine.model.hidden_size), np.float32)
    sides = Side(ANCHOR), Side(ANCHOR, soft)
    found = [x async for x in compare(engine, engine.chat, given, *sides, PLAN, SPEC, seed=1, spent=spent, **options)]
    await engine.aclose()
    return found, spent


async def test_pairs_tell_right_from_wrong_and_count_samples():
    found, spent = await run(right_with_an_offset, items(6))
    assert [item.key for item, *_ in found] == [str(i) for i in range(6)]
    for _, pair, champion, challenger in found:
        assert isinstance(pair, CanaryPair)
        assert (pair.challenger, pair.champion) == (1, 0)
        assert (pair.challenger_samples, pair.champion_samples, pair.max_samples) == (4, 8, 8)
        assert champion.key != challenger.key
    assert spent.samples >= 6 * 12
    assert spent.tokens > spent.samples


async def test_held_out_prompts_give_pairs_without_samples():
    found, _ = await run(right_with_an_offset, items(2, canary=False))
    assert all(pair == HeldoutPair(True, False) for _, pair, *_ in found)


async def test_the_same_seed_gives_the_same_pairs_however_many_run_abreast():
    def noisy(cue: Cue) -> str:
        return f"The answer is {cue.seed % 3}."

    one, _ = await run(noisy, items(5), abreast=1)
    other, _ = await run(noisy, items(5), abreast=5)
    assert [(p, a, b) for _, p, a, b in one] == [(p, a, b) for _, p, a, b in other]


async def test_both_sides_get_the_same_seeds():
    seeds: dict[bool, set[int]] = {True: set(), False: set()}

    def watched(cue: Cue) -> str:
        seeds[bool(cue.soft)].add(cue.seed)
        return "The answer is 1."

    await run(watched, items(1))
    assert seeds[True] == seeds[False]
