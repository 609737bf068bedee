"""Canary templates for `choice`: dates, order, numbers and words with options, exactly one of which is right."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from fractions import Fraction
from itertools import pairwise
from random import Random

from service.tasks.canaries_stories import PEOPLE
from service.tasks.canaries_symbolic import WORDS

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_LONG = "%B {day}, %Y"
_ORDINALS = ("", "second ", "third ", "fourth ")
_RANKS = (("tallest", "taller"), ("oldest", "older"), ("fastest", "faster"), ("heaviest", "heavier"))

Draft = tuple[str, str]


def date_later(rng: Random, level: int) -> Draft:
    day, days = _day(rng), rng.randint(2, (6, 12, 30, 70, 150)[level - 1])
    question = f"Today is {_said(day)}. What is the date {days} days from today in MM/DD/YYYY?"
    return _date_options(rng, question, day + timedelta(days=days))


def date_earlier(rng: Random, level: int) -> Draft:
    day, weeks, days = _day(rng), rng.randint(1, 1 + level), rng.randint(0, level)
    ago = f"{weeks} {'week' if weeks == 1 else 'weeks'}" + (
        f" and {days} {'day' if days == 1 else 'days'}" if days else ""
    )
    question = f"The parcel arrived on {_said(day)}, {ago} after it was sent. On which date was it sent, in MM/DD/YYYY?"
    return _date_options(rng, question, day - timedelta(days=7 * weeks + days))


def date_relative(rng: Random, level: int) -> Draft:
    """Counted from today, where yesterday or tomorrow is given."""
    day, known, asked = _day(rng), rng.choice((-1, 1)), rng.randint(1, 2 + level)
    back = level > 2 and rng.random() < 0.5
    wanted = day - timedelta(days=known) + timedelta(days=-asked if back else asked)
    when = f"{asked} {'day' if asked == 1 else 'days'} {'ago' if back else 'from today'}"
    said = f"Yesterday was {_said(day)}." if known < 0 else f"Tomorrow is {_said(day)}."
    question = f"{said} Which date {'was it' if back else 'will it be'} {when}, in MM/DD/YYYY?"
    return _date_options(rng, question, wanted)


def weekday(rng: Random, level: int) -> Draft:
    today, days = rng.randrange(7), rng.randint(2, (6, 12, 25, 60, 120)[level - 1])
    question = f"Today is {_DAYS[today]}. Which day of the week is it in {days} days?"
    return _options(rng, question, _DAYS[(today + days) % 7], _DAYS)


def next_number(rng: Random, level: int) -> Draft:
    """Steps that are equal, grow or alternate."""
    start, step, more = rng.randint(1, 9 * level), rng.randint(2, 3 + 2 * level), rng.randint(1, level)
    kind = rng.choice(("plain", "growing", "alternating")[: 1 + level // 2])
    terms = [start]
    for i in range(5):
        extra = {"plain": 0, "growing": i * more, "alternating": i % 2 * more}[kind]
        terms.append(terms[-1] + step + extra)
    answer = terms.pop()
    question = f"Which number comes next: {', '.join(map(str, terms))}?"
    return _options(rng, question, str(answer), list(map(str, _near(rng, answer, step))))


def ranking(rng: Random, level: int) -> Draft:
    """A chain of comparisons, told in any order."""
    (top, than), names = rng.choice(_RANKS), [name for name, _ in rng.sample(PEOPLE, 4 if level < 4 else 5)]
    said = [f"{a} is {than} than {b}." for a, b in pairwise(names)]
    if level > 1:
        rng.shuffle(said)
    place = rng.randrange(min(level, 4))
    return _options(rng, f"{' '.join(said)} Who is the {_ORDINALS[place]}{top}?", names[place], names)


def alphabet(rng: Random, level: int) -> Draft:
    """The word that a dictionary has first or last; higher levels share more letters."""
    if level < 3:
        words = rng.sample(WORDS, 4)
    else:
        stem = rng.choice(WORDS)[: level - 1]
        words = [stem + "".join(end) for end in _distinct(rng, 5)]
    where, pick = rng.choice((("first", min), ("last", max)))
    return _options(rng, f"Which of these words comes {where} in alphabetical order?", pick(words), words)


def divisible(rng: Random, level: int) -> Draft:
    by = rng.choice((3, 4, 6, 7, 8, 9, 11, 12, 13)[: 3 + level])
    low, high = 10 * level, 40 * level
    right = by * rng.randint(low // by + 1, high // by)
    wrong = [n for n in rng.sample(range(low, high + 1), 20) if n % by][:4]
    return _options(rng, f"Which of these numbers is divisible by {by}?", str(right), list(map(str, wrong)))


def largest_fraction(rng: Random, level: int) -> Draft:
    top = 5 + 3 * level
    drawn: dict[Fraction, str] = {}
    while len(drawn) < 4:
        n, d = sorted(rng.sample(range(1, top), 2))
        drawn.setdefault(Fraction(n, d), f"{n}/{d}")
    which, pick = rng.choice((("largest", max), ("smallest", min)))
    return _options(rng, f"Which fraction is the {which}?", drawn[pick(drawn)], list(drawn.values()))


def clock(rng: Random, level: int) -> Draft:
    start, minutes = 5 * rng.randint(12 * 7, 12 * 15), 5 * rng.randint(2, 6 + 7 * level)
    end = start + minutes
    near = [_time(n) for n in _near(rng, end, rng.choice((5, 10, 30, 60)))]
    question = f"A train leaves at {_time(start)} and travels for {minutes} minutes. At what time does it arrive?"
    return _options(rng, question, _time(end), near)


# --- options ---


def _options(rng: Random, question: str, right: str, others: Sequence[str]) -> Draft:
    """The right option at a place drawn uniformly among four or five, each shown once."""
    wrong = [other for other in dict.fromkeys(others) if other != right]
    wrong = rng.sample(wrong, min(len(wrong), 4))
    at = rng.randrange(len(wrong) + 1)
    shown = [*wrong[:at], right, *wrong[at:]]
    listed = " ".join(f"({chr(65 + i)}) {text}" for i, text in enumerate(shown))
    return f"{question}\nOptions: {listed}", chr(65 + at)


def _offsets(rng: Random) -> list[int]:
    """Four numbers next to 0, whose rank among them is drawn uniformly: the middle is no better guess."""
    below = rng.randint(0, 4)
    return [k for k in range(-below, 5 - below) if k]


def _near(rng: Random, right: int, step: int) -> list[int]:
    """Positive numbers some steps off the right one."""
    return [right + step * k for k in _offsets(rng) if right + step * k > 0]


def _date_options(rng: Random, question: str, right: date) -> Draft:
    """Other dates: some days, a week, a month or a year off."""
    days = [right + timedelta(days=n) for n in (*_offsets(rng), -7, 7, -31, 31, -365, 366)]
    return _options(rng, question, f"{right:%m/%d/%Y}", [f"{d:%m/%d/%Y}" for d in days])


def _day(rng: Random) -> date:
    return date(1950, 1, 1) + timedelta(days=rng.randrange(27_000))


def _said(day: date) -> str:
    return day.strftime(_LONG).format(day=day.day)


def _time(minutes: int) -> str:
    return f"{minutes // 60 % 24}:{minutes % 60:02}"


def _distinct(rng: Random, count: int) -> list[str]:
    ends: dict[str, None] = {}
    while len(ends) < count:
        ends["".join(rng.choices("aeiloprst", k=3))] = None
    return list(ends)


TEMPLATES = {
    f.__name__: f
    for f in (
        *(date_later, date_earlier, date_relative, weekday, next_number, ranking, alphabet, divisible),
        *(largest_fraction, clock),
    )
}
