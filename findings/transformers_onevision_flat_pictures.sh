#!/usr/bin/env bash
# transformers 5.24.0, LLaVA-OneVision: whether the pictures of one prompt are cut into tiles hangs
# on how they are nested. [[a, b]] gives one view each, as the model was trained with; a flat [a, b],
# which code for one prompt often passes, cuts both into tiles: several times as many tokens, and
# other answers.
# Who meets it: anybody who asks LLaVA-OneVision about several pictures.
# Seen: nested [1, 1] tiles, flat [5, 3], no warning.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.24.0 pillow==12.0.0 numpy==2.3.5
"$dir/venv/bin/python" - <<'PYTHON'
import numpy as np
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

processor = LlavaOnevisionImageProcessorPil()
pictures = [Image.new("RGB", (640, 480)), Image.new("RGB", (500, 333))]
tiles = {}
for name, images in {"nested": [pictures], "flat": pictures}.items():
    pixels = processor(images, return_tensors="np")["pixel_values"]  # zeros fill up
    tiles[name] = [int(np.abs(one).max(axis=(1, 2, 3)).astype(bool).sum()) for one in pixels]
print(tiles)
assert tiles == {"nested": [1, 1], "flat": [5, 3]}
PYTHON
