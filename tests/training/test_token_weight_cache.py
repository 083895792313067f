"""Token weights from two models, from one model under two instructions, and from the records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tbpo_ray.config.loading import load_config
from tbpo_ray.data.reader import PairReader
from tbpo_ray.data.shards import PreparedPairs
from tbpo_ray.errors import InputError
from tbpo_ray.storage.paths import cache_dir
from tbpo_ray.training.instructions import Instruction
from tbpo_ray.training.run_plan import resolve_run
from tbpo_ray.training.token_weight_cache import token_weights, weight_models
from tbpo_ray.workflows.prepare import prepare_role

DATA = "builtin:copyedit?split=train&pairs=12"


def settings(out: Path, model: str, name: str, *more: str):
    return load_config(None, [
        f"run.output_dir={out}", f"model.name_or_path={model}", f"data.train={DATA}", "data.eval=null",
        "data.max_length=64", f"objective.name={name}", "training.precision=fp32", "cluster.use_gpu=false",
        "training.pairs_per_step=4", "training.micro_batch_pairs=2", "training.max_steps=2", *more,
    ])  # fmt: skip


def log_probs(model, ids: list[int], answer: list[int]) -> np.ndarray:
    """The log-prob of each answer token, computed with plain transformers."""
    whole = torch.tensor([[*ids, *answer]])
    with torch.no_grad():
        logps = model(whole).logits.float().log_softmax(-1)[0, len(ids) - 1 : -1]
    return logps.gather(1, torch.tensor(answer)[:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def other_model(small_model, tmp_path_factory) -> str:
    """A slightly perturbed copy of `small_model`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "other"
    model = AutoModelForCausalLM.from_pretrained(small_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_model).save_pretrained(folder)
    return str(folder)


def test_two_equal_weight_models_are_refused(tmp_path, small_model):
    for name, hint in (("tis_dpo", "towards rejected"), ("sepo", "the oracle")):
        with pytest.raises(InputError, match=hint):
            weight_models(settings(tmp_path, small_model, name))
    assert weight_models(settings(tmp_path, small_model, "t_reg"))[0].instruction


@pytest.mark.e2e
def test_weights_are_those_of_the_two_models(ray_session, tmp_path, small_model, other_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = settings(tmp_path, small_model, "tis_dpo", f"objective.token_weights.negative={other_model}")
    prepared = prepare_role(config, "train", small_model, cache_dir(config))
    positive = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32).eval()
    negative = AutoModelForCausalLM.from_pretrained(other_model, dtype=torch.float32).eval()
    weights = PairReader(prepared, [str(token_weights(resolve_run(config), prepared))]).fetch(np.arange(12))
    differences = []
    for i in range(12):
        prompt = list(weights["prompt_ids"][i])
        for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
            answer = list(weights[f"{side}_ids"][i])
            ratio = log_probs(positive, prompt, answer) - log_probs(negative, prompt, answer)
            differences += [ratio] if side == "chosen" else []
            want = np.exp((sign * ratio).clip(-0.5, 1.5))
            np.testing.assert_allclose(weights[f"{side}_weights"][i], want, atol=1e-4)
    ranked = settings(
        tmp_path, small_model, "tis_dpo", f"objective.token_weights.negative={other_model}",
        "objective.token_weights.transform=rank",
    )  # fmt: skip
    ranks = PairReader(prepared, [str(token_weights(resolve_run(ranked), prepared))]).fetch(np.arange(12))
    for i in range(12):
        rank = differences[i].argsort(kind="stable").argsort()
        want = 0.7 + 0.6 * rank / (len(rank) - 1)
        np.testing.assert_allclose(ranks["chosen_weights"][i], want, atol=1e-6)

    keys = [f"objective.token_weights.{side}_instruction" for side in ("positive", "negative")]
    template = "Request: {prompt} Answer: {answer} Now do worse."
    config = settings(tmp_path, small_model, "t_reg", f"{keys[0]}=Be kind.", f"{keys[1]}={template}")
    got = PairReader(prepared, [str(token_weights(resolve_run(config), prepared))]).fetch(np.arange(3))
    tokenizer = AutoTokenizer.from_pretrained(small_model)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for i in range(3):
        first, *prompt = list(got["prompt_ids"][i])
        *turn, assistant = prompt
        assert first == tokenizer.bos_token_id and assistant == tokenizer.convert_tokens_to_ids(
            "<|assistant|>"
        )
        for side in ("chosen", "rejected"):
            answer = list(got[f"{side}_ids"][i])
            shown = [*ids(" Answer: "), *answer[:-1], *ids(" Now do worse.")]
            better = log_probs(positive, [first, *ids("Be kind.\n\n"), *prompt], answer)
            worse = log_probs(positive, [first, *ids("Request: "), *turn, *shown, assistant], answer)
            want = 1 / (1 + np.exp(worse - better)) - 0.5
            np.testing.assert_allclose(got[f"{side}_weights"][i], want, atol=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "key"),
    [("sepo", "objective.token_weights.positive"), ("tgdpo", "objective.guide.model"), ("arc_bpo", None)],
)
def test_a_run_with_token_weights_or_chunks_trains(
    ray_session, tmp_path, small_model, other_model, name, key
):
    from tbpo_ray.workflows.train import train

    given = [f"{key}={other_model}"] if key else ["objective.pair_weights=wpo", "objective.nll_weight=0.1"]
    config = settings(tmp_path, small_model, name, *given, f"run.name={name}")
    assert train(config).metrics["step"] == 2


def prepared_with_weights(folder: Path, chosen: object, rejected: object) -> PreparedPairs:
    """A prepared folder of one pair with two and three answer tokens, and weights in its record."""
    from tbpo_ray.data.shards import write_shard

    folder.mkdir()
    write_shard(
        folder / "a.parquet",
        {
            "prompt_ids": [[1, 5]], "chosen_ids": [[6, 2]], "rejected_ids": [[7, 8, 2]],
            "source": ["x.jsonl"], "row": [7],
            "metadata": [json.dumps({"chosen_weights": chosen, "rejected_weights": rejected})],
        },
    )  # fmt: skip
    return PreparedPairs(str(folder), f"given-{folder.name}", 1, (("a.parquet", 1),), 1)


def test_weights_given_in_the_records_are_read(tmp_path, small_model):
    config = settings(tmp_path, small_model, "tis_dpo", "objective.token_weights.source=columns")
    prepared = prepared_with_weights(tmp_path / "good", [1.5, 0.5], [1, 2, 3])
    columns = PairReader(prepared, [str(token_weights(resolve_run(config), prepared))]).fetch(np.arange(1))
    assert columns["chosen_weights"][0].tolist() == [1.5, 0.5]
    assert columns["rejected_weights"][0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1.0], "1 numbers for 2 tokens"), (None, "None for 2"), ([1, "a"], "not fin"), ([1, None], "not fin")],
)  # fmt: skip
def test_weights_that_do_not_fit_name_the_record(tmp_path, small_model, weights, words):
    config = settings(tmp_path, small_model, "sepo", "objective.token_weights.source=columns")
    with pytest.raises(InputError, match=f"x.jsonl row 7: chosen_weights: .*{words}"):
        token_weights(resolve_run(config), prepared_with_weights(tmp_path / "bad", weights, [1, 2, 3]))


@pytest.mark.parametrize(
    "text", ["{prompt} and {prompt}", "{answer}", "{answer} to {prompt}", "{prompt} {answer} {answer}"]
)
def test_an_instruction_with_misplaced_placeholders_is_refused(tmp_path, small_model, text):
    key = "objective.token_weights.negative_instruction"
    with pytest.raises(InputError, match=re.escape(f"{key}={text!r}")):
        weight_models(settings(tmp_path, small_model, "t_reg", f"{key}={text}"))


def test_an_instruction_goes_into_the_last_turn():
    plain = Instruction(before=(7, 8), bos=1)
    assert plain.identity == {"prefix": [7, 8]}  # as earlier versions named it
    assert plain.revise(np.array([1, 5, 6]), np.array([9])).tolist() == [1, 7, 8, 5, 6]
    assert plain.revise(np.array([5, 6]), np.array([9])).tolist() == [7, 8, 5, 6]
    whole = Instruction((7,), (8,), True, (9,), tail=(3, 4), bos=1, end=2)
    assert whole.revise(np.array([1, 5, 3, 4]), np.array([6, 2])).tolist() == [1, 7, 5, 8, 6, 9, 3, 4]
    assert whole.revise(np.array([1, 5]), np.array([6])).tolist() == [1, 7, 5, 8, 6, 9]
    assert whole.identity != Instruction((7,), (8,), True, (), tail=(3, 4), bos=1, end=2).identity
