"""The main job on a laptop: pretrained parts, data, both stages, scores, and a question answered.

    python -m llava_jax.quickstart          the short recipe (`make quickstart`)
    python -m llava_jax.quickstart --full   and a longer round, scored on the whole test split

Run it from the repository's root. Steps that are done are not done again.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.quickstart.easy_vqa import prepare_easy_vqa
from llava_jax.quickstart.parts import prepare_parts
from llava_jax.weights.run_directory import latest_step

ROOT = Path("runs/quickstart")
# A CPU step gets and gives back gigabytes; in huge pages that costs less time.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="llava_jax.quickstart", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--full", action="store_true", help="a longer second round, and the whole test split"
    )
    try:
        quickstart(parser.parse_args().full)
    except LlavaError as error:
        sys.exit(f"quickstart: {error}")


def quickstart(full: bool) -> None:
    began = time.monotonic()

    def headline(text: str) -> None:
        print(f"\n== {text} ({(time.monotonic() - began) / 60:.1f} min) ==", flush=True)

    headline("1/5 pretrained parts: SmolLM2-135M-Instruct and DINOv2 ViT-S/14")
    prepare_parts(ROOT / "parts")
    headline("2/5 data: easy-VQA as LLaVA records")
    prepare_easy_vqa(ROOT / "easy_vqa")
    headline("3/5 stage 1, alignment: the projector learns to caption")
    train("easy_vqa_align")
    headline("3/5 stage 2, instruction tuning: projector and language model learn to answer")
    train("easy_vqa_instruct")
    run, split = ROOT / "instruct", "test_1000"
    if full:
        headline("3/5 stage 2 again, longer")
        train("easy_vqa_full_instruct")
        run, split = ROOT / "full_instruct", "test"
    headline("4/5 scores on pictures that were held out")
    python(
        "eval.py",
        "--config=configs/eval/easy_vqa.py",
        f"--config.options.split={split}",
        f"--checkpoint={run}",
    )
    headline("5/5 a question about one test picture")
    picture = ask_one(run)
    headline("done")
    print(
        "Try next:\n"
        f"  .venv/bin/llava-jax chat --checkpoint {run} --image {picture}\n"
        f"  .venv/bin/llava-jax show {ROOT}/easy_vqa/instruct.json --index 0 --template chatml "
        f"--tokenizer {ROOT}/parts/smollm2-135m-instruct --image_root {ROOT}/easy_vqa/images "
        "--image_tokens 16\n"
        f"  look at {run}/loss.png and {run}/eval/"
    )


def train(recipe: str) -> None:
    """All steps of a recipe; one that was stopped by a signal has saved its own and said so."""
    python("train.py", f"--config=configs/{recipe}.py")
    config = importlib.import_module(f"configs.{recipe}").get_config()
    if latest_step(Path(config.workdir)) != config.steps:
        raise LlavaError(f"{config.workdir} was stopped early: run this again to go on")


def python(script: str, *arguments: str) -> None:
    """Runs a script of the repository as a user would, showing the command; stops if it fails."""
    print("$", "python", script, *arguments, flush=True)
    environment = {**HUGE_PAGES, **os.environ}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, check=False)
    if done.returncode:
        raise LlavaError(f"{script} failed with status {done.returncode}: see its message above")


def ask_one(run: Path) -> Path:
    """Asks the trained model the first colour question of the test records."""
    from llava_jax import Llava

    records = json.loads((ROOT / "easy_vqa" / "test_1000.json").read_text())
    record = next(r for r in records if r["kind"] == "color")
    picture = ROOT / "easy_vqa" / "images" / record["image"]
    answer = Llava.from_pretrained(run).chat(record["question"], images=[picture])
    print(f"picture:  {picture}\nquestion: {record['question']}\nanswer:   {answer}")
    print(f"(the data set says: {record['answer']})")
    return picture


if __name__ == "__main__":
    main()
