"""Policies served at an address, any endpoint with OpenAI's API: they can be scored and can play, but not be trained.

Such a policy sees text or messages; its own tokens are not known. Here it gets a byte tokenizer, which encodes and
decodes any text, so lengths are in bytes, and log-probabilities are unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmrl.engines.base import Completion, Engine, Keys, Sampling
from lmrl.errors import EndpointError, RecipeError
from lmrl.openai_client import Answer, OpenAIClient
from lmrl.recipe import PromptTask, Section
from lmrl.seeding import key
from lmrl.trajectories.encoding import Encoder

ROLES = ("system", "developer", "user", "assistant", "tool")
END = "<|end|>"
TEMPLATE = (
    "{% if tools %}{{ raise_exception('definitions of tools are not sent to an address') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.tool_calls %}{{ raise_exception('calls of tools are not sent to an address') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Endpoint(Section):
    """Settings of requests to an address; see lmrl.openai_client.OpenAIClient."""

    key_env: str | None = None
    """Environment variable with the key (null: OPENAI_API_KEY for OpenAI's own address, no key elsewhere)."""
    timeout: float = Field(120, gt=0)
    """Seconds per request."""
    retries: int = Field(5, ge=0)
    """Retries after a transient failure."""
    connections: int = Field(8, ge=1, le=1024)
    """Maximum requests in flight."""
    requests_per_minute: float | None = Field(None, gt=0)
    prices: tuple[float, float] | None = None
    """Dollars per million prompt tokens, and per million completion tokens."""
    max_spend: float | None = Field(None, ge=0)
    """Send no further request once this many dollars are spent; needs `prices`."""
    cache: str | None = None
    """Folder that caches answers, so that no request is sent twice."""


def is_address(name: Any) -> bool:
    """True for a policy that is an address, `http://HOST/v1#MODEL`."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


def check_address(name: str) -> None:
    """Raise RecipeError for an address with a password, which would end up in logs."""
    if "@" in urlsplit(name).netloc:
        raise RecipeError(
            "policy: an address holds no user or password: put the key into an environment variable, key_env=NAME"
        )


def byte_tokenizer() -> Any:
    """A tokenizer with a token for each byte of UTF-8 and for each role of a dialogue."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END, pad_token="<|pad|>", clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens({"additional_special_tokens": [f"<|{role}|>" for role in ROLES]})
    fast.chat_template = TEMPLATE
    return fast


class RemotePolicy:
    """A policy served at an address, for use where a Policy is sampled from and not trained."""

    guidance = None
    has_reference = False
    max_length = None
    causal_lm = None
    temperature = 1.0
    device = torch.device("cpu")

    def __init__(self, address: str, endpoint: Endpoint | None = None):
        """address: `http://HOST/v1#MODEL`; without a model, the only one that the server has. Raises EndpointError,
        RecipeError."""
        check_address(address)
        url, _, model = address.partition("#")
        self.client = OpenAIClient(url, model or None, **(endpoint or Endpoint()).model_dump())
        self.tokenizer = byte_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self._roles = {self.tokenizer.convert_tokens_to_ids(f"<|{role}|>"): role for role in ROLES}

    def to(self, device: Any) -> RemotePolicy:
        return self

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def messages(self, context: Sequence[int]) -> list[dict[str, str]] | None:
        """A context as messages, without the open turn at its end; None for plain text."""
        starts = [place for place, token in enumerate(context) if token in self._roles]
        if not starts:
            return None
        ends = [*starts[1:], len(context)]
        return [
            {"role": self._roles[context[start]], "content": self.decode(context[start + 1 : end])}
            for start, end in zip(starts, ends, strict=True)
            if end < len(context) or end - start > 1
        ]


class RemoteEngine(Engine):
    """Samples from an address: chat completions if the task is a dialogue, else plain-text completions."""

    kind = "openai"
    is_remote = True

    def __init__(self, policy: RemotePolicy, check: Callable[[], None] = lambda: None):
        super().__init__(policy, check)  # type: ignore[arg-type]
        self.remote = policy

    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys) -> list[Completion | EndpointError]:
        settings: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        settings |= {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        settings |= {"top_k": sampling.top_k} if sampling.top_k else {}
        settings |= {"stop": list(sampling.stop)} if sampling.stop else {}

        def ask(context: list[int], name: tuple[int | str, ...]) -> Completion | EndpointError:
            self.check()
            own = settings | {"seed": key(*name) % 2**31}
            messages = self.remote.messages(context)
            try:
                if messages is not None:
                    return self._completion(self.remote.client.chat(messages, **own))
                return self._completion(self.remote.client.complete(self.remote.decode(context), **own))
            except EndpointError as error:
                if error.of_one_request:
                    return error
                # Without a cause it is not the endpoint's answer, but the limit on spending.
                if messages is not None or error.temporary or error.__cause__ is None:
                    raise
                raise EndpointError(
                    f"{error}; if it has no plain-text completions, use chat: task.prompts.chat=true (for an environment: "
                    "task.chat=true)"
                ) from error

        return list(self.remote.client.side_by_side(ask, prompts, keys))

    def _completion(self, answer: Answer) -> Completion:
        tokens = self.remote.encoder.encode(self.remote.encoder.content(answer.text))
        cut = answer.finish_reason == "length"
        if not cut or not tokens:
            tokens.append(self.remote.tokenizer.eos_token_id)
        return Completion(tokens, [None] * len(tokens), "length" if cut else "eos")  # type: ignore[list-item]

    def close(self) -> None:
        self.remote.client.close()


def without_limit(task: Any) -> Any:
    """A task's section without a limit on prompt length: lengths in the policy's own tokens are not known."""
    if not isinstance(task, PromptTask):
        return task
    prompts = task.prompts.model_copy(update={"max_tokens": 2**31 - 1})
    return task.model_copy(update={"prompts": prompts})
