"""`lmrl collect`: play episodes and save them for training."""

from __future__ import annotations

import difflib
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lmrl.cli.common import OVERRIDE, Checkpoint, Debug, EndpointOptions, TrustRemoteCode, endpoint_of
from lmrl.errors import RecipeError, counted
from lmrl.local_names import refuse_missing
from lmrl.recipe import AgentTask, PromptTask, Rollouts, Section, TaskSection
from lmrl.recipe.document import Document
from lmrl.recipe.files import merge
from lmrl.recipe.overrides import apply_overrides
from lmrl.recipe.paths import resolve_files
from lmrl.recipe.source import Players
from lmrl.recipe.validation import validate
from lmrl.run_folders import checkpoint_of


class Collection(Section):
    """The task to play, and how."""

    task: TaskSection
    rollouts: Rollouts = Rollouts()


def command(
    policy: Annotated[
        str | None,
        typer.Argument(
            help="A run folder, a checkpoint, a model folder, a GGUF file, a hub name, an address (http://HOST/v1#MODEL), or scripted players of the "
            "environment: random, or shares such as random=0.9,optimal=0.1; none with --by-hand",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides, for instance task.max_turns=20", metavar="[KEY=VALUE]...")
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many to play")] = 1000,
    environment: Annotated[
        str | None, typer.Option("--environment", "-e", help="Its name, or file.py:Name (default: the run's own task)")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder, or a .jsonl file (default: a folder under data/)")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of start states and sampling")] = 0,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Short for rollouts.temperature=...")
    ] = None,
    checkpoint: Checkpoint = "final",
    by_hand: Annotated[bool, typer.Option("--by-hand", help="Play yourself, in the terminal; Ctrl-D ends it")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite episodes collected earlier")] = False,
    endpoint: EndpointOptions = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Play episodes and save them as training rows, for source.path=FOLDER."""
    from lmrl.trajectories.store import EpisodeWriter, check_destination

    output = output or Path("data") / time.strftime("episodes-%Y%m%d-%H%M%S")
    check_destination(output, force)
    changes = [*(overrides or []), *([] if temperature is None else [f"rollouts.temperature={temperature}"])]
    if by_hand:
        policy, changes = _by_hand_target(policy, changes, environment)
    elif policy is None:
        raise RecipeError(
            "POLICY: no player is named. Name a policy or a scripted player, or play yourself with --by-hand"
        )

    from lmrl.rollouts.by_hand import InputEnded
    from lmrl.training.interrupt import Interrupt, Interrupted

    totals = Totals()
    with Interrupt() as interrupt:
        interrupt.safe = True
        asked = endpoint_of(endpoint, [policy])
        if by_hand:
            player = open_person(environment, changes, interrupt.check)
        else:
            player = open_player(policy, environment, changes, checkpoint, trust_remote_code, interrupt.check, asked)
        with EpisodeWriter(output, player.tokenizer, force=force) as writer:
            try:
                for played in player.play(episodes, seed):
                    writer.write(played)
                    totals.add(played)
            except Interrupted:
                print(f"interrupted; {totals.line(player.tokenizer is not None)} are saved in {output}")
                raise
            except InputEnded:
                print("stopped: the unfinished episode is not saved")
            finally:
                player.close()
    print(f"{totals.line(player.tokenizer is not None)} -> {output}")


def _by_hand_target(policy: str | None, changes: list[str], environment: str | None) -> tuple[str, list[str]]:
    """With --by-hand no policy is named, so the first argument is an override."""
    if policy is not None and not OVERRIDE.match(policy):
        raise RecipeError(f"--by-hand: you play yourself, leave '{policy}' out")
    if environment is None:
        raise RecipeError("--by-hand: name what to play, --environment NAME (lmrl ls environments shows them)")
    return "", changes if policy is None else [policy, *changes]


def parse_players(text: str) -> Players:
    """`random`, or `random=0.9,optimal=0.1`."""
    if "=" not in text:
        return text
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            shares[name.strip()] = -1
    if min(shares.values()) < 0 or not 0 < sum(shares.values()) < float("inf"):
        raise RecipeError(f"'{text}' does not name players with their shares, for instance random=0.9,optimal=0.1")
    return shares


def resolve(environment: str | None, overrides: list[str], saved: dict[str, Any]) -> Collection:
    """The checked task and rollouts. saved: those of the policy's own run, as far as they are known."""
    document = Document(dict(saved), places={("task", "environment"): "--environment"})
    if environment is not None:
        document.data = merge(document.data, {"task": {"environment": environment}})
        if "environment" not in saved.get("task", {}):
            document.data["task"] = {"environment": environment}  # a task of prompts has other keys
    apply_overrides(document, overrides)
    if "task" not in document.data:
        raise RecipeError(
            "the policy does not say what it was trained for: name what to play, --environment NAME (lmrl ls environments "
            "shows them), or task.prompts.path=FILE, or task.agent=FILE.py:NAME task.data=ROWS.jsonl"
        )
    resolve_files(document.data, Path.cwd())
    plan = validate(Collection, document)
    if isinstance(plan.task, PromptTask) and plan.task.prompts.holdout == 1:
        raise RecipeError("task.prompts.holdout=1 holds every prompt out, so that none is left to play: set it below 1")
    return plan


class Player:
    """A policy or scripted players, ready to play. tokenizer: fingerprint of the policy's, None for scripted ones."""

    def __init__(self, sampler: Any, rollouts: Rollouts, players: Players | None, name: str, check: Any):
        from lmrl.trajectories.rows import fingerprint

        self.sampler, self.rollouts, self.players, self.name, self.check = sampler, rollouts, players, name, check
        self.tokenizer = None if players else fingerprint(sampler.task.renderer.tokenizer)

    def close(self) -> None:
        """Close the policy's engine, which may hold memory and processes."""
        if self.sampler.samples_from is not None:
            self.sampler.engine.close()

    def play(self, episodes: int, seed: int) -> Any:
        """The judged episodes, part by part."""
        from lmrl.rollouts.collect import collect

        for played in collect(self.sampler, self.players, self.rollouts, episodes, seed, self.check):
            for trajectory in played:
                trajectory.player = trajectory.player or self.name
            yield played


def open_player(
    policy: str,
    environment: str | None,
    overrides: list[str],
    checkpoint: str,
    trust_remote_code: bool,
    check: Any,
    endpoint: Any = None,
) -> Player:
    """The player named by `policy`: scripted players if the environment has them, else a language model."""
    from lmrl.engines.remote import is_address
    from lmrl.environments import environment_factory
    from lmrl.rollouts.collect import check_players
    from lmrl.rollouts.sampler import Sampler
    from lmrl.rollouts.task import build_task

    if is_address(policy):
        return _remote_player(policy, environment, overrides, checkpoint, check, endpoint)
    local = Path(policy).exists()
    path, dtype, saved = _saved(policy, checkpoint) if local else (policy, "float32", {})
    if not local and environment is None and not any(change.startswith("task") for change in overrides):
        raise RecipeError(
            f"there is no folder '{policy}'; for a scripted player or a hub model, name the environment: "
            "--environment NAME (lmrl ls environments shows them)"
        )
    plan = resolve(environment, overrides, saved)
    make = None if local or isinstance(plan.task, PromptTask | AgentTask) else environment_factory(plan.task)
    players = parse_players(policy) if make else None
    if make and players and (isinstance(players, dict) or players in getattr(make(), "players", ())):
        from lmrl.policy.tokenizers import build_tokenizer

        # Only text is saved, so any tokenizer will do, and no chat template is needed.
        task = build_task(plan.task.model_copy(update={"chat": False}), build_tokenizer("char", ()))
        check_players(task, players, "POLICY")
        return Player(Sampler(task), plan.rollouts, players, policy, check)

    if make and (near := difflib.get_close_matches(policy, getattr(make(), "players", ()))):
        raise RecipeError(
            f"'{policy}' is not a player of environment '{getattr(plan.task, 'environment', '')}'; did you mean '{near[0]}'?"
        )
    if not local:
        refuse_missing(policy, "policy")

    from lmrl.accelerators import default_device
    from lmrl.engines.build import build_engine
    from lmrl.policy.load import open_policy

    model = open_policy(path, dtype, trust_remote_code)
    model.to(default_device())
    task = build_task(plan.task, model.tokenizer)
    engine = build_engine(plan.rollouts, model, check)
    return Player(Sampler(task, engine, model.decode, plan.rollouts.deterministic), plan.rollouts, None, path, check)


def open_person(environment: str | None, overrides: list[str], check: Any) -> Player:
    """A person in the terminal, who plays one episode after the other."""
    from lmrl.cli.play import ask, printer
    from lmrl.environments import environment_factory
    from lmrl.policy.tokenizers import build_tokenizer
    from lmrl.rollouts.by_hand import PERSON, ByHand
    from lmrl.rollouts.sampler import Sampler
    from lmrl.rollouts.task import build_task

    plan = resolve(environment, overrides, {})
    if isinstance(plan.task, PromptTask | AgentTask):
        raise RecipeError("--by-hand plays an environment, but this task has none")
    console, tell = printer()
    # A person may think as long as they like, and a thread could not be stopped when the input ends.
    section = plan.task.model_copy(update={"chat": False, "call_timeout": None, "workers": 0})
    task = build_task(section, build_tokenizer("char", ()))
    make = environment_factory(section)
    if task.match is not None and task.match.party is None:
        raise RecipeError(
            "--by-hand: name who plays the other side, task.opponent=NAME (a scripted player, a model or an address)"
        )
    task.match = None  # the opponent moves inside the environment
    task.make = lambda: ByHand(make(), tell, lambda: ask(console))
    one_by_one = plan.rollouts.model_copy(update={"prompts": 1, "samples": 1})
    return Player(Sampler(task), one_by_one, PERSON, PERSON, check)


def _remote_player(
    policy: str, environment: str | None, overrides: list[str], checkpoint: str, check: Any, endpoint: Any
) -> Player:
    """A policy served at an address. Only its text is saved, because its tokens are not known."""
    from lmrl.engines.remote import RemoteEngine, RemotePolicy, without_limit
    from lmrl.rollouts.sampler import Sampler
    from lmrl.rollouts.task import build_task

    checkpoint_of(policy, checkpoint)
    plan = resolve(environment, overrides, {})
    remote = RemotePolicy(policy, endpoint)
    task = build_task(without_limit(plan.task), remote.tokenizer)
    player = Player(Sampler(task, RemoteEngine(remote, check), remote.decode), plan.rollouts, None, policy, check)
    player.tokenizer = None
    return player


def _saved(policy: str, checkpoint: str) -> tuple[str, str, dict[str, Any]]:
    """Checkpoint folder, dtype, and task and rollouts of the run that made it, if they are recorded."""
    from lmrl.evaluation.api import TASK_FILE, saved_task
    from lmrl.run_folders import RECIPE_FILE, read_recipe

    saved, dtype = {}, "float32"
    path = Path(checkpoint_of(policy, checkpoint))
    if (Path(policy) / RECIPE_FILE).is_file():
        saved["rollouts"] = read_recipe(Path(policy)).rollouts.model_dump(mode="json")
    if (path / TASK_FILE).is_file():
        found = saved_task(path)
        saved["task"], dtype = found["task"], found["dtype"]
    return str(path), dtype, saved


class Totals:
    """Summary of the collected episodes, for the closing line."""

    def __init__(self) -> None:
        self.episodes, self.turns, self.tokens = 0, 0, 0
        self.returns: list[float] = []
        self.groups: list[int] = []
        """Start state or prompt of each return."""

    def add(self, played: list[Any]) -> None:
        self.episodes += len(played)
        self.turns += sum(len(trajectory.turns) for trajectory in played)
        self.tokens += sum(trajectory.num_actions for trajectory in played)
        judged = [trajectory for trajectory in played if trajectory.reward is not None]
        self.returns += [trajectory.reward for trajectory in judged]
        self.groups += [trajectory.group for trajectory in judged]

    def line(self, with_tokens: bool) -> str:
        from lmrl.evaluation.statistics import summarize
        from lmrl.training.display import interval

        counts = ", ".join(
            [counted(self.episodes, "episode"), counted(self.turns, "turn")]
            + ([counted(self.tokens, "token")] if with_tokens else [])
        )
        if not self.returns:
            return f"{counts}, not judged"
        score = summarize(self.returns, self.groups)
        return f"{counts}, mean return {interval(score)}"
