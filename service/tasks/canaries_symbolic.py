"""Canary templates for `symbolic`: letters, words and simple states, computed. Higher levels are longer."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

# fmt: off
NAMES = (
    "Oliver", "Marta", "Quinn", "Sergei", "Hugo", "Ines", "Pavel", "Barbara", "Nils", "Otto", "Yvonne", "Freya",
    "Anton", "Gustav", "Leila", "Ravi", "Dora", "Marius", "Inga", "Pablo", "Zara", "Samir", "Wendy", "Felix",
    "Astrid", "Bruno", "Ursula", "Kwame", "Tomoko", "Elias", "Judith", "Malik",
)
WORDS = (
    "silver", "planet", "garden", "window", "bottle", "candle", "orchid", "lantern", "harbor", "walnut", "copper",
    "meadow", "thunder", "pocket", "ribbon", "saddle", "timber", "velvet", "whistle", "anchor", "basket", "cactus",
    "dragon", "engine", "falcon", "guitar", "hammer", "island", "jungle", "kettle", "magnet", "needle", "orange",
    "pepper", "rocket", "shadow",
)
# fmt: on
_COMPASS = ("north", "east", "south", "west")
_ORDINALS = ("first", "second", "third", "fourth")

Draft = tuple[str, str]


def last_letters(rng: Random, level: int) -> Draft:
    names = rng.sample(NAMES, level + 1)
    return f'Take the last letter of every word in "{" ".join(names)}" and join them together.', _joined(names, -1)


def nth_letters(rng: Random, level: int) -> Draft:
    words, n = rng.sample(WORDS, level + 1), rng.randrange(4)
    question = f'Write down the {_ORDINALS[n]} letter of each word in "{" ".join(words)}" and put them in one string.'
    return question, _joined(words, n)


def reverse(rng: Random, level: int) -> Draft:
    """A word at first, then letters without meaning."""
    text = rng.choice(WORDS) if level == 1 else "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=2 + 2 * level))
    return f'Spell "{text}" backwards.', text[::-1]


def sorted_letters(rng: Random, level: int) -> Draft:
    text = "".join(rng.sample("abcdefghijklmnopqrstuvwxyz", 3 + level))
    return f'Put the letters of "{text}" in alphabetical order.', "".join(sorted(text))


def shift(rng: Random, level: int) -> Draft:
    word, by = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=2 + level)), 1 + level // 4
    moved = "".join(chr((ord(c) - 97 + by) % 26 + 97) for c in word)
    places = "one place" if by == 1 else "two places"
    return f'Shift each letter of "{word}" forward by {places} in the alphabet. What string do you get?', moved


def without_vowels(rng: Random, level: int) -> Draft:
    words = rng.sample(WORDS, level)
    kept = "".join(c for c in "".join(words) if c not in "aeiou")
    return f'Remove all vowels from "{" ".join(words)}" and write the letters that remain as one string.', kept


def coin(rng: Random, level: int) -> Draft:
    names, heads = rng.sample(NAMES, level + 1), True
    said = ["A coin is heads up."]
    for name in names:
        flips = rng.random() < 0.5
        heads ^= flips
        said.append(f"{name} flips the coin." if flips else f"{name} does not flip the coin.")
    return f"{' '.join(said)} Is the coin still heads up?", "yes" if heads else "no"


def lamp(rng: Random, level: int) -> Draft:
    names, lit = rng.sample(NAMES, level + 1), rng.random() < 0.5
    said = [f"A lamp is {'on' if lit else 'off'}."]
    for name in names:
        times = rng.randint(1, 1 + level)
        lit ^= times % 2 == 1
        said.append(f"{name} presses the switch {times} {'time' if times == 1 else 'times'}.")
    return f"{' '.join(said)} Is the lamp on now?", "yes" if lit else "no"


def turns(rng: Random, level: int) -> Draft:
    facing = rng.randrange(4)
    said = f"You face {_COMPASS[facing]}"
    for _ in range(level + 2):
        way, by = rng.choice((("right", 1), ("left", -1), ("around", 2)))
        facing += by
        said += f", turn {way}"
    return f"{said}. Which direction are you facing?", _COMPASS[facing % 4]


def _joined(words: Sequence[str], at: int) -> str:
    return "".join(word[at] for word in words).lower()


TEMPLATES = {
    f.__name__: f
    for f in (last_letters, nth_letters, reverse, sorted_letters, shift, without_vowels, coin, lamp, turns)
}
