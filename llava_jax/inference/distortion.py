"""The other side of contrastive decoding: the same prompt with worse pictures, or without any.

S side of a tile.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from llava_jax.inference.jobs import Job, Picture
from llava_jax.inference.sampling import SamplingParams
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig

BLUR = 1 / 16  # of the side of a tile: the standard deviation of the blur
NOISE_STEPS, NOISE_STEP = 1000, 500  # of the diffusion; the authors' figures


def blurred(tiles: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Tiles uint8[n, S, S, 3] in which nothing much smaller than a quarter of the side is seen."""
    blur = ImageFilter.GaussianBlur(BLUR * spec.size)
    return np.stack([np.asarray(Image.fromarray(tile).filter(blur)) for tile in tiles])


def noised(tiles: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Tiles uint8[n, S, S, 3] after half of a diffusion, as in https://arxiv.org/abs/2311.16922.

    The noise is added to normalised pixels; what then leaves the range of colours is cut off, which
    the authors do not do. It is the same for every picture, so an answer is the same each time.
    """
    kept = kept_signal(NOISE_STEP)
    mean, deviation = np.float32(spec.mean), np.float32(spec.std)
    noise = np.random.default_rng(0).standard_normal(tiles.shape, np.float32)
    pixels = (tiles / np.float32(255) - mean) / deviation
    pixels = np.sqrt(kept) * pixels + np.sqrt(1 - kept) * noise
    return np.clip(np.rint((pixels * deviation + mean) * 255), 0, 255).astype(np.uint8)


def kept_signal(step: int) -> np.float32:
    """The share of a picture's variance that is left after step 0, 1, ... of the diffusion."""
    slope = 1 / (1 + np.exp(-np.linspace(-6, 6, NOISE_STEPS)))
    added = 1e-5 + slope * (5e-3 - 1e-5)  # of variance, at each step
    return np.float32(np.prod(1 - added[: step + 1]))


DISTORTIONS: dict[str, Callable[[np.ndarray, ImageSpec], np.ndarray]] = {
    "blur": blurred,
    "noise": noised,
}


def text_ids(ids: np.ndarray, config: LlavaConfig) -> np.ndarray:
    """A prompt's tokens int32[T] without those of pictures and videos."""
    placeholders = [i for i in (config.image_token_id, config.video_token_id) if i is not None]
    return ids[~np.isin(ids, placeholders)]


def with_twin(job: Job, config: LlavaConfig) -> Job:
    """The job, with the twin that it is decoded against if its request asks for contrast.

    Of `absent` pictures the twin has no tokens at all: it is the prompt of the text alone.
    """
    request = job.request
    kind = request.params.contrast
    if kind is None:
        return job
    ids, pictures = request.input_ids, ()
    if kind == "absent":
        ids = text_ids(ids, config)
    else:
        pictures = tuple(_distorted(picture, kind, config.image) for picture in request.pictures)
    # Its own token is never taken, so it needs no settings.
    worse = dataclasses.replace(
        request, input_ids=ids, pictures=pictures, params=SamplingParams(request.params.max_tokens)
    )
    job.twin = Job(worse, job.answer, job.stops, job.budget, produced=job.produced)
    return job


def _distorted(picture: Picture, kind: str, spec: ImageSpec) -> Picture:
    load = functools.partial(_load, picture, kind, spec)
    return dataclasses.replace(picture, load=load, key=(picture.key, kind))


def _load(picture: Picture, kind: str, spec: ImageSpec) -> np.ndarray:
    return DISTORTIONS[kind](picture.load(), spec)
