"""Imports between packages point one way: a package sees only those named before it."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llava_jax"
ORDER = (
    "errors", "files", "imports", "models", "parallel", "text", "data", "weights", "inference",
    "training", "serving", "evaluation", "dry_run", "quickstart",
)  # fmt: skip
FRAME = {"__init__", "cli", "command"}  # the commands, which import what they run


def imported(path: Path) -> set[str]:
    """The packages of llava_jax that a file imports, wherever in the file it does."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    names = {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[1] for name in names if name.startswith("llava_jax.")}


def test_every_package_has_a_place_in_the_order():
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__pycache__")}
    assert found <= {*ORDER, *FRAME}


def test_the_package_itself_imports_nothing_large():
    script = (
        "import sys, llava_jax; print(sorted({'jax', 'numpy', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_train_py_imports_nothing_that_the_check_of_data_does_not_need():
    large = {"torch", "transformers", "orbax.checkpoint", "grain", "matplotlib", "tensorboardX"}
    script = f"import sys, train; print(sorted({large} & {{*sys.modules}}))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_transformers_without_pytorch():
    script = (
        "import sys\nfrom llava_jax import imports\nimports.tokenizers_alone()\n"
        "assert 'transformers' not in sys.modules\n"
        "transformers = imports.transformers()\n"
        "from transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("name", ORDER)
def test_a_package_imports_none_that_comes_after_it(name):
    files = [PACKAGE / f"{name}.py", *(PACKAGE / name).rglob("*.py")]
    allowed = {*ORDER[: ORDER.index(name) + 1]}
    wrong = {str(file): imported(file) - allowed for file in files if file.exists()}
    assert not {file: names for file, names in wrong.items() if names}


def test_benches_import_names_that_exist():
    """Without running them: their flags have the same names."""
    for file in sorted((PACKAGE.parent / "bench").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llava_jax."):
                module = importlib.import_module(node.module)
                missing = [
                    name.name
                    for name in node.names
                    if not hasattr(module, name.name)
                    and not importlib.util.find_spec(f"{node.module}.{name.name}")
                ]
                assert not missing, (file, node.module)


def test_one_file_of_tests_alone_imports_benches_that_define_flags():
    """Others would import two that define the same flag, in a process that runs both files."""
    benches = {
        f"bench.{file.stem}"
        for file in (PACKAGE.parent / "bench").glob("*.py")
        if "flags.DEFINE" in file.read_text(encoding="utf-8")
    }
    tests = PACKAGE.parent / "tests"
    for file in sorted({*tests.rglob("*.py")} - {tests / "test_bench.py"}):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bench"):
                names = {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
                assert not benches & names, file
