"""The fixed set of shapes that requests are padded to, so that compiled functions are reused."""

SMALLEST_LENGTH = 32


def length_bucket(length: int) -> int:
    """The shortest padded length that holds `length` tokens: 32, 48, 64, 80, 96, 112, 128, 160...

    Four sizes to each doubling, so padding is at most a quarter, and an unbounded range of lengths
    needs few compilations. All are multiples of 16.
    """
    if length <= SMALLEST_LENGTH:
        return SMALLEST_LENGTH
    octave = 1 << (length - 1).bit_length() - 1  # the power of two below `length`
    step = max(octave // 4, 16)
    return -(-length // step) * step


def count_bucket(count: int) -> int:
    """The smallest power of two that is not below `count`, 0 staying 0: rows, images a row."""
    return 1 << (count - 1).bit_length() if count else 0
