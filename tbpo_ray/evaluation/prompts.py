"""Held-out prompts, and where policies lie."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbpo_ray.config.loading import digest
from tbpo_ray.config.schema import Config
from tbpo_ray.data.records import BadRecord, Prompt, iter_prompts
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.errors import InputError
from tbpo_ray.generation.samples import PromptTokens
from tbpo_ray.models.load import BUILTIN
from tbpo_ray.models.resolve import local_model
from tbpo_ray.storage.paths import cache_dir, output_dir

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class PromptSet:
    """Prompts as they were read, in order."""

    source: str
    prompts: list[Prompt]
    left_out: list[BadRecord] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        return [f"{number:06d}" for number in range(len(self.prompts))]

    @property
    def digest(self) -> str:
        return digest([(prompt.prompt, prompt.metadata) for prompt in self.prompts])


@dataclass(frozen=True)
class Policy:
    """A policy to evaluate: a model folder, and an adapter folder where it is one."""

    name: str
    model: str
    adapter: str | None = None

    @property
    def folder(self) -> str:
        return self.adapter or self.model


def read_prompts(config: Config) -> PromptSet:
    """The first `evaluation.max_prompts` prompts of `evaluation.prompts`, else of `data.eval`.

    Raises:
        InputError: no source is configured, or there is no prompt in it.
    """
    source = config.evaluation.prompts or config.data.eval
    if not source:
        raise InputError(
            "evaluation.prompts: no held-out prompts; give JSONL, Parquet or builtin:copyedit?split=test"
        )
    names = [source] if isinstance(source, str) else [item.source for item in source]
    prompts: list[Prompt] = []
    bad: list[BadRecord] = []
    for name in names:
        room = config.evaluation.max_prompts
        rest = None if room is None else room - len(prompts)
        prompts += list(iter_prompts(name, rest, bad.append)) if rest != 0 else []
    if not prompts:
        first = f"; {len(bad)} rows have none, the first: {bad[0].reason} {bad[0].detail}" if bad else ""
        raise InputError(f"evaluation.prompts={', '.join(names)}: no prompt in it{first}")
    return PromptSet(", ".join(names), prompts, bad)


def tokenize_prompts(prompts: PromptSet, model: str, config: Config) -> list[PromptTokens]:
    """The prompts as this model's training would see them.

    Raises:
        InputError: the model's chat template refuses every prompt.
    """
    from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec

    spec = TokenizerSpec.load(model, config.model.chat_template)
    encoded = PairTokenizer(spec, config.data.max_length, config.data.prompt_limit).prompts(
        [prompt.prompt for prompt in prompts.prompts]
    )
    refused = [item for item in encoded if isinstance(item, RecordError)]
    if len(refused) == len(encoded):
        raise InputError(f"evaluation.prompts={prompts.source}: {model} takes none of them: {refused[0]}")
    return [
        PromptTokens(key, ids, show(prompt), prompt.metadata)
        for key, ids, prompt in zip(prompts.ids, encoded, prompts.prompts, strict=True)
        if not isinstance(ids, RecordError)
    ]


def show(prompt: Prompt) -> str:
    """A conversation for people: one turn plain, several with their roles."""
    turns: Sequence[dict[str, Any]] = prompt.prompt
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def resolve_policy(name: str, where: str, config: Config) -> Policy:
    """A policy from a model folder, an adapter folder, the name of a run that has exported one, a built-in
    or a hub name.

    Raises:
        InputError: it is none of these.
    """
    runs = output_dir(config)
    for folder in (Path(where).expanduser(), runs / where / "export", runs / where):
        if (folder / "config.json").is_file():
            return Policy(name, str(folder.absolute()))
        if (folder / "adapter_config.json").is_file():
            adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            base = adapter.get("base_model_name_or_path")
            if not base or not (Path(base) / "config.json").is_file():
                raise InputError(f"evaluation.policies.{name}={where}: its base model {base!r} is not there")
            return Policy(name, base, str(folder.absolute()))
    if where.startswith(BUILTIN) or _HUB_NAME.fullmatch(where):
        key = f"evaluation.policies.{name}"
        return Policy(name, local_model(where, cache_dir(config), seed=config.run.seed, key=key))
    raise InputError(
        f"evaluation.policies.{name}={where}: no model folder, no adapter folder, and no run in {runs} "
        "with an export; train it first, or give the folder"
    )
