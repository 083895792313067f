"""What a model cannot do is found from its configuration and its files."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaConfig

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.models.attention import choose_attention, cpu_attention
from tbpo_ray.models.chat import stop_token_ids
from tbpo_ray.models.load import load_model, load_tokenizer, resolve_model
from tbpo_ray.models.preflight import ModelFacts, check_model, check_token_ids
from tbpo_ray.training.estimate import plan_text
from tbpo_ray.training.memory_plan import kv_cache_bytes
from tests.training.architectures import ARCHITECTURES

DATA = "data.train=builtin:copyedit?split=train&pairs=32&tasks=copy"


def facts_of(tmp_path: Path, model_type: str, **config) -> ModelFacts:
    AutoConfig.for_model(model_type, **config).save_pretrained(tmp_path)
    return ModelFacts(str(tmp_path))


@pytest.fixture
def sharded(small_model, tmp_path) -> Path:
    """A model in several files with an index."""
    folder = tmp_path / "sharded"
    shutil.copytree(small_model, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(small_model).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_a_complete_set_of_files_is_accepted(sharded, tmp_path):
    assert resolve_model(str(sharded), tmp_path) == str(sharded)


def test_files_that_the_index_lists_must_be_there(sharded, tmp_path):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(InputError, match=rf"model\.name_or_path={sharded}.*safetensors.*{file.name}"):
        resolve_model(str(sharded), tmp_path)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        resolve_model(str(sharded), tmp_path)


def test_a_truncated_file_is_refused(sharded, small_model, tmp_path):
    file = sorted(sharded.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:20], b"", b"<html>" * 100, struct.pack("<Q", 10**15) + whole[8:]):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{file.name} is not a complete safetensors file"):
            resolve_model(str(sharded), tmp_path)


def test_files_of_two_checkpoints_are_refused(sharded, tmp_path):
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    shutil.copy(first, second)
    with pytest.raises(InputError, match=f"{second.name} does not contain"):
        resolve_model(str(sharded), tmp_path)


def test_missing_weights_are_not_filled_with_random_numbers(small_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack 1 weights.*q_proj"):
        load_model(str(folder), dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("gpt2, learned positions", 256),
        ("opt, learned positions", 256),
        ("biogpt, learned positions", 256),
        ("gpt_bigcode, one key head", 256),
        ("gptj, partial rotary positions", 256),
        ("ctrl, sinusoidal positions", 256),
        ("llama, dense, grouped queries", None),
        ("xglm, sinusoidal positions", None),
    ],
)
def test_rows_longer_than_a_table_of_positions_are_refused(tmp_path, name, limit):
    architecture = ARCHITECTURES[name]
    facts = facts_of(tmp_path, architecture.model_type, **architecture.config)
    assert facts.learned_positions == limit
    check_model(load_config(None, ["data.max_length=256"]), facts)
    config = load_config(None, ["data.max_length=257"])
    if limit is None:
        assert any("data.max_length=257" in note and "256" in note for note in check_model(config, facts))
    else:
        with pytest.raises(InputError, match=r"data\.max_length=257: .*at most 256"):
            check_model(config, facts)


def test_a_token_id_beyond_the_embedding_is_refused(small_model):
    facts = ModelFacts(small_model)
    check_token_ids(facts, 1023, "data.train")
    with pytest.raises(InputError, match=r"model\.name_or_path=.*data\.train.* 1024.*1024 rows"):
        check_token_ids(facts, 1024, "data.train")


def test_the_dry_run_compares_token_ids_with_the_embedding(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(InputError, match=r"data\.train.*300 rows"):
        plan_text(load_config(None, [f"model.name_or_path={folder}", DATA, f"data.cache_dir={tmp_path}"]))


@pytest.mark.parametrize("targets", ["q_proj", "[q_proj, v_proj]", "all-linear", r".*\.[01]\.mlp\..*_proj"])
def test_lora_modules_that_match_are_accepted(tmp_path, targets):
    facts = facts_of(tmp_path, "llama", **ARCHITECTURES["llama, tied"].config)
    config = load_config(None, [f"model.lora.target_modules={targets}", "data.max_length=64"])
    assert check_model(config, facts) == []


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ("all-linar", "all-linear"),
        ("[q_proj, v_prj]", "v_proj"),
        ("v_prj", "v_proj"),
        (r".*\.attention\.q", "q_proj"),
        ("'(q_proj'", "q_proj"),
    ],
)
def test_lora_modules_that_match_nothing_are_refused(tmp_path, targets, named):
    facts = facts_of(tmp_path, "llama", **ARCHITECTURES["llama, tied"].config)
    config = load_config(None, [f"model.lora.target_modules={targets}", "data.max_length=64"])
    with pytest.raises(InputError, match=rf"model\.lora\.target_modules=.*{named}"):
        check_model(config, facts)


def test_lora_of_modules_without_weights_is_refused(small_model):
    from tbpo_ray.models.load import add_lora

    config = load_config(None, ["model.lora.target_modules=[self_attn]"])
    assert config.model.lora is not None
    with pytest.raises(InputError, match=r"model\.lora\.target_modules=.*self_attn"):
        add_lora(load_model(small_model, dtype=torch.float32), config.model.lora)


def test_attention_keeps_every_feature_of_the_model():
    capped = Gemma2Config(attn_logit_softcapping=50.0)
    choice = choose_attention(capped, "sdpa")
    assert choice.implementation == "eager" and choice.reason is not None
    assert "model.attention=sdpa" in choice.reason
    assert choose_attention(Gemma2Config(attn_logit_softcapping=None), "sdpa").implementation == "sdpa"
    assert choose_attention(capped, "flash_attention_2").implementation == "flash_attention_2"
    assert choose_attention(capped, "eager").reason is None
    assert choose_attention(LlamaConfig(), "sdpa").reason is None
    gptj = AutoConfig.for_model("gptj")
    assert choose_attention(gptj, "sdpa").implementation == "eager"
    with pytest.raises(InputError, match=r"model\.attention=flash_attention_2: .*use sdpa or eager"):
        choose_attention(AutoConfig.for_model("mpt"), "flash_attention_2")
    assert cpu_attention("flash_attention_2") == "sdpa" and cpu_attention("eager") == "eager"


def test_a_model_is_loaded_with_the_attention_that_keeps_its_features(tmp_path):
    architecture = ARCHITECTURES["gemma2, soft-capped attention and logits"]
    config = AutoConfig.for_model("gemma2", **architecture.config)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), dtype=torch.float32).config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": 7}}',
    ],
)
def test_an_index_that_lists_no_files_is_refused(sharded, tmp_path, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match="is not an index of safetensors files"):
        resolve_model(str(sharded), tmp_path)


@pytest.mark.parametrize(
    ("content", "ends"),
    [
        ('{"eos_token_id": [5, null, "6", 5.0, true, [7], 8]}', [5, 8]),
        ('{"eos_token_id": true, "text_config": 3}', []),
        ("", None),
        ("[1]", None),
    ],
)
def test_end_tokens_of_generation_settings(small_model, tmp_path, content, ends):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(content)
    if ends is None:
        with pytest.raises(InputError, match=r"generation_config\.json"):
            stop_token_ids(str(folder))
    else:
        assert (
            set(ends)
            <= set(stop_token_ids(str(folder)))
            <= {*ends, load_tokenizer(small_model).eos_token_id, 2}
        )


def test_a_chat_template_that_is_not_text_is_refused(small_model, tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"model\.chat_template=.*not UTF-8"):
        load_tokenizer(small_model, chat_template=str(tmp_path / "t.jinja"))


def _rewrite_header(file: Path, change) -> None:
    """Replace the header of a safetensors file."""
    whole = file.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.dumps(change(json.loads(whole[8 : 8 + length]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])


def test_headers_that_contradict_their_bytes_are_refused(small_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    name = "lm_head.weight" if "lm_head.weight" in load_file(file) else next(iter(load_file(file)))

    def changed(**entry):
        return lambda header: header | {name: header[name] | entry}

    for change in (
        changed(dtype="BF16"),
        changed(shape=[3]),
        changed(shape="x"),
        changed(data_offsets=[5]),
        changed(data_offsets=[-4, 0]),
        lambda header: header | {name: 7},
        lambda header: [header],
    ):
        file.write_bytes(whole)
        _rewrite_header(file, change)
        with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
            resolve_model(str(folder), tmp_path)
    file.write_bytes(whole)
    _rewrite_header(file, changed(dtype="F7"))
    with pytest.raises(InputError, match=f"{name} has the unknown dtype 'F7'"):
        resolve_model(str(folder), tmp_path)


def test_a_configuration_that_its_architecture_cannot_read_is_refused(small_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    for change in (
        {"dtype": "float7"},
        {"hidden_size": "x"},
        {"rope_parameters": 3},
        {"num_attention_heads": 0},
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=str(folder)):
            check_model(load_config(None, ["model.lora={}"]), ModelFacts(str(folder)))


def test_a_garbled_tokenizer_is_refused(small_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    for text in ("", "[]", '{"model": {"type": "?"}}', "{"):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match=rf"model\.name_or_path={folder}: no tokenizer could be loaded"):
            load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("rope", "length", "refused", "noted"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 64, False, False),
        ({"rope_type": "dynamic", "factor": 2.0}, 65, True, False),
        (
            {
                "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 32, "factor": 2.0,
            },
            33, True, False,
        ),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, False, False),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 257, False, True),
        ({"rope_type": "default"}, 64, False, False),
        ({"rope_type": "default"}, 65, False, True),
    ],
)  # fmt: skip
def test_positions_of_scaled_rotary_embeddings(tmp_path, rope, length, refused, noted):
    facts = facts_of(
        tmp_path, "llama", rope_parameters={"rope_theta": 10000.0} | rope, max_position_embeddings=64,
        hidden_size=32, num_attention_heads=4, head_dim=8, num_hidden_layers=1, vocab_size=90,
    )  # fmt: skip
    config = load_config(None, [f"data.max_length={length}"])
    if refused:
        with pytest.raises(InputError, match=rf"data\.max_length={length}: .*{rope['rope_type']}"):
            check_model(config, facts)
    else:
        assert [f"data.max_length={length}" in note for note in check_model(config, facts)] == [True] * noted


def test_the_cache_of_a_model_without_attention_is_empty(tmp_path):
    config = load_config(None, ["cluster.use_gpu=false"])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90}
    for name in ("mamba", "llama"):
        (tmp_path / name).mkdir()
    mamba = facts_of(tmp_path / "mamba", "mamba", **sizes)
    llama = facts_of(tmp_path / "llama", "llama", num_attention_heads=4, num_key_value_heads=2, **sizes)
    assert kv_cache_bytes(config, mamba.config, 10) == 0
    assert kv_cache_bytes(config, llama.config, 10) == 2 * 2 * 2 * 8 * 4 * 10


@pytest.mark.parametrize("targets", ["mlp", "[q_proj, self_attn]", "[norm]", "'.*layernorm'", "layers"])
def test_lora_modules_without_a_low_rank_form_are_refused(small_model, targets):
    config = load_config(None, [f"model.lora.target_modules={targets}"])
    with pytest.raises(InputError, match=r"model\.lora\.target_modules=.* has no low-rank form"):
        check_model(config, ModelFacts(small_model))


def test_quantized_weights_are_not_trained(small_model, tmp_path):
    folder = tmp_path / "quantized"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"model\.name_or_path=.*quantized \(gptq\)"):
        check_model(load_config(None, [DATA]), ModelFacts(str(folder)))


def test_an_encoder_is_not_a_causal_model(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = load_config(None, [DATA, "data.max_length=64"])
    with pytest.raises(InputError, match="BertLMHeadModel is an encoder"):
        check_model(config, facts_of(tmp_path, "bert", **sizes))
    assert check_model(config, facts_of(tmp_path, "bert", **sizes, is_decoder=True)) == []


def test_weights_that_the_architecture_does_not_use_are_named(small_model, tmp_path, capsys):
    folder = tmp_path / "fewer"
    shutil.copytree(small_model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "model.layers.99.mlp.up_proj.weight": torch.zeros(2)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    load_model(str(folder), dtype=torch.float32)
    said = "".join(capsys.readouterr())
    assert "1 weights" in said and "model.layers.99.mlp.up_proj.weight" in said
