"""Rollouts side by side: lmrl's engines, transformers' `generate`, and vLLM if it is installed.

    python benchmarks/rollouts.py --model FOLDER [--rounds 3] [--peers hf,transformers]
    python benchmarks/rollouts.py --model FOLDER --mode turns      # dialogues, compared with recomputing every turn
    python benchmarks/rollouts.py --model FOLDER --mode latency    # environments that are slow, with a heavy tail
    python benchmarks/rollouts.py --mode games [--game RECIPE]     # a shipped game: the time outside model passes

By default all peers complete the same requests in separate processes, in turn: questions that ask for a word, a sentence or a paragraph,
some about a passage, rendered with the model's chat template (a model without one gets the bare question), sampled at
temperature 1 from the whole vocabulary until the model ends its turn, at most `--max-new-tokens`, in bfloat16, with
`--slots` sequences at a time and the same number of threads. Loading and a short warm-up are not timed.

*Useful* tokens are those up to and including the end of the turn. Each peer draws with its own random numbers, so lengths
agree on average but not one by one; the table gives their mean. What else differs:

- lmrl and vLLM return the log-probability of each token; `generate` returns only tokens, so that a trainer would have to
  compute them. lmrl has a random stream for each request, so a result does not depend on the other requests.
- transformers completes static batches of `--slots` requests in the order given, as trl does: a batch takes as long as its
  longest completion. All others refill free places.
- `--samples N` asks each question N times. lmrl's hf engine and vLLM (prefix caching) then compute the prompt once, and in
  any case a common beginning of all prompts, such as the system prompt of a chat template (SmolLM2: 24 of about 56 tokens).
- Peak memory is the resident set of the process and its children; vLLM reserves `VLLM_CPU_KVCACHE_SPACE` GiB, here 2.
- CPU seconds are of all threads; on a shared machine they are more reliable than wall-clock time. Those of lmrl's vllm engine,
  which may run in a separate process, are not known.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from _peers import Results, add_peer_arguments, in_turn, leave, median, this_script, write_json

PEERS = ("hf", "transformers", "vllm", "lmrl-vllm")
NAMES = {"hf": "lmrl hf", "transformers": "transformers", "vllm": "vLLM", "lmrl-vllm": "lmrl vllm"}
MODES = {"kept": "turns", "anew": "turns", "slow": "latency", "game": "games"}
"""The variants to run in each mode that plays episodes."""
SUBJECTS = (
    "the sea", "a lighthouse", "bread", "winter", "the moon", "a railway", "honey bees", "mountains", "glass", "a violin",
    "rain", "an old library", "volcanoes", "chess", "a garden", "whales", "clocks", "the desert", "paper", "bicycles",
    "coffee", "a harbour", "owls", "a bridge", "salt", "maps", "wool", "a market", "thunder", "horses", "a mill", "ice",
)  # fmt: skip
PASSAGES = (
    "The village stands where two rivers meet. For most of the year they are calm, but in spring the snow of the hills melts "
    "and the lower fields are flooded for a week or two. People long ago built their houses on the ridge and left the fields to "
    "grass.",
    "In the workshop a dozen people repair what others have thrown away: radios, chairs, a coffee machine, now and then a "
    "wooden toy. Nobody pays for the work, but whoever brings something is asked to help with something else.",
    "The expedition left the coast in April with eleven people, thirty dogs and food for ninety days. In the second week a storm "
    "held them in their tents for six days; in the fourth they lost a sledge with most of the fuel. From then on they cooked "
    "once a day, melted snow in the sun on black cloth, and walked at night, when the surface was hard. They came back in July, "
    "thinner, with two full notebooks and all of the dogs.",
)
KINDS = (
    "Answer in one word: what colour comes to mind when you think of {}?",
    "Yes or no: is {} older than writing?",
    "Write one short sentence about {}.",
    "Name three things that go with {}.",
    "Write a paragraph about {}.",
    "{passage}\nIn one sentence, what has this to do with {}?",
    "Tell me a story about {}.",
    "{passage}\nContinue this text with a paragraph about {}.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument("--mode", choices=("requests", "turns", "latency", "games"), default="requests")
    parser.add_argument("--precision", default="bfloat16", help="of the weights; float32 if the CPU lacks bfloat16")
    parser.add_argument("--turns", type=int, default=6, help="turns per episode (modes turns, latency, games)")
    parser.add_argument("--mean-latency", type=float, default=0.5, help="seconds of a step (mode latency)")
    parser.add_argument(
        "--game", default="maze/offline_to_online", help="recipe whose task and model are used (mode games)"
    )
    parser.add_argument("--requests", type=int, default=256, help="requests, or concurrent episodes")
    parser.add_argument("--samples", type=int, default=1, help="requests for each question")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}; peers that are not installed are left out"
    )
    parser.add_argument("--json", type=Path)
    add_peer_arguments(parser, [*PEERS, *MODES])
    args = parser.parse_args()
    if args.model is None and args.mode != "games":
        parser.error("--model: name the folder of a causal LM")
    if args.peer in PEERS:
        run(args)
        return
    if args.peer:
        run_mode(args)
        return

    if args.mode != "requests":
        with tempfile.TemporaryDirectory() as scratch:
            peers = [peer for peer, mode in MODES.items() if mode == args.mode]
            results = in_turn(peers, args.rounds, lambda peer, number: this_script(
                peer, Path(scratch) / f"{peer}-{number}", args.threads, environment=environment()
            ))  # fmt: skip
        print_modes(results)
        write_json(args.json, results)
        return
    peers = args.peers.split(",")
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: no such peer: {', '.join(sorted(unknown))} (there are {', '.join(PEERS)})")
    peers = [peer for peer in peers if available(peer)]
    with tempfile.TemporaryDirectory() as scratch:

        def run_peer(peer: str, number: int) -> dict:
            output = Path(scratch) / f"{peer}-{number}"
            return this_script(peer, output, args.threads, environment=environment())

        results = in_turn(peers, args.rounds, run_peer)
    print_table(results, args.rounds)
    write_json(args.json, results)


def available(peer: str) -> bool:
    from typing import get_args

    from lmrl.recipe import Rollouts

    if "vllm" in peer and find_spec("vllm") is None:
        return False
    return peer != "lmrl-vllm" or "vllm" in get_args(Rollouts.model_fields["engine"].annotation)


def environment() -> dict[str, str]:
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "HF_HUB_OFFLINE": "1",
    }


def print_table(results: Results, rounds: int) -> None:
    """Medians over rounds; ratios are between runs of the same round."""
    print(
        f"\n{'':14}{'tokens/s':>10}{'per CPU s':>11}{'tokens each':>13}{'peak MB':>9}   tokens/s to those of transformers"
    )
    for peer, runs in results.items():
        speed, cpu = (rates(runs, key) for key in ("seconds", "cpu_seconds"))
        mean, memory = (median(runs, key) for key in ("mean_tokens", "peak_mb"))
        per_cpu = f"{statistics.median(cpu):11.1f}" if cpu else f"{'-':>11}"
        line = f"{NAMES[peer]:14}{statistics.median(speed):10.1f}{per_cpu}{mean:13.1f}{memory:9.0f}"
        if base := results.get("transformers"):
            line += f"   {ratio(speed, rates(base, 'seconds')):.2f}"
            line += f" ({ratio(cpu, rates(base, 'cpu_seconds')):.2f} by CPU time)" if cpu else ""
        print(line)
    print(f"(median of {rounds} rounds)")


def rates(runs: list[dict], key: str) -> list[float]:
    """Useful tokens per second of each run; none if the time is not known."""
    return [one["tokens"] / one[key] for one in runs if one[key] is not None]


def ratio(mine: list[float], base: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(mine, base, strict=True))


def print_modes(results: Results) -> None:
    """Medians over rounds; ratios are between runs of the same round."""
    for peer, runs in results.items():
        print(f"{peer:8}" + "".join(f"  {name} {median(runs, name):,.4g}" for name in runs[0]))
    if "anew" in results:
        for clock in ("seconds", "cpu_seconds"):
            speed = ratio(rates(results["kept"], clock), rates(results["anew"], clock))
            print(f"tokens a {clock.removesuffix('s').replace('_', ' ')}, kept to anew: {speed:.2f}")


def run_mode(args: argparse.Namespace) -> None:
    """Time one peer of a mode that plays episodes, in this process."""
    import _episodes
    import torch

    torch.set_num_threads(args.threads)
    texts = [question(number) for number in range(args.requests)]
    if args.mode == "turns":
        found = _episodes.run_turns(args, texts, args.peer == "anew")
    elif args.mode == "latency":
        found = _episodes.run_latency(args, texts)
    else:
        found = _episodes.run_games(args)
    leave(args.output, found)


def question(number: int) -> str:
    kind = KINDS[number % len(KINDS)]
    subject = SUBJECTS[(number // len(KINDS) + 5 * number) % len(SUBJECTS)]
    return kind.format(subject, passage=PASSAGES[number // len(KINDS) % len(PASSAGES)])


def requests(args: argparse.Namespace) -> list[list[int]]:
    """The prompts' tokens, the same for all peers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = []
    for number in range(-(-args.requests // args.samples)):
        text = question(number)
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        prompts += [tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids] * args.samples
    return prompts[: args.requests]


def run(args: argparse.Namespace) -> None:
    """Time one peer, in this process."""
    import torch

    torch.set_num_threads(args.threads)
    prompts = requests(args)
    build = {"transformers": build_transformers, "vllm": build_vllm}.get(args.peer, build_lmrl)
    complete, close = build(args)
    complete(prompts[:4], 4)
    wall, cpu = time.monotonic(), time.process_time()
    completions = complete(prompts, args.max_new_tokens)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    close()
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    lengths = [len(tokens) for tokens in completions]
    found = {
        "tokens": sum(lengths),
        "seconds": round(wall, 2),
        "cpu_seconds": None if args.peer == "lmrl-vllm" else round(cpu, 2),  # may run in a separate process
        "mean_tokens": round(statistics.mean(lengths), 1),
        "at_limit": sum(length == args.max_new_tokens for length in lengths),
        "mean_prompt": round(statistics.mean(map(len, prompts)), 1),
        "peak_mb": peak // 1024,
    }
    leave(args.output, found)


def build_lmrl(args: argparse.Namespace):
    from lmrl.engines.base import Sampling
    from lmrl.engines.build import build_engine
    from lmrl.policy.load import open_policy
    from lmrl.recipe import Rollouts

    policy = open_policy(args.model, args.precision)
    engine = build_engine(Rollouts(engine="hf" if args.peer == "hf" else "vllm", slots=args.slots), policy)

    def complete(prompts: list[list[int]], limit: int) -> list[list[int]]:
        keys = [("benchmark", number) for number in range(len(prompts))]
        return [one.tokens for one in engine.complete(prompts, Sampling(max_new_tokens=limit), keys)]

    return complete, engine.close


def build_transformers(args: argparse.Namespace):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.precision)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)

    def complete(prompts: list[list[int]], limit: int) -> list[list[int]]:
        completions = []
        for first in range(0, len(prompts), args.slots):
            batch = tokenizer.pad({"input_ids": prompts[first : first + args.slots]}, return_tensors="pt")
            with torch.no_grad():
                found = model.generate(
                    **batch, max_new_tokens=limit, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=sorted(ends),
                )  # fmt: skip
            for tokens in found[:, batch["input_ids"].shape[1] :].tolist():
                end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
                completions.append(tokens[: end + 1])
        return completions

    return complete, lambda: None


def build_vllm(args: argparse.Namespace):
    from vllm import LLM, SamplingParams

    llm = LLM(args.model, dtype=args.precision, enforce_eager=True, max_model_len=1024, max_num_seqs=args.slots, seed=0)

    def complete(prompts: list[list[int]], limit: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=1.0, max_tokens=limit, logprobs=0, detokenize=False)
        found = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    return complete, lambda: None


if __name__ == "__main__":
    main()
