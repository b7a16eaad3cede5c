"""The `rollouts.server` section: vLLM servers that a run samples from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lmrl.recipe.base import Section

STARTED = ("count", "restarts", "dtype", "max_model_len", "memory", "tensor_parallel_size")
"""Keys that say how servers are started; refused together with `urls`."""


class Server(Section):
    """vLLM servers, given by address or started by the run."""

    urls: list[str] = []
    """Addresses of running servers, `http://HOST:PORT` (docs/rollouts_server.md says how to start them)."""
    count: int = Field(1, ge=1)
    """How many servers the run starts, each on a free port of the loopback interface."""
    in_flight: int = Field(64, ge=1)
    """Requests that each process of the run has in flight at a server; also the sequences that a started server decodes at a time."""
    timeout: float = Field(600, gt=0)
    """Maximum seconds for one completion, or for loading new weights."""
    start_timeout: float = Field(600, gt=0)
    """Seconds to wait for a starting server, or for a lost one of `urls`, to answer."""
    restarts: int = Field(3, ge=0)
    """How often each server is restarted at most after it died or stopped answering."""
    transfer: Literal["auto", "nccl", "files"] = "auto"
    """How weights are transferred: `nccl` broadcasts them from GPU to GPU, `files` puts them in shared memory on the same machine;
    `auto` uses nccl if both sides have their own GPUs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the servers' weights and arithmetic, whatever the learner's is."""
    max_model_len: int | None = Field(None, ge=1)
    """Maximum tokens of context and completion (null: the model's maximum)."""
    memory: float = Field(4, gt=0)
    """GiB for keys and values on each device."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Devices that share the weights of one server."""

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"'{url}' is not an address: expected http://HOST:PORT")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError("an address is named twice")
        return [url.rstrip("/") for url in urls]

    @model_validator(mode="after")
    def _either(self) -> Server:
        stated = [key for key in STARTED if self.urls and getattr(self, key) != type(self).model_fields[key].default]
        if stated:
            raise ValueError(f"`{stated[0]}` is for servers that the run starts: leave it out, or leave `urls` out")
        return self
