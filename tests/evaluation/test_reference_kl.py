"""Reference log-probs and the KL estimate from them."""

from __future__ import annotations

import pytest

from tbpo_ray.evaluation.reference_kl import answer_logprobs, kl_k1
from tbpo_ray.evaluation.scoring import length_batches


def test_reference_scores_agree_with_one_sequence_at_a_time(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from tbpo_ray.models.tiny import build_tiny

    folder = build_tiny(tmp_path / "tiny")
    pairs = [([1, 3, 300 + i], list(range(310, 310 + i))) for i in range(9)]
    got = answer_logprobs(str(folder), pairs, "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for (prompt, answer), values in zip(pairs, got, strict=True):
        assert len(values) == len(answer)
        if answer:
            with torch.no_grad():
                logps = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            want = logps.gather(1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(values), want, atol=1e-5, rtol=0)


def test_reference_scores_never_compute_full_logits(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    from tbpo_ray.models.tiny import build_tiny

    def forward(self, *_, **__):
        raise AssertionError("the model's own forward computes logits at every position")

    folder = build_tiny(tmp_path / "tiny")
    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    assert [len(row) for row in answer_logprobs(str(folder), [([1, 3], [5, 6, 2])], "cpu")] == [3]


def test_length_batches_stay_within_their_size():
    batches = length_batches([2 * n for n in range(1, 30)], 64)
    assert sorted(i for batch in batches for i in batch) == list(range(29))
    assert all(len(b) == 1 or len(b) * max(2 * (i + 1) for i in b) <= 64 for b in batches)


def test_kl_k1_of_a_worked_example(make_sample):
    assert kl_k1([make_sample(0, "ab")], [[-1.0, -2.0]]) == [pytest.approx(2.0)]
