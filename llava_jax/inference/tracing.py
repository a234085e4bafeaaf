"""The host side of `scoring.trace`: a given answer is read in a pass that needs no cache.

A tokens of the answer, T of the prompt, the answer's included.
"""

import jax
import numpy as np

from llava_jax.inference.admission import Admission
from llava_jax.inference.answer import Trace
from llava_jax.inference.counts import Counts
from llava_jax.inference.device import Device
from llava_jax.inference.jobs import Job
from llava_jax.inference.prefill import length_bucket, pack_whole
from llava_jax.inference.scoring import TRACED


class Tracing:
    """A job whose answer is being traced: dispatched when it is made.

    Args:
      counts: of the engine, which are brought up to date.
      few: see `length_bucket`.
    """

    def __init__(self, job: Job, device: Device, admission: Admission, counts: Counts, few: bool):
        tiles = admission.place_alone(job)
        device.encode(tiles)
        arrays = pack_whole(job, length_bucket(job.length, few), device.config.image.taps)
        starts = range(job.length - job.request.traced, job.length, TRACED)
        self._job = job
        self._parts = [device.trace(*arrays, np.int32(start)) for start in starts]
        counts.images += len(job.request.pictures)
        counts.encoded_images += len(tiles)
        counts.prompt_tokens += job.length

    def is_ready(self) -> bool:
        """Whether `finish` need not wait for the device."""
        return self._parts[-1][0].is_ready()

    def finish(self) -> None:
        """Gives the answer its trace, and ends it."""
        count, length = self._job.request.traced, self._job.length
        logprobs, attention = map(np.concatenate, zip(*jax.device_get(self._parts), strict=True))
        self._job.answer.trace = Trace(logprobs[:count], attention[:count, :length])
        self._job.answer.end()
