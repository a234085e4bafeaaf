"""The repository's scripts, run by the quickstart as a user would run them."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.weights.run_directory import latest_step

ROOT = Path("runs/quickstart")  # of all that the quickstart writes
# A training step on a CPU allocates and frees gigabytes, which is cheaper in huge pages.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def train(recipe: str) -> None:
    """Takes all steps of a recipe.

    Raises:
      LlavaError: training failed, or stopped at a signal after it saved its last step.
    """
    python("train.py", f"--config=configs/{recipe}.py")
    config = importlib.import_module(f"configs.{recipe}").get_config()
    if latest_step(Path(config.workdir)) != config.steps:
        raise LlavaError(f"{config.workdir} was stopped early: run the same command to continue")


def python(script: str, *arguments: str) -> None:
    """Shows and runs a script of the repository; LlavaError if it fails."""
    print("$", "python", script, *arguments, flush=True)
    environment = {**HUGE_PAGES, **os.environ}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, check=False)
    if done.returncode:
        raise LlavaError(f"{script} failed with status {done.returncode}: see its message above")
