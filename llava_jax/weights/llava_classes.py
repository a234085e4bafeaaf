"""The LLaVA classes of transformers: what their files leave unsaid, and what they can express.

A `config.json` leaves out what its class takes for granted, and a processor's files likewise; both
differ from class to class. `read/huggingface.py` and `write/huggingface.py` share these rows.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from llava_jax.models.images import ImageSpec
from llava_jax.models.presets import SIGLIP_SO400M, clip_large
from llava_jax.models.video import VideoSpec
from llava_jax.weights.families import encoder_to_hf

STRATEGY, PINPOINTS = "vision_feature_select_strategy", "image_grid_pinpoints"
ASPECT = "vision_aspect_ratio"

# The encoders of a config.json without a vision_config.
_CLIP_LARGE, _SIGLIP_SO400M = encoder_to_hf(clip_large(336)), encoder_to_hf(SIGLIP_SO400M)
_LLAVA = {
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    STRATEGY: "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
_NEXT = _LLAVA | {PINPOINTS: [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}


@dataclasses.dataclass(frozen=True)
class LlavaClass:
    """A family of LLaVAs as transformers has it.

    Attributes:
      model_type: in `config.json`.
      name: the beginning of the names of its classes, as LlavaNext of LlavaNextProcessor.
      defaults: of the keys of `config.json`.
      vision: `vision_config` if there is none, and the model type of one that names none.
      text_type: model type of a `text_config` that names none.
      image_processor: the beginning of the name of its image processor's class.
      tiled: whether pictures are cut into tiles, which its `image_grid_pinpoints` name.
      one_view: of several pictures in a prompt each is one view.
      video: how its videos are shown; None for classes that take none.
    """

    model_type: str
    name: str
    defaults: Mapping
    vision: Mapping
    text_type: str
    image_processor: str
    tiled: bool = True
    one_view: bool = False
    video: VideoSpec | None = None

    @property
    def class_name(self) -> str:
        return f"{self.name}ForConditionalGeneration"


LLAVA = LlavaClass("llava", "Llava", _LLAVA, _CLIP_LARGE, "llama", "CLIP", tiled=False)
NEXT = LlavaClass("llava_next", "LlavaNext", _NEXT, _CLIP_LARGE, "llama", "LlavaNext")
NEXT_VIDEO = LlavaClass(
    model_type="llava_next_video",
    name="LlavaNextVideo",
    defaults=_NEXT
    | {
        "image_token_index": 32001,
        "video_token_index": 32000,
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
    },
    vision=_CLIP_LARGE,
    text_type="llama",
    image_processor="LlavaNext",
    video=VideoSpec("square", "average_before_projector", "no_token"),
)
ONEVISION = LlavaClass(
    model_type="llava_onevision",
    name="LlavaOnevision",
    defaults=_LLAVA
    | {
        "image_token_index": 151646,
        "video_token_index": 151647,
        "vision_feature_layer": -1,
        STRATEGY: "full",
        PINPOINTS: [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
        ASPECT: "anyres_max_9",
    },
    vision=_SIGLIP_SO400M,
    text_type="qwen2",
    image_processor="LlavaOnevision",
    one_view=True,
    video=VideoSpec("resize", "bilinear", "one_token"),
)
CLASSES: Mapping[str, LlavaClass] = MappingProxyType(
    {row.model_type: row for row in (LLAVA, NEXT, NEXT_VIDEO, ONEVISION)}
)


def is_hugging_face(values: Mapping) -> bool:
    """Whether a `config.json` is of a LLaVA as transformers saves it."""
    named = CLASSES.get(str(values.get("model_type")))  # "llava" is the original's word too
    return "text_config" in values or (named is not None and named.tiled)


def class_of(spec: ImageSpec) -> LlavaClass:
    """The class that comes closest to a model's pictures and videos."""
    if spec.pools_in_encoder:
        return NEXT_VIDEO
    if spec.tiling is None:
        return LLAVA
    onevision = spec.video is not None or spec.tiling.cap or spec.tiling.one_view
    return ONEVISION if onevision else NEXT
