"""Packages that lmrl's extras install, and the message if one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from lmrl.errors import LmrlError

EXTRAS = {
    "vaderSentiment": "vader",
    "gguf": "gguf",
    "math_verify": "rewards",
    "reasoning_gym": "rewards",
    "textarena": "textarena",
    "openenv": "openenv",
    "verifiers": "verifiers",
    "bitsandbytes": "quantization",
    "deepspeed": "deepspeed",
    "vllm": "vllm",
    "wandb": "tracking",
    "matplotlib": "plots",
    "mcp": "mcp",
    "inspect_ai": "inspect",
    "openai": "inspect",
}
"""Modules by the extra that installs them."""


def fix_of(module: str) -> str:
    """How to install a module: with lmrl's extra, else by its own name."""
    extra = EXTRAS.get(module.partition(".")[0])
    if extra is None:
        return f"pip install {module.partition('.')[0].replace('_', '-')}"
    return f"install the extra '{extra}', pip install -e '.[{extra}]' in the clone of lmrl"


def need(module: str, what: str, error: type[LmrlError]) -> None:
    """Raise `error` with the fix if a module is not installed. what: the part that needs it."""
    if find_spec(module) is None:
        raise error(f"{what} needs {module}, which is not installed: {fix_of(module)}")
