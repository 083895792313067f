"""The benchmark of checkpoints runs, and an asynchronous one holds up training for less time."""

from __future__ import annotations

from benchmarks import checkpoint
from tbpo_ray.config.loading import load_config


def test_both_modes_are_compared_with_a_plain_write(tmp_path) -> None:
    rows = checkpoint.run(load_config(None, [f"run.output_dir={tmp_path / 'runs'}"]), quick=True)
    assert [row["mode"] for row in rows] == list(checkpoint.MODES)
    for row in rows:
        assert 0 < row["stall"]["low"] <= row["stall_ratio"] <= row["stall"]["high"]
        assert row["stall_ratio"] <= row["total_ratio"]
        # Two matrices and their optimizer state.
        assert row["bytes"] > checkpoint.QUICK_LAYERS * 2 * 4 * checkpoint.WIDTH**2
    waiting, background = rows
    assert background["seconds"] < waiting["seconds"]
    text = checkpoint.markdown(rows)
    assert "at most 1.2" in text and "at most 0.1" in text and "17 MB" in text
    assert not list((tmp_path / "runs").iterdir())
