"""The records of tests/data and the tokenizers of tests/text."""

from tests.data.conftest import data_set  # noqa: F401
from tests.data.conftest import run as command  # noqa: F401
from tests.text.conftest import sentencepiece_folder, tokenizer_folder, tokenizers  # noqa: F401
