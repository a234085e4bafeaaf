"""The fixed set of shapes that requests are padded to, so that compiled functions are reused."""

SMALLEST_LENGTH = 16
SMALLEST_CACHE = 64
ROWS = (1, 4, 16, 64)  # prompts read at once
TOKENS_AT_A_TIME = 8192  # most prompt tokens, padding included, read at once


def length_bucket(length: int) -> int:
    """The shortest padded length that holds `length` tokens: 16, 24, 32, 48, 64, 96, 128, 192...

    Two sizes to each doubling: padding is at most a third, and lengths need few compilations.
    """
    if length <= SMALLEST_LENGTH:
        return SMALLEST_LENGTH
    power = 1 << (length - 1).bit_length()  # the first that holds it
    return power * 3 // 4 if length <= power * 3 // 4 else power


def cache_bucket(length: int) -> int:
    """Cache slots for `length` tokens: a power of two from 64."""
    return max(SMALLEST_CACHE, 1 << (length - 1).bit_length())


def count_bucket(count: int) -> int:
    """The smallest power of two that is not below `count`, 0 staying 0: rows, images a row."""
    return 1 << (count - 1).bit_length() if count else 0


def row_bucket(waiting: int, length: int) -> int:
    """How many rows the next call has, of `waiting` ones padded to `length`.

    The largest of ROWS that the waiting fill to three quarters, within TOKENS_AT_A_TIME.
    """
    most = max(1, TOKENS_AT_A_TIME // length)
    return max(rows for rows in ROWS if rows == 1 or (rows <= most and 4 * waiting >= 3 * rows))
