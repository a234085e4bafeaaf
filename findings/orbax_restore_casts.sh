#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: restoring into a target of another dtype converts without a word, also
# where values do not fit: 70000 restored as int16 is 4464, 1.7 as int32 is 1. A wrong shape, in
# contrast, is an error.
# Who meets it: anybody who restores with a target that was made anew, such as moments in bfloat16 or
# step counters, and expects a mismatch to be reported.
# Seen: "int16: [4464]", "int32: [1]".
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.3.5
JAX_PLATFORMS=cpu "$dir/venv/bin/python" - "$dir" <<'PYTHON'
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def restored(value, dtype):
    path = Path(sys.argv[1]) / f"{value.dtype}-{dtype.__name__}"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"a": value})
        checkpointer.wait_until_finished()
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {"a": jax.ShapeDtypeStruct(value.shape, dtype, sharding=place)}
        return np.asarray(checkpointer.restore(path, target)["a"])


step, rate = restored(np.array([70000], np.int32), np.int16), restored(np.array([1.7], np.float32), np.int32)
print("int16:", step)
print("int32:", rate)
assert step.tolist() == [4464] and rate.tolist() == [1]
PYTHON
