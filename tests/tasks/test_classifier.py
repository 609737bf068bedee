"""The classifier on requests that are in nobody's examples: our own, and research sets where they lie beside us."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest

from service.bench.classify import bench_classifier, confusion_table
from service.errors import InvalidRequest
from service.tasks import classify
from service.tasks.catalogue import GENERAL, load_catalogue, parse_task
from service.tasks.classify import MIN_EXAMPLES, REJECT_BELOW, Classifier, embed

DATA = Path(__file__).parents[1] / "data"
RESEARCH_SETS = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.build(load_catalogue())


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").split("\n") if line]


def generated() -> Iterator[tuple[str, str]]:
    """Small questions made by a program: (task, question)."""
    random = Random(7)
    things, people = ["stamps", "shells", "tiles", "candles"], ["Iris", "Tomas", "Yusuf", "Greta"]
    words = ["marble", "kettle", "ribbon", "copper", "shadow", "violet"]
    for thing, who in product(things, people):
        a, b = random.randint(12, 60), random.randint(3, 11)
        yield (
            "math_word_problem",
            f"{who} has {a} {thing}, buys {b} more and loses {a // 3}. How many {thing} are left?",
        )
        three = " ".join(random.sample(words, 3))
        yield "symbolic", f'Take the last letter of each word in "{three}" and concatenate them.'
        flips = " ".join(f"{p} {random.choice(['flips', 'does not flip'])} the coin." for p in people)
        yield "symbolic", f"A coin is heads up. {flips} Is the coin still heads up?"
        options = " ".join(f"({x}) {w}" for x, w in zip("ABCD", random.sample(words, 4), strict=True))
        yield "choice", f"Which of these did {who} put next to the {thing}?\nOptions: {options}"
        yield "yes_no", f"Would {thing} melt in the {random.choice(['sun', 'oven', 'freezer'])}?"
        yield (
            "sentiment",
            f"Is this review positive or negative? The {thing} arrived {random.choice(['late', 'early'])}.",
        )


def test_generated_questions_go_to_their_task(classifier: Classifier) -> None:
    wrong = [(task, text) for task, text in generated() if classifier.classify(text).task != task]
    assert wrong == []


def test_questions_of_other_kinds_go_to_their_task(classifier: Classifier) -> None:
    found = [(row, classifier.classify(row["question"])) for row in rows("in_domain.jsonl")]
    wrong = [(row["question"], f.task) for row, f in found if f.task != row["task"]]
    assert len(wrong) <= 0.05 * len(found), wrong


def test_nine_in_ten_out_of_domain_requests_are_rejected(classifier: Classifier) -> None:
    requests = rows("out_of_domain.jsonl")
    taken = [(r["question"], classifier.classify(r["question"]).task) for r in requests]
    taken = [(question, task) for question, task in taken if task != GENERAL]
    assert len(requests) == 200
    assert len(taken) <= 20, taken


def test_test_requests_are_not_examples() -> None:
    examples = {x for task in load_catalogue().tasks.values() for x in task.examples}
    for name in ("in_domain.jsonl", "out_of_domain.jsonl"):
        assert examples.isdisjoint(row["question"] for row in rows(name))


def test_a_bare_review_and_an_instructed_one_are_both_sentiment(classifier: Classifier) -> None:
    review = "The acting is superb and the story moved me to tears."
    for text in (review, review.lower().replace(".", " ."), f"Is this review positive or negative? {review}"):
        assert classifier.classify(text).task == "sentiment"


def test_the_same_catalogue_gives_the_same_classifier(classifier: Classifier) -> None:
    again = Classifier.build(load_catalogue())
    assert np.array_equal(again.weights, classifier.weights)
    assert again.classify("Is ice cold?") == classifier.classify("Is ice cold?")


def test_scores_are_probabilities_and_weak_leaders_are_rejected(classifier: Classifier) -> None:
    for row in rows("out_of_domain.jsonl") + rows("in_domain.jsonl"):
        found = classifier.classify(row["question"])
        assert sum(found.scores.values()) == pytest.approx(1, abs=1e-5)
        assert found.probability == found.scores[found.task]
        leader = max(found.scores, key=found.scores.__getitem__)
        assert found.rejected == (leader != GENERAL and found.scores[leader] < REJECT_BELOW)
        assert found.task == (GENERAL if found.rejected else leader)


@pytest.mark.parametrize("text", ["", " \n\t", "😂🎉", "\ud800 x", "\0", "a" * 10**6, "word " * 200_000, "?" * 10**6])
def test_any_text_gets_an_answer(classifier: Classifier, text: str) -> None:
    found = classifier.classify(text)
    assert found.task in classifier.tasks
    assert np.isfinite(found.probability)


def test_nothing_at_all_is_general(classifier: Classifier) -> None:
    assert classifier.classify("  ").task == GENERAL
    assert classifier.classify("").probability == 1.0


def ticket_task(count: int) -> dict[str, object]:
    examples = [
        "Ticket: the invoice of March was charged twice. Department?",
        "Ticket: the app closes when I open the camera. Department?",
        "Ticket: my parcel went to the wrong street. Department?",
        "Ticket: I cannot log in since the update. Department?",
    ]
    return {
        "id": "triage",
        "description": "Department of a ticket.",
        "examples": examples[:count],
        "anchors": {"default": "Name the department. End with 'The answer is X.'"},
        "answer": {"type": "label", "labels": ["billing", "technical", "shipping"]},
    }


def test_a_task_with_a_few_examples_is_classified_into_without_harm_to_others() -> None:
    classifier = Classifier.build(load_catalogue().with_task(parse_task(ticket_task(4))))
    assert classifier.classify("Ticket: the courier left the box in the rain. Department?").task == "triage"
    assert classifier.classify("Did Galileo own a telescope?").task == "yes_no"
    assert classifier.classify("Write a letter to my bank.").task == GENERAL


def test_a_task_with_too_few_examples_is_reached_by_name_only() -> None:
    classifier = Classifier.build(load_catalogue().with_task(parse_task(ticket_task(MIN_EXAMPLES - 1))))
    assert "triage" not in classifier.tasks


def test_a_catalogue_of_general_alone_takes_everything(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("tasks: []")
    classifier = Classifier.build(load_catalogue(file))
    assert classifier.classify("What is 3 + 4?").task == GENERAL


def test_our_embedding_is_wordllamas() -> None:
    import wordllama

    theirs = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    text = "the quick brown fox, and the lazy dog"
    assert np.allclose(embed(text), theirs.embed(text, norm=True)[0], atol=1e-5)


def test_bench_reports_figures(tmp_path: Path) -> None:
    report = bench_classifier([DATA / "in_domain.jsonl"], DATA / "out_of_domain.jsonl", last=30)
    assert report["sets"]["in_domain"]["questions"] == 30
    assert report["ood"]["requests"] == 200
    assert {"dev", "held_out"} <= set(report["ood"])
    assert sum(sum(row.values()) for row in report["confusion"].values()) == 230
    assert confusion_table(report["confusion"]).count("\n") == len(report["confusion"]) + 1
    json.dumps(report)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "x", "task": "nope"}\n')
    with pytest.raises(InvalidRequest, match=r"bad\.jsonl, line 1: field task: there is no task 'nope'"):
        bench_classifier([bad])


@pytest.mark.skipif(not RESEARCH_SETS.is_dir(), reason="the research sets are not in the repository")
def test_held_out_questions_of_research_sets() -> None:
    report = bench_classifier(sorted(RESEARCH_SETS.glob("*.jsonl")))
    assert all(s["accuracy"] >= 0.95 for s in report["sets"].values()), report["sets"]
    assert report["average"] >= 0.98


def test_words_are_tokenised_alone_as_in_their_text():
    """The shortcut that makes embedding fast: per-word ids are the text's ids."""
    tokenizer, _ = classify._wordllama()
    for path in (DATA / "in_domain.jsonl", DATA / "out_of_domain.jsonl"):
        for line in path.read_text().splitlines():
            text = " ".join(json.loads(line)["question"].lower().split())
            ids = [i for word in text.split() for i in classify._word_ids(word)]
            assert ids == tokenizer.encode(text, add_special_tokens=False).ids
