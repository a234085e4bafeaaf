"""One decoder for the Llama family: Llama 1/2/3, Vicuna, Mistral, Qwen 2/2.5/3, SmolLM2.

The families differ in the values of `DecoderConfig` alone.

B rows, T query length, N heads, K kv heads, H head size, D model, V vocabulary, L layers; of a
cached call (see cache.py): Q tokens, R chunks of at most T tokens.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_jax.models.attention import attention, attention_mask, attention_shares
from llava_jax.models.cache import Chunks, KVCache, read_cache, write_cache
from llava_jax.models.cached_attention import cached_attention
from llava_jax.models.flash_attention import PackedCausal
from llava_jax.models.linear import Linear
from llava_jax.models.remat import rematted


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` by `factor`, or `llama3` by all four."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Dimensions and variants of a Llama-family decoder; names follow Hugging Face."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_position_embeddings: int = 4096


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """float32[H // 2]: rotary inverse frequencies, with the config's scaling."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    inv_freq = (1.0 / config.rope_theta**exponent).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.kind == "linear":
        return inv_freq / np.float32(scaling.factor)
    if scaling.kind != "llama3":
        raise ValueError(f"rope scaling {scaling.kind!r} is not supported: linear and llama3 are")
    # Llama 3 stretches long waves, keeps short ones, and blends those in between.
    wavelength = 2 * math.pi / inv_freq
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (blend * inv_freq + (1 - blend) * inv_freq / scaling.factor).astype(np.float32)


@jax.custom_vjp
def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding in the half-split order of Hugging Face's Llama.

    Equal on all platforms up to rounding. The angles get no gradient.

    Args:
      x: [B, T, N, H].
      cos, sin: float32[B, T, H // 2].
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jax.lax.platform_dependent(
        x, cos, sin, tpu=_rotated_by_product, default=_rotated_by_halves
    )


def _rotated_by_halves(x, cos, sin):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _rotated_by_product(x, cos, sin):
    """Swaps the halves by a product with a signed permutation, which is exact.

    A TPU cannot move half of a vector's lanes cheaply: a split copies keys and queries into another
    layout and back, in float32.
    """
    half = x.shape[-1] // 2
    swap = np.kron([[0, 1], [-1, 0]], np.eye(half))  # x @ swap = [-second, first]
    swapped = jax.lax.dot_general(
        x, jnp.asarray(swap, x.dtype), (((3,), (0,)), ((), ())),
        precision="highest", preferred_element_type=jnp.float32,
    )  # fmt: skip
    twice = lambda angles: jnp.concatenate([angles, angles], axis=-1)
    return (x.astype(jnp.float32) * twice(cos) + swapped * twice(sin)).astype(x.dtype)


apply_rope.defvjp(
    lambda x, cos, sin: (apply_rope(x, cos, sin), (cos, sin)),
    lambda angles, dy: (apply_rope(dy, angles[0], -angles[1]), None, None),  # turned back
)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 as LlamaRMSNorm does."""

    epsilon: float
    dtype: jnp.dtype
    axis: str = "norm"

    @nn.compact
    def __call__(self, x):
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        scale = self.param("scale", init, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class Attention(nn.Module):
    """Causal self-attention within rows of tokens, or of chunks over a cache (see `Chunks`)."""

    config: DecoderConfig
    dtype: jnp.dtype
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x, rope, mask, layer, cache: KVCache | None, chunks: Chunks | None, rows):
        c = self.config
        into_heads = lambda heads, axis, name: Linear(
            (heads, c.head_dim), ("embed", axis), self.dtype, c.qkv_bias, name=name
        )
        q = into_heads(c.num_heads, "heads", "q_proj")(x)  # [B, T, N, H], or [Q, 1, N, H]
        k, v = (into_heads(c.num_kv_heads, "kv_heads", f"{name}_proj")(x) for name in "kv")
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, self.dtype, "head_dim", name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, self.dtype, "head_dim", name="k_norm")(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        shares = None if rows is None else attention_shares(q[:, rows], k, mask[:, :, rows])
        if cache is None:
            out = attention(q, k, v, mask, self.implementation)
        else:
            cache = write_cache(cache, layer, chunks, k[:, 0], v[:, 0])
            read = functools.partial(read_cache, cache, layer)
            out = cached_attention(q[chunks.tokens, 0], chunks.tables, mask, read)
            out = out.reshape(-1, *out.shape[2:])[chunks.places, None]
        out = Linear(
            c.hidden_size, ("heads", "embed"), self.dtype, c.o_bias, inputs=2, name="o_proj"
        )(out)
        return out, cache, shares


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up; the backward pass keeps the two arguments and nothing else."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(residuals, dy):
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    # The barrier keeps XLA's CPU compiler from computing these in a transposed, slower order.
    return jax.lax.optimization_barrier((d_gate, dy * gate * sigmoid))


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate, up = (
            Linear(c.intermediate_size, ("embed", "mlp"), self.dtype, c.mlp_bias, name=name)(x)
            for name in ("gate_proj", "up_proj")
        )
        x = nn.with_logical_constraint(swiglu(gate, up), ("batch", "length", "act_mlp"))
        return Linear(c.hidden_size, ("mlp", "embed"), self.dtype, c.mlp_bias, name="down_proj")(x)


class DecoderBlock(nn.Module):
    config: DecoderConfig
    dtype: jnp.dtype
    attention: str = "xla"

    @nn.compact
    def __call__(self, carry, layer, rope, mask, chunks, rows):
        x, cache = carry
        norm = lambda name: RMSNorm(self.config.rms_norm_eps, self.dtype, name=name)
        implementation = self.attention if cache is None else "xla"
        out, cache, shares = Attention(self.config, self.dtype, implementation, name="self_attn")(
            norm("input_layernorm")(x), rope, mask, layer, cache, chunks, rows
        )
        x = x + out
        x = x + MLP(self.config, self.dtype, name="mlp")(norm("post_attention_layernorm")(x))
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        return (x, cache), shares


class SeparateLayers(nn.Module):
    """The layers one after another, each with its own parameters, named by number.

    See `Decoder.stacked`. The cache is then a tuple, with one `KVCache` for each layer.
    """

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry, layer_ids, rope, mask, chunks, rows):
        x, caches = carry
        caches, shares = list(caches or [None] * self.config.num_layers), []
        block = DecoderBlock(self.config, self.dtype, parent=None)

        @jax.jit  # traced and lowered for one layer, not for each
        def layer(params, carry, *others):
            return block.apply({"params": params}, carry, 0, *others)

        for i, cache in enumerate(caches):
            params = self.variables["params"][str(i)]
            (x, caches[i]), of_layer = layer(params, (x, cache), rope, mask, chunks, rows)
            shares.append(of_layer)
        return (x, tuple(caches)), None if rows is None else jnp.stack(shares)


class Decoder(nn.Module):
    """Token embeddings in, final normalised hidden states out; `attend` turns those into logits.

    Follows LlamaModel, MistralModel, Qwen2Model and Qwen3Model of transformers.

    Attributes:
      remat_policy: which activations the backward pass recomputes, a key of REMAT_POLICIES.
      attention: the implementation without a cache, one of IMPLEMENTATIONS.
      stacked: the parameters of all layers are stacked on axis 0 and the layers are one loop, which
        compiles quickly. Otherwise each layer has its own arrays (see `separate_layers`): XLA's
        CPU compiler copies a layer out of a stack before it multiplies by it, a third of the time
        of a decode step; keys and values likewise.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    remat_policy: str = "none"
    attention: str = "xla"
    stacked: bool = True

    def setup(self):
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embed_tokens = nn.Embed(
            c.vocab_size,
            c.hidden_size,
            embedding_init=nn.with_logical_partitioning(init, ("vocab", "embed")),
        )
        if self.stacked:
            self.layers = self._scan(rematted(DecoderBlock, self.remat_policy))
        else:
            self.layers = SeparateLayers(c, self.dtype)
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.vocab_size, ("embed", "vocab"), self.dtype, use_bias=False)

    def _scan(self, block):
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # would trace each block twice; there are none
        )(self.config, self.dtype, self.attention)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """int[B, T] -> [B, T, D]."""
        # Rounded after the look-up, so that the rows of the gradient are summed in the dtype of the
        # table: in bfloat16 the sum of a frequent token stops growing at 256 equal terms.
        return self.embed_tokens(input_ids).astype(self.dtype)

    def __call__(
        self,
        embeddings: jax.Array,
        position_ids: jax.Array,
        segment_ids: jax.Array,
        turn_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D], after the final norm, of rows of tokens.

        Args:
          embeddings: [B, T, D].
          position_ids: int[B, T], from 0 in each segment.
          segment_ids: int[B, T], 0 for padding.
          turn_ids: int[B, T], independent turns, see `attention_mask`.
        """
        window = self.config.sliding_window
        if self.attention == "splash":
            if turn_ids is not None:
                raise ValueError("splash attention cannot keep independent turns apart: use xla")
            mask = PackedCausal(segment_ids, window)
        else:
            mask = attention_mask(
                position_ids, position_ids, segment_ids, segment_ids, window, turn_ids
            )
        return self._run(embeddings, position_ids, mask)[0]

    def attended(self, embeddings: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Reads sequences, and how some of their tokens attend to the others.

        Args:
          embeddings: [B, T, D], of one segment each.
          rows: int32[A], positions of those tokens.

        Returns:
          Hidden states [B, T, D], after the final norm, and float32[B, A, T], of sum 1 over T: the
          mean over all heads of all layers of a token's attention to each token.
        """
        positions = jnp.broadcast_to(jnp.arange(embeddings.shape[1]), embeddings.shape[:2])
        window = self.config.sliding_window
        mask = attention_mask(positions, positions, positions * 0, positions * 0, window)
        hidden, _, shares = self._run(embeddings, positions, mask, rows=rows)
        return hidden, jnp.mean(shares, axis=0)

    def read(
        self, embeddings: jax.Array, cache: KVCache | tuple[KVCache, ...], chunks: Chunks
    ) -> tuple[jax.Array, KVCache | tuple[KVCache, ...]]:
        """Reads tokens [Q, D] into the pages of a cache.

        Returns:
          Their hidden states [Q, D], after the final norm, and the cache that holds them too.
        """
        mask = chunks.mask(self.config.sliding_window)
        slots = chunks.slots[:, None]
        hidden, cache, _ = self._run(embeddings[:, None], slots, mask, cache, chunks)
        return hidden[:, 0], cache

    def _run(self, x, position_ids, mask, cache=None, chunks=None, rows=None):
        """All layers and the final norm."""
        angles = position_ids[..., None] * inverse_frequencies(self.config)  # [B, T, H // 2]
        rope = jnp.cos(angles), jnp.sin(angles)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        layer_ids = jnp.arange(self.config.num_layers)
        (x, cache), shares = self.layers((x, cache), layer_ids, rope, mask, chunks, rows)
        return self.norm(x), cache, shares

    def attend(self, hidden_states: jax.Array) -> jax.Array:
        """[..., D] -> float32 logits [..., V]."""
        if self.config.tie_word_embeddings:
            table = self.embed_tokens.embedding.astype(self.dtype)
            logits = jnp.dot(hidden_states.astype(self.dtype), table.T)
        else:
            logits = self.lm_head(hidden_states)
        return logits.astype(jnp.float32)


def separate_layers(params: dict) -> dict:
    """Parameters for `Decoder(stacked=False)`; one stack at a time is in memory twice."""
    flat = flatten_dict(params)
    for path in [path for path in flat if path[0] == "layers"]:
        stack = flat.pop(path)
        for layer in range(len(stack)):
            flat["layers", str(layer), *path[1:]] = jnp.array(stack[layer])
        del stack
    return unflatten_dict(flat)


def are_stacked(params: dict) -> bool:
    """Whether decoder parameters are stacked, as in training, or made by `separate_layers`."""
    return "0" not in params["layers"]


def output_embedding(params: dict) -> jax.Array:
    """The output projection [V, D] of decoder parameters, tied or not."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"].T
    return params["embed_tokens"]["embedding"]
