"""The text rules of the VQA server, each oddity by hand, and the accuracies over ten answers."""

import pytest

from llava_jax.evaluation.answer_accuracy import (
    m4c_accuracy,
    normalize_answer,
    soft_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    "text, expected",
    [
        (" The Red Car\n", "red car"),
        ("a\tcat and an apple", "cat and apple"),
        ("two", "2"),
        ("None", "0"),  # a number, says the server
        ("eleven", "eleven"),
        ("1,000?", "1000"),
        ("3.5", "3.5"),
        ("5.", "5"),
        (".5", ".5"),
        ("U.S.A.", "usa"),
        ("dog's", "dog 's"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # with both apostrophes lost it is in no table
        ("shes", "shes"),
        ("lets", "lets"),
        ("Im", "im"),  # the table has it with a capital, after everything is lower case
        ("somebody'd", "somebodyd"),
        ("oclock", "o'clock"),
        ("red/blue", "red blue"),  # punctuation inside a word: a space
        ("red / blue", "red blue"),  # next to a space: nothing, then words are joined again
        ("a-b c- d", "ab c d"),  # next to a space anywhere, it is dropped everywhere
        ("$5 (five)", "$5 5"),
        ("isn't it?", "isn't it"),
        ("", ""),
    ],
)
def test_answers_are_cleaned_as_the_server_does(text, expected):
    assert normalize_answer(text) == expected


def test_at_most_32_full_stops_are_removed():
    assert normalize_answer("x." * 40) == "x" * 32 + "x." * 8


def test_soft_accuracy_leaves_each_person_out_once():
    # Three say yes: 3 of the 10 are left with two others (2/3), 7 with three (1).
    answers = ["yes"] * 3 + ["no"] * 7
    assert soft_accuracy("yes", answers) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert soft_accuracy("yes", ["yes"] + ["no"] * 9) == pytest.approx(9 * (1 / 3) / 10)
    assert soft_accuracy("yes", ["yes"] * 2 + ["no"] * 8) == pytest.approx(
        (2 * 1 / 3 + 8 * 2 / 3) / 10
    )
    assert soft_accuracy("no", answers) == 1
    assert soft_accuracy("maybe", answers) == 0


def test_textvqa_cleans_both_sides():
    assert m4c_accuracy("The Two dogs.", ["2 dogs"] * 10) == 1
    assert m4c_accuracy("nokia", ["Nokia"] * 4 + ["a phone"] * 6) == 1


def test_vqav2_cleans_only_where_people_differ():
    assert vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1
    assert vqa_accuracy("2", ["two"] * 10) == 0
    assert vqa_accuracy("yes", ["yes "] * 10) == 1


def test_a_number_with_two_commas_is_none_for_the_server():
    people = ["1,,000"] * 9 + ["x"]
    assert m4c_accuracy("1000", people) == 1
    assert vqa_accuracy("1000", people) == 0 and vqa_accuracy("1 000", people) == 1
