"""The margin and the weight of each pair, from its record to the objective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tbpo_ray.config.loading import load_config
from tbpo_ray.data.reader import PairReader
from tbpo_ray.data.shards import PreparedPairs, write_shard
from tbpo_ray.errors import InputError
from tbpo_ray.training.batch import BatchLayout, collate_columns
from tbpo_ray.training.pair_columns import pair_columns
from tbpo_ray.training.run_plan import RunPlan, resolve_run
from tbpo_ray.training.scorer import to_scores

BOTH = ("objective.pair_margins=data", "objective.pair_weights=data")


def plan(out: Path, *overrides: str) -> RunPlan:
    return resolve_run(load_config(None, [f"run.output_dir={out}", "objective.name=dpo", *overrides]))


def prepared(folder: Path, *metadata: dict[str, Any]) -> PreparedPairs:
    """Pairs of two and three answer tokens, with these further columns in their records."""
    folder.mkdir()
    n = len(metadata)
    columns: dict[str, list[Any]] = {
        "prompt_ids": [[1, 5]] * n, "chosen_ids": [[6, 2]] * n, "rejected_ids": [[7, 8, 2]] * n,
        "source": ["x.jsonl"] * n, "row": list(range(7, 7 + n)), "metadata": list(map(json.dumps, metadata)),
    }  # fmt: skip
    write_shard(folder / "a.parquet", columns)
    return PreparedPairs(str(folder), f"given-{folder.name}", n, (("a.parquet", n),), n)


@pytest.mark.parametrize(
    ("overrides", "read"),
    [(BOTH, {"pair_margin", "pair_weight"}), (BOTH[:1], {"pair_margin"}), (BOTH[1:], {"pair_weight"})],
)
def test_numbers_reach_the_objective(tmp_path: Path, overrides: tuple[str, ...], read: set[str]) -> None:
    run = plan(tmp_path / "out", *overrides)
    # A table's cells may be text.
    pairs = prepared(tmp_path / "pairs", {"margin": 0.5, "weight": 2}, {"margin": "1.5", "weight": "0"})
    columns = PairReader(pairs, [str(pair_columns(run, pairs))]).fetch(np.arange(2))
    assert {name for name in columns if name.startswith("pair_")} == read
    batch = collate_columns(columns, BatchLayout(2, 0, True, False)).to("cpu")
    scores = to_scores(torch.zeros(batch.labels.shape), batch, ref_logps=torch.zeros(batch.labels.shape))
    expected = {"pair_margin": [0.5, 1.5], "pair_weight": [2.0, 0.0]}
    for name, values in expected.items():
        found = getattr(scores, f"{name}s")
        assert (None if found is None else found.tolist()) == (values if name in read else None)
    assert run.objective(scores).loss.isfinite()


def test_a_rank_without_pairs_gets_a_placeholder(tmp_path: Path) -> None:
    empty = [np.zeros(0, dtype=np.float32)]
    columns: dict[str, list[Any]] = {
        name: [np.zeros(0, dtype=np.int64)] for name in ("chosen_ids", "rejected_ids")
    }
    columns |= {"prompt_ids": [np.zeros(1, dtype=np.int64)], "pair_margin": empty, "pair_weight": empty}
    batch = collate_columns(columns, BatchLayout(2, 0, True, False))
    assert batch.pair_margins is not None and batch.pair_weights is not None
    assert batch.pair_margins.tolist() == batch.pair_weights.tolist() == [0.0]
    scores = to_scores(torch.zeros(batch.labels.shape), batch, ref_logps=torch.zeros(batch.labels.shape))
    assert plan(tmp_path, *BOTH).objective(scores).loss == 0


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"weight": 1}, "objective.pair_margins=data: x.jsonl row 7: margin: missing"),
        ({"margin": -0.1, "weight": 1}, "margin: -0.1"),
        ({"margin": 1, "weight": None}, "objective.pair_weights=data: x.jsonl row 7: weight: None"),
        ({"margin": 1, "weight": "much"}, "weight: 'much'"),
        ({"margin": True, "weight": 1}, "margin: True"),
        ({"margin": float("nan"), "weight": 1}, "margin: nan"),
    ],
)
def test_a_record_without_a_number_is_named(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        pair_columns(plan(tmp_path / "out", *BOTH), prepared(tmp_path / "pairs", record))
    assert words in str(error.value) and "must be a finite number" in str(error.value)


def test_the_nll_keeps_the_whole_answers(tmp_path: Path) -> None:
    for overrides, truncates in (
        (("objective.name=tbpo_q",), True),
        (("objective.name=tbpo_q", "objective.nll_weight=0.1"), False),
        (("objective.ld_alpha=0",), True),
        (("objective.ld_alpha=0.1",), False),
    ):
        assert plan(tmp_path, *overrides).truncate_to_shorter == truncates
