"""`lmrl completion`: what makes a shell complete verbs, options and names on TAB."""

from __future__ import annotations

from typing import Annotated

import typer

from lmrl.cli.common import Debug
from lmrl.errors import RecipeError, did_you_mean

VARIABLE = "_LMRL_COMPLETE"
"""Set by the script: the shell asks what may come next, and nothing else is done."""
SHELLS = {
    "bash": "lmrl completion bash > ~/.local/share/bash-completion/completions/lmrl",
    "zsh": "lmrl completion zsh > ~/.zfunc/_lmrl, with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc",
    "fish": "lmrl completion fish > ~/.config/fish/completions/lmrl.fish",
}
"""Shells, and how each keeps its script."""


def command(
    shell: Annotated[str, typer.Argument(help=f"One of {', '.join(SHELLS)}")],
    debug: Debug = False,
) -> None:
    """Print the script by which bash, zsh or fish completes verbs, options, recipes and suites; `eval` it, or keep it in a file."""
    if shell not in SHELLS:
        raise RecipeError(f"no shell called '{shell}'{did_you_mean(shell, SHELLS)}")
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    print(f"# Keep it: {SHELLS[shell]}")
    print(get_completion_script(prog_name="lmrl", complete_var=VARIABLE, shell=shell))


def recipes(incomplete: str) -> list[str]:
    """Names of shipped recipes."""
    from lmrl.shipped import shipped_names

    return [name for name in shipped_names("recipes") if name.startswith(incomplete)]


def suites(incomplete: str) -> list[str]:
    """Names of shipped suites."""
    from lmrl.shipped import shipped_names

    return [name for name in shipped_names("eval") if name.startswith(incomplete)]
