"""Every command of ours that README and the pages show has the flags and files that it names."""

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from llava_jax import cli
from llava_jax.dry_run import answering

ROOT = Path(__file__).parent.parent
INVENTED = ("configs/my", "configs/NAME", "…", "{")  # recipes that a reader writes
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words of each shell command of a page or notebook, comments and prompts left out."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        lines = re.findall(r"^!(.*)", text.replace("\\\n", " "), re.M)
    else:
        blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := split(line))]


def split(line: str) -> list[str]:
    """`JAX_PLATFORMS=cpu .venv/bin/python train.py  # why` -> ["python", "train.py"]"""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # a quote that spans lines: a script of a shell
        return []
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def check_llava_jax(arguments: list[str], monkeypatch) -> None:
    module = importlib.import_module(cli.COMMANDS[arguments[0]][0])
    monkeypatch.setattr(module, "main", lambda args: 0)
    monkeypatch.setattr(answering, "run", lambda args: 0)
    monkeypatch.setattr(cli, "_pictures", lambda source: [source])  # of benchmarks not at hand
    real = "--config=configs/base.py"
    arguments = [real if a.startswith(f"--config={INVENTED[0]}") else a for a in arguments]
    assert cli.main(arguments) == 0


def check_script(path: Path, arguments: list[str]) -> None:
    """train.py, eval.py and bench: their flags, and the keys of the config that is named."""
    source = path.read_text(encoding="utf-8")
    for shared in re.findall(
        r"^from bench\.(\w+) import .*[A-Z]{4}", source, re.M
    ):  # its flags too
        source += (ROOT / f"bench/{shared}.py").read_text(encoding="utf-8")
    flags = [argument[2:].partition("=")[::2] for argument in arguments if argument[:2] == "--"]
    recipe = dict(flags).get("config", "")
    for key, _ in flags:
        if not key.startswith("config."):
            assert re.search(rf'"(--)?{key}"', source), f"{path.name} has no flag --{key}"
        elif recipe and not recipe.startswith(INVENTED):
            place = load_config(ROOT / recipe)
            for part in key.split(".")[1:]:
                assert part in place, f"{recipe} has no {key}"
                place = place[part]


def load_config(path: Path):
    spec = importlib.util.spec_from_file_location("shown", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "docs/run_on/one_tpu_host.ipynb"],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_commands_have_the_flags_that_they_name(page, monkeypatch):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for program, *arguments in commands(page):
        if program == "make":
            assert arguments[0] in targets
        elif program == "llava-jax":
            check_llava_jax(arguments, monkeypatch)
        elif program == "python" and arguments[0] in ("train.py", "eval.py"):
            check_script(ROOT / arguments[0], arguments[1:])
        elif program == "python" and arguments[:1] == ["-m"] and arguments[1].startswith("bench."):
            check_script(ROOT / (arguments[1].replace(".", "/") + ".py"), arguments[2:])
