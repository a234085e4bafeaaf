"""LLaVA in the form of the original code (haotian-liu/LLaVA): `mm_*` keys in a Llama's config.json.

A folder holds a whole model, v0 delta weights, or only what was trained on top of a base model: a
projector (`mm_projector.bin`), or a LoRA adapter with `non_lora_trainables.bin`. Each becomes one
mapping with the names of a whole model: `model.layers.…`, `model.mm_projector.…` and, if the vision
encoder was saved too, `model.vision_tower.vision_tower.…`.
Follows llava/model/builder.py and llava_arch.py of that code.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import IMAGE_TOKEN_ID, LlavaConfig
from llava_jax.models.presets import SIGLIP_SO400M, clip_large
from llava_jax.models.projector import ProjectorSpec
from llava_jax.models.vit import ViTConfig, feature_states
from llava_jax.weights.families import (
    DECODERS,
    ENCODERS,
    ORIGINALS,
    DecoderFamily,
    EncoderFamily,
    Families,
    family_of,
)
from llava_jax.weights.formats.folders import open_weights
from llava_jax.weights.formats.pickle_files import open_pickle
from llava_jax.weights.name_tables import NEWLINE
from llava_jax.weights.read.fields import convert_command, read_json
from llava_jax.weights.read.image_settings import image_settings
from llava_jax.weights.read.merging import add_delta, grow_rows
from llava_jax.weights.read.original_pictures import original_pictures
from llava_jax.weights.read.peft import ADAPTER_CONFIG, merge_adapter, open_adapter
from llava_jax.weights.tensors import StoredTensor

PROJECTOR_FILE, TRAINABLES_FILE = "mm_projector.bin", "non_lora_trainables.bin"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_ROOTS = {  # root of a name -> the component, in which the rest is read
    "model.vision_tower.vision_tower.": "vision",
    "model.mm_projector.": "projector",
}
# Last part of mm_vision_tower -> shape, for encoders whose folder is not needed if the checkpoint
# has their weights.
_KNOWN_TOWERS = {
    "clip-vit-large-patch14": clip_large(224),
    "clip-vit-large-patch14-336": clip_large(336),
    "siglip-so400m-patch14-384": dataclasses.replace(SIGLIP_SO400M, num_layers=27),
}
# The tower of folders that `llava-jax export` wrote around encoders that the original code does not
# have: they say what they mean, also of a SigLIP. For that code its path is written there.
OWN_TOWER = "vision_tower"
_BLOCK = re.compile(r"(?:vision_model\.)?encoder\.layers\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Original:
    """An original LLaVA on disk, ready to be matched with our parameters.

    Attributes:
      parts: component -> tensors by the names that a checkpoint of it alone would have.
      values: the folder's `config.json`.
      added_tokens: tokens to add to the tokenizer of a base model, in this order.
      notes: what was left aside, one sentence each.
    """

    config: LlavaConfig
    families: Families
    parts: dict[str, dict[str, StoredTensor]]
    values: dict
    added_tokens: tuple[str, ...]
    notes: tuple[str, ...] = ()


def open_original(
    folder: Path,
    base: Path | None = None,
    delta_base: Path | None = None,
    vision_tower: Path | None = None,
    allow_pickle: bool = False,
    pinpoint_order: str | None = None,
    image_mode: str | None = None,
) -> Original:
    """Opens any of the forms above; arguments and errors as in `open_llava`.

    An adapter without a config.json is of the model that its base's config.json describes.
    """
    path = folder / "config.json"
    if base is not None and not path.exists():
        path = base / "config.json"
    source, values = str(path), read_json(path)
    added = _added_tokens(values)
    decoder = _decoder_family(values, source)
    rows = decoder.read(values, source).vocab_size
    tensors = _layers(folder, base, delta_base, allow_pickle, rows, bool(added))
    parts, ignored = _split(folder, tensors)
    tower = _tower_folder(values, path.parent, vision_tower)
    vision, vision_family, image = _vision(values, path, tower, bool(parts["vision"]))
    inside = bool(parts["vision"])
    if not inside:
        parts["vision"] = open_weights(tower, allow_pickle)
    layer = values.get("mm_vision_select_layer", -2)
    own = Path(tower_name(values)).name == OWN_TOWER
    if vision_family.model_type == "siglip_vision_model" and not own:
        vision, parts["vision"] = _siglip(vision, parts["vision"], inside)
        layer = -1
    image = original_pictures(values, source, image, vision, decoder, pinpoint_order, image_mode)
    config = _config(values, source, vision, image, decoder, layer)
    if not parts["projector"].keys() - {NEWLINE} and ProjectorSpec.parse(config.projector).depth:
        adapter = (folder / ADAPTER_CONFIG).exists()
        what = (
            f"add the {TRAINABLES_FILE} that was saved with the adapter"
            if adapter
            else (f"add its {PROJECTOR_FILE}")
        )
        raise LlavaError(f"{folder} holds no projector (no tensor model.mm_projector.…): {what}")
    return Original(
        config=config,
        families=Families(vision_family, decoder),
        parts=parts,
        values=values,
        added_tokens=added,
        notes=(f"{folder} holds {ignored}, of no use to the model: ignored",) if ignored else (),
    )


# --- config ---------------------------------------------------------------------------------------


def _decoder_family(values: dict, source: str) -> DecoderFamily:
    """The family of the language model: by the class, since model types are not to be trusted.

    "llava" is the model type of LLaVA-1.5 on Llama and of OneVision on Qwen 2.
    """
    named = values.get("architectures")
    named = [str(name) for name in named] if isinstance(named, list) else []
    for family in DECODERS.values():
        if family.original_class and family.original_class in named:
            return family
    if others := [name for name in named if name.lower().startswith("llava")]:
        known = ", ".join(f.original_class for f in DECODERS.values() if f.original_class)
        raise LlavaError(
            f"{source} has architectures={others!r}: of the original LLaVA, {known} can be read"
        )
    family = str(values.get("model_type"))
    if family not in ORIGINALS:
        raise LlavaError(
            f"{source} has model_type={family!r}: of the original LLaVA, those with the model "
            f"types {', '.join(ORIGINALS)} can be read"
        )
    return ORIGINALS[family]


def _config(
    values: dict,
    source: str,
    vision: ViTConfig,
    image: ImageSpec,
    family: DecoderFamily,
    layer: object,
) -> LlavaConfig:
    feature = values.get("mm_vision_select_feature") or "patch"
    if feature not in ("patch", "cls_patch"):
        raise LlavaError(
            f"{source} has mm_vision_select_feature={feature!r}: choose patch or cls_patch"
        )
    keeps_class_token = feature == "cls_patch" and vision.class_token
    if keeps_class_token and image.tiling is not None:
        raise LlavaError(
            f"{source} has mm_vision_select_feature='cls_patch': the features of a tile must be a "
            "square of patches, without another; name an image_mode of one view"
        )
    projector = str(values.get("mm_projector_type") or "linear")
    if type(layer) is not int:
        raise LlavaError(f"{source} has mm_vision_select_layer={layer!r}: it must be a number")
    try:
        spec = ProjectorSpec.parse(projector)
        feature_states(vision, layer)
    except ValueError as error:
        raise LlavaError(f"{source}: {error}") from error
    decoder = family.read(values, source)
    width = values.get("mm_hidden_size") or vision.hidden_size
    if width != vision.hidden_size:
        name = tower_name(values) or "its vision encoder"
        raise LlavaError(
            f"{source} has mm_hidden_size={width}, but the features of {name} are "
            f"{vision.hidden_size} wide: give the folder of the encoder that it was trained with "
            "(--vision_tower DIR of llava-jax convert; in Python, vision_tower=)"
        )
    try:
        spec.check(vision.hidden_size, decoder.hidden_size)
    except ValueError as error:
        raise LlavaError(f"{source}: {error}") from None
    if spec.fold > 1:
        raise LlavaError(f"{source} has mm_projector_type={projector!r}: it is not of the original")
    return LlavaConfig(
        vision=vision,
        decoder=decoder,
        projector=projector,
        feature_layer=layer,
        keep_class_token=keeps_class_token,
        image=image,
        image_token_id=IMAGE_TOKEN_ID,
        use_im_start_end=bool(values.get("mm_use_im_start_end")),
    )


def _added_tokens(values: dict) -> tuple[str, ...]:
    patch = ("<im_patch>",) if values.get("mm_use_im_patch_token") else ()
    return patch + (("<im_start>", "<im_end>") if values.get("mm_use_im_start_end") else ())


# --- the vision encoder ---------------------------------------------------------------------------


def tower_name(values: Mapping) -> str:
    """What `mm_vision_tower` says."""
    return str(values.get("mm_vision_tower") or values.get("vision_tower") or "")


def _siglip(
    vision: ViTConfig, tensors: Mapping[str, StoredTensor], inside: bool
) -> tuple[ViTConfig, dict[str, StoredTensor]]:
    """A SigLIP encoder without its last block, whose features are those of the last that is left.

    The original code takes the block away when it makes the encoder, so a checkpoint that holds the
    encoder holds it without. It does not look at mm_vision_select_layer.

    Args:
      inside: whether the tensors are of the checkpoint, and not of a folder of the encoder's own.
    """
    numbers = {name: _BLOCK.match(name) for name in tensors}
    numbers = {name: int(found[1]) for name, found in numbers.items() if found}
    held = max(numbers.values(), default=-1) + 1
    count = held if inside and held == vision.num_layers else vision.num_layers - 1
    kept = {name: tensor for name, tensor in tensors.items() if numbers.get(name, -1) < count}
    kept = dict(tensors) if inside else kept
    return dataclasses.replace(vision, num_layers=count), kept


def _tower_folder(values: dict, folder: Path, given: Path | None) -> Path | None:
    """The encoder's folder: the one given, or the one that `mm_vision_tower` names from here."""
    name = tower_name(values)
    if given is not None:
        return given
    last = Path(name).name
    places = (Path(name), folder / name, folder / last, folder.parent / last)
    return next((p for p in places if last and (p / "config.json").is_file()), None)


def _vision(
    values: dict, source: Path, tower: Path | None, has_weights: bool
) -> tuple[ViTConfig, EncoderFamily, ImageSpec]:
    """The encoder's config, its family, and how its pictures are prepared."""
    name = tower_name(values)
    if tower is not None:
        found = read_json(tower / "config.json")
        family = family_of("vision", found, str(tower / "config.json"))
        vision = family.read(found, str(tower / "config.json"))
        return vision, family, image_settings(tower, family.images, vision.image_size)
    vision = _KNOWN_TOWERS.get(Path(name).name)
    if vision is None or not has_weights:
        lacking = "config.json is" if has_weights else "weights are"
        command = convert_command(source.parent, "--vision_tower ENCODER")
        raise LlavaError(
            f"{source} names the vision encoder {name!r}, whose {lacking} not in the folder: "
            f"{command} takes it from the encoder's folder (in Python, vision_tower=)"
        )
    family = ENCODERS["clip" if vision.class_token else "siglip"]
    return vision, family, dataclasses.replace(family.images, size=vision.image_size)


# --- tensors --------------------------------------------------------------------------------------


def _layers(
    folder: Path,
    base: Path | None,
    delta_base: Path | None,
    allow_pickle: bool,
    vocabulary: int,
    grows: bool,
) -> dict[str, StoredTensor]:
    """The tensors of a whole model, by original names.

    Args:
      vocabulary: rows that the embedding table must have.
      grows: whether tokens were added, so that the base may have fewer rows.
    """
    adapter = (folder / ADAPTER_CONFIG).exists()
    if not adapter and not (folder / PROJECTOR_FILE).exists() or _has_whole_model(folder):
        return _whole(folder, base, delta_base, allow_pickle)
    if delta_base is not None:
        raise LlavaError(f"{folder} holds no delta weights: give its base as base (--base DIR)")
    if base is None:
        what = "a LoRA adapter" if adapter else "a projector"
        raise LlavaError(
            f"{folder} holds {what} and no language model: "
            f"{convert_command(folder, '--base MODEL')} adds the model that it was trained on (in "
            "Python, base=)"
        )
    tensors = open_weights(base, allow_pickle)
    added = folder / (TRAINABLES_FILE if adapter else PROJECTOR_FILE)
    own = _plain_names(open_pickle(added, allow_pickle)) if added.exists() else {}
    last = own.pop(EMBEDDING, None)
    tensors |= own
    if grows or last is not None:
        _grow(tensors, vocabulary, last, folder)
    if adapter:
        tensors = merge_adapter(folder, tensors, open_adapter(folder, allow_pickle))
    return tensors


def _grow(
    tensors: dict[str, StoredTensor], vocabulary: int, last: StoredTensor | None, folder: Path
) -> None:
    """Adds rows for added tokens to the embedding table and the head; `last` are trained ones."""
    if EMBEDDING not in tensors:
        raise LlavaError(f"the base of {folder} has no tensor {EMBEDDING!r}")
    if last is not None and last.shape[0] == vocabulary:
        tensors[EMBEDDING] = last
    else:
        tensors[EMBEDDING] = grow_rows(tensors[EMBEDDING], vocabulary, last)
    if HEAD in tensors:
        tensors[HEAD] = grow_rows(tensors[HEAD], vocabulary)


def _has_whole_model(folder: Path) -> bool:
    names = ("model.safetensors", "pytorch_model.bin")
    return any((folder / f"{name}{end}").exists() for name in names for end in ("", ".index.json"))


def _whole(
    folder: Path, base: Path | None, delta_base: Path | None, allow_pickle: bool
) -> dict[str, StoredTensor]:
    if base is not None:
        raise LlavaError(
            f"{folder} holds a whole model: leave out base (--base), or, if these are v0 delta "
            "weights, give the LLaMA as delta_base (--delta_base DIR)"
        )
    tensors = open_weights(folder, allow_pickle)
    if delta_base is not None:
        return add_delta(open_weights(delta_base, allow_pickle), tensors)
    if "-delta-" in folder.name:
        raise LlavaError(
            f"{folder} is named as delta weights, which are no model by themselves: "
            f"{convert_command(folder, '--delta_base LLAMA')} adds the LLaMA that they were taken "
            "from (in Python, delta_base=); or rename the folder"
        )
    return tensors


def _plain_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names of `non_lora_trainables.bin` and `mm_projector.bin` as in a whole model."""
    plain = {name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}
    if any(name.startswith("model.model.") for name in plain):
        plain = {name.removeprefix("model."): tensor for name, tensor in plain.items()}
    return plain


def _split(
    folder: Path, tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, dict[str, StoredTensor]], str]:
    """Tensors by component, under the names that a folder of the component alone would have.

    The second result names those of a resampler, which pools and has nothing to learn.
    """
    parts, ignored = {"vision": {}, "projector": {}, "decoder": {}}, []
    for name, tensor in tensors.items():
        if name.startswith("model.vision_resampler."):
            ignored.append(name)
            continue
        if name == f"model.{NEWLINE}":
            parts["projector"][NEWLINE] = tensor
            continue
        root = next((root for root in _ROOTS if name.startswith(root)), "")
        parts[_ROOTS.get(root, "decoder")][name.removeprefix(root)] = tensor
    if not parts["decoder"]:
        raise LlavaError(f"{folder} holds no tensor of a language model")
    return parts, ", ".join(sorted(ignored))
