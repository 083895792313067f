"""The configuration of every job as one typed tree. Imports neither torch nor ray.

A configuration is a YAML file plus dotted overrides (`training.max_steps=20`). Unknown keys, wrong types
and invalid values raise :class:`tbpo_ray.errors.InputError` with one sentence per fault, each naming the
dotted key, the value and what is accepted.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, field_validator, model_validator

from tbpo_ray.config.base import Count, CountOrZero, NonNegative, Number, Positive, Section, Share, check_name
from tbpo_ray.config.cluster import ClusterConfig, CountOrRange
from tbpo_ray.config.objective import ObjectiveConfig
from tbpo_ray.config.open_values import check_benchmarks, check_engine, check_judge
from tbpo_ray.config.training import TrainingConfig

__all__ = [
    "RENAMED_KEYS",
    "ClusterConfig",
    "CompareConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GenerationConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PromotionConfig",
    "RunConfig",
    "SourceConfig",
    "Sources",
    "TrackingConfig",
    "TrainingConfig",
    "TuneConfig",
]

RENAMED_KEYS = {"training.cut_dead_tail": "training.truncate_to_shorter"}
"""Deprecated keys and their present names; both belong to the same section."""


class RunConfig(Section):
    """The identity of a run and where it is stored."""

    name: str = "run"
    """Name of the run's folder and of its MLflow run; the same name continues the same run."""
    output_dir: str = "runs"
    """Folder of all runs: a local path, or a path on a shared file system if there are several nodes."""
    seed: Annotated[int, Field(ge=0, lt=2**31), Number] = 0
    """Seed of weight initialization, data order, dropout and sampling."""

    _name = field_validator("name")(check_name)


class LoraConfig(Section):
    """A low-rank adapter (LoRA) that is trained instead of all weights."""

    r: Count = 32
    """Rank of the adapter."""
    alpha: Positive = 64
    """Scale of the adapter: its update is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1), Number] = 0.05
    """Dropout on the adapter's input."""
    target_modules: list[str] | str = "all-linear"
    """Names of the modules to adapt, or `all-linear` for every linear layer except the output layer."""


class ModelConfig(Section):
    """The policy, its frozen reference and its tokenizer."""

    name_or_path: str = "builtin:tiny"
    """Model to train: `builtin:tiny`, a folder with a Hugging Face causal model, or a hub name."""
    reference: str | None = None
    """Frozen reference policy; default: the model as it is before training."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the model folder, for quantized releases."""
    revision: str | None = None
    """Hub revision (commit, tag or branch) of `name_or_path`."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of all weights; null: train all weights."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's own, or `none` for plain text."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


class SourceConfig(Section):
    """One of several sources of preference records."""

    source: str
    """A path, glob, fsspec address, `builtin:copyedit?...` or `hf:NAME[:SPLIT]`."""
    weight: Positive = 1.0
    """Share of this source relative to its natural size: 2 repeats every record twice."""


Sources = str | list[SourceConfig]

RecordFormat = Literal[
    "auto", "messages", "alpaca", "pairs", "shp", "safe_rlhf", "helpsteer", "two_answers", "summaries",
    "arena", "arena_columns", "labeled", "ranked", "scored",
]  # fmt: skip
"""The row shapes that :mod:`tbpo_ray.data.record_shapes` reads."""


class DataConfig(Section):
    """The preference records and how they become token sequences."""

    train: Sources = "builtin:copyedit?split=train"
    """Preference records to train on: one source, or a list of `{source, weight}`."""
    eval: Sources | None = None
    """Held-out preference records, for the metrics of `training.eval_every`."""
    format: RecordFormat = "auto"
    """The shape of the rows, which determines the columns of the prompt and the answers; `auto` tries all
    shapes and reports the one that it found."""
    pairing: Literal["best_worst", "best_random", "all"] = "best_worst"
    """Pairs made of a row that ranks or scores several answers: the best with the worst, the best with a
    random one that is worse, or every two that differ."""
    pairing_gap: NonNegative = 0.0
    """Minimum difference of the scores (or ranks) of two answers that make a pair. Ties never do: they are
    skipped and counted."""
    swap_answers: StrictBool = False
    """Exchange the chosen and the rejected answer of every pair of `data.train` and `data.eval`, which trains
    in the reverse direction; evaluations still read the records as they are."""
    share: float | list[float] = 1.0
    """Share of the records of `data.train` to train on: a number draws that fraction of the records by
    `run.seed`; `[low, high]` takes the records whose draw is between the two, so that `[0, 0.3]` and
    `[0.3, 1]` are disjoint and together complete."""
    max_length: Annotated[int, Field(ge=4), Number] = 2048
    """Maximum number of tokens of a prompt and one answer together, including BOS and EOS."""
    max_prompt_length: Count | None = None
    """Maximum number of tokens of a prompt; a longer one loses its beginning. Default: half of
    `max_length`."""
    quarantine_limit: Share = 0.05
    """Maximum fraction of records that may be quarantined; beyond it the run stops."""
    max_pairs: Count | None = None
    """Use at most this many records, from the beginning; for experiments."""
    max_eval_pairs: Count | None = None
    """Use at most this many records of `data.eval`, from the beginning."""
    cache_dir: str | None = None
    """Folder of the prepared shards and the reference scores; default: `<run.output_dir>/.prepared`."""
    card_column: str | None = None
    """A metadata column, such as language or source, whose values the data card counts."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments passed to the chat template, such as `{enable_thinking: false}`. A record's own column
    `chat_template_kwargs` wins over them."""

    @field_validator("template_kwargs")
    @classmethod
    def _check_template_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in value if not name.isidentifier()]
        if names:
            raise ValueError(
                f"{names[0]!r} is not the name of a template variable; must be letters, digits and _"
            )
        taken = sorted({"messages", "tools", "documents", "add_generation_prompt"} & set(value))
        if taken:
            raise ValueError(f"{', '.join(taken)}: set from the records; must be other template variables")
        return value

    @field_validator("share")
    @classmethod
    def _check_share(cls, value: float | list[float]) -> float | list[float]:
        bounds = value if isinstance(value, list) else [0.0, value]
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
            raise ValueError("must be a number in (0, 1], or [low, high] with 0 <= low < high <= 1")
        return value

    @property
    def share_range(self) -> tuple[float, float]:
        """`share` as an interval of draws between 0 and 1."""
        return (self.share[0], self.share[1]) if isinstance(self.share, list) else (0.0, self.share)

    @property
    def prompt_limit(self) -> int:
        """Maximum number of tokens of a prompt."""
        return self.max_prompt_length or self.max_length // 2

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.prompt_limit >= self.max_length:
            raise ValueError(
                f"data.max_prompt_length={self.max_prompt_length} leaves no room for an answer within "
                f"data.max_length={self.max_length}; make it smaller than data.max_length"
            )
        return self


class TrackingConfig(Section):
    """Where MLflow stores parameters, metrics and artifacts."""

    uri: str | None = None
    """MLflow tracking address; default: MLFLOW_TRACKING_URI, else SQLite in `<run.output_dir>/mlflow.db`."""
    experiment: str = "tbpo"
    """MLflow experiment; if it is not set, MLFLOW_EXPERIMENT_NAME is used where the environment has it."""
    log_models: Literal["weights", "metadata"] = "weights"
    """What MLflow gets of every exported policy: a model with its `weights` (hard links where the artifacts
    are local, otherwise an upload), or its `metadata` only, so that a promotion uploads the weights."""
    system_metrics_seconds: NonNegative = 15
    """Seconds between two samples of the nodes' CPU, memory, GPU, disk and network; 0: none. If it is not
    set, MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL and MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING count."""


class GenerationConfig(Section):
    """How vLLM samples answers."""

    max_tokens: Count = 256
    """Maximum number of tokens of an answer."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1), Number] = 1.0
    """Probability mass of nucleus sampling."""
    samples: Count = 1
    """Answers per prompt."""
    engines: CountOrRange | Literal["auto"] = "auto"
    """vLLM engines: a number, `[min, max]` to grow and shrink with the cluster, or `auto`: as many as the
    GPUs of the nodes with `cluster.labels.generate` hold, without GPUs one per node. With `auto`,
    there is at most one per batch."""
    tensor_parallel: Count = 1
    """GPUs per engine."""
    batch_size: Count = 256
    """Prompts per batch that an engine receives."""
    max_model_len: Count | None = None
    """Maximum number of tokens of a prompt and its answer together; default: what the longest prompt and
    `max_tokens` need, or the model's own limit if that is less."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, passed through; `trust_remote_code` is refused."""
    stall_timeout_s: Positive = 600
    """Seconds without a new token after which an engine with unfinished prompts is killed. Its prompts are
    sampled again on a new engine; if that one stalls too, the job fails. An engine that is loading its model
    has half an hour, or this if it is longer."""

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_engine(value)
        return value

    @field_validator("engines")
    @classmethod
    def _check_engines(cls, value: int | list[int] | str) -> int | list[int] | str:
        if isinstance(value, list) and value[0] > value[1]:
            raise ValueError("[min, max] must have min <= max")
        return value

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        limits = {
            "max_model_len": self.max_model_len,
            "engine.max_model_len": self.engine.get("max_model_len"),
        }
        for name, limit in limits.items():
            if limit is not None and limit <= self.max_tokens:
                raise ValueError(
                    f"generation.{name}={limit}: leaves no room for a prompt beside generation.max_tokens="
                    f"{self.max_tokens}; must be larger than generation.max_tokens"
                )
        return self

    @property
    def gpus_per_engine(self) -> int:
        """GPUs of one engine: tensor parallelism times pipeline parallelism."""
        return self.tensor_parallel * int(self.engine.get("pipeline_parallel_size") or 1)


class EvaluationConfig(Section):
    """The prompts, the judge and the policies of an evaluation."""

    prompts: str | None = None
    """Source of the prompts (JSONL, Parquet or `builtin:copyedit?split=test`); default: `data.eval`, with a
    suite the suite's own."""
    suite: str | None = None
    """A ready evaluation that sets how prompts are read, how many, and the judge's rubric: `helpful`,
    `harmless`, `tldr`, `alpaca_eval`, `arena_hard_v2`, `mt_bench`, or the path of one's own YAML file."""
    max_prompts: Count | Literal["auto"] | None = "auto"
    """Use at most this many prompts, from the beginning; null: all; `auto`: as many as the suite says, 400
    without a suite."""
    reference_column: str | None = None
    """Metadata column with a reference answer (a text or several), to which ROUGE-L compares the answers;
    default: that of the suite, else no ROUGE-L."""
    judge: dict[str, Any] = Field(default_factory=lambda: {"kind": "checker", "function": None})
    """How answers are judged: `{kind: KIND, ...}` with `checker`, `reward_model`, `llm` or `implicit`, and
    the settings of that kind."""
    policies: dict[str, str] = Field(default_factory=dict)
    """Policies to compare: a name, and a model folder or the name of a run."""
    baseline: str | None = None
    """Policy that the win rates are measured against; default: the first one."""
    slice_by: list[str] = Field(default_factory=list)
    """Metadata columns whose values are also reported separately."""
    benchmarks: dict[str, Any] = Field(default_factory=dict)
    """lm-eval tasks (needs the extra `harness`): `{tasks: [...], shots: {...}, include_path: ...}`."""
    credit_pairs: CountOrZero = 0
    """Number of pairs that the token credit map shows; 0: no map."""
    traces: CountOrZero = 0
    """Number of prompts whose answers are also logged as MLflow traces, with the judge's assessments."""

    @field_validator("benchmarks")
    @classmethod
    def _check_benchmarks(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_benchmarks(value)
        return value

    @field_validator("judge")
    @classmethod
    def _check_judge(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_judge(value)
        return value


class TuneConfig(Section):
    """A hyperparameter search over a space of configuration keys."""

    trials: Count = 12
    """Number of trials; a larger number extends a study. A grid has at most as many trials as points."""
    metric: str | list[str] = "eval/rewards/accuracy"
    """Logged metric, or several for a Pareto search; a metric `evaluation/...` samples and judges the policy
    of every trial."""
    mode: Literal["max", "min"] | list[Literal["max", "min"]] = "max"
    """Direction of each metric; a single one applies to all."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """How parameters are proposed."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """What stops or changes trials before their end, by the first metric."""
    max_concurrent: Count | None = None
    """Maximum number of concurrent trials; default: as many as fit into the cluster."""
    num_workers: Count | None = None
    """Workers per trial; default: `cluster.num_workers`. The pairs per step stay the same."""
    repeats: Count = 1
    """Runs of each trial with different seeds; the metric is their mean."""
    grace_steps: Count | None = None
    """For `asha` the steps before a trial may be stopped, for `pbt` the steps between exploits; default: a
    quarter of a run."""
    reduction_factor: Annotated[float, Field(gt=1, allow_inf_nan=False), Number] = 3
    """For `asha`: one in this many trials is promoted at each rung."""
    confirm: CountOrZero = 2
    """Number of new seeds with which the best configuration and the one without the search run again; 0: no
    confirmation."""
    keep_checkpoints: Literal["best", "all"] = "best"
    """Which trials that have ended keep their checkpoints: `best` those of the Pareto front (with one metric
    the best one) and those that failed, which can resume; `all` every trial."""
    resume_errored: bool = False
    """When a study is resumed, also resume its failed trials, from their latest checkpoints."""

    @property
    def metrics(self) -> list[str]:
        """The metrics as a list."""
        return [self.metric] if isinstance(self.metric, str) else self.metric

    @property
    def modes(self) -> list[str]:
        """One direction per metric."""
        return [self.mode] * len(self.metrics) if isinstance(self.mode, str) else list(self.mode)

    @model_validator(mode="after")
    def _check_directions(self) -> Self:
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"tune.metric={self.metric}: name each metric once, and at least one metric")
        if len(self.modes) != len(self.metrics):
            raise ValueError(
                f"tune.mode={self.mode}: {len(self.modes)} direction(s) for {len(self.metrics)} metric(s); "
                "give one for each, or one for all"
            )
        return self


class ExportConfig(Section):
    """Where the exported policy is published."""

    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, `OWNER/NAME`, that gets the export of `jobs/train.py` and
    `jobs/pipeline.py` with a model card; null: none."""
    token_file: str | None = None
    """File with an access token of the hub that may write; default: HF_TOKEN, or the hub's own login."""
    private: StrictBool = True
    """Whether a repository that is created is private."""

    @field_validator("push_to_hub")
    @classmethod
    def _check_repository(cls, value: str | None) -> str | None:
        parts = (value or "a/b").split("/")
        if len(parts) != 2 or not all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in parts):
            raise ValueError("not the name of a repository; must be OWNER/NAME")
        return value


class PromotionConfig(Section):
    """When the best run of a comparison is promoted in the model registry."""

    model_name: str | None = None
    """Registered model that gets the alias `champion`; default: nothing is promoted."""
    metric: str = "win_rate"
    """Metric that decides the promotion."""
    at_least: float = 0.5
    """Minimum of the lower end of the metric's 95 % interval."""

    @field_validator("model_name")
    @classmethod
    def _check_model_name(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or set("/:") & set(value)):
            raise ValueError("not a name for MLflow's registry; must not be empty or contain / or :")
        return value


class CompareConfig(Section):
    """The report that compares runs."""

    promote: PromotionConfig = PromotionConfig()
    """When the best run is promoted in the model registry."""
    output: str | None = None
    """Folder of the report; default: `<run.output_dir>/<run.name>/report`."""


class Config(Section):
    """The whole configuration. Every section has defaults, so a file needs only the keys it changes."""

    run: RunConfig = RunConfig()
    """Identity and storage of the run."""
    model: ModelConfig = ModelConfig()
    """Policy, reference and tokenizer."""
    data: DataConfig = DataConfig()
    """Preference records."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss."""
    training: TrainingConfig = TrainingConfig()
    """Optimizer, batches, checkpoints and metrics."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers and their resources."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    generation: GenerationConfig = GenerationConfig()
    """Sampling with vLLM."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Prompts, judge and policies."""
    export: ExportConfig = ExportConfig()
    """Publication of the exported policy."""
    tune: TuneConfig = TuneConfig()
    """Hyperparameter search."""
    compare: CompareConfig = CompareConfig()
    """Report that compares runs."""
    sft: dict[str, Any] = Field(default_factory=dict)
    """Overrides, dotted or nested, that apply in `jobs/sft.py` and in the SFT stage of `jobs/pipeline.py`."""
    runs: list[str] = Field(default_factory=list)
    """Runs that `jobs/compare.py` compares."""

    @model_validator(mode="after")
    def _check_reference_scores(self) -> Self:
        if self.training.reference_scores == "cached" and self.objective.needs_distribution:
            raise ValueError(
                f"training.reference_scores=cached: objective.name={self.objective.name} with "
                f"objective.state_baseline.kind={self.objective.baseline_kind} needs the reference's whole "
                "distribution, which is not stored; use live, or a k3 baseline"
            )
        return self
