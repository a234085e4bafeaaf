#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: an empty folder whose name is a number is the latest step. A job that was
# killed, or a copy that was cut short, between making the folder and filling it therefore hides all
# whole checkpoints from code that restores `latest_step()`.
# Seen: "latest step: 7", "all steps: [2, 7]".
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.3.5
JAX_PLATFORMS=cpu "$dir/venv/bin/python" - "$dir/run" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

folder = Path(sys.argv[1])
with ocp.CheckpointManager(folder) as manager:
    manager.save(2, args=ocp.args.StandardSave({"a": np.ones(3)}))
    manager.wait_until_finished()
(folder / "7").mkdir()
with ocp.CheckpointManager(folder) as manager:
    print("latest step:", manager.latest_step())
    print("all steps:", sorted(manager.all_steps()))
    assert manager.latest_step() == 7
PYTHON
