"""Checkpoint folders of every form -> a LlavaConfig and our parameters, one tensor at a time.

The entry for training, inference and convert:

    checkpoint = open_llava(folder)   # reads configs and headers, no values; reports every fault
    checkpoint.config, checkpoint.words(), checkpoint.tokenizer_dir
    checkpoint.params["decoder/layers/self_attn/q_proj/kernel"]   # LazyParameter
    checkpoint.params[path].shape, .read(block), [slices]         # one tensor at a time, or a part
    params = checkpoint.read("bfloat16")                          # the tree that LlavaModel takes
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import ProjectorSpec
from llava_jax.models.vit import ViTConfig, num_blocks
from llava_jax.weights.families import Families, family_of, is_part
from llava_jax.weights.formats.folders import open_weights
from llava_jax.weights.llava_classes import is_hugging_face
from llava_jax.weights.match import (
    canonical_names,
    component_of,
    idle_tensors,
    match,
    split_llava,
)
from llava_jax.weights.name_tables import NameTable, projector_table
from llava_jax.weights.quantized import packing_notes
from llava_jax.weights.read.fields import convert_command, read_json
from llava_jax.weights.read.huggingface import (
    composed_config,
    huggingface_notes,
    llava_config,
    settle_tying,
)
from llava_jax.weights.read.merging import ComputedTensor
from llava_jax.weights.read.original import (
    EMBEDDING,
    HEAD,
    PROJECTOR_FILE,
    open_original,
)
from llava_jax.weights.read.peft import ADAPTER_CONFIG, merge_adapter, open_adapter, unties
from llava_jax.weights.read.prompt_words import PromptWords, prompt_words
from llava_jax.weights.read.tiled_pictures import check_choices, in_mode
from llava_jax.weights.tensors import LazyParameter, StoredTensor, check_dtype, read_tree

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclasses.dataclass(frozen=True)
class LlavaFolder:
    """A LLaVA on disk.

    Attributes:
      folder: what was opened.
      config: the model's.
      families: of its encoder and language model.
      params: our path ("decoder/norm/scale") -> where its values are; complete and checked.
      idle: encoder tensors we do not use but transformers expects, by Hugging Face name.
      words: (name of a template, or None for the folder's own words) -> how the model is asked;
        see `prompt_words`.
      tokenizer_dir: the folder with its tokenizer, None if there is none.
      added_tokens: tokens to add to that tokenizer first, in this order.
      notes: what was assumed or left aside, one sentence each, for whoever loads the model.
    """

    folder: Path
    config: LlavaConfig
    families: Families
    params: dict[str, LazyParameter]
    idle: dict[str, StoredTensor]
    words: Callable[[str | None], PromptWords]
    tokenizer_dir: Path | None
    added_tokens: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def needed_tokenizer(self) -> Path:
        """The folder with its tokenizer; LlavaError if there is none."""
        if self.tokenizer_dir is None:
            raise LlavaError(
                f"{self.folder} has no tokenizer: copy tokenizer.json (or tokenizer.model) and "
                "tokenizer_config.json there"
            )
        return self.tokenizer_dir

    def read(self, dtype: str = "float32") -> dict:
        """The tree that LlavaModel takes, as numpy arrays of float32, bfloat16 or float16."""
        empty = {"vision": {}, "projector": {}, "decoder": {}}  # an identity projector stays so
        return empty | read_tree(self.params, dtype, self.folder.name)


def open_llava(
    folder: str | Path,
    base: str | Path | None = None,
    delta_base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    allow_pickle: bool = False,
    pinpoint_order: str | None = None,
    image_mode: str | None = None,
) -> LlavaFolder:
    """Opens a LLaVA of any form that we read; blocks past the feature layer are left out.

    Args:
      folder: LLaVA in Hugging Face form, whichever transformers version wrote its names; LLaVA in
        its original form; a LoRA adapter or an `mm_projector.bin`, with `base`; v0 delta weights,
        with `delta_base`; a language model, with `vision_tower`: a fresh LLaVA with a random
        projector.
      base: the folder of the model that an adapter or a projector was trained on.
      delta_base: the folder of the LLaMA that delta weights were taken from.
      vision_tower: the folder of the vision encoder, if the checkpoint only names it.
      allow_pickle: read PyTorch's `.bin` and `.pth` files: their tensors, never their code.
      pinpoint_order: whose code chooses the tiles of a picture, if not that of the folder's form:
        `hf` or `original`. They read image_grid_pinpoints the other way round, and round the size
        without padding otherwise.
      image_mode: show a picture as one view in this mode, whatever the folder says of tiles.
    Raises:
      LlavaError: anything wrong with the folder, naming file and tensor.
    """
    folder = Path(folder)
    pictures = {"pinpoint_order": pinpoint_order, "image_mode": image_mode}
    check_choices(**pictures)
    given = {"base": base, "delta_base": delta_base, "vision_tower": vision_tower}
    paths = {name: Path(path) for name, path in given.items() if path}
    for name, path in paths.items():
        if not path.is_dir():
            raise LlavaError(f"{name} is {path}, which is not a folder")
    adapter = (folder / ADAPTER_CONFIG).exists()
    values = _config_values(folder, paths.get("base"), adapter)
    if is_original(values):
        return _original(folder, paths, allow_pickle, pictures)
    if adapter:
        return _adapted(folder, paths, allow_pickle, pictures)
    if set(paths) == {"vision_tower"} and is_part("decoder", values):
        return _composed(folder, values, paths["vision_tower"], allow_pickle)
    config, families, parts = _huggingface(folder, values, allow_pickle, pictures)
    if paths:
        raise LlavaError(f"{folder} is a whole LLaVA: leave out {' and '.join(paths)}")
    return _opened([folder], values, config, families, parts)


def _original(
    folder: Path, paths: dict[str, Path], allow_pickle: bool, pictures: dict[str, str | None]
) -> LlavaFolder:
    found = open_original(folder, allow_pickle=allow_pickle, **pictures, **paths)
    places = [folder, *(paths[name] for name in ("base", "delta_base") if name in paths)]
    opened = _opened(places, found.values, found.config, found.families, found.parts, True)
    notes = (*opened.notes, *found.notes)
    return dataclasses.replace(opened, added_tokens=found.added_tokens, notes=notes)


def _huggingface(
    folder: Path, values: dict, allow_pickle: bool, pictures: dict[str, str | None]
) -> tuple[LlavaConfig, Families, dict[str, dict[str, StoredTensor]]]:
    """Config, model types and tensors by component of a Hugging Face LLaVA."""
    config, families = llava_config(folder, values, pictures["pinpoint_order"])
    parts = split_llava(folder, open_weights(folder, allow_pickle))
    config = settle_tying(config, values, parts["decoder"])  # by the class that the folder is of
    if pictures["image_mode"]:
        config = dataclasses.replace(config, image=in_mode(config.image, pictures["image_mode"]))
    return config, families, parts


def _config_values(folder: Path, base: Path | None, adapter: bool) -> dict:
    """The model's `config.json`: an adapter may have left it to its base."""
    if (folder / "config.json").exists():
        return read_json(folder / "config.json")
    if adapter and base is None:
        raise _no_base(folder)
    if (folder / PROJECTOR_FILE).exists():
        raise LlavaError(
            f"{folder} holds {PROJECTOR_FILE} without the config.json that was saved with it: put "
            "that there too"
        )
    return read_json((base if adapter else folder) / "config.json")


def _no_base(folder: Path) -> LlavaError:
    command = convert_command(folder, "--base LLAVA")
    return LlavaError(
        f"{folder} holds a LoRA adapter and no model: {command}, and no other folder, adds the "
        "LLaVA that it was trained on (in Python, base=)"
    )


def _adapted(
    folder: Path, paths: dict[str, Path], allow_pickle: bool, pictures: dict[str, str | None]
) -> LlavaFolder:
    """A LoRA adapter that PEFT trained on a Hugging Face LLaVA."""
    if set(paths) != {"base"}:
        raise _no_base(folder)
    values = read_json(paths["base"] / "config.json")
    config, families, parts = _huggingface(paths["base"], values, allow_pickle, pictures)
    tables = components(config, families)
    named = {part: canonical_names(table, sub) for part, (table, sub, _) in tables.items()}
    adapters = {part: [] for part in parts}
    for trained in open_adapter(folder, allow_pickle):
        part, name = component_of(trained.name, trained.tensor)
        adapters[part].append(dataclasses.replace(trained, name=named[part](name)))
    for part, held in parts.items():
        parts[part] = renamed = {named[part](name): tensor for name, tensor in held.items()}
        if part == "decoder" and config.decoder.tie_word_embeddings and unties(adapters[part]):
            renamed[HEAD] = renamed[EMBEDDING]
            decoder = dataclasses.replace(config.decoder, tie_word_embeddings=False)
            config = dataclasses.replace(config, decoder=decoder)
        parts[part] = merge_adapter(folder, renamed, adapters[part])
    return _opened([folder, paths["base"]], values, config, families, parts)


def _composed(folder: Path, values: dict, vision_tower: Path, allow_pickle: bool) -> LlavaFolder:
    """A fresh LLaVA of a language model and a vision encoder, its projector drawn at random."""
    config, families = composed_config(vision_tower, folder)
    parts = {
        "vision": open_weights(vision_tower, allow_pickle),
        "projector": _drawn_projector(folder, config, families),
        "decoder": open_weights(folder, allow_pickle),
    }
    return _opened([folder], values, config, families, parts)


def _drawn_projector(
    folder: Path, config: LlavaConfig, families: Families
) -> dict[str, StoredTensor]:
    """Random tensors as PyTorch draws them, U(-1/sqrt(inputs), 1/sqrt(inputs)), always the same."""
    table, _, _ = components(config, families)["projector"]
    layers = ProjectorSpec.parse(config.projector).layer_sizes(
        config.feature_size, config.decoder.hidden_size
    )
    bounds = {f"linear_{i}": inputs**-0.5 for i, (inputs, _) in enumerate(layers)}
    sizes, rng = table.sizes(config), np.random.default_rng(0)
    tensors = {}
    for parameter in table.parameters:
        name, bound = parameter.keys[0], bounds[parameter.path.partition("/")[0]]
        shape = tuple(sizes[letter] for letter in parameter.stored_shape.split())
        drawn = rng.uniform(-bound, bound, shape).astype(np.float32)  # now: in the table's order
        tensors[name] = ComputedTensor(name, folder, "F32", shape, 0, lambda drawn=drawn: drawn)
    return tensors


def load_llava(folder: str | Path, dtype: str = "float32", **options) -> tuple[LlavaConfig, dict]:
    """The config and the parameters of a LLaVA; options as in `open_llava`."""
    check_dtype(dtype)
    checkpoint = open_llava(folder, **options)
    return checkpoint.config, checkpoint.read(dtype)


def open_part(
    part: str,
    folder: str | Path,
    blocks: int | None = None,
    config: ViTConfig | DecoderConfig | None = None,
    allow_pickle: bool = False,
) -> tuple[ViTConfig | DecoderConfig, dict[str, LazyParameter]]:
    """Opens an encoder (part "vision") or a language model ("decoder") by itself.

    Args:
      folder: `config.json` and weights as `save_pretrained` of transformers writes them.
      blocks: how many of its blocks are wanted, from the first; None for all.
      config: what the caller expects; a folder that differs is an error.
      allow_pickle: as in `open_llava`.
    Returns:
      The config and, by our path in `ViT` or `Decoder`, where its parameters are stored.
    Raises:
      LlavaError: anything wrong with the folder, naming file and tensor.
    """
    folder = Path(folder)
    source, values = str(folder / "config.json"), read_json(folder / "config.json")
    family = family_of(part, values, source)
    found = family.read(values, source)
    if config is not None and found != config:
        raise LlavaError(f"{folder} is not the model asked for: {_differences(found, config)}")
    blocks = found.num_layers if blocks is None else blocks
    if not 0 <= blocks <= found.num_layers:
        raise LlavaError(f"{folder} has {found.num_layers} blocks, not {blocks}")
    tensors = open_weights(folder, allow_pickle)
    return found, match(family.names, found, blocks, tensors, folder)


def load_decoder(
    folder: str | Path,
    config: DecoderConfig | None = None,
    dtype: str = "float32",
    allow_pickle: bool = False,
) -> tuple[DecoderConfig, dict]:
    """A language model's config and parameters, as float32, bfloat16 or float16 arrays."""
    check_dtype(dtype)
    found, params = open_part("decoder", folder, None, config, allow_pickle)
    return found, read_tree(params, dtype, Path(folder).name)


def load_vision(
    folder: str | Path,
    num_blocks: int | None = None,
    config: ViTConfig | None = None,
    dtype: str = "float32",
    allow_pickle: bool = False,
) -> tuple[ViTConfig, dict]:
    """An encoder's config and the parameters of its first blocks (None: all), as `load_decoder`."""
    check_dtype(dtype)
    found, params = open_part("vision", folder, num_blocks, config, allow_pickle)
    return found, read_tree(params, dtype, Path(folder).name)


def _differences(found: object, expected: object) -> str:
    return "; ".join(
        f"{field.name} is {getattr(found, field.name)!r} and not {getattr(expected, field.name)!r}"
        for field in dataclasses.fields(found)
        if getattr(found, field.name) != getattr(expected, field.name)
    )


def components(
    config: LlavaConfig, families: Families, original: bool = False
) -> dict[str, tuple[NameTable, object, int]]:
    """Component -> its name table, its config and how many blocks of it run.

    Args:
      original: the projector's names are those of the original form.
    """
    blocks = num_blocks(config.vision, config.feature_layer)
    sizes = config.feature_size, config.decoder.hidden_size
    projector = projector_table(
        config.projector, config.projector_bias, *sizes, original, config.image.newline
    )
    return {
        "vision": (families.vision.names, config.vision, blocks),
        "projector": (projector, config, 0),
        "decoder": (families.decoder.names, config.decoder, config.decoder.num_layers),
    }


def _opened(
    places: list[Path],
    values: dict,
    config: LlavaConfig,
    families: Families,
    parts: dict[str, dict[str, StoredTensor]],
    original: bool = False,
) -> LlavaFolder:
    """Matches the tensors of each component with its parameters.

    Args:
      places: the folder opened, and those it builds on: tokenizer and prompt words may be there.
      values: the model's `config.json`.
    """
    tables = components(config, families, original)
    params = {
        f"{part}/{path}": lazy
        for part, (table, sub_config, count) in tables.items()
        for path, lazy in match(table, sub_config, count, parts[part], places[0]).items()
    }

    def words(template: str | None = None) -> PromptWords:
        marked, tiled = config.use_im_start_end, config.image.tiling is not None
        tiled |= "anyres" in str(values.get("image_aspect_ratio"))
        return prompt_words(places, values, families.decoder, template, marked, tiled, original)

    hf_notes = () if original else huggingface_notes(places[-1], values, config)
    return LlavaFolder(
        folder=places[0],
        config=config,
        families=families,
        params=params,
        idle=idle_tensors(*tables["vision"], parts["vision"]),
        words=words,
        tokenizer_dir=next((place for place in places if _has_tokenizer(place)), None),
        notes=(*packing_notes(places[0], params), *hf_notes),
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def is_original(values: Mapping) -> bool:
    """True for the config.json of an original LLaVA."""
    return any(key.startswith("mm_") for key in values)


def is_llava_folder(folder: Path) -> bool:
    """True for a LLaVA of another program in any form, not for a run or a part of a LLaVA."""
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    try:
        values = read_json(folder / "config.json")
    except LlavaError:
        return False
    whole = is_hugging_face(values) or is_original(values)
    return whole and not (folder / "model.json").exists()
