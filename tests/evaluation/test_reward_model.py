"""The reward model as judge, with a small classifier built here."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.reward_model import RewardModelJudge, classify


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tbpo_ray.models.tiny import load_tiny_tokenizer

    folder = tmp_path_factory.mktemp("reward")
    tokenizer = load_tiny_tokenizer()
    tokenizer.model_max_length = 64
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_scores_do_not_depend_on_the_batch_and_decide_preferences(classifier, make_sample, tmp_path):
    samples = [make_sample(i, "tree " * (i + 1)) for i in range(6)]
    judge = RewardModelJudge.from_settings({"model": classifier, "batch_size": 4}, cache=tmp_path)
    scores = judge.scores(samples)
    alone, _ = classify(classifier, [(samples[3].prompt_text, samples[3].answer)], 1, "cpu")
    assert scores[3] == pytest.approx(alone[0], abs=1e-5)
    expected = [0.5 if a == b else float(a > b) for a, b in zip(scores[:3], scores[3:], strict=True)]
    assert judge.preferences(samples[:3], samples[3:]) == expected


def test_truncated_texts_are_counted(classifier, make_sample, tmp_path):
    judge = RewardModelJudge.from_settings({"model": classifier}, cache=tmp_path)
    judge.scores([make_sample(0, "tree " * 200), make_sample(1, "tree")])
    assert judge.report()["truncated"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"judge\.model"),
        ({"model": "/none/here/x"}, "/none/here/x"),
        ({"model": "x", "depth": 1}, "depth: unknown key"),
        ({"model": "x", "batch_size": 0}, r"batch_size=0.*at least 1"),
    ],
)
def test_invalid_settings_are_rejected(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        RewardModelJudge.from_settings(settings, cache=tmp_path)


def test_a_language_model_is_not_a_reward_model(tmp_path):
    from tbpo_ray.models.tiny import build_tiny

    with pytest.raises(InputError, match=r"evaluation\.judge\.model=.*one output"):
        RewardModelJudge.from_settings({"model": str(build_tiny(tmp_path / "tiny"))}, cache=tmp_path)


def test_a_template_that_prints_the_date_gives_the_same_score_on_every_day(classifier, tmp_path, monkeypatch):
    import datetime

    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import chat_template_utils

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(classifier).save_pretrained(tmp_path)
    today, _ = classify(str(tmp_path), [("copy: tree", "tree")], 1, "cpu")
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert classify(str(tmp_path), [("copy: tree", "tree")], 1, "cpu")[0] == today


def test_a_hub_name_is_loaded_at_its_revision(classifier, tmp_path, monkeypatch):
    """Without the hub: a cache with one repository at two revisions."""
    import shutil

    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    repository = tmp_path / "hub" / "models--acme--reward"
    for commit, ref in (("a" * 40, "main"), ("b" * 40, "v2")):
        shutil.copytree(classifier, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)

    def judge(**settings):
        return RewardModelJudge.from_settings(settings, cache=tmp_path)

    assert judge(model="acme/reward").model.endswith("a" * 40)
    for settings in ({"model": "acme/reward", "revision": "v2"}, {"model": "acme/reward@v2"}):
        found = judge(**settings)
        assert found.model.endswith("b" * 40) and found.report()["model"] == "acme/reward@v2"
    with pytest.raises(InputError, match=r"evaluation\.judge\.model=acme/reward.*revision v3"):
        judge(model="acme/reward", revision="v3")
    with pytest.raises(InputError, match="another revision than v2"):
        judge(model="acme/reward@main", revision="v2")


def test_scores_that_are_not_finite_are_refused(classifier, make_sample, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(classifier, folder)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    judge = RewardModelJudge.from_settings({"model": str(folder)}, cache=tmp_path)
    with pytest.raises(InputError, match=rf"evaluation\.judge\.model={folder}: 2 of 2 scores are not finite"):
        judge.scores([make_sample(i, "tree") for i in range(2)])
