"""Canaries: every computed answer is right, read as what it is, balanced, and asked in the words of its own task."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import groupby
from random import Random

import pytest

from service.core.answers import extract
from service.core.options import options
from service.core.types import AnswerSpec, AnswerType
from service.errors import InvalidRequest
from service.tasks.canaries import LEVELS, SPECS, TEMPLATES, CanaryItem, generate, next_level, read_canaries
from service.tasks.catalogue import load_catalogue
from service.tasks.classify import Classifier
from tests.tasks import canary_solvers

PER_LEVEL = 150
EVERY = [(task, name) for task, templates in TEMPLATES.items() for name in templates]


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[CanaryItem]]:
    """Items of every task, PER_LEVEL of each level."""
    return {task: [item for level in range(1, LEVELS + 1) for item in batch(task, level)] for task in TEMPLATES}


def batch(task: str, level: int) -> list[CanaryItem]:
    return generate(task, level=level, count=PER_LEVEL, rng=Random(f"{task}{level}"))


def test_there_are_many_templates_for_tasks_of_the_catalogue():
    tasks = load_catalogue().tasks
    assert {task: SPECS[task] for task in TEMPLATES} == {task: tasks[task].answer for task in TEMPLATES}
    assert len(TEMPLATES["math_word_problem"]) >= 12
    assert all(len(templates) >= 6 for templates in TEMPLATES.values())


@pytest.mark.parametrize(("task", "name"), EVERY)
def test_every_answer_is_right(drawn, task, name):
    items = [item for item in drawn[task] if item.template == name]
    assert {item.level for item in items} == set(range(1, LEVELS + 1))
    wrong = [
        (item, solved) for item in items if str(solved := getattr(canary_solvers, name)(item.question)) != item.answer
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "form", ["The answer is {}.", "Some steps first.\n\nThe answer is {}.", "**Answer:** {}", "{}"]
)
@pytest.mark.parametrize("task", TEMPLATES)
def test_the_right_answer_in_a_usual_form_is_recognised(drawn, task, form):
    for item in drawn[task]:
        reading = extract(form.format(item.answer), SPECS[task], item.question)
        assert reading is not None, item
        assert reading.key == item.key, item


def test_options_are_recognised_by_label_in_parentheses_and_by_text(drawn):
    for item in drawn["choice"]:
        shown = options(item.question)
        for said in (f"The answer is ({item.answer}).", f"The answer is ({item.answer}) {shown[item.answer]}."):
            reading = extract(said, SPECS["choice"], item.question)
            assert reading is not None, item
            assert reading.key == item.key, item


def test_another_answer_is_not_taken_for_the_right_one(drawn):
    for item in drawn["math_word_problem"]:
        reading = extract(f"The answer is {int(item.answer) + 1}.", SPECS[item.task], item.question)
        assert reading is not None
        assert reading.key != item.key


def test_no_question_holds_its_own_open_answer(drawn):
    for item in drawn["math_word_problem"] + drawn["symbolic"]:
        if item.key not in ("yes", "no"):
            assert item.answer.lower() not in item.question.lower(), item
    for item in drawn["yes_no"]:
        assert not re.search(r"\byes\b", item.question.lower()), item


def test_yes_and_no_are_equally_frequent(drawn):
    for name in ("coin", "lamp"):
        assert_balanced(item for item in drawn["symbolic"] if item.template == name)
    for _, items in groupby(sorted(drawn["yes_no"], key=lambda i: i.template), key=lambda i: i.template):
        assert_balanced(items)
    for _, items in groupby(drawn["yes_no"], key=lambda i: i.level):
        assert_balanced(items)


def assert_balanced(items) -> None:
    """Within four standard errors of one half."""
    answers = Counter(item.answer for item in items)
    total = answers["yes"] + answers["no"]
    assert total == answers.total()
    assert abs(answers["yes"] - total / 2) < 4 * (total / 4) ** 0.5, answers


def test_the_right_option_is_at_any_place_equally_often(drawn):
    by_size: dict[int, Counter[str]] = {}
    for item in drawn["choice"]:
        by_size.setdefault(len(options(item.question)), Counter())[item.answer] += 1
    assert set(by_size) <= {3, 4, 5}
    for size, answers in by_size.items():
        expected = answers.total() / size
        if expected >= 10:
            chi2 = sum((answers[chr(65 + i)] - expected) ** 2 / expected for i in range(size))
            assert chi2 < 23.5, answers  # 1e-4 with 4 degrees of freedom


@pytest.mark.parametrize("name", ["next_number", "clock"])
def test_the_middle_option_is_no_better_guess(name):
    rng, ranks = Random(3), Counter[float]()
    for _ in range(600):
        question, answer = TEMPLATES["choice"][name](rng, 3)
        shown = {letter: [int(n) for n in re.findall(r"\d+", text)] for letter, text in options(question).items()}
        ranks[sorted(shown.values()).index(shown[answer]) / (len(shown) - 1)] += 1
    assert max(ranks.values()) < 0.35 * ranks.total()


@pytest.mark.parametrize("task", TEMPLATES)
def test_the_classifier_sends_them_to_their_task(drawn, task):
    classifier = Classifier.build(load_catalogue())
    sent = [classifier.classify(item.question).task == task for item in drawn[task]]
    assert sum(sent) / len(sent) >= 0.95


@pytest.mark.parametrize("task", TEMPLATES)
def test_higher_levels_are_longer(drawn, task):
    words = [sum(len(i.question) for i in drawn[task] if i.level == level) for level in (1, LEVELS)]
    assert words[0] < words[1]


def test_a_seed_gives_the_same_items_and_another_seed_others():
    first, again, other = (generate("symbolic", level=3, count=40, rng=Random(seed)) for seed in (1, 1, 2))
    assert first == again
    assert len({i.id for i in first} & {i.id for i in other}) <= 2  # the easiest templates have few questions
    assert len({i.id for i in first}) == len({i.question for i in first}) == 40


def test_templates_take_turns():
    items = generate("math_word_problem", level=2, count=45, rng=Random(4))
    assert set(Counter(i.template for i in items).values()) == {3}


def test_templates_that_run_out_of_questions_leave_the_others():
    items = generate("symbolic", level=1, count=600, rng=Random(5))
    assert len({i.question for i in items}) == 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "sentiment"}, "task 'sentiment' has no canary templates"),
        ({"level": 0}, "level must be from 1 to 5, not 0"),
        ({"level": 6}, "level must be from 1 to 5, not 6"),
        ({"count": -1}, "count must be at least 0, not -1"),
    ],
)
def test_impossible_requests_are_named(arguments, message):
    asked = {"task": "choice", "level": 1, "count": 3, **arguments}
    with pytest.raises(InvalidRequest, match=message):
        generate(asked.pop("task"), rng=Random(0), **asked)


def test_the_level_follows_the_accuracy():
    assert next_level(3, 19, 20) == 4
    assert next_level(3, 5, 20) == 2
    assert next_level(3, 12, 20) == 3
    assert next_level(1, 0, 20) == 1
    assert next_level(5, 20, 20) == 5
    assert next_level(3, 10, 10) == 3  # too few to tell
    with pytest.raises(ValueError, match=r"right must be from 0 to asked \(3\), not 4"):
        next_level(1, 4, 3)
    with pytest.raises(ValueError, match="level must be from 1 to 5, not 9"):
        next_level(9, 1, 3)


@pytest.mark.parametrize("start", [1, 5])
def test_the_staircase_settles_where_a_model_is_neither_always_right_nor_always_wrong(start):
    rng, able, level, seen = Random(6), (0.98, 0.9, 0.6, 0.2, 0.02), start, []
    for _ in range(60):
        level = next_level(level, sum(rng.random() < able[level - 1] for _ in range(32)), 32)
        seen.append(level)
    assert Counter(seen[5:])[3] > 50


TASKS = {
    **SPECS,
    "sentiment": AnswerSpec(AnswerType.LABEL, ("positive", "negative")),
    "general": AnswerSpec(AnswerType.FREE),
}


def line(**fields) -> str:
    return json.dumps({"task": "sentiment", "question": "a dull film", "answer": "negative", **fields})


def test_users_bring_their_own():
    text = "\n".join((line(), "", line(task="choice", question="Pick: (A) a cat (B) a dog", answer="b", id="mine"), ""))
    negative, second = read_canaries(text, TASKS)
    assert (negative.key, negative.template, negative.level) == ("negative", "user", 0)
    assert (second.task, second.key) == ("choice", "B")
    assert negative.id.startswith("canary-sentiment-")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "mine.jsonl, line 2: no JSON"),
        ("[1]", r"mine.jsonl, line 2: must be a JSON object, not \[1\]"),
        ('{"task": "sentiment", "question": "so so"}', "line 2: field answer is missing"),
        (line(answer=3), "line 2: field answer: must be text that is not empty, not 3"),
        (line(question=" "), "line 2: field question: must be text that is not empty, not ' '"),
        (line(question="x" * 20_001), "line 2: field question: 20001 characters are more than 20000"),
        (line(task="poetry"), "line 2: field task: 'poetry' must be one of math_word_problem, symbolic"),
        (line(task="general"), "line 2: field task: 'general' must be one of"),
        (line(question="b", answer="lukewarm"), "line 2: field answer: 'lukewarm' cannot be read .* of type label"),
        (line(), "line 2: question 'a dull film' is there already"),
        ("[" * 100_000, "line 2: no JSON"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(bad, message):
    with pytest.raises(InvalidRequest, match=message):
        read_canaries(f"{line()}\n{bad}\n", TASKS, "mine.jsonl")
