"""The `model` section: where the policy comes from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lmrl.recipe.base import Section


class Lora(Section):
    """Low-rank adapters through peft."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    """While imitating; objectives that compare log-probabilities switch all dropout off."""
    target_modules: str | list[str] = "all-linear"


class Model(Section):
    """The policy's starting point: `path` (hub name, folder, GGUF file), or `config` for one built from scratch."""

    path: str | None = None
    revision: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: Literal["char", "word"] = "char"
    lora: Lora | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if self.path is None and self.config is None:
            raise ValueError("needs `path` (hub name, folder or GGUF file) or `config` (a model built from scratch)")
        if self.path is not None:
            self.config = None  # so that one override, model.path=..., puts a real model into any recipe
        if self.config is not None and self.lora is not None:
            raise ValueError(
                "`lora` adapts a pretrained model: give `path`, or train the model from scratch without it"
            )
        if self.dtype != "float32" and self.lora is None:
            raise ValueError(
                "`dtype: bfloat16` is for frozen weights, so it needs `lora`; trainable weights are float32 "
                "(for bfloat16 arithmetic set training.precision=bfloat16)"
            )
        return self
