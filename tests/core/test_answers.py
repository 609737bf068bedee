"""What is read from completions, type by type, and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.core.answers import Reading, extract, key_of, same
from service.core.claims import claims, plain, text_key
from service.core.numerals import canonical, numerals, spelled
from service.core.options import options
from service.core.types import AnswerSpec, AnswerType

NUMBER = AnswerSpec(AnswerType.NUMBER)
CHOICE = AnswerSpec(AnswerType.CHOICE)
BOOLEAN = AnswerSpec(AnswerType.BOOLEAN)
TEXT = AnswerSpec(AnswerType.TEXT)
FREE = AnswerSpec(AnswerType.FREE)
LABEL = AnswerSpec(
    AnswerType.LABEL, ("positive", "negative"), (("favourable", "positive"), ("unfavourable", "negative"))
)
ALL = (NUMBER, CHOICE, BOOLEAN, LABEL, TEXT, FREE)
WHERE = "Where would you find it?\nOptions: (A) bank (B) library (C) department store (D) mall (E) new york"


def key(text: str, spec: AnswerSpec, question: str = "") -> str | None:
    reading = extract(text, spec, question)
    return reading.key if reading else None


def check(cases: Mapping[str, str | None], spec: AnswerSpec, question: str = "") -> None:
    assert {text: key(text, spec, question) for text in cases} == cases


# --- number ----------------------------------------------------------------------------------------------------------


def test_where_a_number_is_stated():
    check(
        {
            r"\boxed{18}": "18",
            r"So we get $\boxed{18}$.": "18",
            r"\boxed{{18}}": "18",
            r"The answer is \boxed{18 \text{ dollars}}.": "18",
            "The answer is 18.": "18",
            "The answer is: 18": "18",
            "The answer is **18**.": "18",
            "the final answer, in dollars, is 18": "18",
            "The answer to the question is that she has 18 eggs.": "18",
            "Answer: 18": "18",
            "**Answer:** 18 dollars": "18",
            "**Answer**: 18": "18",
            "**Final Answer**\n\n18": "18",
            "The answer is:\n\n**18**\n": "18",
            "The answer is:\n\\[\n18\n\\]": "18",
            "The answer is\n$$\n18\n$$": "18",
            r"The answer is \(18\).": "18",
            "<answer>18</answer>": "18",
            "9 * 2 = 18\n#### 18": "18",
            "The answer is 16 - 3 - 4 = 9 * 2 = $18.": "18",
            "The answer is x = 5.": "5",
            "The answer is 18 (9 * 2).": "18",
            "The answer is (18).": "18",
            "The answer is 18 because 9*2 = 18.": "18",
            "The answer is 18 apples, so he wins 3 games.": "18",
            "18": "18",
            "$18": "18",
        },
        NUMBER,
    )


def test_how_a_number_is_written():
    check(
        {
            "The answer is 1,234.": "1234",
            "The answer is 1 234.": "1234",
            "The answer is 1\u202f234\u202f567.": "1234567",
            "The answer is 1'234.": "1234",
            "The answer is 1.234,56 €.": "1234.56",
            "The answer is 1.234.567": "1234567",
            "The answer is 3,5": "3.5",
            "The answer is 0,125": "0.125",
            "The answer is 1,00,000": "100000",
            r"\boxed{1{,}234}": "1234",
            "The answer is 18.00.": "18",
            "The answer is 18.50.": "18.5",
            "The answer is .5": "0.5",
            "The answer is -5.": "-5",
            "The answer is −5.": "-5",
            "The answer is negative 5": "-5",
            "The answer is -$5.50": "-5.5",
            "The answer is $-5": "-5",
            "5 - 8 = - 3": "-3",
            "The answer is -0": "0",
            "The answer is -0.00": "0",
            "The answer is $18.": "18",
            r"\boxed{\$18.50}": "18.5",
            "The answer is US$1,000,000.00": "1000000",
            "The answer is USD 500": "500",
            "The answer is Rs.500": "500",
            "The answer is 18 dollars per day.": "18",
            "The answer is 5 kg": "5",
            "The answer is 5kg": "5",
            "The answer is 3 hours.": "3",
            "The answer is 18 m^2": "18",
            "The answer is 18 cm².": "18",
            r"\boxed{18\,\text{cm}^{2}}": "18",
            "The answer is 30°": "30",
            r"The answer is 30^\circ": "30",
            "The answer is 25%.": "25",
            r"\boxed{25\%}": "25",
            "The answer is 3/4.": "0.75",
            "The answer is 1/3": "1/3",
            "The answer is 2/6": "1/3",
            "The answer is 1 1/2 hours": "1.5",
            "The answer is 1½": "1.5",
            r"\boxed{\frac{3}{4}}": "0.75",
            r"\boxed{-\dfrac{1}{2}}": "-0.5",
            r"\boxed{3\frac{1}{2}}": "3.5",
            r"\boxed{\frac12}": "0.5",
            "The answer is 1.5e3": "1500",
            "The answer is 2 x 10^3.": "2000",
            r"The answer is $2 \times 10^{3}$": "2000",
            "The answer is 2×10⁻³": "0.002",
            "The answer is 10¹²": None,
            "The answer is 3 million": "3000000",
            "The answer is $18k": "18000",
            "The answer is 2 dozen": "2",
        }
        | {"The answer is 10¹²": "10^12"},
        NUMBER,
    )


def test_numbers_in_words():
    check(
        {
            "The answer is twelve.": "12",
            "The answer is forty-two.": "42",
            "The answer is one hundred and five apples.": "105",
            "The answer is ten thousand two hundred": "10200",
            "The answer is three million": "3000000",
            "The answer is two and a half": "2.5",
            "The answer is half": "0.5",
            "The answer is three quarters": "0.75",
            "The answer is two thirds": "2/3",
            "The answer is minus seven": "-7",
            "The answer is zero": "0",
            "Twelve apples.": "12",
            "The answer is two three": None,
            "The answer is twelve apples and three pears": None,
            "The answer is anyone": None,
        },
        NUMBER,
    )


def test_the_last_statement_decides():
    check(
        {
            "The answer is 5. Wait. The answer is 6.": "6",
            r"\boxed{5} is wrong, so \boxed{6}": "6",
            "The answer is 6. I hope this answer is helpful.": "6",
            "1 + 1 = 2.\n\nThe answer is 2": "2",
        },
        NUMBER,
    )


def test_the_final_sentence_counts_only_with_one_result():
    check(
        {
            "So they have 39 pieces left.": "39",
            "32 + 42 = 74\n74 - 35 = 39 pieces": "39",
            "He needs 3 more (5 - 2 = 3).": "3",
            "The total is 18. I hope this helps!": "18",
            "1. Add 5 and 7.\n2. Total: 12": "12",
            "Step 1: 5 + 7 = 12.\nStep 2: double it": None,
            "She has 12 apples and 3 pears.": None,
            "Is it 18?": None,
            "I do not know.": None,
            "He did not get 18.": None,
            "One of them is right, I think, or so": None,
        },
        NUMBER,
    )


def test_what_is_no_number():
    check(
        {
            "": None,
            "The answer is 12 apples and 3 pears.": None,
            "The answer is 18, 20": None,
            "The answer is x = 5 or x = 3": None,
            "The answer is 5-7": None,
            "The answer is 05/01/2021": None,
            "The answer is 2021-05-01": None,
            "The answer is May 5": None,
            "The answer is 5th of May": None,
            "The answer is 10:30": None,
            "The answer is H2O": None,
            "The answer is x23": None,
            "The answer is 1,2345": None,
            "The answer is 1/0": None,
            "The answer is not 18.": None,
            "The answer is unclear.": None,
            "The answer is N.": None,
            "Is the answer 18?": None,
            "The answer is 5 hours and 30 minutes": None,
        },
        NUMBER,
    )


def test_an_answer_is_shown_as_written():
    assert extract("The answer is $1,234.50 in all.", NUMBER) == Reading("1234.5", "$1,234.50")
    assert extract("The answer is 25 % of it.", NUMBER) == Reading("25", "25 %")
    assert extract(r"\boxed{\frac{3}{4}}", NUMBER) == Reading("0.75", "3/4")


@pytest.mark.parametrize(
    ("text", "symbolic"),
    [
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}"),
        (r"The answer is \frac{\sqrt{3}}{2}.", r"\frac{\sqrt{3}}{2}"),
        ("The answer is √3/2", "√3/2"),
        ("The answer is 5π cm.", "5π"),
        ("The answer is 3 pi", "3 pi"),
        ("The answer is x+1", "x+1"),
        ("The answer is y = 2x^2 + 3", "2x^2 + 3"),
        ("The answer is 6 × 7", "6 × 7"),
        (r"The answer is $5\pi$ meters", r"5\pi"),
    ],
)
def test_expressions_are_left_to_algebra(text: str, symbolic: str):
    reading = extract(text, NUMBER)
    assert reading is not None
    assert (reading.symbolic, reading.answer) == (symbolic, symbolic)
    assert " " not in reading.key


def test_an_unfinished_completion_needs_a_complete_statement():
    def read(text: str) -> str | None:
        reading = extract(text, NUMBER, finished=False)
        return reading.key if reading else None

    assert read("So 32 + 42 = 74") is None
    assert read("The answer is 1") is None, "it may have become 18"
    assert read("The answer is 18. This is bec") == "18"
    assert read(r"\boxed{18} and th") == "18"
    assert read(r"\boxed{1") is None
    assert extract("Penguins swim. So it is true", BOOLEAN, finished=False) is None
    assert extract("The film is positive and yet", LABEL, finished=False) is None
    assert extract("(B", CHOICE, WHERE, finished=False) is None
    assert extract("yajo", TEXT, finished=False) is None


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_every_decimal_is_read_back(digits: int, places: int):
    value = Decimal(digits).scaleb(-places)
    expected = canonical(Fraction(digits, 10**places))
    for written in (f"{value:f}", f"{value:,f}", f"${abs(value):,f}"):
        sign = "" if written[0] != "$" or digits >= 0 else None
        if sign is not None:
            assert key(f"The answer is {written}.", NUMBER) == expected, written
    assert Fraction(expected) == Fraction(digits, 10**places)


@given(st.integers(-999, 999), st.integers(1, 999))
def test_every_fraction_is_read_back(top: int, bottom: int):
    expected = canonical(Fraction(top, bottom))
    assert key(f"The answer is {top}/{bottom}.", NUMBER) == expected
    sign = "-" if top < 0 else ""
    assert key(rf"\boxed{{{sign}\frac{{{abs(top)}}}{{{bottom}}}}}", NUMBER) == expected
    assert Fraction(expected) == Fraction(top, bottom)


@given(st.integers(0, 10**15 - 1))
def test_every_number_in_words_is_read_back(number: int):
    (found,) = spelled(in_words(number))
    assert found.value == number


def in_words(n: int) -> str:
    small = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split()  # noqa: SIM905
    small += ["sixteen", "seventeen", "eighteen", "nineteen"]
    tens = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
    for size, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (1000, "thousand")):
        if n >= size:
            return f"{in_words(n // size)} {name}" + (f" {in_words(n % size)}" if n % size else "")
    if n >= 100:
        return f"{small[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")
    return small[n] if n < 20 else tens[n // 10] + (f"-{small[n % 10]}" if n % 10 else "")


def test_numbers_beyond_bounds_are_not_computed():
    huge = ["9" * 10_000, "1e999999", "1e-999999", "1e" + "9" * 5000, "1" + ",000" * 3000, "1/" + "9" * 5000]
    check({f"The answer is {n}.": None for n in huge} | {f"The answer is 2 x 10^{'9' * 50}": None}, NUMBER)
    assert key("The answer is 1e100", NUMBER) == "1" + "0" * 100
    assert [n.value for n in numerals("9" * 100_000)] == [None]


# --- choice ----------------------------------------------------------------------------------------------------------


def test_options_are_read_from_the_question():
    assert options(WHERE) == {"A": "bank", "B": "library", "C": "department store", "D": "mall", "E": "new york"}
    for question in (
        "Who?\nA) Schiller\nB) Goethe",
        "Who?\n(a) Schiller\n(b) Goethe",
        "Who?\nA. Schiller\nB. Goethe\n",
        "Who? A: Schiller B: Goethe",
        "Who? a) Schiller, b) Goethe",
        "Read A. and B. first. Who?\n(A) Schiller\n(B) Goethe\n\nEnd with the letter.",
        "Who?\nOptions:\n- Schiller\n- Goethe",
    ):
        assert options(question) == {"A": "Schiller", "B": "Goethe"}, question
    assert options("Choose.\n1) digestive\n2) circulatory") == {"1": "digestive", "2": "circulatory"}
    for question in ("", "A dog (A) barks", "(B) foo (C) bar", "A friend. I agree."):
        assert options(question) == {}


def test_a_choice_is_stated():
    check(
        {
            "The answer is (B).": "B",
            "The answer is B.": "B",
            "The answer is B": "B",
            'The answer is "B"': "B",
            "The answer is b": "B",
            "The answer is option (b)": "B",
            "The answer is B because banks have doors": "B",
            "The answer is A because banks have doors": "A",
            "The answer is (B) library.": "B",
            "Answer: B. library": "B",
            "Answer: A. bank": "A",
            "**Answer: (C) department store**": "C",
            "The correct answer is **B) library**.": "B",
            r"\boxed{B}": "B",
            r"\boxed{\text{(B)}}": "B",
            "B": "B",
            "(B)": "B",
            "B)": "B",
            "B.": "B",
            "**B**": "B",
            "(B) library": "B",
            "Option B": "B",
            "option B is correct": "B",
            "The correct option is c": "C",
            "The best choice is a good one": None,
            "The best choice is (D).": "D",
            "So the correct option is D.": "D",
            "The answer is A. Wait. The answer is (C).": "C",
            "The answer is (B) library, not (D) mall.": "B",
        },
        CHOICE,
        WHERE,
    )


def test_an_options_text_is_a_choice():
    check(
        {
            "The answer is library": "B",
            "The answer is a bank.": "A",
            "The answer is A bank": "A",
            "The answer is the mall": "D",
            "The answer is department store.": "C",
            "The answer is in New York": "E",
            "So it is at a bank.": "A",
            "The answer is store": None,
            "I would choose a mall or a bank.": None,
            "It is not a bank.": None,
        },
        CHOICE,
        WHERE,
    )
    dates = "Which date?\nOptions: (A) 06/12/2021 (B) 03/11/2021 (C) 02/23/2021"
    check({"The answer is 03/11/2021.": "B", "The answer is (C) 02/23/2021": "C", "3": None}, CHOICE, dates)


def test_what_is_no_choice():
    check(
        {
            "The answer is F.": None,
            "The answer is (Z)": None,
            "The answer is A and B": None,
            "The answer is A or B.": None,
            "The answer is B, C": None,
            "The answer is not A.": None,
            "A dog barks.": None,
            "The answer is a dog": None,
            "I think so.": None,
            "None of these": None,
            "(A) bank: yes\n(B) library: no\n(E) new york - no": None,
        },
        CHOICE,
        WHERE,
    )


def test_numbered_and_unlisted_options():
    check(
        {"The answer is 2.": "2", "2": "2", "The answer is 2) circulatory": "2", "The answer is circulatory": "2"}
        | {"7": None, "The answer is B": None},
        CHOICE,
        "Choose.\n1) digestive\n2) circulatory\n3) nervous",
    )
    check({"The answer is C": "C", "The answer is Z": None, "A dog": None, "The answer is I think": None}, CHOICE)


# --- boolean ---------------------------------------------------------------------------------------------------------


def test_yes_and_no():
    check(
        {
            "The answer is yes.": "yes",
            "The answer is **no**.": "no",
            'The answer is "No".': "no",
            r"\boxed{Yes}": "yes",
            "Yes": "yes",
            "No, it is not.": "no",
            "No. They can't.": "no",
            "**No**": "no",
            "The answer is yes, because no one minds": "yes",
            "So, yes.": "yes",
            "True": "yes",
            "False.": "no",
            "This statement is false.": "no",
            "It is not true.": "no",
            "The answer is not true.": "no",
            "Penguins are birds. So the statement is true.": "yes",
            "Yes, they can. Therefore, the answer is no.": "no",
            "Yes, penguins swim. They like cold. Therefore, no, they would not.": "no",
            "No, because penguins like cold.\nThey live on ice.": "no",
            "No one knows.": None,
            "No doubt they do.": None,
            "The answer is yes or no.": None,
            "Yes and no": None,
            "The answer is yes/no": None,
            "Is it true?": None,
            "The answer is unclear": None,
            "Notably, none": None,
            "": None,
        },
        BOOLEAN,
    )


# --- label -----------------------------------------------------------------------------------------------------------


def test_labels():
    check(
        {
            "positive": "positive",
            "**Negative**": "negative",
            "The answer is positive.": "positive",
            "The answer is FAVOURABLE": "positive",
            "The answer is unfavourable.": "negative",
            "The sentiment is negative": "negative",
            "The sentiment is positive. It praises the acting.": "positive",
            "It has positive parts. Overall it is negative.": "negative",
            "The answer is positive, not negative.": "positive",
            "The answer is negative rather than positive": "negative",
            "It is more negative than positive": "negative",
            "It is not positive but negative": "negative",
            "The answer is positive, although there are negative aspects.": "positive",
            "not positive": None,
            "The answer is not positive.": None,
            "The review isn't very positive.": None,
            "neither positive nor negative": None,
            "both positive and negative": None,
            "The answer is positive or negative": None,
            "positively non-positive": None,
            "": None,
        },
        LABEL,
    )


def test_longer_labels_win_over_those_they_contain():
    spec = AnswerSpec(AnswerType.LABEL, ("positive", "very positive", "c++", "c"))
    check({"It is very positive.": "very positive", "It is positive.": "positive", "The answer is C++.": "c++"}, spec)


# --- text ------------------------------------------------------------------------------------------------------------


def test_letters_spelled_out_are_one_word():
    spellings = [
        "yajo",
        "YAJO",
        "y a j o",
        "y-a-j-o",
        "Y, A, J, O",
        '"yajo"',
        "'yajo'",
        "**yajo**",
        "y + a + j + o = yajo",
    ]
    check({f"The answer is {s}.": "yajo" for s in spellings}, TEXT)
    check(dict.fromkeys(spellings, "yajo"), TEXT)
    check({r"\boxed{\text{yajo}}": "yajo", 'The letters make "yajo".': "yajo", "Answer:\n\nyajo": "yajo"}, TEXT)


def test_short_text():
    check(
        {
            "The answer is the Eiffel Tower.": "eiffel tower",
            "eiffel  TOWER": "eiffel tower",
            "The answer is yajo because the letters say so": "yajo",
            "The answer is 18.00": "18",
            "The answer is 1,234": "1234",
            "The answer is 007": "007",
            "The answer is 05/01/2021.": "05/01/2021",
            "The answer is don't": "don't",
            "The answer is A": "a",
            "Yes, the coin is still heads up.": "yes",
            "The answer is no, it is not.": "no",
            "I do not know what to say about this at all": None,
            "The answer is " + "word " * 50: None,
            "": None,
            "...": None,
        },
        TEXT,
    )


def test_free_text_has_no_answer():
    check({"The answer is 18.": None, "yes": None}, FREE)


# --- comparing with gold ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "gold", "spec", "question", "equal"),
    [
        ("$18.00", "18", NUMBER, "", True),
        ("1,234 dollars", "1234", NUMBER, "", True),
        ("18", "19", NUMBER, "", False),
        ("eighteen", "18", NUMBER, "", True),
        ("?", "?", NUMBER, "", False),
        ("(B) library", "B", CHOICE, WHERE, True),
        ("library", "B", CHOICE, WHERE, True),
        ("A", "B", CHOICE, WHERE, False),
        ("Yes", "yes", BOOLEAN, "", True),
        ("true", "yes", BOOLEAN, "", True),
        ("Positive", "positive", LABEL, "", True),
        ("y a j o", "yajo", TEXT, "", True),
        ("The Beatles", "beatles", TEXT, "", True),
        ("a rather long gold answer of many words", "A rather long gold answer of many words.", TEXT, "", True),
        ("yes", "yes", FREE, "", False),
    ],
)
def test_same(a: str, gold: str, spec: AnswerSpec, question: str, equal: bool):
    assert same(a, gold, spec, question) is equal
    assert same(gold, a, spec, question) is equal


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.type.value)
@given(text=st.text(max_size=60))
def test_a_key_is_its_own_key(spec: AnswerSpec, text: str):
    """Keys are canonical: reading a number, choice, yes/no or label key again gives the same key."""
    reading = extract(f"The answer is {text}.", spec, WHERE)
    if reading and reading.symbolic is None and spec is not TEXT:
        assert key_of(reading.key, spec, WHERE) == reading.key


# --- any input -------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            "the answer is ",
            "\\boxed{",
            "{",
            "}",
            "####",
            "=",
            "1,",
            "1 ",
            "9",
            "1/",
            "-",
            ".",
            "e9",
            "\\frac",
            "\\text{",
        ),
        *("*", "\n", "(A)", "A) ", "no ", "not ", "true ", "positive ", "twenty ", "and ", '"', "$", "^{", "½²"),
        "options:\n- ",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=6), st.integers(1, 100_000))
@example(["\\boxed{"], 20_000)
@example(["answer "], 20_000)
@example(["1,"], 60_000)
@example(["1 "], 60_000)
@example(["twenty and a "], 10_000)
@example(["no ", "so "], 30_000)
@example(["options:\n", "\n\n"], 20_000)
@example(["\n- a"], 30_000)
@example(["(A) a "], 30_000)
def test_hostile_text_is_read_in_bounded_time(pieces: list[str], times: int):
    unit = "".join(pieces)
    text = (unit * (times // len(unit) + 1))[:100_000]
    for spec in ALL:
        for candidate in (text, f"The answer is {text}", f"{text} The answer is {unit}.", f"\\boxed{{{text}}}"):
            extract(candidate, spec, text)
            extract(candidate, spec, WHERE, finished=False)
    text_key(text)
    plain(text)
    options(text)


@given(st.text())
def test_any_text_can_be_read(text: str):
    for spec in ALL:
        for question in ("", text, WHERE):
            reading = extract(text, spec, question)
            assert reading is None or (reading.key and reading.answer)
    assert all(isinstance(c, str) for c in claims(text))
