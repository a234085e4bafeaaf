"""The projector between vision features and the language model's embedding space.

`ProjectorSpec` is all that is known of a kind of projector before it has parameters; whoever counts
tokens or FLOPs, checks a config, names tensors or draws a fresh projector asks it.

P features of a tile, C width of a feature, D model size, r side of the squares that are folded.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_jax.models.linear import Linear

_KINDS = re.compile(r"(?:pixel_shuffle([2-9])_)?mlp([1-9]\d*)x_gelu")


@dataclasses.dataclass(frozen=True)
class ProjectorSpec:
    """A kind of projector.

    | kind                         | linear layers | tokens of P features |
    | ---------------------------- | ------------- | -------------------- |
    | `identity`                   | 0             | P                    |
    | `linear`                     | 1             | P                    |
    | `mlpNx_gelu`                 | N             | P                    |
    | `pixel_shuffleR_mlpNx_gelu`  | N             | P / R^2              |

    The first three are LLaVA's `mm_projector_type`.

    Attributes:
      kind: its name.
      depth: number of linear layers, with exact (erf) GELU between them.
      fold: side r of the squares of neighbouring features that become one feature r * r times as
        wide before the first layer (`fold_squares`); 1 for none.
    """

    kind: str
    depth: int
    fold: int = 1

    @classmethod
    def parse(cls, kind: str) -> "ProjectorSpec":
        """The spec of a name; ValueError, listing the choices, for one that is not known."""
        if kind in ("linear", "identity"):
            return cls(kind, int(kind == "linear"))
        match = _KINDS.fullmatch(kind)
        if not match:
            raise ValueError(
                f"unknown projector {kind!r}: choose linear, identity, mlpNx_gelu such as "
                "mlp2x_gelu, or pixel_shuffleR_mlpNx_gelu such as pixel_shuffle2_mlp2x_gelu"
            )
        return cls(kind, int(match.group(2)), int(match.group(1) or 1))

    def tokens(self, features: int) -> int:
        """Tokens that a tile of P features becomes.

        Raises:
          ValueError: the features are no grid that can be cut into r x r squares.
        """
        side = math.isqrt(features)
        if self.fold > 1 and (side * side != features or side % self.fold):
            grid = f"{side} x {side}" if side * side == features else str(features)
            raise ValueError(
                f"projector {self.kind!r} folds squares of {self.fold} x {self.fold} features, but "
                f"a picture has {grid}: choose an image size with a number of patches a side that "
                f"{self.fold} divides, and features without a class token"
            )
        return features // self.fold**2

    def layer_sizes(self, width_in: int, width_out: int) -> Iterator[tuple[int, int]]:
        """(inputs, outputs) of each linear layer, for features of C = width_in and D = width_out.

        >>> list(ProjectorSpec.parse("pixel_shuffle2_mlp2x_gelu").layer_sizes(384, 576))
        [(1536, 576), (576, 576)]
        """
        for i in range(self.depth):
            yield (width_out if i else width_in * self.fold**2), width_out

    def check(self, width_in: int, width_out: int) -> None:
        """Raises ValueError if features of one width cannot become embeddings of the other."""
        if not self.depth and width_in != width_out:
            raise ValueError(
                f"projector {self.kind!r} keeps the width of features, but image features are "
                f"{width_in} wide and the language model takes {width_out}: choose linear or "
                "mlp2x_gelu"
            )

    def flops(self, features: int, width_in: int, width_out: int) -> float:
        """Forward FLOPs of one tile of P features; a multiply-add counts 2."""
        weights = sum(into * out for into, out in self.layer_sizes(width_in, width_out))
        return 2.0 * (features // self.fold**2) * weights


def fold_squares(x: jax.Array, side: int) -> jax.Array:
    """[..., P, C] -> [..., P / r^2, r^2 * C]: each r x r square of features becomes one (r = side).

    P is a square grid, row by row. The channels of a square follow each other row by row too:

        a b c d
        e f g h      ->   [a b e f]  [c d g h]  [i j m n]  [k l o p]
        i j k l
        m n o p
    """
    *batch, count, width = x.shape
    squares = math.isqrt(count) // side
    x = x.reshape(*batch, squares, side, squares, side, width)
    x = jnp.moveaxis(x, -4, -3)  # [..., rows, columns, row in square, column in square, C]
    return x.reshape(*batch, squares * squares, side * side * width)


def average_squares(x: jax.Array) -> jax.Array:
    """[B, P, C] -> [B, P', C]: the mean of each 2 x 2 square; an odd last row or column is left."""
    side = math.isqrt(x.shape[1])
    half = side // 2
    squares = x.reshape(-1, side, side, x.shape[-1])[:, : 2 * half, : 2 * half]
    squares = squares.reshape(-1, half, 2, half, 2, x.shape[-1])
    return squares.mean(axis=(2, 4)).reshape(-1, half * half, x.shape[-1])


def torch_linear_init(fan_in: int):
    """PyTorch's default for nn.Linear: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), kernel and bias."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Projector(nn.Module):
    """Vision features [..., P, C] -> tokens [..., tokens(P), D].

    Attributes:
      kind: see ProjectorSpec; without a fold as `build_vision_projector` of the original LLaVA.
      features: D.
      has_newline: whether it has the vector [D] that ends rows of tokens (image_newline).
    """

    kind: str
    features: int
    use_bias: bool = True
    has_newline: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.has_newline:
            drawn = nn.initializers.normal(self.features**-0.5)
            init = nn.with_logical_partitioning(drawn, ("projector_out",))
            self._newline = self.param("newline", init, (self.features,), jnp.float32)

    def newline_token(self) -> jax.Array:
        """The learnt newline [D]."""
        return self._newline

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = ProjectorSpec.parse(self.kind)
        width = x.shape[-1]
        if spec.fold > 1:
            x = fold_squares(x, spec.fold)
        for i, (inputs, outputs) in enumerate(spec.layer_sizes(width, self.features)):
            if i:
                x = jax.nn.gelu(x, approximate=False)
            init = torch_linear_init(inputs)
            axes = ("vision_embed" if i == 0 else "embed", "projector_out")
            x = Linear(outputs, axes, self.dtype, self.use_bias, init, init, name=f"linear_{i}")(x)
        return x
