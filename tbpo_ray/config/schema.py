"""Everything a run can be told, as one typed tree. Imports neither torch nor ray, and a test says so.

A configuration is a YAML file plus dotted overrides (`training.max_steps=20`). Unknown keys, wrong
types and impossible values raise :class:`tbpo_ray.errors.InputError`, one sentence per fault, each
naming the dotted key, the value and what would do.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from tbpo_ray.config.base import Count, NonNegative, Positive, Section, Share, check_name
from tbpo_ray.config.objective import ObjectiveConfig

RENAMED_KEYS = {"training.cut_dead_tail": "training.truncate_to_shorter"}
"""Deprecated keys and their present names; both belong to the same section."""
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class RunConfig(Section):
    name: str = "run"
    """Names the run's folder and its MLflow run; the same name continues the same run."""
    output_dir: str = "runs"
    """Folder of all runs: a local path, or a shared file system when there are several nodes."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seeds weights, data order, dropout and sampling."""

    _name = field_validator("name")(check_name)


class LoraConfig(Section):
    r: Count = 32
    """Rank (the released TBPO code uses 32)."""
    alpha: Positive = 64
    """Scale; the update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the adapter's input."""
    target_modules: list[str] | str = "all-linear"
    """Module names, or `all-linear` (every linear layer but the output layer)."""


class ModelConfig(Section):
    name_or_path: str = "builtin:tiny"
    """`builtin:tiny`, a folder with a Hugging Face causal model, or a hub name."""
    reference: str | None = None
    """The frozen reference policy; by default the model as it is before training."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the model folder, for quantised releases."""
    revision: str | None = None
    """Hub revision (commit, tag or branch) of `name_or_path`."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of all weights."""
    chat_template: str | None = None
    """Path of a Jinja chat template to use instead of the tokenizer's own, or `none` for plain text."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


class SourceConfig(Section):
    source: str
    """A path, glob, fsspec address, `builtin:copyedit?...` or `hf:NAME[:SPLIT]`."""
    weight: Positive = 1.0
    """Share of this source among all, relative to its natural size: 2 repeats every record twice."""


Sources = str | list[SourceConfig]


class DataConfig(Section):
    train: Sources = "builtin:copyedit?split=train"
    """Preference records to train on: one source, or a list of `{source, weight}`."""
    eval: Sources | None = None
    """Held-out preference records, for the metrics of `training.eval_every`."""
    max_length: Annotated[int, Field(ge=4)] = 2048
    """Most tokens of a prompt and one answer together, BOS and EOS included."""
    max_prompt_length: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of a prompt, default half of max_length; the front is cut, never the end."""
    quarantine_limit: Share = 0.05
    """Largest share of records that may be quarantined before the run stops."""
    max_pairs: Count | None = None
    """Use at most this many records, the first ones; for trials."""
    max_eval_pairs: Count | None = None
    """The same for `data.eval`."""
    cache_dir: str | None = None
    """Where prepared shards and reference scores are kept; default `<run.output_dir>/.prepared`."""
    card_column: str | None = None
    """A metadata column (language, source ...) that the data card counts."""

    @property
    def prompt_limit(self) -> int:
        return self.max_prompt_length or self.max_length // 2

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.prompt_limit >= self.max_length:
            raise ValueError(
                f"data.max_prompt_length={self.max_prompt_length} leaves no room for an answer within "
                f"data.max_length={self.max_length}; make it smaller than data.max_length"
            )
        return self


class TrainingConfig(Section):
    epochs: Positive = 1.0
    """Passes over the data; a part of one is allowed."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps; overrides `epochs`."""
    pairs_per_step: Count = 128
    """Pairs in one optimizer step, over all workers and micro-batches."""
    micro_batch_pairs: Count = 8
    """Most pairs that go through the model at once on one worker."""
    learning_rate: NonNegative = 5e-7
    """Peak learning rate."""
    optimizer: Literal["rmsprop", "adamw"] = "rmsprop"
    """The paper uses RMSprop."""
    weight_decay: NonNegative = 0.0
    """Decoupled for adamw, L2 for rmsprop."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up."""
    warmup_ratio: Share = 0.05
    """Share of all steps in which the rate rises from 0."""
    max_grad_norm: Positive | None = 1.0
    """Clip the gradient's global norm."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights."""
    tf32: bool = False
    """Allow TF32 matrix products on GPUs."""
    activation_checkpointing: bool = False
    """Recompute layer activations in the backward pass."""
    shared_prompt: bool | None = None
    """Run the prompt once for both answers; default: on where the attention implementation allows it."""
    truncate_to_shorter: bool = True
    """Truncate both answers to the shorter one's length, for objectives that compare no tokens beyond it."""
    length_batches: bool = True
    """Draw steps from pairs of like length; within a step micro-batches hold like lengths anyway."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; default: ten in a run."""
    keep_checkpoints: Count = 2
    """How many of the latest checkpoints stay."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """How many of the best checkpoints by `best_metric` stay besides; each is evaluated when written."""
    best_metric: str = "eval/loss"
    """A logged metric, with eval/ for one on `data.eval`."""
    best_mode: Literal["min", "max"] = "min"
    """Whether small or large values of it are good."""
    export: Literal["last", "best"] = "last"
    """Which checkpoint becomes the exported policy; `best` wants keep_best."""
    async_checkpoints: bool = False
    """Write checkpoints in a thread while training goes on; holds a second copy of the optimizer state."""
    eval_every: Count | None = None
    """Steps between evaluations on `data.eval`; default: at the end only."""
    validate_every: Count | None = None
    """Steps between checkpoints that vLLM samples and the judge scores beside training; default: none."""
    validation_prompts: Count = 64
    """Evaluation prompts that are used for it."""
    log_every: Count = 1
    """Steps between lines of `metrics.jsonl` and MLflow."""
    reference_scores: Literal["cached", "live"] | None = None
    """`cached`: computed once and stored; `live`: by a model at hand; default: cached where possible."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do, on all workers, with a step whose loss or gradient is not finite."""
    deepspeed: dict[str, Any] = Field(default_factory=lambda: {"stage": 1})
    """`{stage: N}`, or any DeepSpeed mapping, passed through; with the optimizer's state on the CPU:
    `{zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}`."""

    @field_validator("deepspeed")
    @classmethod
    def _deepspeed(cls, value: dict[str, Any]) -> dict[str, Any]:
        zero = value.get("zero_optimization")
        stage = value["stage"] if "stage" in value else zero.get("stage", 0) if isinstance(zero, dict) else 0
        if stage not in (0, 1, 2, 3):
            raise ValueError("the ZeRO stage must be 0, 1, 2 or 3")
        if "stage" in value and len(value) > 1 and "zero_optimization" in value:
            raise ValueError("give either `stage` or `zero_optimization`, not both")
        for part, stages in _OFFLOADS.items():
            if stage not in stages and isinstance(zero, dict) and _is_offloaded(zero, part):
                use = " or ".join(map(str, stages))
                raise ValueError(f"{part} does nothing with ZeRO stage {stage}; leave it out, or use {use}")
        return value

    @model_validator(mode="after")
    def _best(self) -> Self:
        if self.export == "best" and not self.keep_best:
            raise ValueError(
                "training.export=best keeps no best checkpoint; set training.keep_best=1 or more"
            )
        return self

    @property
    def zero_stage(self) -> int:
        zero = self.deepspeed.get("zero_optimization") or {}
        return int(self.deepspeed.get("stage", zero.get("stage", 0)))

    @property
    def offloads(self) -> bool:
        """Whether DeepSpeed keeps the optimizer's state or the weights off the device."""
        zero = self.deepspeed.get("zero_optimization") or {}
        return any(_is_offloaded(zero, part) for part in _OFFLOADS)


_OFFLOADS = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""Parts of DeepSpeed's `zero_optimization`, and the stages in which they do something."""


def _is_offloaded(zero: dict[str, Any], part: str) -> bool:
    return bool(zero.get(part)) and zero[part].get("device") in ("cpu", "nvme")


class PoolLabels(Section):
    """Labels that nodes must carry, by part of the work; a cluster with pools names them here."""

    prepare: dict[str, str] = Field(default_factory=dict)
    """Reading, tokenizing, reference scores on CPUs, export."""
    train: dict[str, str] = Field(default_factory=dict)
    """Training workers, and reference scores on GPUs."""
    generate: dict[str, str] = Field(default_factory=dict)
    """vLLM engines."""

    @field_validator("prepare", "train", "generate")
    @classmethod
    def _plain(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for name, label in value.items():
            if not _LABEL.fullmatch(label):
                raise ValueError(
                    f"cluster.labels.{info.field_name}.{name}={label}: write letters, digits, '.', '_' or '-'"
                )
        return value


class ClusterConfig(Section):
    num_workers: Annotated[int, Field(ge=1)] | Annotated[list[Count], Field(min_length=2, max_length=2)] = 1
    """Training workers: a number, or `[min, max]` to grow and shrink with the cluster."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU for each worker and vLLM engine; `auto`: where the cluster has or can start any."""
    resources_per_worker: dict[str, NonNegative] = Field(default_factory=dict)
    """Ray resources of a training worker; default `{CPU: 1}`, and `{CPU: 4, GPU: 1}` with use_gpu."""
    threads_per_worker: Count | None = None
    """Torch threads of a CPU worker; default: the node's cores over the workers on it."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """Worker failures that a run survives; -1: any number."""
    max_preemption_failures: Annotated[int, Field(ge=-1)] = -1
    """The same for preempted nodes."""
    start_timeout_s: Positive = 600
    """How long to wait for nodes to come up."""
    labels: PoolLabels = PoolLabels()
    """Pools of nodes for the parts of the work; by default any node that has the resources."""
    node_types: str | None = None
    """A Ray cluster file or KubeRay manifest that says what the cluster can grow to; default: the file that
    `ray up` left on the head. Without either only the nodes that are up count."""

    @field_validator("num_workers")
    @classmethod
    def _range(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, list) and value[0] > value[1]:
            raise ValueError("[min, max] wants min <= max")
        return value

    @property
    def gpus(self) -> bool:
        """Whether workers get GPUs; `auto` counts as no until it is settled on a cluster."""
        return self.use_gpu is True

    @property
    def max_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def worker_resources(self) -> dict[str, float]:
        default = {"CPU": 4.0, "GPU": 1.0} if self.gpus else {"CPU": 1.0}
        return dict(self.resources_per_worker) or default


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking address; default: SQLite in `<run.output_dir>/mlflow.db`."""
    experiment: str = "tbpo"
    """MLflow experiment."""


class GenerationConfig(Section):
    max_tokens: Count = 256
    """Most tokens of an answer."""
    temperature: NonNegative = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling."""
    samples: Count = 1
    """Answers per prompt."""
    engines: Annotated[int, Field(ge=1)] | Annotated[list[Count], Field(min_length=2, max_length=2)] = 1
    """vLLM engines: a number, or `[min, max]`."""
    tensor_parallel: Count = 1
    """GPUs of one engine."""
    batch_size: Count = 256
    """Prompts handed to an engine at once."""
    max_model_len: Count | None = None
    """Longest prompt and answer together; default: the model's own limit."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, passed through (`trust_remote_code` is refused)."""

    @field_validator("engine")
    @classmethod
    def _no_remote_code(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("trust_remote_code"):
            raise ValueError("trust_remote_code stays off; convert the model to safetensors of a known class")
        return value


class EvaluationConfig(Section):
    prompts: str | None = None
    """Where prompts come from (JSONL, Parquet or `builtin:copyedit?split=test`); default: `data.eval`."""
    max_prompts: Count | None = 400
    """Use the first so many prompts."""
    judge: dict[str, Any] = Field(default_factory=lambda: {"kind": "checker", "function": None})
    """How answers are judged: `{kind: checker|reward_model|llm|implicit, ...}`."""
    policies: dict[str, str] = Field(default_factory=dict)
    """Policies to compare, name to model folder or run name."""
    baseline: str | None = None
    """The policy that win rates are against; default: the first one."""
    slice_by: list[str] = Field(default_factory=list)
    """Metadata columns to report separately."""
    benchmarks: dict[str, Any] = Field(default_factory=dict)
    """lm-eval tasks (extra `harness`): `{tasks: [...], shots: {...}, include_path: ...}`."""
    credit_pairs: Annotated[int, Field(ge=0)] = 0
    """Pairs that the token credit map shows."""


class TuneConfig(Section):
    trials: Count = 12
    """How many trials; a larger number extends a study. A grid has at most as many as its points."""
    metric: str | list[str] = "eval/rewards/accuracy"
    """Logged metric, or several for a Pareto search; `evaluation/...` samples and judges every policy."""
    mode: Literal["max", "min"] | list[Literal["max", "min"]] = "max"
    """Direction of each metric; one alone counts for all."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """How parameters are proposed."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """What stops or changes trials in the middle, by the first metric."""
    max_concurrent: Count | None = None
    """Trials at a time; default: as many as the cluster holds."""
    num_workers: Count | None = None
    """Workers of a trial; default: `cluster.num_workers`. The pairs of a step stay the same."""
    repeats: Count = 1
    """Runs of each trial with other seeds; the metric is their mean."""
    grace_steps: Count | None = None
    """asha: steps before a trial may be stopped; pbt: steps between exploits; default: a quarter of a run."""
    reduction_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3
    """asha: one in so many trials passes a rung."""
    confirm: Annotated[int, Field(ge=0)] = 2
    """New seeds with which the best configuration and the one without the search run again; 0: none."""
    resume_errored: bool = False
    """When a study goes on, its failed trials do so too, from their last checkpoints."""

    @property
    def metrics(self) -> list[str]:
        return [self.metric] if isinstance(self.metric, str) else self.metric

    @property
    def modes(self) -> list[str]:
        """One direction per metric."""
        return [self.mode] * len(self.metrics) if isinstance(self.mode, str) else list(self.mode)

    @model_validator(mode="after")
    def _directions(self) -> Self:
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"tune.metric={self.metric}: name each metric once, at least one")
        if len(self.modes) != len(self.metrics):
            raise ValueError(
                f"tune.mode={self.mode}: {len(self.modes)} direction(s) for {len(self.metrics)} metric(s); "
                "give one for each, or one for all"
            )
        return self


class PromotionConfig(Section):
    model_name: str | None = None
    """Registered model that gets the alias `champion`."""
    metric: str = "win_rate"
    """Metric of the gate."""
    at_least: float = 0.5
    """The lower end of its 95 % interval must reach this."""


class CompareConfig(Section):
    promote: PromotionConfig = PromotionConfig()
    """When the best run enters the model registry."""
    output: str | None = None
    """Folder of the report; default `<run.output_dir>/<run.name>/report`."""


class Config(Section):
    """The root. `sft` and `pipeline` hold overrides for the stages of `jobs/pipeline.py`."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tune: TuneConfig = TuneConfig()
    compare: CompareConfig = CompareConfig()
    sft: dict[str, Any] = Field(default_factory=dict)
    """Overrides in force while `jobs/sft.py` or the pipeline's first stage runs, dotted or nested."""
    runs: list[str] = Field(default_factory=list)
    """Runs that `jobs/compare.py` puts side by side."""

    @model_validator(mode="after")
    def _cross(self) -> Self:
        if self.training.reference_scores == "cached" and self.objective.needs_distribution:
            raise ValueError(
                f"training.reference_scores=cached cannot serve objective.name={self.objective.name} with "
                f"objective.state_baseline.kind={self.objective.baseline_kind}, which needs the reference's "
                "whole distribution; use live, or a k3 baseline"
            )
        return self
