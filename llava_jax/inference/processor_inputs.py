"""What Hugging Face processors of the LLaVA family return, as the engine takes it.

B rows, T length, N pictures in all, S side of a tile, P features of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.inference.prompts import check_vocabulary
from llava_jax.models.images import Layout
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.taps import TEXT


@dataclass(frozen=True)
class Shown:
    """The pictures, or the videos, of a batch.

    Attributes:
      word: what messages call them.
      token_id: of their placeholders.
      layouts: one of each.
      tiles: of all, one after the other, float[n, 3, S, S].
    """

    word: str
    token_id: int
    layouts: list[Layout]
    tiles: np.ndarray


def read_inputs(
    config: LlavaConfig,
    input_ids,
    pixel_values=None,
    attention_mask=None,
    image_sizes=None,
    batch_num_images=None,
    pixel_values_videos=None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """What a processor returns, checked, as the arguments of `Engine.logits`.

    Arrays are of NumPy, PyTorch or JAX. Pictures and videos are in the order of their placeholders
    over the whole batch.

    Args:
      input_ids: int[B, T], with one placeholder id (`config.image_token_id`, of videos
        `config.video_token_id`) for each token of a picture or video.
      pixel_values: float[N, 3, S, S], normalised; of models that cut pictures into tiles
        float[N, most tiles, 3, S, S]; None for no pictures.
      attention_mask: int[B, T], 0 for padding on either side; by default there is no padding.
      image_sizes: int[N, 2], (height, width) of the pictures, if they are cut into tiles.
      batch_num_images: int[B], pictures of each prompt, where that decides how they are cut. By
        default each picture is cut as a prompt's only one, as in transformers.
      pixel_values_videos: float[videos, frames, 3, S, S], or None.

    Raises:
      LlavaError: they do not fit together.
    """
    input_ids = to_numpy(input_ids)
    mask = np.ones_like(input_ids) if attention_mask is None else to_numpy(attention_mask)
    if input_ids.ndim != 2 or input_ids.dtype.kind not in "iu" or 0 in input_ids.shape:
        raise LlavaError(
            f"input_ids must be whole numbers [B, T], not {input_ids.dtype}{input_ids.shape}"
        )
    if mask.shape != input_ids.shape:
        raise LlavaError(
            f"attention_mask {mask.shape} must have the shape of input_ids {input_ids.shape}"
        )
    mask = (mask != 0).astype(np.int32)
    input_ids = np.where(mask, input_ids, 0)
    check_vocabulary(input_ids, config)
    shown = [_pictures(config, pixel_values, image_sizes, batch_num_images)]
    if pixel_values_videos is not None or config.video_token_id is not None:
        shown.append(_videos(config, pixel_values_videos))
        if config.video_token_id is None:  # one id for both
            if shown[0].layouts:
                raise LlavaError(
                    "pictures and videos have the same placeholder: give one kind at a time"
                )
            del shown[0]
    taps = () if config.image.taps == 1 else (config.image.taps,)
    features = np.full((*input_ids.shape, *taps), TEXT, np.int32)
    weights = np.zeros(features.shape, np.float32) if taps else None
    first_tile = 0
    for some in shown:
        places = _places(input_ids, some)
        for layout, (row, start) in zip(some.layouts, places, strict=True):
            part = np.s_[row, start]
            features[part] = layout.placed(first_tile, config.tokens_per_tile)
            if taps:
                weights[part] = layout.weights
            first_tile += layout.tiles
    tiles = np.concatenate([some.tiles for some in shown]).transpose(0, 2, 3, 1)
    return input_ids, tiles.astype(np.float32), features, mask, weights


def _pictures(config: LlavaConfig, pixel_values, image_sizes, batch_num_images) -> Shown:
    """The pictures of a batch; each has its tiles first and zeros behind them."""
    size, spec = config.image.size, config.image
    none = np.zeros((0, 3, size, size), np.float32)
    pixels = none if pixel_values is None else to_numpy(pixel_values)
    tiled = spec.by_size and pixel_values is not None
    axes = ["images", "tiles"] if tiled else ["images"]
    _check_shape("pixel_values", pixels, axes, size)
    if not tiled:
        layouts = config.layouts([(size, size)] * len(pixels), several=False)
        return Shown("image", config.image_token_id, layouts, pixels)
    if image_sizes is None:
        raise LlavaError("give image_sizes, (height, width) of each picture: they are cut by it")
    sizes = to_numpy(image_sizes)
    if sizes.shape != (len(pixels), 2) or (sizes < 1).any():
        raise LlavaError(
            f"image_sizes must be the (height, width) of {len(pixels)} picture(s), from 1, "
            f"not {sizes.tolist()!s:.80}"
        )
    several = _are_several(batch_num_images, len(pixels))
    layouts = [
        config.layouts([(int(width), int(height))], several=among)[0]
        for (height, width), among in zip(sizes, several, strict=True)
    ]
    for i, layout in enumerate(layouts):
        if layout.tiles > pixels.shape[1]:
            raise LlavaError(
                f"pixel_values have {pixels.shape[1]} tiles a picture, but picture {i} of "
                f"{sizes[i][1]}x{sizes[i][0]} pixels is cut into {layout.tiles}"
            )
    tiles = [of_picture[: layout.tiles] for of_picture, layout in zip(pixels, layouts, strict=True)]
    return Shown("image", config.image_token_id, layouts, np.concatenate([none, *tiles]))


def _are_several(batch_num_images, pictures: int) -> list[bool]:
    """For each picture whether its prompt has others."""
    if batch_num_images is None:
        return [False] * pictures
    counts = to_numpy(batch_num_images).reshape(-1).astype(int)
    if (counts < 0).any() or counts.sum() != pictures:
        raise LlavaError(
            f"batch_num_images count {counts.sum()} picture(s), but pixel_values have {pictures}"
        )
    return [count > 1 for count in counts for _ in range(count)]


def _videos(config: LlavaConfig, pixel_values_videos) -> Shown:
    size, token_id = config.image.size, config.video_token_id
    token_id = config.image_token_id if token_id is None else token_id
    if pixel_values_videos is None:
        return Shown("video", token_id, [], np.zeros((0, 3, size, size), np.float32))
    pixels = to_numpy(pixel_values_videos)
    _check_shape("pixel_values_videos", pixels, ["videos", "frames"], size)
    layouts = config.layouts([(size, size, pixels.shape[1])] * len(pixels))
    return Shown("video", token_id, layouts, pixels.reshape(-1, 3, size, size))


def _check_shape(name: str, pixels: np.ndarray, axes: Sequence[str], size: int) -> None:
    if pixels.ndim != len(axes) + 3 or pixels.shape[-3:] != (3, size, size):
        wanted = ", ".join([*axes, "3", str(size), str(size)])
        raise LlavaError(f"{name} must be [{wanted}], not {list(pixels.shape)}")


def _places(input_ids: np.ndarray, shown: Shown) -> list[tuple[int, np.ndarray]]:
    """For each picture or video its row and the columns int[n] of its tokens."""
    rows, columns = np.nonzero(input_ids == shown.token_id)
    lengths, word = [len(layout) for layout in shown.layouts], shown.word
    if len(rows) != sum(lengths):
        each = sorted(set(lengths))
        of_tokens = f" of {each[0]} tokens" if len(each) == 1 else ""
        raise LlavaError(
            f"input_ids have {len(rows)} placeholders ({shown.token_id}) but {len(lengths)} "
            f"{word}(s){of_tokens} need {sum(lengths)}"
        )
    places, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        if length and rows[start] != rows[start + length - 1]:
            row = int(rows[start])
            raise LlavaError(
                f"row {row} of input_ids has {(rows == row).sum()} placeholders, which is no whole "
                f"number of {word}s: the next {word} takes {length}"
            )
        places.append((int(rows[start]) if length else 0, columns[part]))
        start += length
    return places


def to_numpy(array) -> np.ndarray:
    """NumPy from NumPy, JAX, a list, or a PyTorch tensor of any device, dtype and grad."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)
