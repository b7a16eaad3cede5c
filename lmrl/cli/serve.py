"""`lmrl serve`: an OpenAI-compatible server of a policy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Checkpoint, Debug, TrustRemoteCode
from lmrl.errors import RecipeError, RunError
from lmrl.recipe import Rollouts, Section
from lmrl.recipe.document import Document
from lmrl.recipe.overrides import apply_overrides
from lmrl.recipe.paths import resolve_files
from lmrl.recipe.validation import validate

SHORTEST_KEY = 16


class Serving(Section):
    """How a policy is sampled from, unless a request says otherwise."""

    rollouts: Rollouts = Rollouts(max_new_tokens=1024)


def command(
    policy: Annotated[str, typer.Argument(help="A run, checkpoint, folder, GGUF file or hub name")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides, for instance rollouts.engine=vllm", metavar="[KEY=VALUE]..."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; any but 127.0.0.1 needs a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name for clients (default: the folder's)")
    ] = None,
    key_env: Annotated[
        str | None, typer.Option("--key-env", help="Environment variable with the key that requests must carry")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="File of such keys, one per line, that only its owner may read")
    ] = None,
    concurrent: Annotated[
        int, typer.Option("--concurrent", min=1, help="Completions at a time; further requests are refused (429)")
    ] = 256,
    max_mb: Annotated[float, typer.Option("--max-mb", min=0.001, help="Maximum size of a request")] = 8,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time limit of an answer")] = 600,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that running requests get to finish when the server stops")
    ] = 30,
    checkpoint: Checkpoint = "final",
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Serve a policy over OpenAI's API: chat completions, completions, models."""
    from lmrl.secrets import LOOPBACK
    from lmrl.serve.app import App, AppLimits
    from lmrl.serve.http import Limits

    keys = read_keys(key_env, key_file)
    if host not in LOOPBACK and not keys:
        raise RunError(f"--host {host}: others could reach this server; give it a key with --key-env or --key-file")
    rollouts = resolve(overrides or [])

    from lmrl.accelerators import default_device
    from lmrl.coroutines import run
    from lmrl.engines.base import Sampling
    from lmrl.engines.build import build_engine
    from lmrl.policy.load import open_policy
    from lmrl.run_folders import checkpoint_of
    from lmrl.serve.endpoint import serve_until_signalled
    from lmrl.serve.model import ServedPolicy

    opened = open_policy(checkpoint_of(policy, checkpoint), trust_remote_code=trust_remote_code)
    opened.to(default_device())
    engine = build_engine(rollouts, opened)
    try:
        served = ServedPolicy(opened, engine, Sampling.of(rollouts), name or Path(policy).name or policy)
        app = App(served, keys, AppLimits(concurrent, seconds), public=host not in LOOPBACK)
        limits = Limits(body_bytes=int(max_mb * 2**20), grace_seconds=grace)
        run(serve_until_signalled(app, host, port, limits))
    finally:
        engine.close()


def read_keys(variable: str | None, file: Path | None) -> list[str]:
    """The keys of an environment variable and of a file. Raises RunError."""
    keys: list[str] = []
    if variable is not None:
        if not os.environ.get(variable):
            raise RunError(f"--key-env: the environment variable {variable} is not set")
        keys.append(os.environ[variable])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            mode = file.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"--key-file: {file} cannot be read: {error}") from error
        if mode & 0o077 and os.name == "posix":
            raise RunError(f"--key-file: others may read {file}: chmod 600 {file}")
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise RunError(f"--key-file: {file} holds no key")
        keys += found
    if short := [key for key in keys if len(key) < SHORTEST_KEY or not key.isascii() or " " in key]:
        raise RunError(
            f"a key of {len(short[0])} characters could be guessed, or could not be sent: take {SHORTEST_KEY} or more ASCII "
            "characters without spaces, such as the output of openssl rand -hex 24"
        )
    return keys


def resolve(overrides: list[str]) -> Rollouts:
    """The checked `rollouts`."""
    document = Document({"rollouts": {"max_new_tokens": Serving().rollouts.max_new_tokens}})
    for override in overrides:
        if not override.startswith("rollouts."):
            raise RecipeError(f"'{override}': only rollouts.KEY=VALUE can be changed here")
    apply_overrides(document, overrides)
    resolve_files(document.data, Path.cwd())
    return validate(Serving, document).rollouts
