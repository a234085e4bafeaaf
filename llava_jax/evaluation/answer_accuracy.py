"""Accuracy of a short answer against ten people's answers, and the normalisation before it.

The rules are those of the VQA evaluation server, https://github.com/GT-Vision-Lab/VQA, with all
their oddities: the published numbers depend on them.
"""

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        ["none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
    for word in words.split()
}
# Words whose missing apostrophe is restored. The server's table also has "let's", "she's" and
# words with capitals, which can never match.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
APOSTROPHES = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # reversed in the server's table

_COMMA_IN_NUMBER = re.compile(r"\d,\d")  # the server's pattern: one comma only
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the server passes the flag re.UNICODE as the count


def normalize_answer(text: str) -> str:
    """The form in which the EvalAI server and M4C compare answers, and LLaVA-1.5 submits them.

    Lower case, without commas, question marks, articles and most punctuation, "'s" as a word,
    small numbers as digits, apostrophes restored: "The two dogs' toys?" -> "2 dogs' toys".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return strip_articles(strip_punctuation(text))


def strip_punctuation(text: str) -> str:
    """Removes a mark that is next to a space anywhere in the text; writes a space for others."""
    result = text
    comma = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if next_to_space or comma else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED)


def strip_articles(text: str) -> str:
    """Lower-case words without articles, numbers up to ten as digits, apostrophes restored."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Agreement with people: min(1, matching answers / 3), averaged over leaving each one out."""
    matches = [reference == answer for reference in references]
    return sum(min(1.0, (sum(matches) - m) / 3) for m in matches) / len(matches)


def m4c_accuracy(answer: str, references: Sequence[str]) -> float:
    """TextVQA's metric, from M4C: answer and references are always normalised."""
    return soft_accuracy(normalize_answer(answer), [normalize_answer(r) for r in references])


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQAv2's metric: texts are normalised only if the people's answers are not all identical."""
    answer, *references = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *references)
    )
    if len(set(references)) > 1:
        answer = strip_articles(strip_punctuation(answer))
        references = [strip_articles(strip_punctuation(text)) for text in references]
    return soft_accuracy(answer, references)
