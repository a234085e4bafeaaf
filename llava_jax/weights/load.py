"""Checkpoint folders of every form -> a LlavaConfig and our parameters, one tensor at a time.

The one way in for whoever reads a LLaVA (training, inference, convert):

    checkpoint = open_llava(folder)   # reads configs and headers, tells every fault, no values
    checkpoint.config, checkpoint.template, checkpoint.tokenizer_dir
    checkpoint.params["decoder/layers/self_attn/q_proj/kernel"]   # LazyParameter
    checkpoint.params[path].shape, .read(block), [slices]         # one tensor at a time, or a part
    params = checkpoint.read("bfloat16")                          # the tree that LlavaModel takes
"""

import dataclasses
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import ViTConfig, num_blocks
from llava_jax.weights import hf_config
from llava_jax.weights.lazy import (
    LazyParameter,
    check_dtype,
    match,
    read_tree,
    twice,
)
from llava_jax.weights.name_tables import (
    DECODERS,
    LLAVA_HEAD,
    LLAVA_ROOTS,
    VISION_ENCODERS,
    projector_table,
)
from llava_jax.weights.safetensors_files import StoredTensor, open_folder

# How the llava-hf checkpoints of each language model family were tuned.
HF_TEMPLATES = {"llama": "v1", "mistral": "mistral_instruct", "qwen2": "chatml", "qwen3": "chatml"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A LLaVA on disk.

    Attributes:
      folder: what was opened.
      config: the model's.
      params: our path ("decoder/norm/scale") -> where its values lie; complete and checked.
      template: name of the conversation template it was tuned with.
      tokenizer_dir: the folder with its tokenizer, None where there is none.
    """

    folder: Path
    config: LlavaConfig
    params: dict[str, LazyParameter]
    template: str
    tokenizer_dir: Path | None

    def read(self, dtype: str = "float32") -> dict:
        """The tree that LlavaModel takes, as numpy arrays of float32, bfloat16 or float16."""
        empty = {"vision": {}, "projector": {}, "decoder": {}}  # an identity projector stays so
        return empty | read_tree(self.params, dtype, self.folder.name)


def open_llava(folder: str | Path) -> Checkpoint:
    """Opens a LLaVA in Hugging Face form, whichever transformers version wrote its names.

    Blocks of the encoder past the feature layer are left out.

    Raises:
      LlavaError: anything wrong with the folder, naming file and tensor.
    """
    folder = Path(folder)
    config = hf_config.llava_config(folder)
    values = hf_config.read_json(folder / "config.json")
    parts = _split_llava(folder, open_folder(folder))
    config = _settle_tying(config, values, parts["decoder"])
    families = {
        "vision": (values.get("vision_config") or {}).get("model_type", "clip_vision_model"),
        "decoder": (values["text_config"] or {}).get("model_type", "llama"),
    }
    params = _match_parts(folder, config, families, parts)
    return Checkpoint(folder, config, params, HF_TEMPLATES[families["decoder"]], folder)


def load_llava(folder: str | Path, dtype: str = "float32") -> tuple[LlavaConfig, dict]:
    """The config and the parameters of `open_llava`."""
    check_dtype(dtype)
    checkpoint = open_llava(folder)
    return checkpoint.config, checkpoint.read(dtype)


def load_decoder(
    folder: str | Path, config: DecoderConfig | None = None, dtype: str = "float32"
) -> tuple[DecoderConfig, dict]:
    """Reads a Llama-family language model.

    Args:
      folder: `config.json` and safetensors as `LlamaForCausalLM.save_pretrained` writes them.
      config: what the caller expects; a folder that differs is an error.
      dtype: of the parameters returned: float32, bfloat16 or float16.
    Returns:
      The config and the tree of numpy arrays that `Decoder` takes.
    Raises:
      LlavaError: anything wrong with the folder, naming file and tensor.
    """
    check_dtype(dtype)
    folder = Path(folder)
    values = hf_config.read_json(folder / "config.json")
    found = hf_config.decoder_config(values, str(folder / "config.json"))
    _check_expected(folder, found, config)
    table = DECODERS[values.get("model_type", "llama")]
    params = match(table, found, found.num_layers, open_folder(folder), folder)
    return found, read_tree(params, dtype, folder.name)


def load_vision(
    folder: str | Path,
    num_blocks: int | None = None,
    config: ViTConfig | None = None,
    dtype: str = "float32",
) -> tuple[ViTConfig, dict]:
    """Reads the first `num_blocks` blocks (default: all) of a CLIP, SigLIP or DINOv2 encoder.

    Arguments, result and errors as in `load_decoder`; the tree is the one that `ViT` takes.
    """
    check_dtype(dtype)
    folder = Path(folder)
    values = hf_config.read_json(folder / "config.json")
    found = hf_config.vision_config(values, str(folder / "config.json"))
    _check_expected(folder, found, config)
    blocks = found.num_layers if num_blocks is None else num_blocks
    if not 0 <= blocks <= found.num_layers:
        raise LlavaError(f"{folder} has {found.num_layers} blocks, not {blocks}.")
    table = VISION_ENCODERS[values.get("model_type", "clip_vision_model")]
    params = match(table, found, blocks, open_folder(folder), folder)
    return found, read_tree(params, dtype, folder.name)


def _check_expected(folder: Path, found: object, expected: object | None) -> None:
    if expected is None or found == expected:
        return
    differing = [
        f"{field.name} is {getattr(found, field.name)!r} and not {getattr(expected, field.name)!r}"
        for field in dataclasses.fields(found)
        if getattr(found, field.name) != getattr(expected, field.name)
    ]
    raise LlavaError(f"{folder} is not the model asked for: {'; '.join(differing)}.")


def _match_parts(
    folder: Path,
    config: LlavaConfig,
    families: dict[str, str],
    parts: dict[str, dict[str, StoredTensor]],
) -> dict[str, LazyParameter]:
    """The parameters of the three components under our paths of the whole model."""
    blocks = num_blocks(config.vision, config.feature_layer)
    sizes = config.feature_size, config.decoder.hidden_size
    projector = projector_table(config.projector, config.projector_bias, *sizes)
    components = {
        "vision": (VISION_ENCODERS[families["vision"]], config.vision, blocks),
        "projector": (projector, config, 0),
        "decoder": (DECODERS[families["decoder"]], config.decoder, config.decoder.num_layers),
    }
    return {
        f"{part}/{path}": lazy
        for part, (table, sub_config, count) in components.items()
        for path, lazy in match(table, sub_config, count, parts[part], folder).items()
    }


def _split_llava(
    folder: Path, tensors: dict[str, StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by component, under the names that a folder of the component alone would have."""
    parts = {"vision": {}, "projector": {}, "decoder": {}}
    for name, tensor in tensors.items():
        root, part = next(
            ((root, part) for root, part in LLAVA_ROOTS if name.startswith(root)), ("", None)
        )
        if part is None:
            if not name.startswith(LLAVA_HEAD):
                raise LlavaError(
                    f"{tensor.path} holds the tensor {name!r}, which is no part of a LLaVA model."
                )
            part = "decoder"
        short = name.removeprefix(root)
        if short in parts[part]:
            raise twice(parts[part][short], tensor)
        parts[part][short] = tensor
    empty = [part for part, held in parts.items() if not held]
    if empty:
        raise LlavaError(f"{folder} holds no tensor of the {' and the '.join(empty)}.")
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
