"""Completion in shells: the script, and what it offers."""

import os
import shutil
import subprocess
import sys

import pytest

from lmrl.cli.commands import COMMANDS
from lmrl.shipped import shipped_names


def offered(*words, shell="bash"):
    """What is offered for the last word."""
    if shell == "bash":
        asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    else:
        asked = {"_TYPER_COMPLETE_ARGS": " ".join(words), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    asked |= {"_LMRL_COMPLETE": f"complete_{shell}"}
    command = [sys.executable, "-m", "lmrl"]
    done = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def scripts():
    def run(shell):
        return subprocess.run([sys.executable, "-m", "lmrl", "completion", shell], capture_output=True, text=True)

    return {shell: run(shell) for shell in ("bash", "zsh", "fish", "csh")}


def test_commands_options_and_names_are_offered():
    assert offered("lmrl", "").split() == list(COMMANDS)
    assert offered("lmrl", "ex").split() == ["export"]
    assert offered("lmrl", "train", "--res").split() == ["--resume"]
    expected = [name for name in shipped_names("recipes") if name.startswith("maze/")]
    assert offered("lmrl", "train", "maze/").split() == expected
    assert "maze" in offered("lmrl", "eval", "--suite", "m").split()
    assert offered("lmrl", "reward", "ca").split() == ["calibrate"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same(shell):
    assert "export" in offered("lmrl", "ex", shell=shell)


def test_bash_takes_the_script(scripts, tmp_path):
    program = tmp_path / "lmrl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lmrl "$@"\n')
    program.chmod(0o755)
    lines = (
        f"PATH={tmp_path}:$PATH\n{scripts['bash'].stdout}\nCOMP_WORDS=(lmrl do)\nCOMP_CWORD=1\n_lmrl_completion lmrl\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'{lines}echo "${{COMPREPLY[@]}}"; complete -p lmrl'], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[0] == "doctor" and "_lmrl_completion" in done.stdout, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_valid(scripts, shell):
    assert scripts[shell].returncode == 0 and "_LMRL_COMPLETE" in scripts[shell].stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    checked = subprocess.run([shell, "-n"], input=scripts[shell].stdout, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_an_unknown_shell_is_refused(scripts):
    assert scripts["csh"].returncode == 2 and "no shell called 'csh'; did you mean" in scripts["csh"].stderr
