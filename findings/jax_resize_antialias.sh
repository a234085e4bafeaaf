#!/usr/bin/env bash
# jax 0.10.2: jax.image.resize smooths before it shrinks (antialias=True is the default), while
# torch.nn.functional.interpolate does not. Code that follows LLaVA-OneVision, which shrinks encoder
# features from 27 to 14 cells a side bilinearly without smoothing, gets other features with the
# default, and the right ones with antialias=False.
# Seen: the default is off by 2.96, antialias=False by 4e-6.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet jax==0.10.2 numpy==2.3.5
JAX_PLATFORMS=cpu "$dir/venv/bin/python" - <<'PYTHON'
import jax
import numpy as np


def weights(out: int, size: int) -> np.ndarray:
    """[out, size]: bilinear, pixel centres at half integers, clamped at the edge, as PyTorch's."""
    at = np.maximum((np.arange(out) + 0.5) * size / out - 0.5, 0)
    low = np.floor(at).astype(int)
    matrix = np.zeros((out, size))
    matrix[np.arange(out), low] += 1 - (at - low)
    matrix[np.arange(out), np.minimum(low + 1, size - 1)] += at - low
    return matrix


features = np.random.default_rng(0).normal(size=(27, 27, 64)).astype(np.float32)
taps = weights(14, 27)
expected = np.einsum("ai,bj,ijd->abd", taps, taps, features)
off = {
    antialias: float(np.abs(expected - jax.image.resize(features, (14, 14, 64), "linear", antialias)).max())
    for antialias in (True, False)
}
print(off)
assert off[True] > 0.5 and off[False] < 1e-5
PYTHON
