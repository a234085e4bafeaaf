#!/usr/bin/env bash
# jax 0.10.2 on CPU: reading a compiled program from the persistent compilation cache takes time that
# grows with about the square of the number of its products. A program of 1,200 products takes as
# long to read as to compile, so that the cache saves nothing. In a profile of such a start the time
# is in xla::cpu::CpuAotCompilationResult::LoadExecutable, in YnnFusionThunkFromProto and
# HloInstruction::unique_id: each fused product is looked up among all instructions.
# Who meets it: anybody whose layers are written out one by one on CPU, as engines do that keep each
# layer's weights for themselves, and who expects a second start to be quick.
# Seen: "300 products: compiled in 0.29 s, read in 0.17 s", "1200 products: compiled in 3.08 s, read
# in 3.39 s", "four times the products in 20 times the time".
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet jax==0.10.2 numpy==2.3.5
cat > "$dir/program.py" <<'PYTHON'
import json
import sys
import time

import jax
import jax.numpy as jnp

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def product_after_product(x, weights):
    for weight in weights:
        x = jnp.tanh(x @ weight)
    return x


seconds = []
for count in (300, 1200):
    weights = [jnp.zeros((64, 64))] * count
    lowered = jax.jit(product_after_product).lower(jnp.zeros((16, 64)), weights)
    start = time.perf_counter()
    lowered.compile()
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
PYTHON
export JAX_PLATFORMS=cpu
for turn in 1 2 3 4; do "$dir/venv/bin/python" "$dir/program.py" "$dir/cache" > "$dir/$turn.json"; done
"$dir/venv/bin/python" - "$dir" <<'PYTHON'
import json
import sys
from pathlib import Path

compiled, *read = (json.loads(Path(sys.argv[1], f"{turn}.json").read_text()) for turn in (1, 2, 3, 4))
read = [min(times) for times in zip(*read)]
for count, first, later in zip((300, 1200), compiled, read):
    print(f"{count} products: compiled in {first:.2f} s, read in {later:.2f} s")
print(f"four times the products in {read[1] / read[0]:.0f} times the time")
assert read[1] / read[0] > 8, "no longer far from linear"
assert read[1] > 0.4 * compiled[1], "the cache saves time"
PYTHON
