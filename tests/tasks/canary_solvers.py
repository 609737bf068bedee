"""Solves canary questions from their text alone, another way than the generators: by counting, searching, stepping."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import count, pairwise, permutations, product

from service.core.options import options


def ints(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


# --- stories ---


def moves(text: str) -> list[int]:
    gains = r"(?:finds|buys|wins|is given) (\d+)"
    told = re.findall(rf"Then \w+ (?:{gains}|(?:loses|gives|sells|drops) (\d+))", text)
    return [int(up) if up else -int(down) for up, down in told]


def ledger(q: str) -> int:
    have = ints(q)[0]
    for n in moves(q):
        have += n
        assert have > 0
    return have


def unknown_start(q: str) -> int:
    (end,) = ints(q.split("In the end")[1])
    return next(s for s in count() if s + sum(moves(q)) == end)


def containers(q: str) -> int:
    full = [int(each) for n, each in re.findall(r"(\d+) \w+ with (\d+) \w+ in each", q) for _ in range(int(n))]
    return sum(full) - ints(q)[-1]


def equal_shares(q: str) -> int:
    packs, size, kept, heads = (ints(q)[i] for i in (0, 1, 2, 3))
    hands, left = [0] * heads, sum(size for _ in range(packs)) - kept
    for i in range(left):
        hands[i % heads] += 1
    assert len(set(hands)) == 1
    return hands[0]


def comparison(q: str) -> int:
    has: dict[str, int] = {}
    for sentence in q.split(". ")[:-1]:
        name = sentence.split()[0]
        other = sentence.split()[-1]
        if m := re.search(r"(twice|three times|four times) as many", sentence):
            has[name] = has[other] * {"twice": 2, "three times": 3, "four times": 4}[m[1]]
        elif m := re.search(r"(\d+) (more|fewer)", sentence):
            has[name] = has[other] + int(m[1]) * (1 if m[2] == "more" else -1)
        else:
            has[name] = ints(sentence)[0]
    return sum(has.values())


def wages(q: str) -> int:
    rate, hours, days, spent, weeks = ints(q)
    purse = 0
    for _ in range(weeks):
        for _ in range(days):
            purse += sum(rate for _ in range(hours))
        purse -= spent
    return purse


def discount(q: str) -> Fraction:
    price, percent, off, pieces = ints(q)
    return sum(((Fraction(price) * (1 - Fraction(percent, 100)) - off) for _ in range(pieces)), Fraction())


def tank(q: str) -> int:
    holds, has, flow, leak = ints(q)
    for minute in count(1):
        has += flow - leak
        if has >= holds:
            return minute
    raise AssertionError


def ratio(q: str) -> int:
    a, b, second, gone = ints(q)
    groups = next(g for g in count() if g * b == second)
    return groups * a + second - gone


def change(q: str) -> int:
    *bought, paid = ints(q)
    return paid - sum(n * price for n, price in zip(bought[::2], bought[1::2], strict=True))


def reading(q: str) -> int:
    pages, read, daily = ints(q)
    for day in count(1):
        read += daily
        if read >= pages:
            return day
    raise AssertionError


def buses(q: str) -> int:
    classes, pupils, teachers, seats = ints(q)
    people, rides = classes * pupils + teachers, 0
    while people > 0:
        people, rides = people - seats, rides + 1
    return rides


def average(q: str) -> int:
    *scores, games, mean = ints(q)
    assert len(scores) == games
    return next(x for x in count() if Fraction(sum(scores) + x, games + 1) == mean)


def halves(q: str) -> int:
    parts = [{"half": 2, "third": 3, "quarter": 4}[w] for w in re.findall(r"(half|third|quarter) of", q)]
    (left,) = ints(q)
    for saved in count(1):
        rest = Fraction(saved)
        for k in parts:
            rest -= rest / k
        if rest == left:
            return saved
    raise AssertionError


def doubling(q: str) -> int:
    lilies, every, days, eaten = ints(q)
    for day in range(1, days + 1):
        if day % every == 0:
            lilies += lilies
    return lilies - eaten


# --- symbolic ---


def quoted(q: str) -> str:
    return q.split('"')[1]


def last_letters(q: str) -> str:
    return "".join(re.findall(r"\w(?!\w)", quoted(q))).lower()


def nth_letters(q: str) -> str:
    skip = ["first", "second", "third", "fourth"].index(q.split()[3])
    return "".join(re.findall(rf"\b\w{{{skip}}}(\w)", quoted(q)))


def reverse(q: str) -> str:
    text = quoted(q)
    return "".join(text[-i] for i in range(1, len(text) + 1))


def sorted_letters(q: str) -> str:
    return "".join(letter for letter in "abcdefghijklmnopqrstuvwxyz" for _ in range(quoted(q).count(letter)))


def shift(q: str) -> str:
    alphabet, by = "abcdefghijklmnopqrstuvwxyz" * 2, 2 if "two places" in q else 1
    return "".join(alphabet[alphabet.index(letter) + by] for letter in quoted(q))


def without_vowels(q: str) -> str:
    return re.sub("[aeiou ]", "", quoted(q))


def coin(q: str) -> str:
    return "yes" if len(re.findall(r"\w+ flips the coin", q)) % 2 == 0 else "no"


def lamp(q: str) -> str:
    presses = sum(ints(q)) + q.startswith("A lamp is on")
    return "yes" if presses % 2 else "no"


def turns(q: str) -> str:
    compass = {"east": 1, "north": 1j, "west": -1, "south": -1j}
    facing = compass[q.split()[2].rstrip(",")]
    for way in re.findall(r"turn (\w+)", q):
        facing *= {"left": 1j, "right": -1j, "around": -1}[way]
    return next(name for name, at in compass.items() if at == facing)


# --- choice ---


def label(q: str, right: Callable[[str], bool]) -> str:
    """The label of the only option that is right."""
    found = [letter for letter, text in options(q).items() if right(text)]
    assert len(found) == 1, q
    return found[0]


def stepped(q: str, day: datetime, days: int) -> str:
    for _ in range(abs(days)):
        day += timedelta(1 if days > 0 else -1)
    return label(q, lambda text: text == day.strftime("%m/%d/%Y"))


def said_date(q: str) -> datetime:
    m = re.search(r"[A-Z][a-z]+ \d+, \d{4}", q)
    assert m
    return datetime.strptime(m[0], "%B %d, %Y")


def date_later(q: str) -> str:
    return stepped(q, said_date(q), int(re.findall(r"(\d+) days from", q)[0]))


def date_earlier(q: str) -> str:
    weeks = int(re.findall(r"(\d+) week", q)[0])
    days = int((re.findall(r"(\d+) day", q) or ["0"])[0])
    return stepped(q, said_date(q), -weeks * 7 - days)


def date_relative(q: str) -> str:
    n, when = re.findall(r"(\d+) days? (ago|from today)", q)[0]
    today = said_date(q) + timedelta(1 if q.startswith("Yesterday") else -1)
    return stepped(q, today, int(n) * (-1 if when == "ago" else 1))


def weekday(q: str) -> str:
    week = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    day = week.index(q.split()[2].rstrip("."))
    for _ in range(ints(q)[0]):
        day = 0 if day == 6 else day + 1
    return label(q, lambda text: text == week[day])


def next_number(q: str) -> str:
    t = ints(q.split("\n")[0])
    d = [b - a for a, b in pairwise(t)]
    if d[0] == d[2] and d[1] == d[3]:
        step = d[0]
    else:
        assert len({b - a for a, b in pairwise(d)}) == 1
        step = d[-1] + d[-1] - d[-2]
    return label(q, lambda text: int(text) == t[-1] + step)


def ranking(q: str) -> str:
    above = re.findall(r"(\w+) is \w+ than (\w+)\.", q)
    names = sorted({name for pair in above for name in pair})
    orders = [p for p in permutations(names) if all(p.index(a) < p.index(b) for a, b in above)]
    assert len(orders) == 1
    place = next((i for i, word in enumerate(("second", "third", "fourth"), 1) if f"the {word} " in q), 0)
    return label(q, lambda text: text == orders[0][place])


def alphabet(q: str) -> str:
    words = list(options(q).values())
    better = (lambda a, b: a <= b) if "comes first" in q else (lambda a, b: a >= b)
    return label(q, lambda text: all(better(text, word) for word in words))


def divisible(q: str) -> str:
    by = ints(q)[0]
    return label(q, lambda text: int(text) in range(0, 1000, by))


def largest_fraction(q: str) -> str:
    parsed = {text: ints(text) for text in options(q).values()}
    sign = 1 if "largest" in q else -1
    others = list(parsed.values())
    return label(q, lambda text: all(sign * (parsed[text][0] * d - n * parsed[text][1]) >= 0 for n, d in others))


def clock(q: str) -> str:
    start = datetime.strptime(re.findall(r"at (\d+:\d\d)", q)[0], "%H:%M")
    end = start + timedelta(minutes=int(re.findall(r"(\d+) minutes", q)[0]))
    return label(q, lambda text: text == f"{end.hour}:{end:%M}")


# --- yes or no ---

LEGS = {"spiders": 8, "dogs": 4, "ants": 6, "ducks": 2, "cows": 4, "beetles": 6, "ostriches": 2, "horses": 4}
LENGTHS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86_400, "weeks": 604_800, "months": 1, "years": 12}


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def more_legs(q: str) -> str:
    first, second = (int(n) * LEGS[animal] for n, animal in re.findall(r"(\d+) (\w+)", q))
    return yes(first > second)


def longer_span(q: str) -> str:
    first, second = (int(n) * LENGTHS[unit] for n, unit in re.findall(r"(\d+) (\w+)", q))
    return yes(first > second)


def opening_hours(q: str) -> str:
    hours = [int(n) for n in re.findall(r"(\d+):00", q)]
    asked, at = re.findall(r"open on (\w+) at (\d+):30", q)[0]
    for day, later in re.findall(r"except on (\w+), when it opens and closes (\d+) hours later", q):
        hours = [h + int(later) for h in hours] if day == asked else hours
    return yes(60 * hours[0] <= 60 * int(at) + 30 < 60 * hours[1])


def order(q: str) -> str:
    told, asked = q.split("\nQuestion: ")
    known = set(re.findall(r"the \w+ (\w+) is \w+ than the \w+ (\w+)\.", told.replace("The", "the")))
    return yes(asked_pair(asked) in closure(known))


def asked_pair(asked: str) -> tuple[str, str]:
    a, b = re.findall(r"the \w+ ([A-Z]\w+)", asked)
    return a, b


def closure(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    while more := {(a, d) for a, b in pairs for c, d in pairs if b == c} - pairs:
        pairs = pairs | more
    return pairs


def syllogism(q: str) -> str:
    """Whether it holds for every kind of being that the statements allow."""
    rules = re.findall(r"(All|No) (\w+) are (\w+)\.", q)
    of, to = re.findall(r"Are all (\w+) necessarily (\w+)\?", q)[0]
    kinds = sorted({kind for _, a, b in rules for kind in (a, b)})
    beings = [dict(zip(kinds, member, strict=True)) for member in product((False, True), repeat=len(kinds))]
    possible = [b for b in beings if all(not b[x] or b[y] == (word == "All") for word, x, y in rules)]
    return yes(all(b[to] for b in possible if b[of]))


def lifetimes(q: str) -> str:
    born, end, opened = ints(q)
    died = end if end > born else sum((born, end))
    return yes(opened in range(born, died + 1))


def ferries(q: str) -> str:
    links = set(re.findall(r"from (\w+) to (\w+)[;,]", q))
    start, stop = re.findall(r"get from (\w+) to (\w+) by", q)[0]
    return yes((start, stop) in closure(links))


def admission(q: str) -> str:
    has, must = q.split(", if visitors")
    measured, bounds = ints(has), ints(must)
    above = all(m >= b for m, b in zip(measured[:2], bounds[:2], strict=True))
    return yes(above and (len(measured) < 3 or measured[2] <= bounds[2]))
