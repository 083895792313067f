"""The check at the start of training and scoring finds layouts and attentions that change log-probs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tbpo_ray.config.loading import load_config, to_tree
from tbpo_ray.data.shards import LENGTHS, MANIFEST, TOKEN_COLUMNS, PreparedPairs
from tbpo_ray.errors import InputError
from tbpo_ray.models import load as loading
from tbpo_ray.models.attention import AttentionChoice
from tbpo_ray.training.components import build_components, load_checked
from tbpo_ray.training.reference_scores import ReferenceScorer
from tbpo_ray.training.run_paths import RunPaths
from tbpo_ray.training.run_plan import resolve_run
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.self_check import select_pairs
from tests.training.architectures import ARCHITECTURES

CPU = torch.device("cpu")
LLAMA, GPT_NEO = "llama, tied", "gpt_neo, learned positions, local attention"
GEMMA2 = "gemma2, soft-capped attention and logits"


def write_pairs(folder: Path, sizes: list[tuple[int, int, int]], vocab: int = 90) -> PreparedPairs:
    """Prepared pairs of random tokens with these lengths of prompt, chosen and rejected."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    columns = {
        name: [rng.integers(3, vocab, size[k]).tolist() for size in sizes]
        for k, name in enumerate(TOKEN_COLUMNS)
    }
    kind = pa.list_(pa.int32())
    pq.write_table(pa.table({n: pa.array(v, kind) for n, v in columns.items()}), folder / "pairs.parquet")
    np.save(folder / LENGTHS, np.array(sizes, dtype=np.int32))
    size = (folder / "pairs.parquet").stat().st_size
    manifest = {
        "fingerprint": "f", "pairs": len(sizes), "records": len(sizes), "counts": {}, "inputs": {},
        "column": {},
        "shards": [{"file": "pairs.parquet", "pairs": len(sizes), "bytes": size, "sha256": ""}],
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return PreparedPairs.load(folder)


@pytest.fixture
def prepared(tmp_path) -> PreparedPairs:
    return write_pairs(tmp_path / "pairs", [(20, 12, 9), (9, 2, 30), (11, 20, 15), (60, 40, 50), (17, 8, 8)])


@pytest.fixture
def save(tmp_path, tiny_model):
    """Write the model of an architecture, with a tokenizer whose pad token it does not know."""

    def write(name: str, **changes) -> str:
        folder = tmp_path / name.replace(" ", "-")
        torch.manual_seed(0)
        architecture = ARCHITECTURES[name]
        config = AutoConfig.for_model(architecture.model_type, **architecture.config | changes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.add_special_tokens({"pad_token": "[NEW PAD]"})
        tokenizer.save_pretrained(folder)
        return str(folder)

    return write


def components(model: str, prepared: PreparedPairs, *overrides: str):
    config = load_config(
        None, [f"model.name_or_path={model}", "objective.name=dpo", "training.precision=fp32", *overrides]
    )
    paths = RunPaths(run_dir="", checkpoints="", model=model, prepared=prepared.path)
    return build_components(resolve_run(config), paths, CPU)


def test_shared_rows_that_are_exact_are_kept_silently(save, prepared):
    found = components(save(LLAMA), prepared, "training.reference_scores=live")
    assert found.layout.shared_prompt and found.sentences == ()


def test_shared_rows_that_change_log_probs_are_replaced_and_said(save, prepared):
    model = save(GPT_NEO)
    found = components(model, prepared)
    assert not found.layout.shared_prompt
    (sentence,) = found.sentences
    assert f"model.name_or_path={model}" in sentence and "training.shared_prompt=false" in sentence
    assert components(model, prepared).sentences == (sentence,)


def test_shared_rows_that_fail_are_replaced_and_said(save, prepared):
    found = components(save("bloom, ALiBi"), prepared)
    assert not found.layout.shared_prompt and "ValueError" in found.sentences[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("mamba, recurrent", "linear_attention"),
        ("rwkv, recurrent", "recurrent"),
        ("lfm2, convolution", "conv"),
    ],
)
def test_layers_that_carry_state_get_separate_rows_in_every_precision(
    save, prepared, name, layers, precision
):
    model = save(name)
    found = components(model, prepared, f"training.precision={precision}")
    assert not found.layout.shared_prompt
    assert layers in found.sentences[-1] and "each answer gets its own row" in found.sentences[-1]
    with pytest.raises(InputError, match=r"training\.shared_prompt=true"):
        components(model, prepared, "training.shared_prompt=true", f"training.precision={precision}")


def test_a_reference_that_needs_separate_rows_decides_for_both(save, prepared):
    model, reference = save(LLAMA), save(GPT_NEO)
    config = load_config(
        None,
        [
            f"model.name_or_path={model}",
            f"model.reference={reference}",
            "training.precision=fp32",
            "objective.name=dpo",
            "training.reference_scores=live",
        ],
    )
    paths = RunPaths(run_dir="", checkpoints="", model=model, prepared=prepared.path, reference=reference)
    found = build_components(resolve_run(config), paths, CPU)
    assert not found.layout.shared_prompt and f"model.reference={reference}" in found.sentences[0]


def test_requested_shared_rows_that_change_log_probs_are_refused(save, prepared):
    with pytest.raises(InputError, match=r"training\.shared_prompt=true: .*must be false or unset"):
        components(save(GPT_NEO), prepared, "training.shared_prompt=true")


def test_only_rows_beyond_a_window_show_that_it_is_wrong(save, tmp_path):
    """The longest pair is among those that are compared, in training and held-out data alike."""
    model = save(GPT_NEO, window_size=64)
    short = write_pairs(tmp_path / "short", [(9, 6, 6)] * 9)
    assert components(model, short).layout.shared_prompt
    longer = write_pairs(tmp_path / "long", [(9, 6, 6)] * 9 + [(40, 50, 50)])
    assert not components(model, longer).layout.shared_prompt
    lengths = [len(ids) for ids in select_pairs([short, longer]).longest["chosen_ids"]]
    assert lengths == [50]


@pytest.mark.parametrize("name", [LLAMA, GPT_NEO])
def test_bf16_noise_is_not_mistaken_for_a_fault(save, prepared, name):
    found = components(save(name), prepared, "training.precision=bf16")
    assert found.layout.shared_prompt is (name == LLAMA)


def test_attention_that_drops_a_feature_is_replaced_and_said(save, prepared, monkeypatch):
    monkeypatch.setattr(loading, "choose_attention", lambda config, requested: AttentionChoice(requested))
    found = components(save(GEMMA2), prepared)
    assert found.scorer.model.config._attn_implementation == "eager"
    assert "model.attention=sdpa" in found.sentences[0] and "eager" in found.sentences[0]
    assert found.layout.shared_prompt


def test_a_model_whose_log_probs_are_wrong_in_every_way_is_refused(save, prepared, monkeypatch):
    scores = PairScorer.reference_logps
    monkeypatch.setattr(PairScorer, "reference_logps", lambda self, batch: scores(self, batch) + 0.5)
    with pytest.raises(InputError, match=r"model\.name_or_path=.* by 0\.\d+ per token.*LlamaForCausalLM"):
        components(save(LLAMA), prepared)


def test_the_check_draws_no_random_numbers(save, prepared):
    model = save(GPT_NEO)
    plan = resolve_run(load_config(None, [f"model.name_or_path={model}", "training.precision=fp32"]))
    states = []
    for check in (False, True):
        torch.manual_seed(5)
        if check:
            load_checked(plan, model, CPU, select_pairs([prepared]))
        else:
            loading.load_model(model, dtype=torch.float32)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_padding_uses_a_token_that_the_model_knows(save, prepared):
    assert components(save(LLAMA), prepared).layout.pad_id == 2  # EOS; the new pad token has the id 1024


def score(model: str, prepared: PreparedPairs, out: Path, *overrides: str) -> dict[str, list]:
    settings = [f"model.name_or_path={model}", "training.precision=fp32", "objective.name=dpo", *overrides]
    scorer = ReferenceScorer(to_tree(load_config(None, settings)), model, None, prepared.path, 1)
    shard = str(Path(prepared.path) / "pairs.parquet")
    jobs = {"shard": [shard], "start": [0], "stop": [5], "out": [str(out)]}
    return scorer({name: np.array(values) for name, values in jobs.items()})


def test_reference_scores_are_computed_in_the_layout_that_is_exact(save, prepared, tmp_path):
    model, out = save(GPT_NEO), tmp_path / "scores.parquet"
    found = score(model, prepared, out)
    assert found["pairs"] == [5] and "each answer gets its own row" in found["note"][0]
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    pairs = list(prepared.rows(TOKEN_COLUMNS))
    for row, scores in zip(pairs, pq.read_table(out).to_pylist(), strict=True):
        prompt, answer = row["prompt_ids"], row["rejected_ids"]
        with torch.no_grad():
            logps = plain(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = [float(logps[len(prompt) + k - 1, token]) for k, token in enumerate(answer)]
        assert scores["rejected_ref_logps"] == pytest.approx(expected, abs=1e-4)


def test_scoring_refuses_what_training_would_refuse(save, prepared, tmp_path):
    found = score(save(GPT_NEO), prepared, tmp_path / "out", "training.shared_prompt=true")
    assert found["pairs"] == [0] and "training.shared_prompt=true" in found["refusal"][0]


def test_a_model_that_looks_ahead_is_refused(save, prepared):
    name = next(n for n in ARCHITECTURES if n.startswith("gemma3"))
    components(save(name), prepared)
    with pytest.raises(InputError, match=r"model.name_or_path=.*not a causal language model"):
        components(save(name, use_bidirectional_attention=True), prepared)


def spoil(model: str, tensor: str, value: float, at: Any = (0, 0)) -> Path:
    """Put a value into a tensor of a saved model; returns its file."""
    for file in Path(model).glob("*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor][at] = value
            save_file(tensors, file, {"format": "pt"})
            return file
    raise AssertionError(f"{tensor} is not in {model}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named_with_its_file(save, prepared, tensor, value):
    model = save(LLAMA)
    file = spoil(model, tensor, value, at=(-1, -1))  # of the embedding, a token that no pair has
    with pytest.raises(InputError, match=rf"the tensor {tensor} \({file}\) has 1 values of \d+ that are not"):
        components(model, prepared)
    # The reference of a run is checked as its policy is.
    other = ("training.reference_scores=live", f"model.reference={model}")
    config = load_config(None, [f"model.name_or_path={model}", "objective.name=dpo", *other])
    with pytest.raises(InputError, match=rf"^model\.reference={model}: the tensor {tensor}"):
        load_checked(resolve_run(config), model, CPU, select_pairs([prepared]), key="model.reference")


def test_the_shard_that_holds_a_weight_that_is_not_finite_is_named(save, prepared):
    model = save(LLAMA)
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="20KB")
    (Path(model) / "model.safetensors").unlink(missing_ok=True)
    file = spoil(model, "model.layers.0.self_attn.q_proj.weight", float("nan"))
    assert "-of-" in file.name
    with pytest.raises(InputError, match=f"q_proj.weight .{file}. has 1 values"):
        components(model, prepared)


def test_log_probs_that_overflow_are_refused_though_all_weights_are_finite(save, prepared):
    model = save(LLAMA)
    spoil(model, "model.norm.weight", 3e38, at=...)
    with pytest.raises(InputError, match=r"log-probs of the run's first pairs are not finite; all of its w"):
        components(model, prepared)
