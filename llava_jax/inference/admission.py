"""Which waiting requests are read next, into which rows, and what they share with other rows."""

import hashlib
from collections import deque
from collections.abc import Collection

import numpy as np

from llava_jax.inference.decoding import NO_TOKEN
from llava_jax.inference.jobs import Job
from llava_jax.inference.slots import ImageSlots, RowSlots


class Admission:
    """Gives rows of the cache and slots of the feature store to requests.

    Args:
      rows, size: of the cache.
      image_slots: of the feature store.
      image_token_id, image_tokens: the placeholder, and how many stand for an image.
    """

    def __init__(self, image_slots: int, image_token_id: int, image_tokens: int):
        self.images = ImageSlots(image_slots)
        self.rows = RowSlots(0, 0)
        self._image_token_id, self._image_tokens = image_token_id, image_tokens

    def wave(
        self, waiting: deque[Job], free: Collection[int], count: int
    ) -> tuple[list[Job], dict[int, np.ndarray]]:
        """Takes at most `count` requests that can be read now, and a row of `free` for each.

        A prompt may share a beginning with a row or with a prompt before it in the wave, and must
        not be read before that one.

        Returns:
          The requests, and the pictures that are to be encoded first, by slot.
        """
        wave: dict[int, Job] = {}  # by row
        pinned, images = set(), {}
        needed = set()  # rows whose present contents are to be copied from
        while waiting and len(wave) < count:
            if not self._place_images(waiting[0], pinned, images):
                break
            job = waiting[0]
            planned = {row: other.contents for row, other in wave.items()}
            donor, shared = self.rows.donor(job.contents, planned)
            rows = set(free) - set(wave) - needed
            others = rows - {donor} if shared else rows
            if not rows:
                break
            job.row = self.rows.oldest(others or rows)
            # In its own row a prompt finds what it shares where it is; no other is overwritten.
            job.shared, job.sources = shared, np.full(job.length, job.row, np.int32)
            if shared:
                needed.add(donor)
                source = wave[donor].sources if donor in wave else np.full(shared, donor)
                job.sources[:shared] = source[:shared]
            wave[job.row] = waiting.popleft()
        return list(wave.values()), images

    def _place_images(self, job: Job, pinned: set[int], images: dict[int, np.ndarray]) -> bool:
        """Finds slots for a request's pictures; those to be encoded go into `images`, by slot.

        False where the wave before it needs all slots.
        """
        slots, numbers = [], []
        for image in job.images:
            digest = hashlib.sha256(f"{image.shape}{image.dtype}".encode() + image.tobytes())
            found = self.images.find(digest.digest())
            if found is None:
                found = self.images.add(digest.digest(), pinned)
                if found is None:
                    return False
                images[found[0]] = image
            pinned.add(found[0])
            slots.append(found[0])
            numbers.append(found[1])
        job.contents = job.request.input_ids.astype(np.int64)
        job.feature_ids = np.full(job.length, NO_TOKEN, np.int32)
        places = job.request.input_ids == self._image_token_id
        if slots:
            tokens = self._image_tokens
            job.contents[places] = -np.repeat(numbers, tokens)
            features = np.array(slots)[:, None] * tokens + np.arange(tokens)
            job.feature_ids[places] = features.ravel()
        return True
