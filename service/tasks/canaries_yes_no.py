"""Canary templates for `yes_no`: questions whose answer follows from what they say or from counts that all know.

Each template draws the answer first, so that yes and no are equally frequent whatever the level.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from service.tasks.canaries_stories import PEOPLE

# fmt: off
_COUNTS = (
    ("{n} spiders", "legs", 8), ("{n} dogs", "legs", 4), ("{n} ants", "legs", 6), ("{n} ducks", "legs", 2),
    ("{n} cows", "legs", 4), ("{n} beetles", "legs", 6), ("{n} ostriches", "legs", 2), ("{n} horses", "legs", 4),
)
_SPANS = (
    ("days", "weeks", 7), ("months", "years", 12), ("hours", "days", 24), ("minutes", "hours", 60),
    ("seconds", "minutes", 60),
)
_PLACES = ("Avala", "Brenn", "Corvo", "Dunmar", "Elsby", "Farno", "Gildra", "Harkin", "Istel", "Jorvik")
_KINDS = ("wugs", "daxes", "blickets", "feps", "zorps", "tomas", "lumes", "gorps")
_RIVERS = ("Alda", "Berin", "Curra", "Drava", "Esk", "Fenn", "Garo", "Hulme")
_RELATIONS = (("castle", "older"), ("lake", "deeper"), ("tower", "taller"), ("river", "longer"))
# fmt: on

Draft = tuple[str, str]


def more_legs(rng: Random, level: int) -> Draft:
    """Counts of things that everybody knows, multiplied."""
    (a, part, x), (b, _, y) = _unlike(rng)
    while True:
        n, m = rng.randint(2, 2 + 3 * level), rng.randint(2, 2 + 3 * level)
        if n * x != m * y:
            break
    if (n * x > m * y) != (yes := _toss(rng)):
        (a, n, x), (b, m, y) = (b, m, y), (a, n, x)
    return f"Do {a.format(n=n)} have more {part} in total than {b.format(n=m)}?", _said(yes)


def longer_span(rng: Random, level: int) -> Draft:
    """A span of time in two units."""
    small, large, size = rng.choice(_SPANS[: 2 + level // 2])
    count, yes = rng.randint(2, 3 + 4 * level), _toss(rng)
    off = rng.randint(1, max(2, size // level))
    stay = count * size + (off if yes else -off)
    return f"Is a stay of {stay} {small} longer than a stay of {count} {large}?", _said(yes)


def opening_hours(rng: Random, level: int) -> Draft:
    """Whether a place is open, with exceptions from level 3 on."""
    place = rng.choice(("shop", "museum", "library", "pool", "bakery"))
    opens, closes = rng.randint(7, 10), rng.randint(15, 20)
    day, later = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")), 0
    rule = f"opens at {opens}:00 and closes at {closes}:00 every day"
    if level > 2:
        apart, hours = rng.choice((day, "Saturday")), rng.randint(2, 3)
        later = hours if apart == day else 0
        rule += f", except on {apart}, when it opens and closes {hours} hours later"
    if yes := _toss(rng):
        hour = rng.randint(opens + later, closes + later - 1)
    else:
        hour = rng.choice((opens + later - rng.randint(1, 2), closes + later + rng.randint(0, 1)))
    return f"Is the {place} open on {day} at {hour}:30, if it {rule}?", _said(yes)


def order(rng: Random, level: int) -> Draft:
    """A chain of comparisons, of which two are compared that are not neighbours."""
    (kind, than), names = rng.choice(_RELATIONS), rng.sample(_RIVERS, level + 2)
    said = [f"The {kind} {a} is {than} than the {kind} {b}." for a, b in pairwise(names)]
    if level > 1:
        rng.shuffle(said)
    i = rng.randrange(len(names) - 2)
    a, b = names[i], names[rng.randrange(i + 2, len(names))]
    yes = _toss(rng)
    a, b = (a, b) if yes else (b, a)
    return f"Passage: {' '.join(said)}\nQuestion: is the {kind} {a} {than} than the {kind} {b}?", _said(yes)


def syllogism(rng: Random, level: int) -> Draft:
    """A chain of inclusions and one exclusion at its end; the statements do not tell what is asked."""
    (*chain, out), yes = rng.sample(_KINDS, level + 3), _toss(rng)
    said = [f"All {a} are {b}." for a, b in pairwise(chain)] + [f"No {chain[-1]} are {out}."]
    if level > 2:
        rng.shuffle(said)
    i, j = sorted(rng.sample(range(len(chain)), 2))
    a, b = (i, j) if yes else (j, i)
    of, to = (chain[a], chain[b]) if yes or rng.random() < 0.5 else (chain[i], out)
    return f"{' '.join(said)} Are all {of} necessarily {to}?", _said(yes)


def lifetimes(rng: Random, level: int) -> Draft:
    """Whether somebody lived to see something opened."""
    name, born = rng.choice(PEOPLE)[0], rng.randint(1700, 1900)
    age, yes = rng.randint(40, 90), _toss(rng)
    slack = rng.randint(2, 27 - 5 * level + 5)
    year = born + age - slack if yes else born + age + slack
    thing = rng.choice(("opera", "bridge", "railway", "theater"))
    end = f"died at the age of {age}" if level > 1 else f"died in {born + age}"
    seen = f"Could {name} have seen the opening of the {thing}, if it was in {year}?"
    return f"{name} was born in January {born} and {end}. {seen}", _said(yes)


def ferries(rng: Random, level: int) -> Draft:
    """Reaching a place by one-way connections."""
    stops, yes = rng.sample(_PLACES, min(level + 4, len(_PLACES))), _toss(rng)
    path = stops[: level + 2]
    links = list(pairwise(path))
    if not yes:  # the other way round at one place: no way through
        i = rng.randrange(len(links))
        links[i] = (links[i][1], links[i][0])
    links += [(rng.choice(path[:-1]), stop) for stop in stops[level + 2 :]]
    rng.shuffle(links)
    listed = "; ".join(f"from {a} to {b}" for a, b in links)
    return f"The only ferries go {listed}, one way each. Can one get from {path[0]} to {path[-1]} by ferry?", _said(yes)


def admission(rng: Random, level: int) -> Draft:
    """A rule with one to three conditions, of which at most one is broken."""
    (name, _), yes = rng.choice(PEOPLE), _toss(rng)
    limits = (rng.randint(8, 14), rng.randint(120, 150), rng.randint(60, 90))
    number = min(1 + level // 2, 3)
    broken = None if yes else rng.randrange(number)
    has = [limit + rng.randint(0, 6 - level) for limit in limits]
    has[2] = 2 * limits[2] - has[2]  # a weight is bounded from above
    if broken is not None:
        has[broken] = limits[broken] + rng.randint(1, 7 - level) * (1 if broken == 2 else -1)
    enough = (f"old enough at {has[0]} years", f"tall enough at {has[1]} cm", f"light enough at {has[2]} kg")
    rules = (f"at least {limits[0]} years old", f"at least {limits[1]} cm tall", f"at most {limits[2]} kg in weight")
    is_so, rule = " and ".join(enough[:number]), " and ".join(rules[:number])
    return f"Is {name} {is_so} for the roller coaster, if visitors must be {rule}?", _said(yes)


def _unlike(rng: Random) -> tuple[tuple[str, str, int], tuple[str, str, int]]:
    while True:
        a, b = rng.sample(_COUNTS, 2)
        if a[2] != b[2]:
            return a, b


def _toss(rng: Random) -> bool:
    return rng.random() < 0.5


def _said(yes: bool) -> str:
    return "yes" if yes else "no"


TEMPLATES = {
    f.__name__: f for f in (more_legs, longer_span, opening_hours, order, syllogism, lifetimes, ferries, admission)
}
