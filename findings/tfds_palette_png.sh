#!/usr/bin/env bash
# tensorflow-datasets 4.9.10 without TensorFlow: an Image feature is decoded by OpenCV if it is
# installed, else by Pillow, and the two differ. Of a PNG with a palette, Pillow's way gives the
# INDICES of the palette as grey levels; OpenCV's gives its colours. Nothing is reported.
# Who meets it: anybody who reads pictures of a TFDS set through as_data_source on another machine
# than the one where it was looked at.
# Seen: of a red and a blue pixel, [0, 0, 0] and [1, 1, 1] without OpenCV, and their colours with it.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet tensorflow-datasets==4.9.10 importlib_resources pillow==12.0.0 array_record==0.8.6
cat > "$dir/look.py" <<'PYTHON'
import io
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

picture = Image.new("P", (2, 2))
picture.putpalette([255, 0, 0, 0, 0, 255])
picture.putdata([0, 1, 0, 1])
file = io.BytesIO()
picture.save(file, "PNG")
feature = tfds.features.Image()
read = np.asarray(feature.decode_example_np(file.getvalue()))
print(sys.argv[1], read.shape, read.reshape(-1).tolist())
if sys.argv[1] == "Pillow":
    assert read.reshape(4, 3).tolist() == [[0, 0, 0], [1, 1, 1]] * 2
else:
    assert read.reshape(4, 3).tolist() == [[255, 0, 0], [0, 0, 255]] * 2
PYTHON
"$dir/venv/bin/python" "$dir/look.py" Pillow
"$dir/venv/bin/pip" install --quiet opencv-python-headless==4.12.0.88
"$dir/venv/bin/python" "$dir/look.py" OpenCV
