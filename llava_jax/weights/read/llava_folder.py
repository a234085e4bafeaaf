"""Checkpoint folders of every form -> a LlavaConfig and our parameters, one tensor at a time.

The one way in for whoever reads a LLaVA (training, inference, convert):

    checkpoint = open_llava(folder)   # reads configs and headers, tells every fault, no values
    checkpoint.config, checkpoint.template, checkpoint.tokenizer_dir
    checkpoint.params["decoder/layers/self_attn/q_proj/kernel"]   # LazyParameter
    checkpoint.params[path].shape, .read(block), [slices]         # one tensor at a time, or a part
    params = checkpoint.read("bfloat16")                          # the tree that LlavaModel takes
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.projector import ProjectorSpec
from llava_jax.models.vit import ViTConfig, num_blocks
from llava_jax.text.chat_template import template_of
from llava_jax.weights.families import (
    DECODERS,
    Families,
    decoder_config,
    decoder_family,
    encoder_config,
    encoder_family,
)
from llava_jax.weights.formats.folders import open_weights
from llava_jax.weights.formats.safetensors_files import StoredTensor
from llava_jax.weights.lazy import (
    LazyParameter,
    check_dtype,
    idle_tensors,
    match,
    read_tree,
    standard_names,
    twice,
)
from llava_jax.weights.name_tables import LLAVA_HEAD, LLAVA_ROOTS, NameTable, projector_table
from llava_jax.weights.read.fields import read_json
from llava_jax.weights.read.huggingface import composed_config, llava_config
from llava_jax.weights.read.merging import ComputedTensor
from llava_jax.weights.read.original import has_tokenizer, is_original, open_original
from llava_jax.weights.read.peft import ADAPTER_CONFIG, merge_lora, open_adapter


@dataclasses.dataclass(frozen=True)
class LlavaFolder:
    """A LLaVA on disk.

    Attributes:
      folder: what was opened.
      config: the model's.
      families: of its encoder and language model.
      params: our path ("decoder/norm/scale") -> where its values lie; complete and checked.
      idle: tensors of the encoder that our model never computes with and its class in transformers
        has, by their names there.
      template: name of the conversation template it was tuned with.
      tokenizer_dir: the folder with its tokenizer, None where there is none.
      added_tokens: what that tokenizer must learn first, in this order.
      chat_template: the folder's own Jinja chat template, where it is none of our templates.
    """

    folder: Path
    config: LlavaConfig
    families: Families
    params: dict[str, LazyParameter]
    idle: dict[str, StoredTensor]
    template: str
    tokenizer_dir: Path | None
    added_tokens: tuple[str, ...] = ()
    chat_template: str | None = None

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
) -> LlavaFolder:
    """Opens a LLaVA of any form that we read; blocks past the feature layer are left out.

    Args:
      folder: LLaVA in Hugging Face form, whichever transformers version wrote its names; LLaVA in
        its original form; a LoRA adapter or an `mm_projector.bin`, with `base`; v0 delta weights,
        with `delta_base`; a language model, with `vision_tower`: a fresh LLaVA with a random
        projector.
      base: the folder of the model that an adapter or a projector was trained on.
      delta_base: the folder of the LLaMA that delta weights were taken from.
      vision_tower: the folder of the vision encoder, where the checkpoint only names it.
      allow_pickle: read PyTorch's `.bin` and `.pth` files: their tensors, never their code.
    Raises:
      LlavaError: anything wrong with the folder, naming file and tensor.
    """
    folder = Path(folder)
    others = {"base": base, "delta_base": delta_base, "vision_tower": vision_tower}
    paths = {name: Path(path) for name, path in others.items() if path}
    for name, path in paths.items():
        if not path.is_dir():
            raise LlavaError(f"{name} is {path}, which is not a folder")
    adapter = (folder / ADAPTER_CONFIG).exists()
    values = {}
    if not adapter or (folder / "config.json").exists():
        values = read_json(folder / "config.json")
    if is_original(values):
        return _original(folder, paths, allow_pickle)
    if adapter:
        return _adapted(folder, paths, allow_pickle)
    if set(paths) == {"vision_tower"} and values.get("model_type") in DECODERS:
        return _composed(folder, paths["vision_tower"], allow_pickle)
    config, families, parts = _huggingface(folder, values, allow_pickle)
    if paths:
        raise LlavaError(f"{folder} is a whole LLaVA: leave out {' and '.join(paths)}")
    return _checkpoint(folder, config, families, parts)


def _original(folder: Path, paths: dict[str, Path], allow_pickle: bool) -> LlavaFolder:
    found = open_original(folder, allow_pickle=allow_pickle, **paths)
    checkpoint = _checkpoint(folder, found.config, found.families, found.parts, original=True)
    jinja = _chat_template(folder)
    return dataclasses.replace(
        checkpoint,
        template=(jinja and template_of(jinja)) or found.template,
        tokenizer_dir=found.tokenizer_dir,
        added_tokens=found.added_tokens,
        chat_template=None,
    )


def _huggingface(
    folder: Path, values: dict, allow_pickle: bool
) -> tuple[LlavaConfig, Families, dict[str, dict[str, StoredTensor]]]:
    """Config, model types and tensors by component of a Hugging Face LLaVA."""
    config = llava_config(folder)
    parts = _split_llava(folder, open_weights(folder, allow_pickle))
    config = _settle_tying(config, values, parts["decoder"])
    families = Families(
        encoder_family(values.get("vision_config") or {}),
        decoder_family(values["text_config"] or {}),
    )
    return config, families, parts


def _adapted(folder: Path, paths: dict[str, Path], allow_pickle: bool) -> LlavaFolder:
    """A LoRA adapter that PEFT trained on a Hugging Face LLaVA."""
    if set(paths) != {"base"}:
        raise LlavaError(
            f"{folder} holds a LoRA adapter: give the folder of the LLaVA it was trained on, and "
            "nothing else (--base DIR, or base=)"
        )
    values = read_json(paths["base"] / "config.json")
    config, families, parts = _huggingface(paths["base"], values, allow_pickle)
    adapter = _split_llava(folder, open_adapter(folder, allow_pickle), whole=False)
    for name, (table, _, _) in components(config, families).items():
        held, added = standard_names(table, parts[name]), standard_names(table, adapter[name])
        idle = {key: tensor for key, tensor in parts[name].items() if tensor not in held.values()}
        parts[name] = idle | merge_lora(folder, held, added)
    tokenizer = folder if has_tokenizer(folder) else paths["base"]
    return dataclasses.replace(
        _checkpoint(paths["base"], config, families, parts), folder=folder, tokenizer_dir=tokenizer
    )


def _composed(folder: Path, vision_tower: Path, allow_pickle: bool) -> LlavaFolder:
    """A fresh LLaVA of a language model and a vision encoder, its projector drawn at random."""
    config = composed_config(vision_tower, folder)
    types = {"vision": vision_tower, "decoder": folder}
    families = Families(
        encoder_family(read_json(vision_tower / "config.json")),
        decoder_family(read_json(folder / "config.json")),
    )
    table, _, _ = components(config, families)["projector"]
    sizes, rng = table.sizes(config), np.random.default_rng(0)
    spec = ProjectorSpec.parse(config.projector)
    layers = spec.layer_sizes(config.feature_size, config.decoder.hidden_size)
    fan_in = {f"linear_{i}": inputs for i, (inputs, _) in enumerate(layers)}
    projector = {}
    for parameter in table.parameters:
        shape = tuple(sizes[letter] for letter in parameter.stored_shape.split())
        bound = fan_in[parameter.path.split("/")[0]] ** -0.5
        draw = functools.partial(rng.uniform, -bound, bound, shape)
        values = draw().astype(np.float32)  # drawn now: the same whatever is read first
        name = parameter.keys[0]
        projector[name] = ComputedTensor(
            name, folder, "F32", shape, 0, lambda values=values: values
        )
    parts = {part: open_weights(f, allow_pickle) for part, f in types.items()}
    return _checkpoint(folder, config, families, parts | {"projector": projector})


def load_llava(folder: str | Path, dtype: str = "float32", **options) -> tuple[LlavaConfig, dict]:
    """The config and the parameters of `open_llava`, which says what the options are."""
    check_dtype(dtype)
    checkpoint = open_llava(folder, **options)
    return checkpoint.config, checkpoint.read(dtype)


def open_decoder(
    folder: str | Path, config: DecoderConfig | None = None, allow_pickle: bool = False
) -> tuple[DecoderConfig, dict[str, LazyParameter]]:
    """Opens a Llama-family language model.

    Args:
      folder: `config.json` and weights as `LlamaForCausalLM.save_pretrained` writes them.
      config: what the caller expects; a folder that differs is an error.
      allow_pickle: as in `open_llava`.
    Returns:
      The config and, by our path in `Decoder`, where its parameters lie.
    Raises:
      LlavaError: anything wrong with the folder, naming file and tensor.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    found = decoder_config(values, str(folder / "config.json"))
    _check_expected(folder, found, config)
    table = decoder_family(values).names
    tensors = open_weights(folder, allow_pickle)
    return found, match(table, found, found.num_layers, tensors, folder)


def load_decoder(
    folder: str | Path,
    config: DecoderConfig | None = None,
    dtype: str = "float32",
    allow_pickle: bool = False,
) -> tuple[DecoderConfig, dict]:
    """The config and the parameters of `open_decoder`, as float32, bfloat16 or float16 arrays."""
    check_dtype(dtype)
    found, params = open_decoder(folder, config, allow_pickle)
    return found, read_tree(params, dtype, Path(folder).name)


def open_vision(
    folder: str | Path,
    num_blocks: int | None = None,
    config: ViTConfig | None = None,
    allow_pickle: bool = False,
) -> tuple[ViTConfig, dict[str, LazyParameter]]:
    """Opens the first `num_blocks` blocks (default: all) of a CLIP, SigLIP or DINOv2 encoder.

    Arguments, result and errors as in `open_decoder`; the paths are those in `ViT`.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    found = encoder_config(values, str(folder / "config.json"))
    _check_expected(folder, found, config)
    blocks = found.num_layers if num_blocks is None else num_blocks
    if not 0 <= blocks <= found.num_layers:
        raise LlavaError(f"{folder} has {found.num_layers} blocks, not {blocks}")
    table = encoder_family(values).names
    return found, match(table, found, blocks, open_weights(folder, allow_pickle), folder)


def load_vision(
    folder: str | Path,
    num_blocks: int | None = None,
    config: ViTConfig | None = None,
    dtype: str = "float32",
    allow_pickle: bool = False,
) -> tuple[ViTConfig, dict]:
    """The config and the parameters of `open_vision`, as float32, bfloat16 or float16 arrays."""
    check_dtype(dtype)
    found, params = open_vision(folder, num_blocks, config, allow_pickle)
    return found, read_tree(params, dtype, Path(folder).name)


def _check_expected(folder: Path, found: object, expected: object | None) -> None:
    if expected is None or found == expected:
        return
    differing = [
        f"{field.name} is {getattr(found, field.name)!r} and not {getattr(expected, field.name)!r}"
        for field in dataclasses.fields(found)
        if getattr(found, field.name) != getattr(expected, field.name)
    ]
    raise LlavaError(f"{folder} is not the model asked for: {'; '.join(differing)}")


def components(
    config: LlavaConfig, families: Families, original: bool = False
) -> dict[str, tuple[NameTable, object, int]]:
    """Component -> its name table, its config and how many blocks of it run.

    Args:
      original: the projector's names are those of the original form.
    """
    blocks = num_blocks(config.vision, config.feature_layer)
    sizes = config.feature_size, config.decoder.hidden_size
    projector = projector_table(config.projector, config.projector_bias, *sizes, original)
    return {
        "vision": (families.vision.names, config.vision, blocks),
        "projector": (projector, config, 0),
        "decoder": (families.decoder.names, config.decoder, config.decoder.num_layers),
    }


def _checkpoint(
    folder: Path,
    config: LlavaConfig,
    families: Families,
    parts: dict[str, dict[str, StoredTensor]],
    original: bool = False,
) -> LlavaFolder:
    """Matches the tensors of each component with its parameters."""
    tables = components(config, families, original)
    params = {
        f"{part}/{path}": lazy
        for part, (table, sub_config, count) in tables.items()
        for path, lazy in match(table, sub_config, count, parts[part], folder).items()
    }
    idle = idle_tensors(*tables["vision"], parts["vision"])
    jinja = _chat_template(folder)
    ours = template_of(jinja) if jinja else None
    return LlavaFolder(
        folder,
        config,
        families,
        params,
        idle,
        template=ours or families.decoder.template,
        tokenizer_dir=folder if has_tokenizer(folder) else None,
        chat_template=None if ours else jinja,
    )


def _chat_template(folder: Path) -> str | None:
    """The Jinja text that transformers' processor would take from a folder."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LlavaError(f"{path} is no UTF-8 text: {error}") from error
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
            if isinstance(found, str):
                return found
    return None


def is_llava_folder(folder: Path) -> bool:
    """True for a LLaVA of others in any form: not for a run of ours, nor for a part of a LLaVA."""
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    try:
        values = read_json(folder / "config.json")
    except LlavaError:
        return False
    return not (folder / "model.json").exists() and ("text_config" in values or is_original(values))


def _split_llava(
    folder: Path, tensors: dict[str, StoredTensor], whole: bool = True
) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by component, under the names that a folder of the component alone would have.

    `whole`: each component must have some.
    """
    parts = {"vision": {}, "projector": {}, "decoder": {}}
    for name, tensor in tensors.items():
        root, part = next(
            ((root, part) for root, part in LLAVA_ROOTS if name.startswith(root)), ("", None)
        )
        if part is None:
            if not name.startswith(LLAVA_HEAD):
                raise LlavaError(
                    f"{tensor.path} holds the tensor {name!r}, which is no part of a LLaVA model"
                )
            part = "decoder"
        short = name.removeprefix(root)
        if short in parts[part]:
            raise twice(parts[part][short], tensor)
        parts[part][short] = tensor
    empty = [part for part, held in parts.items() if not held]
    if empty and whole:
        raise LlavaError(f"{folder} holds no tensor of the {' and the '.join(empty)}")
    return parts


def _settle_tying(
    config: LlavaConfig, values: dict, decoder_tensors: dict[str, StoredTensor]
) -> LlavaConfig:
    """Decides whether the output head is the embedding table.

    `text_config` saying so settles it in every transformers version; the top level, true by default
    in the 4.x line whatever the model, counts only where there is no head.
    """
    top_level = bool(values.get("tie_word_embeddings")) and "lm_head.weight" not in decoder_tensors
    tied = config.decoder.tie_word_embeddings or top_level
    decoder = dataclasses.replace(config.decoder, tie_word_embeddings=tied)
    return dataclasses.replace(config, decoder=decoder)
