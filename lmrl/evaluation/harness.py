"""Tasks of lm-eval as suites, `lm-eval:TASK`: its prompts, filters and metrics, with lmrl's policy as its language
model.

Imported only where such a suite is named: it needs `pip install lm-eval`.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lmrl.engines.base import Sampling
from lmrl.engines.build import build_engine
from lmrl.errors import RecipeError, RunError, counted
from lmrl.evaluation.bridges import HARNESS, HarnessOptions
from lmrl.evaluation.scoring import Scores
from lmrl.evaluation.statistics import summarize
from lmrl.evaluation.t_distribution import NORMAL
from lmrl.policy.likelihood import Continued, likelihoods
from lmrl.policy.policy import Policy
from lmrl.recipe import Rollouts
from lmrl.trajectories.trajectory import Trajectory, Turn

os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has threads and CUDA

BOOTSTRAP = 1000
"""Bootstrap resamples for standard errors without a closed form in lm-eval."""
NEW_TOKENS = 256
"""Maximum new tokens of a task that does not set it, as for lm-eval's own models."""
KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks"}
"""Sampling options that a task may set."""


class PolicyLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A policy of lmrl as lm-eval's language model: contexts computed once for all their continuations, sampling by an
    engine of lmrl."""

    def __init__(self, policy: Policy, options: HarnessOptions):
        super().__init__()
        self.policy, self.tokenizer = policy, policy.tokenizer
        self.backend = "causal"
        self.engine = build_engine(Rollouts(engine=options.engine), policy)
        self.seed = options.seed

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self.policy.max_length or 2048

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; special tokens in it are parsed as such, because chat templates write them."""
        if add_special_tokens is None:
            opened = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
            add_special_tokens = not opened
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """requests: (texts or None, tokens of the context, tokens of the continuation), the context is cut on the left
        if both together are too long."""
        places: dict[tuple[int, ...], list[int]] = {}
        pairs = []
        for place, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise RunError(
                    f"{HARNESS}: a continuation of {len(continuation)} tokens is longer than the model's {self.max_length} "
                    "positions: take a model with more, or another task"
                )
            kept = tuple(context[-room:])
            pairs.append((kept, list(continuation)))
            places.setdefault(kept, []).append(place)
        wanted = [Continued(list(context), [pairs[place][1] for place in own]) for context, own in places.items()]
        result: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for own, found in zip(places.values(), likelihoods(self.policy, wanted), strict=True):
            for place, one in zip(own, found, strict=True):
                result[place] = one.total, one.is_greedy
                if requests[place][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[place][0], result[place])
        return result

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the model's length, each token predicted once."""
        windows, counts = [], []
        for request in requests:
            own = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            made = [(None, *make_disjoint_window(window)) for window in own]
            windows += made
            counts.append(len(made))
        found = iter(self._loglikelihood_tokens(windows))
        return [math.fsum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its task's stop strings."""
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        by_sampling: dict[Sampling, list[int]] = {}
        for place, request in enumerate(requests):
            by_sampling.setdefault(self._sampling(dict(request.args[1]), eos), []).append(place)
        result = [""] * len(requests)
        for sampling, places in by_sampling.items():
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise RunError(
                    f"{HARNESS}: the task samples {sampling.max_new_tokens} tokens, but the model has {self.max_length} "
                    "positions: take a model with more, or another task"
                )
            contexts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            keys = [("lm-eval", self.seed, place) for place in places]
            for place, one in zip(places, self.engine.complete(contexts, sampling, keys), strict=True):
                text = self.tokenizer.decode(one.tokens, skip_special_tokens=True)
                result[place] = postprocess_generated_text(text, list(sampling.stop), None)
                self.cache_hook.add_partial("generate_until", requests[place].args, result[place])
        return result

    def _sampling(self, given: dict[str, Any], eos: str) -> Sampling:
        kwargs = normalize_gen_kwargs(given, NEW_TOKENS)
        if unknown := {name for name, value in kwargs.items() if name not in KNOWN and value is not None}:
            raise RecipeError(
                f"{HARNESS}: the task samples with '{sorted(unknown)[0]}', which lmrl's engines do not have: run it by "
                "lm-eval itself on an export of the policy"
            )
        stop = tuple(handle_stop_sequences(kwargs.get("until"), eos))
        greedy = not kwargs.get("do_sample")
        temperature = 0.0 if greedy else float(kwargs.get("temperature") or 1.0)
        return Sampling(
            int(kwargs["max_gen_toks"]),
            temperature,
            float(kwargs.get("top_p") or 1.0),
            int(kwargs.get("top_k") or 0),
            stop,
            beta=0.0,
            support=0.0,
        )


@cache
def manager_of(include: str | None) -> TaskManager:
    """lm-eval's task manager, for its own tasks and those of a folder. It reads thousands of files, so it is cached."""
    return TaskManager(include_path=include)


def run_harness(
    policy: Policy, task: str, options: HarnessOptions, run_code: bool = False
) -> tuple[Scores, list[Trajectory], str]:
    """Scores of a task or group of lm-eval, its documents as episodes, and a description of what was played.

    Raises RecipeError for an unknown task, or one that runs code without permission.
    """
    manager = manager_of(options.include)
    if task not in manager.all_tasks:
        raise RecipeError(f"--suite: lm-eval {lm_eval.__version__} has no task '{task}': lm-eval ls tasks lists all")
    lm = PolicyLM(policy, options)
    try:
        found = lm_eval.simple_evaluate(
            lm,
            tasks=[task],
            num_fewshot=options.shots,
            limit=options.limit,
            apply_chat_template=options.chat,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAP,
            random_seed=options.seed,
            fewshot_random_seed=options.shots_seed,
            confirm_run_unsafe_code=run_code,
        )
    except ValueError as error:
        if "marked as unsafe" in str(error):
            raise RecipeError(f"{HARNESS}{task} runs code that the policy writes: allow it, --run-code") from error
        raise
    finally:
        lm.engine.close()
    trajectories = list(_episodes(found["samples"]))
    played = f"{counted(len(trajectories), 'document')} of {task}, by lm-eval {lm_eval.__version__}"
    return _scores(trajectories, found["results"]), trajectories, played


def _episodes(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Trajectory]:
    """Every document of every task as an episode, whose metrics are those of all its filters."""
    first = 0
    for task, logged in samples.items():
        filters = {sample["filter"] for sample in logged}
        by_document: dict[int, Trajectory] = {}
        for sample in logged:
            number = sample["doc_id"]
            episode = by_document.setdefault(number, _episode(task, sample, first + len(by_document)))
            for name in sample["metrics"]:
                value = sample[name]
                if isinstance(value, bool | numbers.Real):
                    label = name if len(filters) == 1 else f"{name}/{sample['filter']}"
                    episode.components[label] = float(value)
        for episode in by_document.values():
            episode.reward = next(iter(episode.components.values()), None)
            yield episode
        first += len(by_document)


def _episode(task: str, sample: Mapping[str, Any], group: int) -> Trajectory:
    prompt = str(sample["arguments"][0][0])
    columns = {"task": task, "document": sample["doc_id"], "target": sample["target"]}
    answers = [one[0] for one in sample["resps"]]
    if isinstance(answers[0], str):
        said = answers[0]
    else:
        columns["loglikelihoods"] = [one[0] if isinstance(one, tuple | list) else one for one in answers]
        best = max(range(len(answers)), key=columns["loglikelihoods"].__getitem__)
        arguments = sample["arguments"][best]
        said = str(arguments[1]) if len(arguments) > 1 else ""
    return Trajectory([], prompt, said, columns=columns, group=group, episode=group, turns=[Turn(prompt, said)])


def _is_mean(name: str, trajectories: Sequence[Trajectory], results: Mapping[str, Mapping[str, Any]]) -> bool:
    """True if lm-eval's own value of a metric is the mean over documents, in every task that has it."""
    metric, _, which = name.partition("/")
    by_task: dict[str, list[float]] = {}
    for one in trajectories:
        value = one.components.get(name)
        if value is not None:
            by_task.setdefault(one.columns["task"], []).append(value)
    for task, values in by_task.items():
        for key, aggregated in results.get(task, {}).items():
            named, comma, filtered = key.partition(",")
            if comma and named == metric and which in ("", filtered):
                if not math.isclose(aggregated, math.fsum(values) / len(values), rel_tol=1e-6, abs_tol=1e-9):
                    return False
    return True


def _scores(trajectories: Sequence[Trajectory], results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """Means over documents with lmrl's intervals; other aggregates are lm-eval's, with its standard error."""
    scores: Scores = {}
    names = dict.fromkeys(name for one in trajectories for name in one.components)
    for name in [name for name in names if _is_mean(name, trajectories, results)]:
        held = [(one.components[name], one.group) for one in trajectories if name in one.components]
        values, groups = zip(*[(value, group) for value, group in held if value is not None], strict=True)
        scores[name] = summarize(values, groups, unit="document")
    for task, found in results.items():
        for key, value in found.items():
            name, comma, _ = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, numbers.Real):
                continue
            if any(name == known.partition("/")[0] for known in scores):
                continue
            error = found.get(key.replace(",", "_stderr,", 1))
            half = NORMAL * float(error) if isinstance(error, numbers.Real) else 0.0
            label = name if len(results) == 1 else f"{task}/{name}"
            scores[label] = {
                "mean": float(value),
                "ci95": [float(value) - half, float(value) + half],
                "n": len(trajectories),
                "clusters": len(trajectories),
                "holds_for": "new documents" if half else "these documents alone",
            }
    return scores
