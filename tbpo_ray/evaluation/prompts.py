"""Held-out prompts, and the model folders of policies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbpo_ray.config.loading import digest
from tbpo_ray.config.schema import Config
from tbpo_ray.data.records import BadRecord, Prompt, iter_prompts
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.readable import conversation_text
from tbpo_ray.evaluation.rouge import check_references
from tbpo_ray.evaluation.suites import iter_suite_prompts, load_suite, prompt_limit, suite_source
from tbpo_ray.generation.samples import PromptTokens
from tbpo_ray.models.load import BUILTIN
from tbpo_ray.models.resolve import local_model
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.json_lines import read_object
from tbpo_ray.storage.paths import cache_dir, output_dir
from tbpo_ray.tracking.model_uris import is_model_uri, model_folder

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source."""

    source: str
    prompts: list[Prompt]
    skipped: list[BadRecord] = field(default_factory=list)
    """Rows without a prompt."""
    suite: str | None = None
    """`evaluation.suite`."""
    counts: Counter[str] = field(default_factory=Counter)
    """How many prompts a policy did not get as they are, by reason; see :func:`tokenize_prompts`."""

    @property
    def ids(self) -> list[str]:
        return [f"{number:06d}" for number in range(len(self.prompts))]

    @property
    def digest(self) -> str:
        return digest([_identity(prompt) for prompt in self.prompts])

    def summary(self) -> dict[str, Any]:
        """The entry `prompts` of the verdict."""
        return {
            "source": self.source,
            "digest": self.digest,
            "rows": len(self.prompts),
            "skipped": len(self.skipped),
            **self.counts,
            **({"suite": self.suite} if self.suite else {}),
        }


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate: a model folder, and the folder of its LoRA adapter if it has one."""

    name: str
    model: str
    adapter: str | None = None

    @property
    def folder(self) -> str:
        return self.adapter or self.model


def _identity(prompt: Prompt) -> tuple[Any, ...]:
    """What a prompt's tokens and checks depend on."""
    more = (prompt.tools, prompt.template_kwargs) if prompt.tools or prompt.template_kwargs else ()
    return (prompt.prompt, prompt.metadata, *more)


def prompt_sources(config: Config) -> list[str]:
    """`evaluation.prompts`, else the source of the suite, or without one the sources of `data.eval`.

    Raises:
        InputError: none is configured, or the suite is unknown.
    """
    suite = load_suite(config)
    if suite is not None:
        return [suite_source(config, suite)]
    source = config.evaluation.prompts or config.data.eval
    if not source:
        raise InputError(
            "evaluation.prompts: missing, and data.eval too; give JSONL, Parquet or "
            "builtin:copyedit?split=test"
        )
    return [source] if isinstance(source, str) else [item.source for item in source]


def read_prompts(config: Config) -> PromptSet:
    """Read the first `evaluation.max_prompts` prompts of `evaluation.prompts`, else of `data.eval`.

    A suite may render them in its own way, and takes each prompt once.

    Raises:
        InputError: no source is configured, it contains no prompt, or none has the reference answer that
            `evaluation.reference_column` names.
    """
    suite, column = load_suite(config), config.evaluation.reference_column
    names, limit = prompt_sources(config), prompt_limit(config)
    prompts: list[Prompt] = []
    bad: list[BadRecord] = []
    for name in names:
        room = None if limit is None else limit - len(prompts)
        if room != 0 and suite is not None:
            prompts += iter_suite_prompts(suite, name, room, bad.append)
        elif room != 0:
            prompts += iter_prompts(name, room, bad.append)
    if not prompts:
        first = (
            f"; {len(bad)} rows were skipped, the first one: {bad[0].reason} {bad[0].detail}" if bad else ""
        )
        raise InputError(f"evaluation.prompts={', '.join(names)}: contains no prompt{first}")
    if column is not None:
        check_references([prompt.metadata for prompt in prompts], column)
    return PromptSet(", ".join(names), prompts, bad, config.evaluation.suite)


def tokenize_prompts(prompts: PromptSet, model: str, config: Config) -> list[PromptTokens]:
    """Tokenize prompts as in training, and count those that the template rejects or whose tools it ignores.

    Raises:
        InputError: the model's chat template rejects every prompt.
    """
    spec = TokenizerSpec.load(model, config.model.chat_template, config.data.template_kwargs)
    tokenizer = PairTokenizer(spec, config.data.max_length, config.data.prompt_limit)
    encoded = _encode(tokenizer, prompts.prompts)
    rejected = [item for item in encoded if isinstance(item, RecordError)]
    if len(rejected) == len(encoded):
        raise InputError(
            f"evaluation.prompts={prompts.source}: {model} rejects all; the first error: {rejected[0]}"
        )
    _count(prompts, model, "rejected_by_template", len(rejected), "; ".join(map(str, rejected[:1])))
    altered = tokenizer.counts["prompt_altered_by_template"]
    _count(prompts, model, "prompt_altered_by_template", altered, "its chat template omits a turn")
    ignored = _without_tools(tokenizer, prompts.prompts, encoded)
    _count(prompts, model, "tools_ignored_by_template", ignored, "its chat template writes no tools")
    # The token that the template in use puts behind an answer; the model's own are added by the pool.
    stop_ids = (tokenizer.end,) if config.model.chat_template is not None else ()
    return [
        PromptTokens(key, ids, conversation_text(prompt.prompt, prompt.tools), prompt.metadata, stop_ids)
        for key, ids, prompt in zip(prompts.ids, encoded, prompts.prompts, strict=True)
        if not isinstance(ids, RecordError)
    ]


def _encode(
    tokenizer: PairTokenizer, prompts: Sequence[Prompt], *, with_tools: bool = True
) -> list[list[int] | RecordError]:
    return tokenizer.prompts(
        [prompt.prompt for prompt in prompts],
        tools=[prompt.tools if with_tools else None for prompt in prompts],
        template_kwargs=[prompt.template_kwargs for prompt in prompts],
    )


def _without_tools(
    tokenizer: PairTokenizer, prompts: Sequence[Prompt], encoded: Sequence[list[int] | RecordError]
) -> int:
    """The number of prompts whose tokens are the same without their tools."""
    asked = [
        (prompt, ids)
        for prompt, ids in zip(prompts, encoded, strict=True)
        if prompt.tools and not isinstance(ids, RecordError)
    ]
    plain = _encode(tokenizer, [prompt for prompt, _ in asked], with_tools=False)
    return sum(ids == other for (_, ids), other in zip(asked, plain, strict=True))


def _count(prompts: PromptSet, model: str, name: str, count: int, why: str) -> None:
    """Report prompts that a policy does not get as they are; the verdict has the largest number."""
    if count:
        log_progress(f"{count} of {len(prompts.prompts)} prompts, {model}: {name} ({why})")
        prompts.counts[name] = max(prompts.counts[name], count)


def resolve_policy(name: str, where: str, config: Config) -> Policy:
    """Find a policy.

    Args:
        name: its name in `evaluation.policies`.
        where: a model folder, an adapter folder, the name of a run with an export, a built-in model, a hub
            name, with or without `@REVISION`, or an address of MLflow (`models:/NAME@ALIAS`, `runs:/ID`).

    Raises:
        InputError: `where` is none of these.
    """
    if is_model_uri(where):
        return Policy(name, model_folder(config, where, f"evaluation.policies.{name}"))
    runs = output_dir(config)
    for folder in (Path(where).expanduser(), runs / where / "export", runs / where):
        if (folder / "config.json").is_file():
            return Policy(name, str(folder.absolute()))
        if (folder / "adapter_config.json").is_file():
            adapter = read_object(folder / "adapter_config.json", "save the adapter again")
            base = adapter.get("base_model_name_or_path")
            if not base or not (Path(base) / "config.json").is_file():
                raise InputError(
                    f"evaluation.policies.{name}={where}: the adapter's base model {base!r} does not exist"
                )
            return Policy(name, base, str(folder.absolute()))
    if where.startswith(BUILTIN) or _HUB_NAME.fullmatch(where):
        key = f"evaluation.policies.{name}"
        return Policy(name, local_model(where, cache_dir(config), seed=config.run.seed, key=key))
    raise InputError(
        f"evaluation.policies.{name}={where}: must be a model folder, an adapter folder, a run in {runs} "
        "that has an export, models:/NAME@ALIAS or runs:/ID"
    )
