"""Models with random weights and pairs with realistic lengths, to measure with."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lengths import sample_lengths
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.data.preparation import PairsSpec, prepare
from tbpo_ray.data.schedule import pair_tokens
from tbpo_ray.data.shards import PreparedPairs


@dataclass(frozen=True)
class Size:
    """A model shape with tied embeddings: Llama's, or Gemma 3's with its own head size, a single key-value
    head, and sliding windows in five of six layers."""

    vocabulary: int = 32_000
    width: int = 384
    layers: int = 8
    heads: int = 6
    intermediate: int = 1024
    positions: int = 2048
    gemma_head: int | None = None
    """Head size; setting it selects Gemma's shape."""


MODEL = Size()
LARGE_VOCABULARY = Size(vocabulary=128_256, width=256, layers=4, heads=4, intermediate=704)
GEMMA_270M = Size(
    vocabulary=262_144, width=640, layers=18, heads=4, intermediate=2048, positions=32_768, gemma_head=256
)
TINY = Size(vocabulary=2048, width=64, layers=2, heads=2, intermediate=128)


@dataclass(frozen=True)
class Case:
    """A model folder and prepared pairs, with the configuration of a run that uses them."""

    config: Config
    model: str
    prepared: PreparedPairs
    parameters: int


def sample_steps(kind: str, steps: int, pairs_per_step: int = 8) -> np.ndarray:
    """[steps * pairs_per_step, 3] lengths of whole steps of a long run that batches by length.

    Sorting only a few pairs by length leaves dissimilar ones together, while a real run sorts hundreds. So a
    population is sorted and cut into steps, and one step is drawn from each of `steps` equal parts of it. Of
    200 such draws, the one whose mean lengths are nearest to the population's is used. In random order the
    same pairs are a representative sample too.
    """
    population = sample_lengths(kind, 256 * pairs_per_step)
    ranked = population[np.argsort(pair_tokens(population, truncate_to_shorter=True), kind="stable")]
    groups = ranked.reshape(-1, pairs_per_step, 3)
    rng = np.random.default_rng(0)
    edges = np.linspace(0, len(groups), steps + 1).astype(int)
    draws = [groups[rng.integers(edges[:-1], edges[1:])].reshape(-1, 3) for _ in range(200)]
    mean = population.mean(axis=0)
    return min(draws, key=lambda drawn: float((np.abs(drawn.mean(axis=0) - mean) / mean).sum()))


def typical_lengths(pairs: int) -> np.ndarray:
    """[pairs, 3] lengths: every pair has the mean lengths of `hh_rlhf`."""
    return np.tile([112, 39, 49], (pairs, 1))


def build_case(config: Config, folder: Path, lengths: np.ndarray, size: Size = MODEL, **changes: Any) -> Case:
    """Write a model with random weights and a file of pairs into `folder`, and prepare them.

    Args:
        config: its evaluation and tracking sections are kept; model, data and training are set here:
            TBPO-A with the k3 baseline, RMSprop, fp32, 8 pairs per step, one epoch.
        changes: further changes of the configuration, with `__` for the dots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = build_model(folder / "model", size)
    file = folder / "pairs.jsonl"
    write_pairs(file, lengths)
    settled = stage_config(
        config,
        {
            "model.name_or_path": str(folder / "model"),
            "data.train": str(file),
            "data.eval": None,
            "data.max_length": 2048,
            "data.max_prompt_length": 1024,
            "data.cache_dir": str(folder / "cache"),
            "run.output_dir": str(folder / "runs"),
            "objective.name": "tbpo_a",
            "objective.state_baseline.kind": "k3",
            "training.epochs": 1,
            "training.max_steps": None,
            "training.pairs_per_step": 8,
            "training.micro_batch_pairs": 8,
            "training.learning_rate": 1e-6,
            "training.optimizer": "rmsprop",
            "training.scheduler": "constant",
            "training.precision": "fp32",
            "training.length_batches": True,
            "training.eval_every": None,
        },
        **changes,
    )
    spec = PairsSpec(str(file), settled.data, str(folder / "model"))
    prepared = prepare(spec, folder / "cache", progress=False)
    if not np.array_equal(prepared.lengths(), lengths):
        raise AssertionError("the prepared pairs do not have the requested lengths")
    return Case(settled, str(folder / "model"), prepared, parameters)


def build_model(folder: Path, size: Size, seed: int = 0) -> int:
    """Save a model with random weights and the built-in tokenizer; returns its number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    from tbpo_ray.models.tiny import load_tiny_tokenizer

    tokenizer = load_tiny_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.positions,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if size.gemma_head is None:
        facts: Any = LlamaConfig(num_key_value_heads=size.heads, **shape)
    else:
        facts = Gemma3TextConfig(
            num_key_value_heads=1,
            head_dim=size.gemma_head,
            query_pre_attn_scalar=size.gemma_head,
            sliding_window=512,
            **shape,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(facts, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def write_pairs(file: Path, lengths: np.ndarray, seed: int = 0) -> None:
    """Write pairs as JSON lines whose prepared lengths are `lengths`.

    Every word is one token of the built-in tokenizer.
    """
    words = ("red", "blue", "cat", "dog", "tree", "hat", "pen", "desk", "gold", "bird", "boat", "sand")
    rng = random.Random(seed)

    def text(tokens: int) -> str:
        return " ".join(rng.choices(words, k=max(1, tokens)))

    with file.open("w", encoding="utf-8") as out:
        for prompt, chosen, rejected in lengths.tolist():
            # The template adds three tokens to a prompt and one to an answer.
            row = {"prompt": text(prompt - 3), "chosen": text(chosen - 1), "rejected": text(rejected - 1)}
            out.write(json.dumps(row) + "\n")
