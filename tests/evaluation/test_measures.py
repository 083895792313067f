"""Judges, metrics and the verdict's table, on constructed samples."""

from __future__ import annotations

import math

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.evaluation.checker import Checker, load_function
from tbpo_ray.evaluation.judge import prefer
from tbpo_ray.evaluation.judges import make_judge
from tbpo_ray.evaluation.measures import (
    Estimate,
    compare,
    describe,
    mean_estimate,
    paired,
    share_estimate,
    slices,
)
from tbpo_ray.evaluation.prompts import read_prompts, resolve_policy, tokenize_prompts
from tbpo_ray.evaluation.verdict import PolicyVerdict, Verdict


def test_a_checker_scores_and_prefers(make_sample):
    judge = Checker(load_function("tbpo_ray.data.copyedit:check"), "check")
    right, wrong = make_sample(0, "a b"), make_sample(0, "a c", metadata={"answer": "a b"})
    assert judge.scores([right, wrong]) == [1.0, 0.0]
    assert judge.preferences([right, wrong, right], [wrong, right, right]) == [1.0, 0.0, 0.5]
    assert prefer(0.2, 0.1) == 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, a: 7, "returned 7.0"),
        (lambda m, a: m["none"], "raised KeyError"),
        (lambda m, a: math.nan, "nan"),
    ],
)
def test_an_error_of_a_checker_names_the_checker(make_sample, function, message):
    with pytest.raises(InputError, match=message):
        Checker(function, "mine:check").scores([make_sample(3, "x")])


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("{kind: oracle}", "oracle"),
        ("{kind: checker}", r"evaluation\.judge\.function"),
        ("{kind: checker, function: 'json:nothing'}", "nothing"),
        ("{kind: checker, function: json}", "module:function"),
        ("{kind: checker, function: 'json:dumps', speed: 3}", "speed: unknown key"),
    ],
)
def test_an_invalid_judge_is_rejected(judge, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config = load_config(None, [f"evaluation.judge={judge}"])
        make_judge(config, source="prompts.jsonl", output=tmp_path)


def test_metrics_of_a_worked_example(make_sample):
    groups = {
        "000000": [make_sample(0, "ab"), make_sample(0, "ab", 1, finish_reason="length")],
        "000001": [make_sample(1, "abcd")],
    }
    got = describe(groups)
    assert got["distinct_1"].value == 4 / 8
    assert got["length_chars"].value == 3.0
    assert got["truncated"].value == pytest.approx(1 / 3)
    assert got["predictive_entropy"].value == pytest.approx(8 * 0.5 / 3)
    assert got["self_bleu"].value == pytest.approx(1.0)
    assert "self_bleu" not in describe({"000001": groups["000001"]})
    assert mean_estimate([1.0]) == Estimate(1.0)
    few = mean_estimate([1.0, 2.0, 3.0])  # t with 2 degrees of freedom: 4.3027; s / sqrt(3) = 0.57735
    assert (few.low, few.high) == (pytest.approx(2 - 2.48414, abs=1e-4), pytest.approx(2 + 2.48414, abs=1e-4))
    assert share_estimate({"a": [1, 0], "b": [1]}).value == 0.75


def test_preferences_are_averaged_per_prompt_and_verdicts_may_be_missing(make_sample):
    candidate = {"000000": [make_sample(0, "aa", k) for k in range(3)], "000001": [make_sample(1, "b")]}
    baseline = {"000000": [make_sample(0, "a", k) for k in range(3)], "000002": [make_sample(2, "c")]}
    pairs = paired(candidate, baseline)
    assert [(a.sample, b.sample) for a, b in pairs] == [(0, 0), (1, 1), (2, 2)]
    got = compare(pairs, [1.0, 0.0, None])
    assert got["win_rate"].value == 0.5
    with pytest.raises(RunFailedError, match="no verdict on any of 3"):
        compare(pairs, [None] * 3)


def test_slices_by_metadata_and_by_length(make_sample):
    groups = {
        f"{i:06d}": [make_sample(i, "a" * (i + 1), metadata={"language": "de" if i % 2 else "en"})]
        for i in range(8)
    }
    got = slices(groups, ["language", "answer_length", "nothing"])
    assert {value: len(keys) for value, keys in got["language"].items()} == {"de": 4, "en": 4}
    assert [len(keys) for keys in got["answer_length"].values()] == [2, 2, 2, 2]
    assert list(got["nothing"]) == ["(none)"]


def test_the_table_and_the_file_hold_the_verdict(tmp_path):
    rate = Estimate(0.785, 0.742, 0.822)
    verdict = Verdict(
        policies=[
            PolicyVerdict(
                "sft", "a", 400, 0, {"exact_match": Estimate(0.64, 0.59, 0.69), "distinct_1": Estimate(0.1)}
            ),
            PolicyVerdict(
                "tbpo", "b", 400, 1, {"exact_match": rate, "win_rate": rate}, {"task": {"copy": {"x": rate}}}
            ),
        ],
        baseline="sft",
        reference="a",
        judge={"kind": "checker"},
        prompts={"source": "x", "digest": "d", "rows": 400, "skipped": 0},
    )
    verdict.save(tmp_path)
    assert Verdict.load(tmp_path / "verdict.json") == verdict
    table = verdict.table().splitlines()
    assert "78.5 % [74.2, 82.2]" in table[3] and "baseline" in table[2] and table[3].startswith("tbpo")
    assert "against sft" in table[-1]
    (tmp_path / "verdict.json").write_text("{}")
    with pytest.raises(InputError, match=r"verdict\.json: .*KeyError"):
        Verdict.load(tmp_path / "verdict.json")
    with pytest.raises(InputError, match=r"none\.json"):
        Verdict.load(tmp_path / "none.json")


def test_prompts_are_read_and_an_empty_file_is_rejected(tmp_path):
    config = load_config(None, ["evaluation.prompts=builtin:copyedit?split=test", "evaluation.max_prompts=7"])
    got = read_prompts(config)
    assert len(got.prompts) == 7 and got.prompts[0].metadata["answer"]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"question": 1}\n')
    for name, message in (("empty", r"empty\.jsonl"), ("odd", r"odd\.jsonl.*1 rows")):
        with pytest.raises(InputError, match=message):
            read_prompts(load_config(None, [f"evaluation.prompts={tmp_path}/{name}.jsonl"]))
    with pytest.raises(InputError, match=r"evaluation\.prompts.*builtin:copyedit"):
        read_prompts(load_config(None, []))


def test_prompts_are_tokenized_as_training_does(tmp_path):
    from transformers import AutoTokenizer

    from tbpo_ray.config.schema import DataConfig
    from tbpo_ray.data.tokenize import prompt_tokens
    from tbpo_ray.models.tiny import build_tiny

    folder = str(build_tiny(tmp_path / "tiny"))
    config = load_config(None, ["evaluation.prompts=builtin:copyedit?split=test", "evaluation.max_prompts=3"])
    prompts = read_prompts(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for got, prompt in zip(tokenize_prompts(prompts, folder, config), prompts.prompts, strict=True):
        assert got.token_ids == prompt_tokens(tokenizer, prompt.prompt, DataConfig())


def test_policies_are_folders_or_runs(tmp_path):
    config = load_config(None, [f"run.output_dir={tmp_path}"])
    export = tmp_path / "first" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    assert resolve_policy("a", "first", config).model == str(export)
    assert resolve_policy("a", str(export), config).folder == str(export)
    with pytest.raises(InputError, match=r"evaluation\.policies\.a=second"):
        resolve_policy("a", "second", config)
