"""The fixed set of shapes that requests are padded to, so that compiled functions are reused."""

SMALLEST_LENGTH = 16
SMALLEST_CACHE = 64
IMAGES = (1, 4, 16, 64)  # encoded at once
TOKENS_AT_A_TIME = 4096  # of prompts, read at once where no prompt is longer


def length_bucket(length: int) -> int:
    """The shortest padded length that holds `length` tokens: 16, 24, 32, 48, 64, 96, 128, 192...

    Two sizes to each doubling: padding is at most a third, and lengths need few compilations.
    """
    if length <= SMALLEST_LENGTH:
        return SMALLEST_LENGTH
    power = 1 << (length - 1).bit_length()  # the first that holds it
    return power * 3 // 4 if length <= power * 3 // 4 else power


def token_bucket(total: int, longest: int, more: bool) -> int:
    """How many tokens the next call reads, of `total` that wait in prompts of at most `longest`.

    Where `more` prompts wait for a row, a call that would not be filled to 7/8 is the next smaller.
    """
    bucket = length_bucket(total)
    if more and 8 * total < 7 * bucket:
        bucket = length_bucket(bucket * 5 // 8)  # the one below: 2/3 or 3/4 of it
    return max(length_bucket(longest), min(bucket, TOKENS_AT_A_TIME))


def chunk_bucket(longest: int) -> int:
    """The length of the chunks that prompts of at most `longest` are read in: 16, 64, 256...

    A prompt has at most four.
    """
    chunk = SMALLEST_LENGTH
    while 4 * chunk < longest:
        chunk *= 4
    return chunk


def chunk_count(tokens: int, chunk: int) -> int:
    """How many chunks a call has for `tokens`: enough where they are three quarters full."""
    return max(4 * tokens // (3 * chunk), 1)


def cache_bucket(length: int) -> int:
    """Cache slots for `length` tokens: a power of two from 64."""
    return max(SMALLEST_CACHE, 1 << (length - 1).bit_length())


def count_bucket(count: int) -> int:
    """The smallest power of two that is not below `count`, 0 staying 0: rows, images a row."""
    return 1 << (count - 1).bit_length() if count else 0


def image_bucket(waiting: int) -> int:
    """How many images the next call encodes: the most of IMAGES that are filled to 3/4."""
    return max(count for count in IMAGES if count == 1 or 4 * waiting >= 3 * count)
