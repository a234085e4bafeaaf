"""What an engine counts."""

from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.inference.lookup import Drafts


@dataclass
class Counts:
    """What an engine did so far.

    Attributes:
      prompt_tokens: of all requests; `shared_tokens` of them were found, not computed.
      images: pictures of all requests; `encoded_images` tiles went through the vision encoder.
      drafts: of prompt look-up: `draft_tokens` were guessed in so many runs, and `accepted_tokens`
        of them stand in answers.
      put_back: answers that gave way in a full cache, and were read again later.
      compilations: functions compiled for the device. The number stops growing once every shape
        was seen.
    """

    requests: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    answer_tokens: int = 0
    images: int = 0
    encoded_images: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    put_back: int = 0
    compilations: int = 0

    def add(self, drafts: Drafts | None, rows: Sequence[int]) -> None:
        """Adds what became of the guesses in some rows; None if nothing is guessed."""
        if drafts:
            self.drafts += int(drafts.made[rows].sum())
            self.draft_tokens += int(drafts.tokens[rows].sum())
            self.accepted_tokens += int(drafts.accepted[rows].sum())
