"""The commands' frame: help, unknown words, one-sentence errors and exit codes."""

import argparse
import errno
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax import cli, command
from llava_jax.errors import LlavaError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_a_main(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: llava-jax {name}" in capsys.readouterr().out
    module = importlib.import_module(cli.COMMANDS[name][0])
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.main)


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out and text in out for name, (_, text) in cli.COMMANDS.items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "llava-jax: the following arguments are required: COMMAND"),
        (["shw"], "llava-jax: COMMAND has no choice 'shw': did you mean show?"),
        (["xyz"], "llava-jax: COMMAND has no choice 'xyz'; known are generate, chat, "),
        (["chat", "--checkpoint", "a", "--xyz"], "llava-jax chat: unknown flag --xyz"),
        (
            ["chat", "--checkpoint", "a", "--imags=b"],
            "llava-jax chat: unknown flag --imags: did you mean --image?",
        ),
        (["chat", "--checkpoint", "a", "stray"], "llava-jax chat: unknown argument stray"),
        (["chat"], "llava-jax chat: the following arguments are required: --checkpoint"),
        (
            ["chat", "--checkpoint", "a", "--dtype", "bfloat"],
            "llava-jax chat: --dtype has no choice 'bfloat': did you mean bfloat16?",
        ),
        (
            ["chat", "--checkpoint", "a", "--seed", "x"],
            "llava-jax chat: argument --seed: invalid int value: 'x'",
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence_with_the_closest_word(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: llava-jax")
    assert err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_has_help_and_shows_its_default(name):
    parser = cli.Parser()
    importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
    for action in parser._actions:
        assert action.help, f"{action.option_strings} of {name} has no help"
        text = parser._get_formatter()._get_help_string(action)
        hidden = action.default in ([], argparse.SUPPRESS)
        if not hidden and action.default is not None and action.default is not False:
            assert "default" in text, f"{action.option_strings} of {name} hides its default"


def test_a_users_error_is_one_sentence_and_exit_code_1(capsys):
    assert cli.main(["validate", "no/such.json"]) == 1
    out, err = capsys.readouterr()
    assert err == "llava-jax validate: no data file or data set at no/such.json\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_one_sentence_and_other_faults_are_not(
    number, monkeypatch, capsys, tmp_path
):
    def full(args):
        raise OSError(number, os.strerror(number), "answers.jsonl")

    monkeypatch.setattr("llava_jax.weights.convert.main", full)
    arguments = ["convert", str(tmp_path), "--out", str(tmp_path / "out")]
    if number == errno.EIO:
        with pytest.raises(OSError, match="answers.jsonl"):
            cli.main(arguments)
        return
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == (
        "llava-jax convert: no room to write answers.jsonl: No space left on device\n"
    )


def test_help_is_quick_and_needs_no_jax():
    code = (
        "import sys\nfrom llava_jax import cli\ntry:\n    cli.main(['--help'])\n"
        "finally:\n    sys.exit(bool({'jax', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE).returncode == 0


def script(tmp_path: Path, body: str, *arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of a script in the frame that train.py and eval.py share."""
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'size': 3, 'model': {'name': 'a'}})\n"
    )
    (tmp_path / "script.py").write_text(
        "from ml_collections import config_flags\n"
        "from llava_jax import command\nfrom llava_jax.errors import LlavaError\n"
        "CONFIG = config_flags.DEFINE_config_file('config', None, '', lock_config=True)\n"
        f"def main():\n    {body}\n"
        "if __name__ == '__main__':\n    command.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", *arguments],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stderr


CONFIG = "--config=config.py"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "config"),
        (["--config=no/such.py"], "script.py: no config file no/such.py"),
        ([CONFIG, "--config.sise=3"], "script.py: unknown config key: .*sise.*size"),
        ([CONFIG, "--config.model.nam=b"], "script.py: unknown config key: .*nam"),
        ([CONFIG, "--config.size=big"], "script.py: .*size"),
        ([CONFIG, "--verbos=1"], "script.py: .*verbos"),
        ([CONFIG, "stray"], "script.py: unexpected argument 'stray': flags begin with --"),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments, message, tmp_path):
    code, err = script(tmp_path, "raise AssertionError('main was reached')", *arguments)
    assert code != 0 and "Traceback" not in err and "main was reached" not in err
    assert re.search(message, err.strip().splitlines()[-1]), err


def test_a_users_error_in_a_script_is_one_sentence(tmp_path):
    code, err = script(tmp_path, "raise LlavaError('a.json: record 3 is wrong')", CONFIG)
    assert (code, err) == (1, "script.py: a.json: record 3 is wrong\n")


def test_a_bug_in_a_script_keeps_its_traceback(tmp_path):
    code, err = script(tmp_path, "raise ValueError('a bug')", CONFIG)
    assert code == 1 and "Traceback" in err and "ValueError: a bug" in err


def test_overrides_reach_the_config(tmp_path):
    body = "raise LlavaError(f'{CONFIG.value.size} {CONFIG.value.model.name}')"
    code, err = script(tmp_path, body, CONFIG, "--config.size=7", "--config.model.name=b")
    assert err == "script.py: 7 b\n"


def test_users_errors_are_value_errors():
    assert issubclass(LlavaError, ValueError) and callable(command.run)
