"""What is chosen differently on an accelerator: the shape of blocks and the attention of shared rows."""

from __future__ import annotations

import pytest
import torch

from tbpo_ray.objectives import token_log_probs
from tbpo_ray.objectives.token_stats import DEVICE_BLOCK
from tbpo_ray.training.pair_attention import is_worthwhile
from tbpo_ray.training.scorer import PairScorer
from tests.device import step_cases


@pytest.mark.parametrize("tokens", [7, 1517, 5000])
def test_blocks_are_aligned_on_an_accelerator(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    widths = []

    class SeenError(Exception):
        pass

    def record(options: object, *_: object) -> None:
        widths.append(options.cols)  # type: ignore[attr-defined]
        raise SeenError

    monkeypatch.setattr(
        "tbpo_ray.objectives.token_stats.TokenStatistics.apply", lambda *args: record(args[-1])
    )
    vocabulary = 200_003
    for device, aligned in (("cpu", False), ("meta", True)):
        hidden = torch.empty(tokens, 8, device=device)
        weight = torch.empty(vocabulary, 8, device=device)
        labels = torch.zeros(tokens, dtype=torch.long, device=device)
        mask = torch.ones(tokens, dtype=torch.bool, device=device)
        selected = torch.arange(tokens, device=device)
        with pytest.raises(SeenError):
            token_log_probs(hidden, weight, labels, mask, selected=selected)
        columns = widths.pop()
        assert columns * 4 * min(tokens, 4096) <= DEVICE_BLOCK[0]
        if aligned:
            assert columns == vocabulary or columns % 256 == 0


def _indices(length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose prompt takes half of the positions, and each answer a quarter."""
    rows = 8
    gathered = torch.empty(2 * rows, 3 * length // 4, dtype=torch.long, device=device)
    return gathered, torch.empty(rows, length, dtype=torch.long, device=device)


@pytest.mark.parametrize(
    ("device", "length", "gathers"),
    [("cpu", 256, False), ("cpu", 512, True), ("meta", 1024, False), ("meta", 2048, True)],
)
def test_shared_rows_are_gathered_where_that_is_faster(device: str, length: int, gathers: bool) -> None:
    assert is_worthwhile(*_indices(length, device)) is gathers


def test_scorers_avoid_attention_with_a_plan_for_every_shape() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    PairScorer(step_cases.llama())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
