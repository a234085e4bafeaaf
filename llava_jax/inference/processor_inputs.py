"""What a Hugging Face LLaVA processor returns, checked and as the engine takes it.

B rows, T length, N images in all, S image side.
"""

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.inference.prompts import check_vocabulary
from llava_jax.models.llava import LlavaConfig


def read_inputs(
    config: LlavaConfig, input_ids, pixel_values, attention_mask
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """As `Llava.logits` takes them -> ids int[B, T], images of each row, mask int32[B, T].

    The images of a row are float32[n, S, S, 3]; LlavaError where the three do not fit together.
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
    return input_ids, deal_images(config, input_ids, pixel_values), mask


def deal_images(config: LlavaConfig, input_ids: np.ndarray, pixel_values) -> list[np.ndarray]:
    """The flat list of images, float32[n, S, S, 3] for each row by its placeholders."""
    size, tokens = config.image.size, config.tokens_per_tile
    pixels = np.zeros((0, 3, size, size)) if pixel_values is None else to_numpy(pixel_values)
    if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise LlavaError(
            f"pixel_values must be [images, 3, {size}, {size}], not {list(pixels.shape)}"
        )
    placeholders = (input_ids == config.image_token_id).sum(axis=1)
    if placeholders.sum() != len(pixels) * tokens:
        raise LlavaError(
            f"input_ids have {placeholders.sum()} placeholders ({config.image_token_id}) "
            f"but {len(pixels)} image(s) of {tokens} tokens need {len(pixels) * tokens}"
        )
    if (placeholders % tokens).any():
        row = int(np.argmax(placeholders % tokens != 0))
        raise LlavaError(
            f"row {row} of input_ids has {placeholders[row]} placeholders, which is no whole "
            f"number of images: each takes {tokens}"
        )
    ends = np.cumsum(placeholders // tokens)[:-1]
    return np.split(pixels.transpose(0, 2, 3, 1).astype(np.float32), ends)


def to_numpy(array) -> np.ndarray:
    """NumPy from NumPy, JAX, a list, or a PyTorch tensor of any device, dtype and grad."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)
