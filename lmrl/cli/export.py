"""`lmrl export`: an ordinary checkpoint from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Checkpoint, Debug, TrustRemoteCode
from lmrl.errors import RecipeError


def command(
    run: Annotated[str, typer.Argument(help="A run folder or a checkpoint")],
    destination: Annotated[Path, typer.Argument(help="Folder to write to")],
    beta: Annotated[
        float | None,
        typer.Option("--beta", min=0, help="Weight of the Q heads: linear or tied ones are folded into the model"),
    ] = None,
    distill: Annotated[
        bool,
        typer.Option("--distill", help="Fit a plain model to the policy guided by --beta, with Q heads of any kind"),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=1, help="With --distill: maximum number of updates  [default: 2000]", show_default=False
        ),
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="For a LoRA run: write the adapter instead of merged weights")
    ] = False,
    max_loss: Annotated[
        float,
        typer.Option(
            "--max-loss", help="Points of normalised score that --beta may cost, or percent of the gain over beta 0"
        ),
    ] = 5.0,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Play the suite with both policies")] = True,
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="A suite's file or name (default: the run's own)")
    ] = None,
    checkpoint: Checkpoint = "final",
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="OWNER/NAME", help="Also upload it to the Hugging Face hub, with the token in HF_TOKEN"
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: make the repository private")] = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Write a run as an ordinary transformers checkpoint, which any server decodes at full speed."""
    from lmrl.evaluation.distill import STEPS
    from lmrl.evaluation.export import export
    from lmrl.training.display import Display

    if private and push is None:
        raise RecipeError("--private goes with --push OWNER/NAME")
    if steps is not None and not distill:
        raise RecipeError("--steps counts the updates of --distill: leave it out")
    result = export(
        run,
        destination,
        beta,
        adapter_only,
        max_loss,
        check,
        checkpoint,
        suite,
        trust_remote_code,
        push,
        private,
        (steps or STEPS) if distill else None,
        print,
    )
    if result.rows:
        Display().table(f"beta {beta:g}", result.rows)
        lost = max(result.loss or 0.0, 0.0)
        print(f"{result.metric}: the export loses {lost:.1f} {result.unit}; at most {max_loss:g} are allowed")
    print(f"written to {destination}, with a model card")
    if result.address:
        print(f"pushed to {result.address}")
