"""Which pages of the cache are in use, and what those hold that prompts may share."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.cache import PAGE


def check_cache_tokens(count) -> None:
    """Raises LlavaError unless a cache may hold so many tokens; None is for any."""
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < PAGE:
        raise LlavaError(f"cache_tokens must be a whole number from {PAGE}, not {count!r}")


class Pages:
    """The pages of the cache by use and content.

    Tokens are known by their `contents`, int64[T]: the ids of text, and numbers below zero, one for
    each token of each picture. A full page is known by its contents and by the known page before
    it; if two sequences begin with equal contents, they have equal keys and values there, and use
    the same pages. A page that nobody uses keeps what it is known for until it is needed.

    Example with pages of two slots, of `abcde` and `abcx`, both in use:

        page      7    2    4    0
        holds     ab   cd   e.   cx
        users     2    1    1    1       ab: for both; e.: not full, so it is not shared

    Attributes:
      count: of all pages.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count))[::-1]
        self._users = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._known: dict[tuple[int, bytes], int] = {}
        self._keys: dict[int, tuple[int, bytes]] = {}  # of the known pages
        self._numbers: dict[int, int] = {}  # of the known pages; never given twice
        self._given = 0

    @property
    def unused(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def share_in_use(self) -> float:
        """Share of the pages that somebody uses."""
        return 1 - self.unused / self.count if self.count else 0.0

    def find(self, contents: np.ndarray) -> list[int]:
        """The pages that hold the beginning of a prompt, but for its last token.

        That one's hidden state is needed to choose the answer's first token.
        """
        found = []
        for key in self._keys_of(contents[:-1]):
            if key not in self._known:
                break
            found.append(self._known[key])
        return found

    def _keys_of(self, contents: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """The key of each full page; each is asked for after the page before it is known."""
        before = 0
        for start in range(0, len(contents) - PAGE + 1, PAGE):
            key = before, contents[start : start + PAGE].tobytes()
            yield key
            before = self._numbers[self._known[key]]

    def use(self, pages: Sequence[int]) -> None:
        """Pages that were found, for one user more."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def take(self, count: int) -> list[int] | None:
        """So many pages for one user alone; None if there are fewer."""
        if count > self.unused:
            return None
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            self.forget([page])
            self._free.append(page)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def know(self, contents: np.ndarray, pages: Sequence[int]) -> None:
        """What pages hold from now on, as far as they are full."""
        for page, key in zip(pages, self._keys_of(contents), strict=False):
            if key not in self._known:
                self._given += 1
                self._known[key], self._keys[page] = page, key
                self._numbers[page] = self._given

    def forget(self, pages: Sequence[int]) -> None:
        """What pages hold is gone, or was never computed."""
        for page in pages:
            if page in self._keys:
                del self._known[self._keys.pop(page)], self._numbers[page]

    def drop(self, pages: Sequence[int]) -> None:
        """The pages of a sequence have one user less."""
        for page in reversed(pages):  # what follows a page is found after it alone
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)
