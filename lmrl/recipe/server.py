"""The `rollouts.server` section: vLLM servers that a run samples from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lmrl.recipe.base import Section

STARTED = ("count", "restarts", "dtype", "max_model_len", "memory", "tensor_parallel_size")
"""Keys that say how servers are started, and mean nothing where they are given."""


class Server(Section):
    """Servers that are given by address, or else started by the run."""

    urls: list[str] = []
    """Addresses of servers that run already, `http://HOST:PORT` (docs/rollouts_server.md says how to start them)."""
    count: int = Field(1, ge=1)
    """How many servers the run starts, each on a free port of the loopback interface."""
    in_flight: int = Field(64, ge=1)
    """Requests that each process of the run has in flight at a server, and sequences that a started one decodes."""
    timeout: float = Field(600, gt=0)
    """Seconds that one completion, or loading new weights, may take."""
    start_timeout: float = Field(600, gt=0)
    """Seconds until a server that starts, or one that is lost and not ours to start, has to answer."""
    restarts: int = Field(3, ge=0)
    """How often each server is started again after it died or stopped answering."""
    transfer: Literal["auto", "nccl", "files"] = "auto"
    """How weights travel: `nccl` broadcasts them from GPU to GPU, `files` puts them in shared memory on the same machine;
    `auto` takes nccl if both sides have their own GPUs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the servers' weights and arithmetic, whatever the learner's is."""
    max_model_len: int | None = Field(None, ge=1)
    """Tokens of context and completion at most (null: what the model has positions for)."""
    memory: float = Field(4, gt=0)
    """GiB for keys and values, on each device."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Devices that share the weights of one server."""

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"'{url}' is no address: expected http://HOST:PORT")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError("an address is named twice")
        return [url.rstrip("/") for url in urls]

    @model_validator(mode="after")
    def _either(self) -> Server:
        stated = [key for key in STARTED if self.urls and getattr(self, key) != type(self).model_fields[key].default]
        if stated:
            raise ValueError(f"`{stated[0]}` is for servers that the run starts: leave it out, or leave `urls` out")
        return self
