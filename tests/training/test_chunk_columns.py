"""The chunks of answers, from their text to the objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from tbpo_ray.config.loading import load_config
from tbpo_ray.data.reader import PairReader
from tbpo_ray.data.shards import PreparedPairs, write_shard
from tbpo_ray.training.batch import BatchLayout, collate_columns
from tbpo_ray.training.chunk_columns import chunk_columns
from tbpo_ray.training.run_plan import resolve_run
from tbpo_ray.training.scorer import to_scores


def test_chunks_reach_the_objective_for_the_trained_tokens_alone(tmp_path: Path, small_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    chosen = [*tokenizer.encode("one\ntwo", add_special_tokens=False), tokenizer.eos_token_id]
    rejected = [*tokenizer.encode("\n", add_special_tokens=False), *chosen]
    # The newline of the rejected answer is context only.
    mask = [False] * (len(rejected) - len(chosen)) + [True] * len(chosen)
    columns: dict[str, list[Any]] = {
        "prompt_ids": [[1, 5]], "chosen_ids": [chosen], "rejected_ids": [rejected], "chosen_mask": [None],
        "rejected_mask": [mask], "source": ["x.jsonl"], "row": [0], "metadata": ["{}"],
    }  # fmt: skip
    (tmp_path / "pairs").mkdir()
    write_shard(tmp_path / "pairs" / "a.parquet", columns)
    prepared = PreparedPairs(
        str(tmp_path / "pairs"), "given", 1, (("a.parquet", 1),), 1, {"masked_answers": 1}
    )

    def chunks(*overrides: str) -> tuple[Path, list[list[int]]]:
        run = resolve_run(
            load_config(None, [f"run.output_dir={tmp_path}", "objective.name=arc_bpo", *overrides])
        )
        folder = chunk_columns(run, prepared, small_model)
        found = PairReader(prepared, [str(folder)]).fetch(np.arange(1))
        batch = collate_columns(found, BatchLayout(2, 0, True, run.truncate_to_shorter))
        zeros = torch.zeros(batch.labels.shape)
        scores = to_scores(zeros, batch, ref_logps=zeros)
        assert run.objective(scores).loss.isfinite() and scores.chosen_chunks is not None
        sides: Any = (
            (scores.chosen_chunks, scores.chosen_mask),
            (scores.rejected_chunks, scores.rejected_mask),
        )
        return folder, [values[keep].tolist() for values, keep in sides]

    folder, (first, second) = chunks("objective.chunks.min_tokens=1")
    newline = tokenizer.encode("one\n", add_special_tokens=False)
    assert first == second == [0] * len(newline) + [1] * (len(chosen) - len(newline))
    other, answers = chunks("objective.chunks.kind=answer")
    assert other != folder and answers == [[0] * len(chosen)] * 2
    assert chunks("objective.chunks.min_tokens=1")[0] == folder
