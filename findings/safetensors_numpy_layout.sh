#!/usr/bin/env bash
# safetensors 0.8.0 with NumPy 2.3.5: numpy.save_file ignores an array's strides. A transposed or
# Fortran-ordered array is written in the order of its memory, with the shape of the view: other
# values come back, without an error. 0.7.0 wrote the right ones.
# Who meets it: anybody who moves kernels between JAX or Flax and PyTorch, which transpose them.
# Seen: "0.7.0 equal: True", "0.8.0 equal: False".
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
for version in 0.7.0 0.8.0; do
  python3 -m venv "$dir/$version"
  "$dir/$version/bin/pip" install --quiet "safetensors==$version" numpy==2.3.5
  "$dir/$version/bin/python" - "$dir/a.safetensors" "$version" <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

kernel = np.arange(6, dtype=np.float32).reshape(2, 3).T  # [3, 2], a view
save_file({"kernel": kernel}, sys.argv[1])
read = load_file(sys.argv[1])["kernel"]
equal = read.shape == kernel.shape and bool((read == kernel).all())
print(sys.argv[2], "equal:", equal)
assert equal == (sys.argv[2] == "0.7.0")
PYTHON
done
