"""Tiny random models of transformers' LLaVA classes that cut pictures into tiles, and their inputs.

A tile has 28 pixels a side and 4 x 4 features.
"""

import dataclasses
import json

import jax
import numpy as np

from llava_jax.data.media import preprocess
from llava_jax.models.llava import LlavaConfig, LlavaModel, normalize_images
from llava_jax.models.taps import TEXT
from tests.tiny_model import byte_tokenizer
from tests.weights.conftest import TEXT as DECODER
from tests.weights.conftest import VISION, randomize

SIDE, ROWS = 28, 320
NEXT_PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
ALL_PINPOINTS = [[28 * rows, 28 * columns] for rows in range(1, 4) for columns in range(1, 4)]
TEXT_FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
}
CLASSES = {
    "llava_next": {
        "name": "LlavaNext",
        "tower": "clip_vision_model",
        "image_grid_pinpoints": NEXT_PINPOINTS,
    },
    "llava_next_video": {
        "name": "LlavaNextVideo",
        "tower": "clip_vision_model",
        "image_grid_pinpoints": NEXT_PINPOINTS,
    },
    "llava_onevision": {
        "name": "LlavaOnevision",
        "tower": "siglip_vision_model",
        "image_grid_pinpoints": ALL_PINPOINTS,
        "vision_aspect_ratio": "anyres_max_2",
        "vision_feature_layer": -1,
    },
}


def family_tokenizer():
    """Bytes and ChatML's marks; 259 is <image>, 260 is <video>."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def family_model(kind: str, text: str = "llama", **fields):
    """A random model of a class; `fields` of its config."""
    import transformers

    values = CLASSES[kind] | fields
    name, tower = values.pop("name"), values.pop("tower")
    videos = {} if kind == "llava_next" else {"video_token_index": 260}
    config = getattr(transformers, f"{name}Config")(
        text_config=DECODER
        | {"model_type": text, "vocab_size": ROWS, "max_position_embeddings": 1024}
        | TEXT_FAMILIES[text],
        vision_config=VISION | {"model_type": tower},
        image_token_index=259,
        **videos,
        **values,
    )
    return randomize(getattr(transformers, f"{name}ForConditionalGeneration")(config))


def image_processor(config):
    """The Pillow form of a model's image processor."""
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    square, pinpoints = {"height": SIDE, "width": SIDE}, config.image_grid_pinpoints
    if config.model_type == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(
            size=square, image_grid_pinpoints=pinpoints, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=pinpoints
    )


def processor_of(model):
    """The processor of a model."""
    import transformers

    config = model.config
    name = CLASSES[config.model_type]["name"]
    options = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    if config.model_type == "llava_onevision":
        options |= {"num_image_tokens": 16, "vision_aspect_ratio": config.vision_aspect_ratio}
    else:
        options |= {"patch_size": 7, "num_additional_image_tokens": 1}
    parts = {"image_processor": image_processor(config), "tokenizer": family_tokenizer()}
    if name != "LlavaNext":
        parts["video_processor"] = None
    processor = object.__new__(getattr(transformers, f"{name}Processor"))
    processor.check_argument_for_proper_class = lambda *_: None  # no torchvision, no videos
    processor.__init__(**parts, **options)
    return processor


def save_family(folder, model):
    """The folder that a user has: model, pictures, tokenizer."""
    model.save_pretrained(folder)
    save_processor(folder, model)
    return folder


def save_processor(folder, model) -> None:
    values = image_processor(model.config).to_dict()
    (folder / "preprocessor_config.json").write_text(
        json.dumps(values, default=lambda v: v.to_dict())
    )
    family_tokenizer().save_pretrained(folder)


def pixels_of(config: LlavaConfig, sources: list) -> np.ndarray:
    """Tiles [n, S, S, 3] of a prompt's pictures and of its videos, lists of frames."""
    pictures = sum(not isinstance(source, list) for source in sources)
    frame = dataclasses.replace(
        config.image, mode=config.image.video.mode if config.image.video else "pad", tiling=None
    )
    tiles = [np.zeros((0, SIDE, SIDE, 3), np.uint8)]
    for source in sources:
        if isinstance(source, list):
            tiles += [preprocess(one, frame) for one in source]
        else:
            tiles.append(preprocess(source, config.image, several=pictures > 1))
    return np.concatenate(tiles)


def sizes_of(sources: list) -> list:
    sized = lambda source: (
        (*source[0].size, len(source)) if isinstance(source, list) else source.size
    )
    return [sized(source) for source in sources]


def our_logits(
    config: LlavaConfig, params: dict, ids: np.ndarray, mask: np.ndarray, rows: list[list]
) -> np.ndarray:
    """Logits [B, T, V] of rows whose placeholders show each row's sources one after the other."""
    taps = config.image.taps
    features = np.full((*ids.shape, taps), TEXT, np.int32)
    weights = np.zeros(features.shape, np.float32)
    tiles = [pixels_of(config, sources) for sources in rows]
    for i, sources in enumerate(rows):
        where = np.isin(ids[i], (config.image_token_id, config.video_token_id))
        first, found = 0, []
        for layout in config.layouts(sizes_of(sources)):
            found.append(layout.placed(first, config.tokens_per_tile).reshape(-1, taps))
            first += layout.tiles
            weighed = layout.weights
            found[-1] = (found[-1], np.ones((len(layout), 1)) if weighed is None else weighed)
        assert where.sum() == sum(len(f) for f, _ in found), "the processor counts other tokens"
        if found:
            features[i, where], weights[i, where] = map(np.concatenate, zip(*found, strict=True))
    most = max(1, *map(len, tiles))
    pixels = np.zeros((len(rows), most, SIDE, SIDE, 3), np.uint8)
    for i, own in enumerate(tiles):
        pixels[i, : len(own)] = own
    pixels = normalize_images(config.image, pixels)
    places = (features[..., 0], None) if taps == 1 else (features, weights)
    model, positions = LlavaModel(config), np.maximum(mask.cumsum(-1) - 1, 0)

    def forward(model):
        hidden = model(ids, pixels, places[0], None, positions, mask, feature_weights=places[1])
        return model.attend(hidden)

    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, method=forward))(params))
