"""The families that can be read and written: one row each, with all that is known of it.

A row says how the family's `config.json` maps to our config (`decoder_configs`, `encoder_configs`),
under which names its tensors are stored (`name_tables`), and, for a language model, which
conversation template a LLaVA around it was tuned with. The way back needs no table: a config is
written as the first family, in the order of the rows, whose `config.json` reads back as the same
config. docs/extend/ says how to add a row.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from llava_jax.errors import LlavaError
from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.images import ImageSpec
from llava_jax.models.llava import LlavaConfig
from llava_jax.models.vit import ViTConfig
from llava_jax.weights import decoder_configs, encoder_configs
from llava_jax.weights.name_tables import CLIP, DINOV2, LLAMA, SIGLIP, NameTable


@dataclasses.dataclass(frozen=True)
class DecoderFamily:
    """A family of language models.

    Attributes:
      model_type: in `config.json`.
      class_name: of transformers, without the ending ForCausalLM.
      read: (`config.json`, the file's name) -> DecoderConfig.
      names: where the tensors are.
      template: of the conversations that a LLaVA around it was tuned with, if its folder has none.
      more_keys: of `config.json` besides those of every family, for a config.
      original_types: model types of the original LLaVA code around it; the first is written.
      original_class: the class of the original code that is written.
    """

    model_type: str
    class_name: str
    read: Callable[[dict, str], DecoderConfig]
    names: NameTable
    template: str
    more_keys: Callable[[DecoderConfig], dict] = lambda config: {}
    original_types: tuple[str, ...] = ()
    original_class: str = ""

    def write(self, config: DecoderConfig) -> dict:
        """`config.json` of a language model alone."""
        return {
            "architectures": [f"{self.class_name}ForCausalLM"],
            "model_type": self.model_type,
            **decoder_configs.values(config),
            **self.more_keys(config),
        }


@dataclasses.dataclass(frozen=True)
class EncoderFamily:
    """A family of vision encoders.

    Attributes:
      model_types: in `config.json`: of the encoder alone, which is written, and of the model of
        texts and images that it is a part of.
      class_name: of transformers.
      read, names: as in DecoderFamily.
      more_keys: of `config.json` besides those of every family, for a config.
      loaded_by: programs that load a LLaVA around it in Hugging Face form.
      images: how its pictures are prepared if no file says so, at the encoder's own size.
    """

    model_types: tuple[str, ...]
    class_name: str
    read: Callable[[dict, str], ViTConfig]
    names: NameTable
    more_keys: Callable[[ViTConfig], dict]
    loaded_by: tuple[str, ...]
    images: ImageSpec = ImageSpec(mode="square")

    @property
    def model_type(self) -> str:
        return self.model_types[0]

    def write(self, config: ViTConfig) -> dict:
        """`config.json` of an encoder alone."""
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            **encoder_configs.values(config),
            **self.more_keys(config),
        }


_DECODERS = (
    DecoderFamily(
        model_type="llama",
        class_name="Llama",
        read=decoder_configs.llama,
        names=LLAMA,
        template="v1",
        original_types=("llava_llama", "llava", "llama"),
        original_class="LlavaLlamaForCausalLM",
    ),
    DecoderFamily(
        model_type="mistral",
        class_name="Mistral",
        read=decoder_configs.mistral,
        names=LLAMA,
        template="mistral_instruct",
        original_types=("llava_mistral", "mistral"),
        original_class="LlavaMistralForCausalLM",
    ),
    DecoderFamily(
        model_type="qwen2",
        class_name="Qwen2",
        read=decoder_configs.qwen2,
        names=LLAMA,
        template="chatml",
        more_keys=decoder_configs.qwen_window_keys,
        original_types=("llava_qwen", "qwen2"),
        original_class="LlavaQwenForCausalLM",
    ),
    DecoderFamily(
        model_type="qwen3",
        class_name="Qwen3",
        read=decoder_configs.qwen3,
        names=LLAMA,
        template="chatml",
        more_keys=decoder_configs.qwen_window_keys,
    ),
    DecoderFamily(
        model_type="seed_oss",
        class_name="SeedOss",
        read=decoder_configs.seed_oss,
        names=LLAMA,
        template="seed_oss",
    ),
)

_ENCODERS = (
    EncoderFamily(
        model_types=("clip_vision_model", "clip"),
        class_name="CLIPVisionModel",
        read=encoder_configs.clip,
        names=CLIP,
        more_keys=encoder_configs.clip_keys,
        loaded_by=("transformers", "vLLM", "llama.cpp"),
    ),
    EncoderFamily(
        model_types=("siglip_vision_model", "siglip"),
        class_name="SiglipVisionModel",
        read=encoder_configs.siglip,
        names=SIGLIP,
        more_keys=encoder_configs.siglip_keys,
        loaded_by=("transformers", "vLLM"),
        images=ImageSpec(mode="resize", mean=(0.5,) * 3, std=(0.5,) * 3),
    ),
    EncoderFamily(
        model_types=("dinov2",),
        class_name="Dinov2Model",
        read=encoder_configs.dinov2,
        names=DINOV2,
        more_keys=encoder_configs.dinov2_keys,
        loaded_by=("transformers",),
    ),
)

DECODERS: Mapping[str, DecoderFamily] = MappingProxyType({f.model_type: f for f in _DECODERS})
ENCODERS: Mapping[str, EncoderFamily] = MappingProxyType(
    {model_type: family for family in _ENCODERS for model_type in family.model_types}
)
ORIGINALS: Mapping[str, DecoderFamily] = MappingProxyType(
    {model_type: family for family in _DECODERS for model_type in family.original_types}
)


@dataclasses.dataclass(frozen=True)
class Families:
    """The families of a LLaVA's two pretrained parts."""

    vision: EncoderFamily
    decoder: DecoderFamily


_FAMILIES = {"vision": ENCODERS, "decoder": DECODERS}
_DEFAULTS = {"vision": "clip_vision_model", "decoder": "llama"}  # as in LlavaConfig of transformers
_TITLES = {"vision": "vision encoder", "decoder": "language model"}


def family_of(part: str, values: Mapping, source: str = "config.json"):
    """The family that a `config.json`, or a part of LLaVA's, is of.

    Args:
      part: vision or decoder.
      values: the encoder's or language model's `config.json`, LLaVA's `vision_config` or
        `text_config`.
      source: what an error calls it.
    """
    known = _FAMILIES[part]
    name = str(values.get("model_type", _DEFAULTS[part]))
    if name not in known:
        raise LlavaError(
            f"{source} has model_type={name!r}: the {_TITLES[part]} must be one of "
            f"{', '.join(known)}"
        )
    return known[name]


def is_part(part: str, values: Mapping) -> bool:
    """Whether a `config.json` is of an encoder (`vision`) or a language model (`decoder`)."""
    return values.get("model_type") in _FAMILIES[part]


def decoder_config(values: dict, source: str = "config.json") -> DecoderConfig:
    """A language model's `config.json`, or LLaVA's `text_config`, as a DecoderConfig.

    Raises:
      LlavaError: a model type, activation or rotary scaling that the decoder does not have.
    """
    return family_of("decoder", values, source).read(values, source)


def encoder_config(values: dict, source: str = "config.json") -> ViTConfig:
    """An encoder's `config.json`, or LLaVA's `vision_config`, as a ViTConfig.

    Raises:
      LlavaError: another model type, or a variant that the encoder does not have.
    """
    return family_of("vision", values, source).read(values, source)


def families_of(config: LlavaConfig) -> Families:
    """The families as which the parts of a model are written."""
    return Families(_writer_of(config.vision, _ENCODERS), _writer_of(config.decoder, _DECODERS))


def decoder_to_hf(config: DecoderConfig) -> dict:
    """The `config.json` that transformers reads as this decoder; inverse of `decoder_config`."""
    return _writer_of(config, _DECODERS).write(config)


def encoder_to_hf(config: ViTConfig) -> dict:
    """The `config.json` that transformers reads as this encoder; inverse of `encoder_config`."""
    return _writer_of(config, _ENCODERS).write(config)


def _writer_of(config, families):
    """The first family whose `config.json` reads back as `config`."""
    for family in families:
        try:
            if family.read(family.write(config), "config.json") == config:
                return family
        except LlavaError:  # the family does not have this variant
            continue
    raise LlavaError(f"no Hugging Face model type of ours has this combination: {config}")
