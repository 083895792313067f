"""The section `training`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tbpo_ray.config.base import Count, CountOrZero, NonNegative, Positive, Section, Share
from tbpo_ray.config.deepspeed_options import check_deepspeed, check_precision, offloads, zero_stage

DEFAULT_MICRO_BATCH_PAIRS = 8
DEFAULT_CHECKPOINTS = 5
"""Checkpoints that a run writes: a failure costs at most a fifth of it, and half of that on average."""


class TrainingConfig(Section):
    """The optimizer, the batches, the checkpoints and the metrics of a training run."""

    epochs: Positive = 1.0
    """Passes over the data; may be a fraction."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps; overrides `epochs`."""
    pairs_per_step: Count = 128
    """Pairs in one optimizer step, over all workers and micro-batches."""
    micro_batch_pairs: Count | None = None
    """Maximum number of pairs in one forward and backward pass on one worker; default: 8, or no limit on
    pairs with `micro_batch_tokens`."""
    micro_batch_tokens: Count | Literal["auto"] | None = None
    """Maximum number of tokens in one forward and backward pass on one worker, padding included. Pairs are
    then distributed so that all workers have nearly equally many tokens; a longer pair goes through alone.
    `auto`: as many as fit into a worker's memory by the memory plan."""
    packing: bool | None = None
    """Put the pairs of a micro-batch behind each other in one row, without padding; each token sees its own
    pair only. Needs `micro_batch_tokens` and `model.attention: sdpa`. Default: true where both are set and
    `shared_prompt` is not false."""
    learning_rate: NonNegative = 5e-7
    """Peak learning rate."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """Optimizer of the policy; the paper uses RMSprop."""
    weight_decay: NonNegative = 0.0
    """Weight decay: decoupled for `adamw`, an L2 penalty for `rmsprop`."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_ratio: Share = 0.05
    """Fraction of all steps in which the learning rate rises linearly from 0."""
    max_grad_norm: Positive | None = 1.0
    """Maximum global norm of the gradient; null: no clipping."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the forward and backward pass; `bf16` keeps fp32 master weights."""
    tf32: bool = False
    """Allow TF32 matrix products on GPUs."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute layer activations in the backward pass instead of storing them. `auto`: only where a step
    does not fit into a worker's memory without, at any ZeRO stage that may be chosen; false where the memory
    is not known."""
    shared_prompt: bool | None = None
    """Compute the prompt once for both answers; default: true where the attention implementation
    allows it."""
    truncate_to_shorter: bool = True
    """Truncate both answers to the length of the shorter one if the objective reads no tokens beyond it."""
    length_batches: bool = True
    """Form each step from pairs of similar length. Micro-batches within a step always hold pairs of similar
    length."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; default: five checkpoints per run."""
    keep_checkpoints: Count = 2
    """Number of latest checkpoints to keep; each has the fp32 weights and the optimizer state."""
    keep_best: CountOrZero = 0
    """Number of best checkpoints by `best_metric` to keep in addition; each checkpoint is then evaluated
    when it is written."""
    best_metric: str = "eval/loss"
    """Logged metric that ranks checkpoints; metrics on `data.eval` begin with `eval/`."""
    best_mode: Literal["min", "max"] = "min"
    """Whether a lower (`min`) or a higher (`max`) value of `best_metric` is better."""
    export: Literal["last", "best"] = "last"
    """Checkpoint to export as the policy; `best` requires `keep_best` of at least 1."""
    async_checkpoints: bool | Literal["auto"] = "auto"
    """Write checkpoints while training continues, from a copy in the host's memory of what a worker writes.
    `auto`: on GPUs, but not on the CPU, which would write and train with the same cores."""
    eval_every: Count | None = None
    """Steps between evaluations on `data.eval`; default: only at the end."""
    validate_every: Count | None = None
    """Steps between checkpoints that vLLM samples from and the judge scores while training continues;
    default: none."""
    validation_prompts: Count = 64
    """Number of evaluation prompts for `validate_every`."""
    log_every: Count = 1
    """Steps between two lines of `metrics.jsonl` and between two MLflow entries."""
    reference_scores: Literal["cached", "live"] | None = None
    """`cached`: reference log-probs are computed once and stored; `live`: computed in every step by a
    reference model on the worker; default: `cached` where the objective allows it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What all workers do with a step whose loss or gradient is not finite."""
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"stage": None})
    """`{stage: N}` for ZeRO stage N; `{stage: null}` for the lowest stage, from 1, with which a worker fits
    into its memory by the memory plan, and stage 1 where that memory is not known; or any DeepSpeed
    configuration, which is passed through. Example with the optimizer state on the CPU:
    `{zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}`."""

    @model_validator(mode="after")
    def _set_micro_batch_pairs(self) -> Self:
        if self.micro_batch_pairs is None and self.micro_batch_tokens is None:
            self.micro_batch_pairs = DEFAULT_MICRO_BATCH_PAIRS
        return self

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.packing and self.micro_batch_tokens is None:
            raise ValueError(
                "training.packing=true: needs training.micro_batch_tokens, which is not set; must be a "
                "number of tokens or auto"
            )
        if self.packing and self.shared_prompt is False:
            raise ValueError(
                "training.packing=true: not possible with training.shared_prompt=false, since both need "
                "attention that is limited to parts of a row; set training.packing=false"
            )
        return self

    @field_validator("deepspeed")
    @classmethod
    def _check_deepspeed(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_deepspeed(value)
        return value

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        check_precision(self.deepspeed, self.precision)
        return self

    @model_validator(mode="after")
    def _check_export(self) -> Self:
        if self.export == "best" and not self.keep_best:
            raise ValueError(
                "training.export=best: no best checkpoint is kept; set training.keep_best=1 or more"
            )
        return self

    @property
    def scoring_pairs(self) -> int:
        """Pairs of a forward pass where no budget of tokens applies: reference scores and evaluation."""
        return self.micro_batch_pairs or DEFAULT_MICRO_BATCH_PAIRS

    @property
    def token_budget(self) -> int | None:
        """`micro_batch_tokens` as a number; `auto` has to be resolved first."""
        assert self.micro_batch_tokens != "auto"
        return self.micro_batch_tokens

    def writes_in_background(self, *, gpus: bool) -> bool:
        """`async_checkpoints` for workers with or without GPUs."""
        return gpus if self.async_checkpoints == "auto" else self.async_checkpoints

    def checkpoint_steps(self, total: int) -> int:
        """Steps between checkpoints of a run of `total` steps."""
        return self.checkpoint_every or max(1, total // DEFAULT_CHECKPOINTS)

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed; `auto` counts as no until it is resolved."""
        return self.activation_checkpointing is True

    @property
    def leaves_stage_open(self) -> bool:
        """Whether the ZeRO stage is still to be chosen."""
        return self.deepspeed.get("stage", 0) is None

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the DeepSpeed configuration; null counts as 1 until it is resolved."""
        return zero_stage(self.deepspeed)

    @property
    def offloads(self) -> bool:
        """Whether DeepSpeed keeps the optimizer state or the weights off the device."""
        return offloads(self.deepspeed)
