"""Parts of a stage from its config, checked: model shape, starting parameters, tokenizer."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.data.rows import RowFormat
from llava_jax.errors import LlavaError
from llava_jax.models.anyres import Tiling, read_grids
from llava_jax.models.attention import choose_attention
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig, LlavaModel, abstract_params, fresh_projector
from llava_jax.models.lora import LoraConfig, abstract_lora, init_lora
from llava_jax.models.precision import compute_precision
from llava_jax.models.presets import preset
from llava_jax.models.video import VideoSpec
from llava_jax.parallel import hosts
from llava_jax.text.templates import PAIR
from llava_jax.training.step import REFERENCE
from llava_jax.weights.load import open_components, source_config
from llava_jax.weights.read.huggingface import composed_config
from llava_jax.weights.read.llava_folder import is_llava_folder
from llava_jax.weights.run_directory import COMPONENTS, Source, checkpoint_of, weights_checksum

MODEL_OVERRIDES = ("projector", "feature_layer", "image_size", "image_mode")


def optimizer_options(config: ConfigDict) -> dict:
    """The arguments of `adamw` besides groups and schedule."""
    options = {k: v for k, v in config.optimizer.items() if k != "warmup_ratio"}
    return options | ({"clip_norm": 0.0} if config.parity else {})


def model_config(config: ConfigDict) -> LlavaConfig:
    """The preset's shape, else the starting checkpoint's, else that of the two folders in init."""
    if config.model.preset:
        base = preset(config.model.preset)
    elif config.init.checkpoint:
        base = source_config(existing(config.init.checkpoint, "init.checkpoint"))
    else:
        folders = {k: existing(config.init[k], f"init.{k}") for k in ("vision", "decoder")}
        base, _ = composed_config(folders["vision"], folders["decoder"])
    changes = {k: config.model[k] for k in MODEL_OVERRIDES if config.model[k] is not None}
    image = {k: changes.pop(f"image_{k}") for k in ("size", "mode") if f"image_{k}" in changes}
    try:
        image["tiling"] = _tiling(config, base.image, image.get("mode", base.image.mode))
        image["video"] = _video(config, base.image)
        changes["image"] = dataclasses.replace(base.image, **image)
    except LlavaError as error:
        raise LlavaError(f"config.model.{error}") from None
    model = dataclasses.replace(base, **changes)
    try:
        model.check()
    except ValueError as error:
        raise LlavaError(f"config.model: {error}") from None
    return model


def _tiling(config: ConfigDict, base: ImageSpec, mode: str) -> Tiling | None:
    """How pictures are cut into tiles in a mode; None if they are not."""
    changes = {k: v for k, v in config.model.tiling.items() if v is not None}
    if mode != "anyres":
        if changes:
            raise LlavaError(
                f"tiling.{next(iter(changes))} is set, but image_mode is {mode!r}: only anyres "
                "cuts pictures into tiles"
            )
        return None
    try:
        if "grids" in changes:
            changes["grids"] = read_grids(changes["grids"])
        return dataclasses.replace(base.tiling or Tiling(), **changes)
    except ValueError as error:
        raise LlavaError(f"tiling.{error}") from None


def _video(config: ConfigDict, base: ImageSpec) -> VideoSpec | None:
    """How videos become tokens; None if the model takes none."""
    changes = {k: v for k, v in config.model.video.items() if v is not None}
    if not changes:
        return base.video
    try:
        return dataclasses.replace(base.video or VideoSpec(), **changes)
    except LlavaError as error:
        raise LlavaError(f"video: {error}") from None


def row_format(config: ConfigDict, model: LlavaConfig) -> RowFormat:
    """The rows that a stage trains on.

    `data.max_tiles` and the sampling of videos are about training alone: the run keeps the model's.
    """
    data = config.data
    if data.max_tiles is not None:
        model = dataclasses.replace(model, image=_with_few_tiles(model.image, data.max_tiles))
    sampling = {"frames": data.video_frames, "fps": data.video_fps}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling:
        model = dataclasses.replace(model, image=_with_sampling(model.image, sampling))
    rows = RowFormat.of(
        model,
        config.model.template,
        data.max_length,
        data.images_per_row,
        row_length=data.row_length,
        packing=data.packing,
        turns=PAIR if config.loss == "dpo" else data.turns,
        box_convention=data.box_convention,
    )
    if data.labels is None:
        return rows
    return dataclasses.replace(rows, template=rows.template.with_original_labels())


def _with_few_tiles(image: ImageSpec, most: int) -> ImageSpec:
    if image.tiling is None:
        raise LlavaError(
            f"config.data.max_tiles is {most}, but image_mode is {image.mode!r}: only anyres cuts "
            "pictures into tiles"
        )
    try:
        return dataclasses.replace(image, tiling=image.tiling.up_to(most))
    except ValueError as error:
        raise LlavaError(f"config.data.max_tiles is {most}: {error}") from None


def _with_sampling(image: ImageSpec, sampling: dict) -> ImageSpec:
    if image.video is None:
        raise LlavaError(
            f"config.data.video_{next(iter(sampling))} is set, but the model takes no videos: say "
            "how with config.model.video"
        )
    try:
        return dataclasses.replace(image, video=dataclasses.replace(image.video, **sampling))
    except LlavaError as error:
        raise LlavaError(f"config.data.video_frames and video_fps: {error}") from None


def training_model(config: ConfigDict, model: LlavaConfig, mesh: Mesh) -> tuple[LlavaModel, str]:
    """The module that a stage trains; `auto` in the config becomes what suits the devices.

    Returns:
      The module, and why its attention is not the devices' own kernel (see `choose_attention`).
    """
    device, data = mesh.devices.flat[0], config.data
    dtype, _ = compute_precision(config.model.dtype, device.platform)
    try:
        attention, refused = choose_attention(
            config.model.attention,
            device,
            mesh.shape["tensor"],
            dtype,
            model.decoder,
            data.row_length or data.max_length,
            data.turns == "independent" or config.loss == "dpo",
        )
    except ValueError as error:
        raise LlavaError(f"config.model.attention: {error}; choose auto") from None
    return LlavaModel(model, dtype, config.model.remat_policy, attention), refused


def existing(path: str, key: str) -> Path:
    """The path that a config key names, or an error that names the key."""
    if not path:
        raise LlavaError(f"config.{key} is empty: set it to a folder with pretrained weights")
    if not Path(path).is_dir():
        raise LlavaError(f"config.{key} names {path}, which is not a folder")
    return Path(path)


def tokenizer_folder(config: ConfigDict) -> Path:
    """The folder of the tokenizer: the one named, or that of the starting weights."""
    if config.init.tokenizer:
        return existing(config.init.tokenizer, "init.tokenizer")
    if not config.init.checkpoint:
        return existing(config.init.decoder, "init.decoder")
    checkpoint = existing(config.init.checkpoint, "init.checkpoint")
    if is_llava_folder(checkpoint):
        return checkpoint
    return checkpoint_of(checkpoint).parent.parent / "tokenizer"


def starting_sources(config: ConfigDict) -> dict[str, Path]:
    """Component -> folder of its starting parameters; a component without one starts fresh.

    Raises:
      LlavaError: the encoder or the language model would start from random numbers.
    """
    sources = {}
    for component in COMPONENTS:
        key = component if component in ("vision", "decoder") and config.init[component] else None
        if key:
            sources[component] = existing(config.init[key], f"init.{key}")
        elif config.init.checkpoint:
            whole = existing(config.init.checkpoint, "init.checkpoint")
            sources[component] = whole if is_llava_folder(whole) else checkpoint_of(whole)
        elif component != "projector":
            raise LlavaError(
                f"config.init.{component} and config.init.checkpoint are empty: the {component} "
                "would start from random numbers; name a folder with pretrained weights"
            )
    return sources


def starting_params(
    config: LlavaConfig,
    lora: LoraConfig | None,
    sources: dict[str, Path],
    components: set[str],
    seed: int,
    frozen: dict | None = None,
    resumed: bool = False,
) -> dict:
    """Parameters of some components, to be placed on devices.

    Those from a folder are LazyParameter: each device's slices are read when they are placed. A
    projector without a source, the newline if its source was trained without tiles, and lora are
    drawn at random.

    Args:
      frozen: the frozen parameters of the stage: what is drawn must be trained.
      resumed: what trains is there already; nothing is drawn.
    """
    params, newline = {}, ("projector", "newline")
    for folder in dict.fromkeys(sources.values()):
        here = [c for c in COMPONENTS if sources.get(c) == folder and c in components]
        if here:
            params |= open_components(folder, here, config, optional=[newline])
    key = jax.random.key(seed)
    projector = params.get("projector")
    lacks_newline = projector is not None and config.image.newline and "newline" not in projector
    if lacks_newline and "newline" in (frozen or {}).get("projector", {}):
        raise LlavaError(
            f"{sources['projector']} has no projector/newline and config.trainable leaves it "
            "frozen at its random start: train it, at the language model's rate for one"
        )
    if lacks_newline and REFERENCE in (frozen or {}):
        raise LlavaError(
            f"{sources['projector']} has no projector/newline, and config.loss=dpo would compare "
            "with a random one: start from a model that was trained on pictures in tiles"
        )
    if resumed:
        return params
    if "projector" in components and (projector is None or lacks_newline):
        if lacks_newline:
            hosts.report(f"{sources['projector']} has no projector/newline: it is drawn at random")
        fresh = lambda: nn.meta.unbox(fresh_projector(config, key))
        params["projector"] = jax.tree.map(jax.device_get, jax.jit(fresh)()) | (projector or {})
    if "lora" in components:
        fresh = lambda: init_lora(abstract_lora(lora, abstract_params(config)), key)
        params["lora"] = jax.tree.map(jax.device_get, jax.jit(fresh)())
    return params


def lora_config(config: ConfigDict, model: LlavaConfig) -> LoraConfig | None:
    """The LoRA of config.lora, or None.

    Raises:
      LlavaError: it does not fit the model, or config.trainable.
    """
    trains = any(group.split("/")[0] == "lora" for group in config.trainable)
    if config.lora.rank < 0 or trains != (config.lora.rank > 0):
        raise LlavaError(
            f"config.lora.rank is {config.lora.rank}, but config.trainable names "
            f"{', '.join(config.trainable)}: LoRA needs a rank of at least 1 and a learning rate, "
            "such as config.trainable.lora = 2e-4"
        )
    if not trains:
        return None
    lora = LoraConfig(
        config.lora.rank, config.lora.alpha, tuple(config.lora.targets), config.lora.dropout
    )
    try:
        abstract_lora(lora, abstract_params(model))
    except ValueError as error:
        raise LlavaError(f"config.lora.targets: {error}") from None
    return lora


def frozen_sources(sources: dict[str, Path], frozen: Collection[str]) -> dict[str, Source]:
    """The sources of frozen components, which a checkpoint names because it does not hold them."""
    for component in frozen:
        if component not in sources:
            raise LlavaError(
                f"config.trainable leaves the {component} frozen at its random start: train it or "
                "start from a checkpoint that has it"
            )
    return {c: Source(sources[c], weights_checksum(sources[c])) for c in frozen}
