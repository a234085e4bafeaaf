"""Where each of our parameters is found in a Hugging Face checkpoint, as data.

A family names its table in its row of `families.py`.

Letters of the shapes. Decoder: V vocabulary, D model, F feed-forward, H head size, Q heads * head
size, K kv heads * head size. Vision: D model, F feed-forward, P positions, p patch side,
C = p * p * 3. Projector: I in, O out.
"""

import dataclasses
from collections.abc import Callable

from llava_jax.models.decoder import DecoderConfig
from llava_jax.models.projector import ProjectorSpec
from llava_jax.models.vit import ViTConfig

STACKED = "layers/"  # our path prefix of the parameters stacked over blocks on axis 0


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our parameters and its Hugging Face spelling.

    The bias of the query projection of Qwen 2, which other families of the table do not have:

        Parameter(
            path="layers/self_attn/q_proj/bias",  # ours: [num_layers, Q]
            shape="Q",
            keys=("model.layers.{layer}.self_attn.q_proj.bias",),  # one tensor [Q] a layer
            when="qkv_bias",  # only if DecoderConfig.qkv_bias
        )

    Attributes:
      path: our path; under `layers/` there is one Hugging Face tensor for each block.
      shape: our shape in letters; of one block if the parameter is stacked.
      keys: Hugging Face names, with `{layer}` if stacked; all are read, the first is written.
      transform: `same`, `transpose` (a linear weight) or `patches` (a convolution over patches).
      stored: Hugging Face's shape if it is ours with axes of size one added.
      when: the boolean config field that this parameter depends on; `not FIELD` for the opposite.
    """

    path: str
    shape: str
    keys: tuple[str, ...]
    transform: str = "same"
    stored: str = ""
    when: str = ""

    @property
    def stored_shape(self) -> str:
        if self.transform == "transpose":
            return " ".join(reversed(self.shape.split()))
        return self.stored or self.shape

    def used_by(self, config: object) -> bool:
        if not self.when:
            return True
        field = self.when.removeprefix("not ")
        return bool(getattr(config, field)) is (field == self.when)


@dataclasses.dataclass(frozen=True)
class NameTable:
    """All parameters of a component, and the other tensors that its checkpoints may hold.

    Attributes:
      sizes: config -> size of each letter.
      prefixes: (prefix on disk, its replacement); the first that matches makes a name comparable to
        `Parameter.keys`.
      unused: regular expressions, on stored names, of tensors that this model never needs.
      idle: unused here but required by the transformers class, so they are written.
      carried: regular expressions of unused tensors that are optional in the transformers class:
        written only if the source had them.
    """

    parameters: tuple[Parameter, ...]
    sizes: Callable[[object], dict[str, int]]
    prefixes: tuple[tuple[str, str], ...] = (("", ""),)
    unused: tuple[str, ...] = ()
    idle: tuple[Parameter, ...] = ()
    carried: tuple[str, ...] = ()


def _linear(path: str, keys: str | tuple[str, ...], shape: str, bias: str = "", no_bias=False):
    """A dense layer: kernel [in, out], and a bias that may depend on the config field `bias`."""
    keys = (keys,) if isinstance(keys, str) else keys
    weights, biases = (
        tuple(f"{k}.{end}".removeprefix(".") for k in keys) for end in ("weight", "bias")
    )
    kernel = Parameter(f"{path}/kernel", shape, weights, "transpose")
    if no_bias:
        return (kernel,)
    return kernel, Parameter(f"{path}/bias", shape.split()[-1], biases, when=bias)


def _norm(path: str, key: str):
    return (
        Parameter(f"{path}/scale", "D", (f"{key}.weight",)),
        Parameter(f"{path}/bias", "D", (f"{key}.bias",)),
    )


# --- decoders -------------------------------------------------------------------------------------


def _decoder_sizes(config: DecoderConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "Q": config.num_heads * config.head_dim,
        "K": config.num_kv_heads * config.head_dim,
        "H": config.head_dim,
    }


_BLOCK = "model.layers.{layer}"

LLAMA = NameTable(
    parameters=(
        Parameter("embed_tokens/embedding", "V D", ("model.embed_tokens.weight",)),
        Parameter("layers/input_layernorm/scale", "D", (f"{_BLOCK}.input_layernorm.weight",)),
        *_linear("layers/self_attn/q_proj", f"{_BLOCK}.self_attn.q_proj", "D Q", "qkv_bias"),
        *_linear("layers/self_attn/k_proj", f"{_BLOCK}.self_attn.k_proj", "D K", "qkv_bias"),
        *_linear("layers/self_attn/v_proj", f"{_BLOCK}.self_attn.v_proj", "D K", "qkv_bias"),
        *_linear("layers/self_attn/o_proj", f"{_BLOCK}.self_attn.o_proj", "Q D", "o_bias"),
        Parameter(
            "layers/self_attn/q_norm/scale",
            "H",
            (f"{_BLOCK}.self_attn.q_norm.weight",),
            when="qk_norm",
        ),
        Parameter(
            "layers/self_attn/k_norm/scale",
            "H",
            (f"{_BLOCK}.self_attn.k_norm.weight",),
            when="qk_norm",
        ),
        Parameter(
            "layers/post_attention_layernorm/scale",
            "D",
            (f"{_BLOCK}.post_attention_layernorm.weight",),
        ),
        *_linear("layers/mlp/gate_proj", f"{_BLOCK}.mlp.gate_proj", "D F", "mlp_bias"),
        *_linear("layers/mlp/up_proj", f"{_BLOCK}.mlp.up_proj", "D F", "mlp_bias"),
        *_linear("layers/mlp/down_proj", f"{_BLOCK}.mlp.down_proj", "F D", "mlp_bias"),
        Parameter("norm/scale", "D", ("model.norm.weight",)),
        Parameter(
            "lm_head/kernel",
            "D V",
            ("lm_head.weight",),
            "transpose",
            when="not tie_word_embeddings",
        ),
    ),
    sizes=_decoder_sizes,
    # The last prefix is of a bare LlamaModel, saved without a language-model head.
    prefixes=(("model.", "model."), ("lm_head.", "lm_head."), ("", "model.")),
    unused=(r".*rotary_emb\.inv_freq",),
)

# --- vision encoders ------------------------------------------------------------------------------


def _vision_sizes(config: ViTConfig) -> dict[str, int]:
    grid = config.image_size // config.patch_size
    return {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "P": grid * grid + int(config.class_token),
        "p": config.patch_size,
        "C": config.patch_size**2 * 3,
        "3": 3,
        "1": 1,
    }


def _clip_like() -> tuple[Parameter, ...]:
    block, embeddings = "vision_model.encoder.layers.{layer}", "vision_model.embeddings"
    patch = f"{embeddings}.patch_embedding"
    return (
        Parameter("patch_embed/kernel", "C D", (f"{patch}.weight",), "patches", "D 3 p p"),
        Parameter("patch_embed/bias", "D", (f"{patch}.bias",), when="patch_bias"),
        Parameter("class_embed", "D", (f"{embeddings}.class_embedding",), when="class_token"),
        Parameter("position_embed", "P D", (f"{embeddings}.position_embedding.weight",)),
        # Hugging Face spells it without the e.
        *(
            dataclasses.replace(p, when="pre_norm")
            for p in _norm("pre_norm", "vision_model.pre_layrnorm")
        ),
        *_norm("layers/layer_norm1", f"{block}.layer_norm1"),
        *_norm("layers/layer_norm2", f"{block}.layer_norm2"),
        *(
            parameter
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")
            for parameter in _linear(f"layers/self_attn/{name}", f"{block}.self_attn.{name}", "D D")
        ),
        *_linear("layers/mlp/fc1", f"{block}.mlp.fc1", "D F"),
        *_linear("layers/mlp/fc2", f"{block}.mlp.fc2", "F D"),
    )


# transformers 5 dropped the `vision_model` level of names; hub checkpoints have it.
_VISION_MODEL_LEVEL = (("vision_model.", "vision_model."), ("", "vision_model."))
_OUTSIDE_THE_TOWER = (
    r"(vision_model\.)?embeddings\.position_ids",
    r"(vision_model\.)?post_layernorm\.(weight|bias)",
    r"text_model\..*",
    r"logit_scale",
)

_POST_LAYERNORM = _norm("post_layernorm", "vision_model.post_layernorm")

CLIP = NameTable(
    parameters=_clip_like(),
    sizes=_vision_sizes,
    prefixes=_VISION_MODEL_LEVEL,
    unused=(*_OUTSIDE_THE_TOWER, r"(visual|text)_projection\.weight"),
    idle=_POST_LAYERNORM,
)

SIGLIP = NameTable(
    parameters=_clip_like(),
    sizes=_vision_sizes,
    prefixes=_VISION_MODEL_LEVEL,
    unused=(*_OUTSIDE_THE_TOWER, r"logit_bias", r"(vision_model\.)?head\..*"),
    idle=_POST_LAYERNORM,
    carried=(r"vision_model\.head\..*",),
)


def _dinov2() -> tuple[Parameter, ...]:
    block, patch = "encoder.layer.{layer}", "embeddings.patch_embeddings.projection"
    attention = {  # names of transformers 4, which 5 still writes; then names of 5 in memory
        "q_proj": (f"{block}.attention.attention.query", f"{block}.attention.q_proj"),
        "k_proj": (f"{block}.attention.attention.key", f"{block}.attention.k_proj"),
        "v_proj": (f"{block}.attention.attention.value", f"{block}.attention.v_proj"),
        "out_proj": (f"{block}.attention.output.dense", f"{block}.attention.o_proj"),
    }
    return (
        Parameter("patch_embed/kernel", "C D", (f"{patch}.weight",), "patches", "D 3 p p"),
        Parameter("patch_embed/bias", "D", (f"{patch}.bias",)),
        Parameter("class_embed", "D", ("embeddings.cls_token",), stored="1 1 D"),
        Parameter("position_embed", "P D", ("embeddings.position_embeddings",), stored="1 P D"),
        *_norm("layers/layer_norm1", f"{block}.norm1"),
        *_norm("layers/layer_norm2", f"{block}.norm2"),
        *(
            parameter
            for name, keys in attention.items()
            for parameter in _linear(f"layers/self_attn/{name}", keys, "D D")
        ),
        *_linear("layers/mlp/fc1", f"{block}.mlp.fc1", "D F"),
        *_linear("layers/mlp/fc2", f"{block}.mlp.fc2", "F D"),
        Parameter("layers/layer_scale1", "D", (f"{block}.layer_scale1.lambda1",)),
        Parameter("layers/layer_scale2", "D", (f"{block}.layer_scale2.lambda1",)),
    )


DINOV2 = NameTable(
    parameters=_dinov2(),
    sizes=_vision_sizes,
    prefixes=(("dinov2.", ""), ("", "")),
    unused=(
        r"(dinov2\.)?embeddings\.mask_token",
        r"(dinov2\.)?layernorm\.(weight|bias)",
        r"classifier\.(weight|bias)",
    ),
    idle=(
        Parameter("mask_token", "1 D", ("embeddings.mask_token",)),
        *_norm("post_layernorm", "layernorm"),
    ),
)

# --- LLaVA ----------------------------------------------------------------------------------------

# Root of a name on disk -> component, whose own table reads the rest of the name. First the roots
# of transformers 4.36 to 4.51, which later versions still write; then those of 4.52 in memory.
LLAVA_ROOTS = (
    ("language_model.", "decoder"),
    ("vision_tower.", "vision"),
    ("multi_modal_projector.", "projector"),
    ("model.language_model.", "decoder"),
    ("model.vision_tower.", "vision"),
    ("model.multi_modal_projector.", "projector"),
)
LLAVA_HEAD = "lm_head."  # next to the roots of the second form
NEWLINE = "image_newline"  # a part of the projector here, at the root in every form


def projector_table(
    kind: str,
    use_bias: bool,
    features_in: int,
    features_out: int,
    original: bool = False,
    newline: bool = False,
) -> NameTable:
    """Names of LLaVA's projector in Hugging Face form or, with `original`, in the original form.

    ours        Hugging Face     original         original, `linear`
    linear_0    linear_1         0                (no name)
    linear_1    linear_2         2
    newline     image_newline    image_newline    image_newline

    newline: whether the model has one. Files may hold it for models that never use it.
    """
    spec = ProjectorSpec.parse(kind)

    def key(i: int) -> str:
        return f"linear_{i + 1}" if not original else "" if kind == "linear" else str(2 * i)

    parameters = [
        parameter
        for i in range(spec.depth)
        for parameter in _linear(f"linear_{i}", key(i), "O O" if i else "I O", no_bias=not use_bias)
    ]
    if newline:
        parameters.append(Parameter("newline", "O", (NEWLINE,)))
    widths = next(spec.layer_sizes(features_in, features_out), (features_in, features_out))
    sizes = dict(zip("IO", (widths[0], features_out), strict=True))
    unused = () if newline else (NEWLINE,)
    return NameTable(tuple(parameters), lambda _: sizes, unused=unused)
