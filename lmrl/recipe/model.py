"""The `model` section: where the policy comes from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lmrl.recipe.base import FreeForm, ModelPath, Section

SIZES = (
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "n_inner",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
)
"""Names of sizes in transformers' configurations; all are whole numbers."""


class Lora(Section):
    """Low-rank adapters, by peft."""

    r: int = Field(16, ge=1)
    """Rank."""
    alpha: float = Field(32, gt=0)
    """Adapters are scaled by alpha / r (by alpha / sqrt(r) with `use_rslora`)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapters while imitating; objectives that compare log-probabilities switch all dropout off."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter, named as in peft."""
    target_parameters: list[str] | None = None
    """Further parameters that get an adapter although they are not the `weight` of a layer, such as `mlp.experts.gate_up_proj` of
    mixtures of experts. Not with `dropout` or `use_dora`."""
    modules_to_save: list[str] | None = None
    """Layers to train in full, as copies saved with the adapter: `embed_tokens`, `lm_head`. Embeddings
    tied to the head stay tied."""
    use_rslora: bool = False
    """Scale adapters by alpha / sqrt(r), so that larger ranks do not learn more slowly (Kalajdzievski, arXiv 2312.03732)."""
    use_dora: bool = False
    """Learn the magnitude of each weight row separately from its direction (DoRA; Liu et al., arXiv 2402.09353): closer to training
    all weights at small ranks, but slower."""

    @model_validator(mode="after")
    def _fits(self) -> Lora:
        if self.target_parameters and (self.use_dora or self.dropout):
            other = "use_dora" if self.use_dora else "dropout"
            raise ValueError(
                f"`target_parameters` cannot be combined with `{other}` (peft supports neither): leave one out"
            )
        if not self.target_modules and not self.target_parameters:
            raise ValueError("`target_modules` names no layer: name some, or parameters by `target_parameters`")
        return self


class Model(Section):
    """The policy's starting point: `path` (hub name, folder, GGUF file), or `config` for a model from scratch."""

    path: ModelPath | None = None
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    config: FreeForm | None = None
    """Transformers configuration of a model from scratch: `model_type` and its sizes. Without `initializer_range`, initial
    weights have a standard deviation of 1 / sqrt(`hidden_size`), but at least transformers' own."""
    tokenizer: Literal["char", "word"] = "char"
    """Tokenizer of a model from scratch: one token per character, or per word, of the task's texts."""
    chat_template: str | None = None
    """Chat template (Jinja) that replaces the tokenizer's own; a tokenizer from scratch has none. Saved with the policy."""
    lora: Lora | None = None
    """Train adapters and freeze the model (null: train all weights)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of frozen weights; trained ones are float32."""
    attention: str = "auto"
    """How attention is computed. auto: packed sequences without padding if the device and the model support it, else `sdpa`. Or `sdpa`,
    `eager`, `varlen` (packed), flash_attention_2, flash_attention_3, flex_attention, or a hub kernel (`owner/name`), named as in
    transformers."""
    quantization: Literal["nf4"] | None = None
    """nf4: keep the frozen weights of linear layers, except the head, in 4 bits, and compute with them in `dtype` (QLoRA; Dettmers
    et al., arXiv 2305.14314), with bitsandbytes; needs `lora`. Exports merge the adapter into the rounded weights, in bfloat16."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @model_validator(mode="after")
    def _one_origin(self) -> Model:
        if self.path is None and self.config is None:
            raise ValueError("needs `path` (hub name, folder or GGUF file) or `config` (a model built from scratch)")
        if self.path is not None:
            self.config = None  # so that one override, model.path=..., puts a real model into any recipe
        for name in SIZES:
            size = (self.config or {}).get(name)
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise ValueError(f"`config.{name}`: expected a whole number of at least 1, got {size!r:.60}")
        if self.config is not None and self.lora is not None:
            raise ValueError(
                "`lora` adapts a pretrained model: give `path`, or train the model from scratch without it"
            )
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f"`quantization: {self.quantization}` is for frozen weights, so it needs `lora`: add it, for instance lora.r=16"
            )
        if self.quantization is not None and str(self.path).endswith(".gguf"):
            raise ValueError(
                "`quantization` cannot be applied to a GGUF file, which is quantized already: give a folder or hub name as `path`"
            )
        if self.dtype != "float32" and self.lora is None:
            raise ValueError(
                "`dtype: bfloat16` is for frozen weights, so it needs `lora`; trainable weights are float32 "
                "(for bfloat16 arithmetic set training.precision=bfloat16)"
            )
        return self
