"""One vision transformer for CLIP, SigLIP and DINOv2; layers above the features do not exist.

B images, H height, W width, P patches, D model size.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.models.attention import attention
from llava_jax.models.linear import Linear
from llava_jax.models.remat import rematted

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Dimensions and variants of a vision transformer.

    Attributes:
      num_layers: blocks of the pretrained encoder; `num_blocks` of them run.
      image_size: side in pixels of the images that the position grid was trained for.
      class_token: a learnt token before the patches (CLIP, DINOv2).
      pre_norm: a LayerNorm between the embeddings and the first block (CLIP).
      patch_bias: the patch embedding has a bias (SigLIP, DINOv2).
      layer_scale: learnt per-channel scales on both branches of a block (DINOv2).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    image_size: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool
    pre_norm: bool
    patch_bias: bool
    layer_scale: bool


def feature_states(config: ViTConfig, feature_layer: int | tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the hidden states that are the features; 0 is the embeddings, as in HF."""
    states = config.num_layers + 1
    layers = (feature_layer,) if isinstance(feature_layer, int) else feature_layer
    for layer in layers:
        if not -states <= layer < states:
            raise ValueError(
                f"feature_layer {layer} does not exist: the vision encoder has {states} hidden "
                f"states, so give a number from {-states} to {states - 1}"
            )
    return tuple(layer % states for layer in layers)


def num_blocks(config: ViTConfig, feature_layer: int | tuple[int, ...]) -> int:
    """Blocks to run for `hidden_states[feature_layer]`."""
    return max(feature_states(config, feature_layer))


def resize_matrix(old: int, new: int) -> np.ndarray:
    """float32[new, old]: bicubic as in PyTorch (a = -0.75, half-pixel centres, clamped edges)."""
    a = -0.75
    source = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(source).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(source - (base + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        np.add.at(
            matrix, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(x <= 1, near, far)
        )
    return matrix.astype(np.float32)


def resize_positions(grid: jax.Array, height: int, width: int) -> jax.Array:
    """A square grid of positions [P, D] resized to [height * width, D], as in Dinov2Model."""
    side = int(grid.shape[0] ** 0.5)
    if (side, side) == (height, width):
        return grid
    rows, columns = resize_matrix(side, height), resize_matrix(side, width)
    grid = grid.astype(jnp.float32).reshape(side, side, -1)
    grid = jnp.einsum("yi,xj,ijd->yxd", rows, columns, grid, precision="highest")
    return grid.reshape(height * width, -1)


def layer_norm(config: ViTConfig, name: str, dtype):
    vector = ("vision_embed_norm",)
    return nn.LayerNorm(
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, vector),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, vector),
        name=name,
    )


class ViTAttention(nn.Module):
    config: ViTConfig
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, x):  # [B, P, D]
        c = self.config
        into, out = ("vision_embed", "vision_heads"), ("vision_heads", "vision_embed")
        heads = c.num_heads, c.hidden_size // c.num_heads
        q, k, v = (Linear(heads, into, self.dtype, name=f"{n}_proj")(x) for n in "qkv")
        x = attention(q, k, v, implementation=self.implementation)
        return Linear(c.hidden_size, out, self.dtype, inputs=2, name="out_proj")(x)


class ViTMLP(nn.Module):
    config: ViTConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = Linear(c.intermediate_size, ("vision_embed", "vision_mlp"), self.dtype, name="fc1")(x)
        x = ACTIVATIONS[c.hidden_act](x)
        return Linear(c.hidden_size, ("vision_mlp", "vision_embed"), self.dtype, name="fc2")(x)


class ViTBlock(nn.Module):
    """Returns its output for the next block and, with `emit`, once more for the scan's outputs."""

    config: ViTConfig
    dtype: jnp.dtype
    attention: str
    emit: bool

    @nn.compact
    def __call__(self, x, _):
        x = x + self._scale(
            ViTAttention(self.config, self.dtype, self.attention, name="self_attn")(
                layer_norm(self.config, "layer_norm1", self.dtype)(x)
            ),
            "layer_scale1",
        )
        x = x + self._scale(
            ViTMLP(self.config, self.dtype, name="mlp")(
                layer_norm(self.config, "layer_norm2", self.dtype)(x)
            ),
            "layer_scale2",
        )
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        return x, x if self.emit else None

    def _scale(self, x, name: str):
        if not self.config.layer_scale:
            return x
        init = nn.with_logical_partitioning(nn.initializers.ones, ("vision_embed_norm",))
        return x * self.param(name, init, (self.config.hidden_size,)).astype(self.dtype)


class ViT(nn.Module):
    """Image features of one hidden layer.

    Follows CLIPVisionModel, SiglipVisionModel and Dinov2Model of transformers. The result is
    `hidden_states[feature_layer]`, before any final LayerNorm; later blocks do not exist.

    Attributes:
      feature_layer: index into Hugging Face's `hidden_states`, -2 in LLaVA; several are
        concatenated.
      keep_class_token: the class token stays in front of the patches.
      remat_policy: which activations the backward pass recomputes, a key of REMAT_POLICIES.
      attention: `xla`, or `blocks` for one picture's scores at a time.
    """

    config: ViTConfig
    feature_layer: int | tuple[int, ...]
    keep_class_token: bool = False
    dtype: jnp.dtype = jnp.float32
    remat_policy: str = "none"
    attention: str = "xla"

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, H, W, 3] -> features [B, P (+1), D * layers]."""
        c = self.config
        batch, height, width, _ = pixels.shape
        rows, columns = height // c.patch_size, width // c.patch_size
        x = pixels[:, : rows * c.patch_size, : columns * c.patch_size].astype(self.dtype)
        x = x.reshape(batch, rows, c.patch_size, columns, c.patch_size * 3)
        x = x.swapaxes(2, 3).reshape(batch, rows * columns, -1)  # [B, P, patch * patch * 3]
        axes = ("vision_patch", "vision_embed")
        x = Linear(c.hidden_size, axes, self.dtype, c.patch_bias, name="patch_embed")(x)
        x = self._add_positions(x, rows, columns)
        if c.pre_norm:
            x = layer_norm(c, "pre_norm", self.dtype)(x)
        # Without this the compiler shards channels instead of images and has to move activations.
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        wanted = feature_states(c, self.feature_layer)
        blocks, several = max(wanted), len(wanted) > 1
        outputs, embeddings = (), x
        if blocks:
            x, outputs = nn.scan(
                rematted(ViTBlock, self.remat_policy),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=blocks,
                metadata_params={nn.PARTITION_NAME: "layers"},
                check_constancy_invariants=False,  # would trace each block twice; there are none
            )(c, self.dtype, self.attention, several, name="layers")(x, None)
        if several:
            states = [outputs[i - 1] if i else embeddings for i in wanted]
            x = jnp.concatenate(states, axis=-1)
        return x if self.keep_class_token or not c.class_token else x[:, 1:]

    def _add_positions(self, x, rows: int, columns: int):
        c = self.config
        cls = int(c.class_token)
        init = nn.initializers.normal(0.02)
        count = (c.image_size // c.patch_size) ** 2 + cls
        positions = self.param(
            "position_embed",
            nn.with_logical_partitioning(init, ("vision_positions", "vision_embed")),
            (count, c.hidden_size),
        )
        x = x + resize_positions(positions[cls:], rows, columns).astype(self.dtype)
        if not c.class_token:
            return x
        token = self.param(
            "class_embed",
            nn.with_logical_partitioning(init, ("vision_embed_norm",)),
            (c.hidden_size,),
        )
        token = (token + positions[0]).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, token.size)), x], axis=1)
