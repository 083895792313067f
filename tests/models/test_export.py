"""An exported policy computes what was trained, and ends where its chat template ends."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tbpo_ray.config.schema import LoraConfig
from tbpo_ray.models.export import export_policy
from tbpo_ray.models.load import add_lora, load_model, load_tokenizer

IDS = torch.arange(3, 20)[None]


def tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("targets", "tied"),
    [(["lm_head"], False), (["embed_tokens"], False), (["lm_head", "embed_tokens"], False), ("q_proj", True)],
)
def test_a_merged_adapter_computes_the_trained_logits(tiny_model, tmp_path, targets, tied):
    policy = add_lora(tied_llama(), LoraConfig(r=4, dropout=0, target_modules=targets)).eval()
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        trained = policy(IDS).logits
    export_policy(
        policy, load_tokenizer(tiny_model), tmp_path / "export", dtype=torch.float32, card={}, stop_ids=[2]
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, trained, atol=1e-4, rtol=1e-5)
        assert (trained - tied_llama()(IDS).logits).abs().max() > 0.1
    assert loaded.config.tie_word_embeddings is tied
    assert (tmp_path / "export" / "adapter" / "adapter_config.json").is_file()


def export_with(model_folder, tmp_path, stop_ids, **settings):
    model = load_model(model_folder, dtype=torch.float32)
    model.generation_config = GenerationConfig(**{"eos_token_id": 2, **settings})
    export_policy(
        model, load_tokenizer(model_folder), tmp_path, dtype=torch.float32, card={}, stop_ids=stop_ids
    )
    return json.loads((tmp_path / "generation_config.json").read_text())


def test_every_stop_token_is_in_the_exported_generation_config(small_model, tmp_path):
    assert export_with(small_model, tmp_path / "one", [2])["eos_token_id"] == 2
    assert export_with(small_model, tmp_path / "two", [2, 5])["eos_token_id"] == [2, 5]
    assert export_with(small_model, tmp_path / "none", [])["eos_token_id"] == 2


def test_inconsistent_generation_settings_are_exported(small_model, tmp_path):
    """A temperature without sampling; transformers refuses to save it."""
    found = export_with(small_model, tmp_path / "export", [2], temperature=0.6, do_sample=False)
    assert found["temperature"] == 0.6 and found["do_sample"] is True


def test_an_output_layer_of_its_own_is_not_exported_as_tied(tiny_model, tmp_path):
    for untie in (True, False):
        model = tied_llama()
        if untie:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
        folder = tmp_path / str(untie)
        export_policy(model, load_tokenizer(tiny_model), folder, dtype=torch.float32, card={})
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is not untie
