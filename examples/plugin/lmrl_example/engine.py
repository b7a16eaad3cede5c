"""Sampling from a server that continues token ids: POST {"prompts", "max_tokens", "seeds"} -> {"tokens", "logprobs"}."""

import json
import urllib.request

from lmrl import Engine
from lmrl.engines.base import Completion
from lmrl.seeding import key as number


class Completions(Engine):
    """`rollouts.options: {url: ...}`. The server has to load the policy's weights itself: `sync` tells it when they have changed."""

    is_remote = True

    def __init__(self, policy, check=lambda: None, url="http://127.0.0.1:8000"):
        super().__init__(policy, check)
        self.url = url

    def sample(self, prompts, sampling, keys):
        seeds = [number(*key) for key in keys]
        request = {"prompts": prompts, "max_tokens": sampling.max_new_tokens, "seeds": seeds}
        answer = self._post(request)
        end = self.policy.tokenizer.eos_token_id
        return [
            Completion(tokens, logprobs, "eos" if tokens[-1] == end else "length")
            for tokens, logprobs in zip(answer["tokens"], answer["logprobs"], strict=True)
        ]

    def sync(self):
        self._post({"sync": self.syncs + 1})

    def _post(self, body):
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
