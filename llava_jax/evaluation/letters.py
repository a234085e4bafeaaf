"""Reads the letter of an option, or a short value, out of a free answer, as lmms-eval does.

Oddities are kept: the published scores depend on them.
"""

import random
import re
import string
from collections.abc import Callable, Mapping, Sequence

# Where an answer may give its letter, from the surest to the least sure form; the number orders
# them. Each finds the last position of a letter in the text, or -1.
_FORMS: tuple[tuple[int, Callable[[str, str], int]], ...] = (
    (10, lambda text, letter: 0 if _starts_with(text.strip(), letter) else -1),
    (9, lambda text, letter: len(text) - 1 if _starts_with(text.strip()[::-1], letter) else -1),
    (7, lambda text, letter: _after_phrase(text, letter)),
    (6, lambda text, letter: text.rfind(f"({letter})")),
    (5, lambda text, letter: text.rfind(f"{letter}.")),
    (4, lambda text, letter: text.rfind(f"{letter}:")),
    (3, lambda text, letter: text.rfind(f"{letter})")),
    (2, lambda text, letter: text.rfind(f"{letter} ")),
)
PHRASES = tuple(
    f"{article}{kind}{noun} is"
    for article in ("", "the ")
    for kind, noun in [
        ("", "answer"), ("correct ", "answer"), ("best ", "answer"), ("correct ", "option"),
        ("best ", "option"), ("", "choice"), ("correct ", "choice"),
    ]
) + ("i choose", "i select", "i pick", "my answer is", "my choice is",
     "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは")  # fmt: skip


def option_letter(text: str, letters: str = "ABCD") -> str:
    """The letter that lmms-eval extracts for RealWorldQA and MMStar, or an empty text.

    "The answer is (B)." -> "B". The surest form wins, and of that the last place in the text.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    text = f" {text} "
    found = [(rank, find(text, letter), letter) for rank, find in _FORMS for letter in letters]
    found = [place for place in found if place[1] >= 0]
    if not found:  # any such letter anywhere, even inside a word
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda place: place[:2])[2] if found else ""


def _starts_with(text: str, letter: str) -> bool:
    """Whether the letter comes first and is not part of a word."""
    return text.startswith(letter) and not text[1:2].isalpha()


def _after_phrase(text: str, letter: str) -> int:
    """The last place where the letter is the next after one of PHRASES; -1 if nowhere."""
    lower, places = text.lower(), [-1]
    for phrase in PHRASES:
        if phrase in lower:
            places.append(text.find(letter, lower.find(phrase) + len(phrase)))
    return max(places)


def leading_letter(text: str) -> str:
    """The letter before a full stop at the start, else the text itself: "A. cat" -> "A"."""
    match = re.match(r"\s*([A-Z])\.", text)
    return match[1] if match else text


def bare(text: str) -> str:
    """Lower case without punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def mmmu_letter(text: str, options: Mapping[str, str], seed: str) -> str:
    """The letter that MMMU's rules read; where they find none, one drawn by `seed`.

    Args:
      options: text of each option by its letter.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    forms = [
        ({k for k in options if f"({k})" in text}, lambda k: text.rfind(f"({k})")),
        ({k for k in options if f"{k} " in text}, lambda k: text.rfind(f" {k} ")),
        ({k for k in options if f"{k}." in text}, lambda k: text.rfind(f" {k} ")),
    ]
    if len(text.split()) > 5:
        lower = text.lower()
        named = {k for k, option in options.items() if option.lower() in lower}
        forms.append((named, lambda k: lower.rfind(options[k].lower())))
    for letters, place in forms:
        if letters:
            return max((k for k in options if k in letters), key=place)
    return random.Random(seed).choice(list(options))


def mmmu_values(text: str) -> list[str | float]:
    """Texts and numbers that an open MMMU answer may mean.

    "So the result is 12 m." -> ["12 m", 12.0].
    """
    values: list[str | float] = []
    parts = _key_parts(text)
    for value in [*parts, *(number for part in parts for number in _numbers(part))]:
        values += mmmu_normalize(value)
    return list(dict.fromkeys(values))


_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def _key_parts(text: str) -> list[str]:
    """Of each line the shortest text behind an indicator of a result, else the whole answer."""
    whole = text.strip().strip(".").lower()
    lines = re.split(r"\.\s(?=[A-Z])|\n", whole)  # in lower case only line breaks split
    parts = []
    for i, line in enumerate(lines):
        marks = _INDICATORS + (("=",) if i == len(lines) - 1 else ())
        tails = [line.split(mark)[-1].strip() for mark in marks if mark in line]
        if tails and (tail := _shortest(tails)) not in tuple(":,.!?;'") and tail:
            parts.append(tail)
    return parts or [whole]


def _shortest(tails: Sequence[str]) -> str:
    """The shortest text, with MMMU's oddity that an empty one gives way to whatever follows it."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def _numbers(text: str) -> list[str]:
    """Numbers with commas, in scientific notation, and plain ones."""
    return [
        *re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text),
        *re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text),
        *re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text),
    ]


def mmmu_normalize(text: str) -> list[str | float]:
    """A number rounded to two places, or a text in lower case; one character with a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_open_is_right(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is among the numbers or inside the texts of an open answer."""
    wanted = [value for answer in answers for value in mmmu_normalize(answer)]
    for value in mmmu_values(text):
        if isinstance(value, str):
            if any(isinstance(w, str) and w in value for w in wanted):
                return True
        elif value in wanted:
            return True
    return False
