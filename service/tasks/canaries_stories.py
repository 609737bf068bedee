"""Canary templates for `math_word_problem`: arithmetic told as a story, the answer computed from the numbers drawn.

A template takes a source of randomness and a level from 1 to 5 and returns question and answer. Higher levels have
larger numbers and more steps.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from random import Random

# fmt: off
PEOPLE = (
    ("Nadia", "she"), ("Victor", "he"), ("Amara", "she"), ("Pieter", "he"), ("Rosa", "she"), ("Omar", "he"),
    ("Lin", "she"), ("Kenji", "he"), ("Jana", "she"), ("Theo", "he"), ("Carla", "she"), ("Ivan", "he"),
    ("Mei", "she"), ("Lukas", "he"), ("Zoe", "she"), ("Hassan", "he"), ("Ida", "she"), ("Marek", "he"),
    ("Freya", "she"), ("Dev", "he"), ("Paula", "she"), ("Sven", "he"), ("Tara", "she"), ("Emil", "he"),
    ("Wanda", "she"), ("Rafael", "he"), ("Greta", "she"), ("Idris", "he"),
)
THINGS = (
    "marbles", "stamps", "shells", "stickers", "coins", "postcards", "buttons", "walnuts", "candles", "pencils",
    "badges", "ribbons", "beads", "tickets", "magnets", "seeds",
)
HOLDERS = (
    ("box", "boxes"), ("bag", "bags"), ("crate", "crates"), ("tray", "trays"), ("basket", "baskets"), ("jar", "jars"),
)
# fmt: on
GAINS = ("finds {n} more", "buys {n} more", "wins {n} in a game", "is given {n} by a friend")
LOSSES = ("loses {n}", "gives {n} away", "sells {n}", "drops {n} in the river")
MULTIPLES = ((2, "twice"), (3, "three times"), (4, "four times"))

Draft = tuple[str, str]


def ledger(rng: Random, level: int) -> Draft:
    """Gains and losses, one after the other."""
    (name, he), thing = rng.choice(PEOPLE), rng.choice(THINGS)
    start = rng.randint(8, 12 + 25 * level)
    moves, have = _moves(rng, start, level + 1, 10 * level)
    return f"{name} has {start} {thing}. {_told(moves, he)} How many {thing} does {name} have now?", str(have)


def unknown_start(rng: Random, level: int) -> Draft:
    """Gains and losses, and the end; what was there at first?"""
    (name, he), thing = rng.choice(PEOPLE), rng.choice(THINGS)
    start = rng.randint(8, 12 + 25 * level)
    moves, have = _moves(rng, start, level + 1, 10 * level)
    end = f"In the end {name} has {have} {thing}. How many {thing} did {name} have at the start?"
    return f"{name} has some {thing}. {_told(moves, he)} {end}", str(start)


def containers(rng: Random, level: int) -> Draft:
    """Several kinds of containers, and what is taken out of them."""
    (name, _), thing = rng.choice(PEOPLE), rng.choice(THINGS)
    kinds = [
        (rng.randint(2, 4 + 3 * level), rng.randint(3, 5 + 5 * level), h)
        for h in rng.sample(HOLDERS, ceil(level / 2) + 1)
    ]
    total = sum(count * each for count, each, _ in kinds)
    listed = " and ".join(f"{count} {many} with {each} {thing} in each {one}" for count, each, (one, many) in kinds)
    sold = rng.randint(2, total - 2)
    return f"{name} packs {listed}. {name} then sells {sold} {thing}. How many {thing} are left?", str(total - sold)


def equal_shares(rng: Random, level: int) -> Draft:
    """What is left over is divided equally."""
    (name, _), thing = rng.choice(PEOPLE), rng.choice(THINGS)
    heads, each = rng.randint(3, 4 + 2 * level), rng.randint(3, 6 + 6 * level)
    packs = rng.randint(2, 2 + 2 * level)
    kept = packs - heads * each % packs  # so that the packs come out even
    size = (heads * each + kept) // packs
    return (
        f"{name} buys {packs} packs of {thing} with {size} {thing} in each pack, keeps {kept} and shares the others "
        f"equally among {heads} children. How many {thing} does each child get?",
        str(each),
    )


def comparison(rng: Random, level: int) -> Draft:
    """Each has more, fewer or a multiple of what the one before has; all are added up."""
    names, thing = [name for name, _ in rng.sample(PEOPLE, min(level, 4) + 1)], rng.choice(THINGS)
    has = [rng.randint(4, 8 + 8 * level)]
    said = [f"{names[0]} has {has[0]} {thing}."]
    for before, name in pairwise(names):
        kind, n = rng.choice(("more", "fewer", "times")), rng.randint(2, 3 + 5 * level)
        if kind == "times":
            factor, word = rng.choice(MULTIPLES[: 1 + level // 2])
            has.append(has[-1] * factor)
            said.append(f"{name} has {word} as many {thing} as {before}.")
        else:
            kind = "more" if n >= has[-1] else kind
            has.append(has[-1] + n if kind == "more" else has[-1] - n)
            said.append(f"{name} has {n} {kind} {thing} than {before}.")
    return f"{' '.join(said)} How many {thing} do they have altogether?", str(sum(has))


def wages(rng: Random, level: int) -> Draft:
    """Pay by the hour over weeks, less what is spent."""
    name, he = rng.choice(PEOPLE)
    rate, hours, days = rng.randint(7, 12 + 3 * level), rng.randint(2, 8), rng.randint(2, 5)
    weeks, weekly = rng.randint(2, 1 + level) if level > 1 else 2, rate * hours * days
    spent = rng.randint(1, weekly // 2)
    return (
        f"{name} earns ${rate} an hour and works {hours} hours a day on {days} days a week. Every week {he} spends "
        f"${spent}. How many dollars does {name} have left after {weeks} weeks?",
        str((weekly - spent) * weeks),
    )


def discount(rng: Random, level: int) -> Draft:
    """A price less a percentage, then less or more an amount, for several pieces."""
    percent = rng.choice((50, 25, 20, 10, 40, 30, 15, 5)[: 2 + level])
    price, off, count = 20 * rng.randint(2, 3 + 4 * level), rng.randint(2, 9), rng.randint(1, level) + 1
    thing = rng.choice(("jacket", "chair", "lamp", "backpack", "clock", "blanket"))
    final = price * (100 - percent) // 100 - off
    return (
        f"A {thing} costs ${price}. The price is reduced by {percent}% and then by another ${off}. How many dollars do "
        f"{count} such {thing}s cost now?",
        str(final * count),
    )


def tank(rng: Random, level: int) -> Draft:
    """Filling against a leak."""
    leak, minutes = rng.randint(2, 4 + 2 * level), rng.randint(4, 8 + 8 * level)
    flow, there = leak + rng.randint(2, 4 + 4 * level), rng.randint(1, 9) * 5
    return (
        f"A tank holds {(flow - leak) * minutes + there} liters and has {there} liters of water in it. A pipe adds "
        f"{flow} liters a minute while a leak loses {leak} liters a minute. How many minutes does it take until the "
        "tank is full?",
        str(minutes),
    )


def ratio(rng: Random, level: int) -> Draft:
    """A ratio and one of its parts; the whole is asked."""
    first, second = rng.choice(
        (("cats", "dogs"), ("hens", "ducks"), ("tulips", "roses"), ("girls", "boys"), ("cars", "vans"))
    )
    a, b = rng.sample(range(2, 5 + 2 * level), 2)
    part = rng.randint(3, 3 + 5 * level)
    gone = rng.randint(1, a * part - 1)
    return (
        f"The ratio of {first} to {second} was {a} to {b}, and there were {b * part} {second}. Then {gone} of the "
        f"{first} were taken away. How many {first} and {second} are there in total now?",
        str((a + b) * part - gone),
    )


def change(rng: Random, level: int) -> Draft:
    """A bill of several articles, paid with a note."""
    name, _ = rng.choice(PEOPLE)
    goods = rng.sample(("notebooks", "pens", "apples", "mugs", "rulers", "lemons", "brushes"), ceil(level / 2) + 1)
    bought = [(rng.randint(2, 3 + level), rng.randint(2, 4 + 3 * level), g) for g in goods]
    bill = sum(n * price for n, price, _ in bought)
    paid = next(note for note in (20, 50, 100, 200, 500, 1000, 2000) if note > bill)
    listed = " and ".join(f"{n} {g} at ${price} each" for n, price, g in bought)
    return f"{name} buys {listed} and pays with ${paid}. How many dollars of change does {name} get?", str(paid - bill)


def reading(rng: Random, level: int) -> Draft:
    """Days until a book is finished, the last of which may be a short one."""
    name, he = rng.choice(PEOPLE)
    daily, read = rng.randint(6, 10 + 6 * level), rng.randint(5, 20 * level)
    days, short = rng.randint(3, 5 + 5 * level), rng.randint(0, 5)
    pages = read + daily * days - min(short, daily - 1)
    return (
        f"A novel has {pages} pages. {name} has read {read} pages of it and reads {daily} pages every day from now on. "
        f"On how many days will {he} still read in it?",
        str(days),
    )


def buses(rng: Random, level: int) -> Draft:
    """Rounding up: nobody stays behind."""
    seats, pupils, classes = (
        rng.randint(8, 14 + 8 * level),
        rng.randint(11, 15 + 4 * level),
        rng.randint(2, 2 + 2 * level),
    )
    teachers = rng.randint(2, 4 + 2 * level)
    return (
        f"A school trip has {classes} classes with {pupils} pupils in each class and {teachers} teachers in all. Each "
        f"bus seats {seats} people. How many buses are needed?",
        str(ceil((classes * pupils + teachers) / seats)),
    )


def average(rng: Random, level: int) -> Draft:
    """The score that is missing for a mean."""
    name, he = rng.choice(PEOPLE)
    mean = rng.randint(25 + 8 * level, 40 + 12 * level)
    scores = [mean + rng.randint(-2 * level, 2 * level) for _ in range(1 + level)]
    missing = mean * (len(scores) + 1) - sum(scores)
    listed = ", ".join(map(str, scores[:-1])) + f" and {scores[-1]}"
    return (
        f"{name} scored {listed} points in {len(scores)} games. How many points must {he} score in the next game so "
        f"that the average of all games is {mean} points?",
        str(missing),
    )


def halves(rng: Random, level: int) -> Draft:
    """Fractions of what remains, backwards."""
    name, he = rng.choice(PEOPLE)
    parts = [rng.choice(((2, "half"), (3, "a third"), (4, "a quarter"))) for _ in range(min(1 + level // 2, 3))]
    saved = rng.randint(3, 6 + 5 * level)
    for k, _ in parts:
        saved *= k
    rest = saved
    for k, _ in parts:
        rest -= rest // k
    spent = f"{he} spends {parts[0][1]} of it on a gift"
    for (_, word), on in zip(parts[1:], ("a coat", "a trip"), strict=False):
        spent += f", then {word} of what remains on {on}"
    return f"{name} saved some money. First {spent}. Now ${rest} is left. How many dollars had {name} saved?", str(
        saved
    )


def doubling(rng: Random, level: int) -> Draft:
    """Doubling at intervals, less a harvest at the end."""
    start, every, times = rng.randint(2, 4 + 2 * level), rng.randint(2, 9), rng.randint(2, 2 + level // 2)
    eaten = rng.randint(1, start)
    return (
        f"There are {start} lilies on a pond, and their number doubles every {every} days. After {every * times} days "
        f"a goat eats {eaten} of them. How many lilies are left?",
        str(start * 2**times - eaten),
    )


def _moves(rng: Random, have: int, steps: int, most: int) -> tuple[list[int], int]:
    """Gains and losses that never leave less than 1, and what is left after them."""
    moves = []
    for _ in range(steps):
        n = rng.randint(2, most)
        if n < have and rng.random() < 0.5:
            n = -n
        moves.append(n)
        have += n
    return moves, have


def _told(moves: list[int], he: str) -> str:
    said = [(GAINS if n > 0 else LOSSES)[i % 4].format(n=abs(n)) for i, n in enumerate(moves)]
    return " ".join(f"Then {he} {s}." for s in said)


TEMPLATES = {
    f.__name__: f
    for f in (
        *(ledger, unknown_start, containers, equal_shares, comparison, wages, discount, tank, ratio, change, reading),
        *(buses, average, halves, doubling),
    )
}
