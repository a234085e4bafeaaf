"""Letters and values read in free answers, oddities included."""

import pytest

from llava_jax.evaluation.letters import (
    bare,
    leading_letter,
    mmmu_letter,
    mmmu_open_is_right,
    mmmu_values,
    option_letter,
)


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) a leaf", "B"),
        ("The answer is (B).", "B"),
        ("A is wrong, so the answer is C", "A"),  # a letter at the start is the surest
        ("It cannot be (A) or (B)", "B"),  # of equal forms the last
        ("I pick Blue", "B"),  # after a phrase even inside a word
        ("답은 D 입니다", "D"),
        ("maybe Cats", "C"),  # nothing better: any such letter
        ("none", ""),
        ("", ""),
    ],
)
def test_option_letters_of_lmms_eval(text, letter):
    assert option_letter(text) == letter


def test_a_leading_letter_needs_its_full_stop():
    assert [leading_letter(t) for t in (" B. cat", "B", "Bcat.", "(B).")] == [
        "B", "B", "Bcat.", "(B)."]  # fmt: skip
    assert bare("(B).") == "b"


OPTIONS = {"A": "cat", "B": "a blue dog", "C": "none"}


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("(A) or (C)", "C"),
        ("C.", "C"),
        ("A dog", "A"),
        ("I think that this is a blue dog", "B"),  # an option's text, in six words or more
        ("I see: A but rather B is right", "B"),
    ],
)
def test_mmmu_letters(text, letter):
    assert mmmu_letter(text, OPTIONS, "seed") == letter


def test_an_unreadable_mmmu_answer_draws_a_letter_by_its_seed():
    drawn = [mmmu_letter("no idea", OPTIONS, f"{i}/q") for i in range(60)]
    assert set(drawn) == set(OPTIONS)
    assert drawn == [mmmu_letter("no idea", OPTIONS, f"{i}/q") for i in range(60)]


@pytest.mark.parametrize(
    "text, answers, right",
    [
        ("12", ["12.0"], True),
        ("So the result is 1,234 m.", ["1234"], True),
        ("x = 3 and y = 4", ["4"], True),
        ("The answer is blue cheese", ["Blue"], True),  # contained is enough
        ("the", ["e"], False),  # one character needs a space next to it
        ("it is e now", ["e"], True),
        ("13", ["12"], False),
    ],
)
def test_open_mmmu_answers(text, answers, right):
    assert mmmu_open_is_right(text, answers) is right


def test_values_are_those_behind_the_last_indicator():
    assert mmmu_values("Thus we get 7 m\nso x = 2e3") == ["we get 7 m", 2000.0, 7.0, 3.0]
    assert mmmu_values("So the result is 1,234 m.") == ["1,234 m", 1234.0, 234.0]
