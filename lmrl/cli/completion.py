"""`lmrl completion`: the script that lets a shell complete commands, options and names on TAB."""

from __future__ import annotations

from typing import Annotated

import typer

from lmrl.cli.common import Debug
from lmrl.errors import RecipeError, did_you_mean

VARIABLE = "_LMRL_COMPLETE"
"""The script sets this variable when the shell asks for completions; lmrl then does nothing else."""
SHELLS = {
    "bash": "lmrl completion bash > ~/.local/share/bash-completion/completions/lmrl",
    "zsh": "lmrl completion zsh > ~/.zfunc/_lmrl, with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc",
    "fish": "lmrl completion fish > ~/.config/fish/completions/lmrl.fish",
}
"""Shells, and how to install the script for each."""


def command(
    shell: Annotated[str, typer.Argument(help=f"One of {', '.join(SHELLS)}")],
    debug: Debug = False,
) -> None:
    """Print the script that completes commands, options and names in bash, zsh or fish; `eval` it, or save it."""
    if shell not in SHELLS:
        raise RecipeError(f"no shell called '{shell}'{did_you_mean(shell, SHELLS)}")
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    print(f"# Save it: {SHELLS[shell]}")
    print(get_completion_script(prog_name="lmrl", complete_var=VARIABLE, shell=shell))


def recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes."""
    from lmrl.shipped import shipped_names

    return [name for name in shipped_names("recipes") if name.startswith(incomplete)]


def suites(incomplete: str) -> list[str]:
    """Names of shipped suites."""
    from lmrl.shipped import shipped_names

    return [name for name in shipped_names("eval") if name.startswith(incomplete)]
