"""How a video becomes tokens: each frame one tile, its features pooled 2 x 2."""

import dataclasses

import numpy as np

from llava_jax.errors import LlavaError
from llava_jax.models.taps import Taps, average, bilinear

FRAME_MODES = ("square", "pad", "resize")  # those of `models.images` that give one tile
POOLS = ("bilinear", "average", "average_before_projector")
NEWLINES = ("no_token", "one_token", "frame", "grid")


@dataclasses.dataclass(frozen=True)
class VideoSpec:
    """How a model's videos are prepared.

    Attributes:
      mode: how a frame becomes its tile, one of FRAME_MODES.
      pool: `bilinear` of the projector's features (OneVision), `average` of them, or
        `average_before_projector`, of the encoder's (LLaVA-NeXT-Video).
      newline: where the learnt newline stands: nowhere (`no_token`), at the end (`one_token`),
        after each frame, or after each row of a frame (`grid`); mm_newline_position.
      frames: how many are sampled, evenly spread; with fps the most, 0 for no limit.
      fps: frames a second that are sampled; 0 for `frames` whatever the duration.
      time_instruction: the question follows a sentence about duration and times (LLaVA-Video).
    """

    mode: str = "resize"
    pool: str = "bilinear"
    newline: str = "one_token"
    frames: int = 32
    fps: float = 0.0
    time_instruction: bool = False

    def __post_init__(self):
        for name, choices in (("mode", FRAME_MODES), ("pool", POOLS), ("newline", NEWLINES)):
            if (value := getattr(self, name)) not in choices:
                raise LlavaError(
                    f"the {name} of videos is {value!r}: choose one of {', '.join(choices)}"
                )
        if self.frames < 0 or self.fps < 0 or not (self.frames or self.fps):
            raise LlavaError(
                f"videos are sampled by {self.frames} frames and {self.fps} frames a second: "
                "neither may be negative, and one must be above 0"
            )


def pooled_side(spec: VideoSpec, side: int) -> int:
    """Side of the pooled square of a frame's side x side features."""
    return -(-side // 2) if spec.pool == "bilinear" else side // 2


def video_tokens(spec: VideoSpec, per_tile: int, side: int, frames: int) -> Taps:
    """The tokens [n] of a video.

    Args:
      per_tile: P, features of a tile; those pooled before the projector follow the side x side
        others.
      side: of the square of a frame's features.
    """
    if frames < 1:
        raise LlavaError("a video has no frames")
    cells = np.arange(side * side).reshape(side, side)
    if spec.pool == "average_before_projector":
        pooled = pooled_side(spec, side)
        frame = Taps.of(side * side + np.arange(pooled * pooled).reshape(pooled, pooled))
    elif spec.pool == "average":
        frame = average(cells)
    else:
        frame = bilinear(cells, *[pooled_side(spec, side)] * 2)
    tiles = np.arange(frames, dtype=np.int32).reshape(-1, 1, 1, 1) * per_tile
    features = np.where(frame.features < 0, frame.features, tiles + frame.features)
    tokens = Taps(features, np.broadcast_to(frame.weights, features.shape))
    if spec.newline == "grid":
        return tokens.ended().in_a_row()
    if spec.newline == "frame":
        return tokens.in_a_row(1).ended().in_a_row()
    return tokens.in_a_row().ended() if spec.newline == "one_token" else tokens.in_a_row()
