"""Several pairs in one row score as each of them alone, and models that cannot do so are refused."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BloomConfig, Lfm2Config

from tbpo_ray.config.loading import load_config, stage_config
from tbpo_ray.data.schedule import row_tokens
from tbpo_ray.errors import InputError
from tbpo_ray.training.batch import BatchLayout, collate, collate_columns
from tbpo_ray.training.run_plan import (
    OtherRowsError,
    check_rows,
    check_shared_prompt,
    evaluation_schedule,
    make_schedule,
    resolve_run,
    settle_packing,
    settle_rows,
)
from tbpo_ray.training.scorer import PairScorer
from tests.device.step_cases import VOCAB, llama
from tests.training.layout_checks import (
    MODELS,
    attention,
    check_gradients_agree,
    check_plain_scores,
    pairs,
)
from tests.training.test_self_check import GEMMA2, GPT_NEO, LLAMA, components, prepared, save

__all__ = ["attention", "prepared", "save"]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.usefixtures("attention")
def test_packed_scores_equal_the_plain_formula(make, sides):
    batch = check_plain_scores(make().eval(), shared=False, packed=True, sides=sides)
    assert batch.shared and batch.input_ids.shape[0] == 1


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_gradients_of_packed_and_padded_rows_agree(make, checkpointed):
    layouts = [{"shared": True, "packed": packed, "truncate_to_shorter": True} for packed in (True, False)]
    check_gradients_agree(make, layouts, checkpointed=checkpointed)


def test_a_packed_row_holds_no_padding_but_at_its_end():
    prompts, answers = pairs(7)
    sizes = np.array([[len(p), len(c), len(r)] for p, c, r in zip(prompts, *answers, strict=True)])
    batch = collate(prompts, answers, pad_id=9, shared=True, packed=True, truncate_to_shorter=True)
    real = int(row_tokens(sizes, truncate_to_shorter=True).sum())
    assert int((batch.segment >= 0).sum()) == batch.real_tokens == real
    assert batch.input_ids.shape == (1, -(-real // 8) * 8)
    assert batch.pair is not None
    assert (batch.pair[0, :real] >= 0).all() and (batch.pair[0, real:] == -1).all()
    assert (batch.input_ids[0, real:] == 9).all()
    # The positions of each pair begin at 0.
    starts = torch.nonzero(batch.position_ids[0, :real] == 0).flatten()
    assert batch.pair[0, starts].tolist() == list(range(7))


def test_a_rank_without_pairs_has_one_masked_pair():
    columns = {"prompt_ids": [np.zeros(1, dtype=np.int64)]}
    columns |= {name: [np.zeros(0, dtype=np.int64)] for name in ("chosen_ids", "rejected_ids")}
    batch = collate_columns(columns, BatchLayout(2, 0, True, False, packed=True))
    logp = PairScorer(llama())(batch)[0]
    assert not batch.mask.any() and not logp.any() and logp.requires_grad


def test_a_long_packed_row_has_no_dense_mask():
    scorer = PairScorer(llama())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, 8) for _ in range(4)]
    answers = [[rng.integers(3, VOCAB, n) for n in (500, 400, 300, 20)] for _ in range(2)]
    batch = collate(prompts, answers, pad_id=0, shared=True, packed=True, truncate_to_shorter=False)
    assert scorer._mask(batch, None).shape == (1, 8, 1, 8 * 512 + batch.input_ids.numel())


def plan(*overrides: str) -> Any:
    return resolve_run(load_config(None, ["objective.name=dpo", *overrides]))


def test_packing_follows_from_a_budget_of_tokens():
    assert not plan().packed
    budget = "training.micro_batch_tokens=4096"
    assert plan(budget).packed and plan(budget, "objective.name=sft").packed
    for other in ("training.packing=false", "training.shared_prompt=false", "model.attention=eager"):
        assert not plan(budget, other).packed
    assert plan(budget, "training.packing=false").rows == "shared"
    assert plan(budget, "training.shared_prompt=false").rows == "separate"
    assert (
        plan(budget, "training.packing=false", "training.shared_prompt=false", "objective.name=sft").sides
        == 1
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.packing=true"], r"training\.packing=true: needs training\.micro_batch_tokens"),
        (
            ["training.packing=true", "training.micro_batch_tokens=9", "training.shared_prompt=false"],
            r"training\.packing=true: .*training\.packing=false",
        ),
        (
            ["training.packing=true", "training.micro_batch_tokens=9", "model.attention=flash_attention_2"],
            r"training\.packing=true: .*model\.attention=flash_attention_2; use sdpa",
        ),
        (["training.micro_batch_tokens=many"], r"training\.micro_batch_tokens='?many.*auto"),
        (["training.micro_batch_tokens=0"], r"training\.micro_batch_tokens=0"),
    ],
)
def test_what_cannot_be_packed_is_refused(overrides, words):
    with pytest.raises(InputError, match=words):
        plan(*overrides)


def test_a_model_that_would_mix_the_pairs_of_a_row_gets_a_row_for_each(tmp_path):
    sizes: Any = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Lfm2Config(**sizes, layer_types=["conv", "full_attention"]).save_pretrained(tmp_path / "conv")
    BloomConfig(**sizes).save_pretrained(tmp_path / "alibi")
    llama().config.save_pretrained(tmp_path / "llama")
    key, budget = "model.name_or_path", ("training.micro_batch_tokens=4096", "objective.name=sft")
    for name, word in (("conv", "conv"), ("alibi", "eager")):
        settled, (note,) = settle_packing(plan(*budget), {key: str(tmp_path / name)})
        assert not settled.packed and settled.config.training.packing is False
        assert settled.rows == "shared" and word in note and "training.packing=false" in note
        with pytest.raises(InputError, match=rf"training\.packing=true: {key}: .*{word}.*packing=false"):
            check_shared_prompt(plan(*budget, "training.packing=true"), str(tmp_path / name), key)
    kept = plan(*budget)
    assert settle_packing(kept, {key: str(tmp_path / "llama")}) == (kept, [])


def test_the_self_check_covers_packed_rows(save, prepared):
    budget = "training.micro_batch_tokens=4096"
    found = components(save(LLAMA), prepared, budget)
    assert found.layout.packed and found.sentences == ()
    # GPT-Neo's rows of several answers are wrong, Gemma 2 has eager attention, and LFM2 carries a state.
    for name, shared in ((GPT_NEO, False), (GEMMA2, True), ("lfm2, convolution", False)):
        model = save(name)
        fallen = components(model, prepared, budget)
        assert (fallen.layout.packed, fallen.layout.shared_prompt) == (False, shared)
        assert "rows with several pairs" in fallen.sentences[0]
        assert "each pair gets its own row (training.packing=false)" in fallen.sentences[0]
        assert len(fallen.sentences) == (1 if shared else 2)
        with pytest.raises(InputError, match=r"training\.packing=true: .*training\.packing=false"):
            components(model, prepared, budget, "training.packing=true")


def test_micro_batches_are_made_again_for_the_rows_that_the_self_check_chose():
    budget = "training.micro_batch_tokens=4096"
    for packed, shared, changes in (
        (True, True, {}),
        (False, True, {"training.packing": False}),
        (False, False, {"training.packing": False, "training.shared_prompt": False}),
    ):
        found = {}
        try:
            check_rows(plan(budget), packed=packed, shared_prompt=shared, sentence="why")
        except OtherRowsError as error:
            found = pickle.loads(pickle.dumps(error)).changes
            assert str(error) == "why"
        assert found == changes
        settled = resolve_run(stage_config(plan(budget).config, changes))
        check_rows(settled, packed=packed, shared_prompt=shared, sentence="")
    # Without a budget of tokens the micro-batches stay as they are; SFT has one answer in a row.
    check_rows(plan(), packed=False, shared_prompt=False, sentence="")
    check_rows(
        plan(budget, "training.packing=false", "objective.name=sft"),
        packed=False, shared_prompt=False, sentence="",
    )  # fmt: skip


def test_a_model_with_a_state_has_separate_rows_in_the_plan_of_a_budget(tmp_path):
    sizes: Any = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Lfm2Config(**sizes, layer_types=["conv", "full_attention"]).save_pretrained(tmp_path / "conv")
    llama().config.save_pretrained(tmp_path / "llama")
    folders = {"model.reference": str(tmp_path / "llama"), "model.name_or_path": str(tmp_path / "conv")}
    settled, (note,) = settle_rows(plan("training.micro_batch_tokens=4096"), folders)
    assert settled.rows == "separate" and "training.packing=false" in note
    without = plan()
    assert settle_rows(without, folders) == (without, [])


def test_the_pairs_of_an_evaluation_keep_the_budget_too():
    lengths = np.random.default_rng(0).integers(1, 300, (500, 3))
    packed = plan("training.micro_batch_tokens=1200")
    for made in (make_schedule(packed, lengths), evaluation_schedule(packed, lengths, 2)):
        sizes = row_tokens(lengths, truncate_to_shorter=packed.truncate_to_shorter)
        batches = [ids for step in range(2) for rank in range(2) for ids in made.micro_batches(step, rank, 2)]
        assert all(sizes[ids].sum() <= 1200 for ids in batches)
        assert np.mean([sizes[ids].sum() for ids in batches]) > 700
    plain = evaluation_schedule(plan("training.micro_batch_pairs=4"), lengths, 2)
    assert plain.pairs_per_step == 8 and all(len(ids) <= 4 for ids in plain.micro_batches(0, 0, 2))
