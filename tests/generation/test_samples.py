"""Parts, manifest and the checks before an engine starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.errors import InputError
from tbpo_ray.generation import pool
from tbpo_ray.generation.pool import generate, sampling_fingerprint
from tbpo_ray.generation.rows import input_rows, to_request, to_result
from tbpo_ray.generation.samples import (
    PromptTokens,
    done_indices,
    open_folder,
    read_parts,
    write_manifest,
    write_part,
)
from tbpo_ray.generation.vllm_engine import (
    check_length,
    check_model,
    engine_arguments,
    engine_length,
    engine_resources,
    environment,
    needed_length,
)
from tbpo_ray.models.chat import stop_token_ids


def row(index: int, answer: str = "a") -> dict:
    return {
        "index": index,
        "prompt_id": f"p{index}",
        "sample": 0,
        "prompt_text": "?",
        "prompt_token_ids": [1],
        "answer": answer,
        "token_ids": [5, 2],
        "logprobs": [-1.0, -0.5],
        "finish_reason": "stop",
        "metadata": "{}",
        "error": "",
    }


def test_parts_come_back_in_order_and_each_index_once(tmp_path):
    write_part(tmp_path, [row(3), row(2)])
    write_part(tmp_path, [row(0), row(1), row(2)])
    assert read_parts(tmp_path)["index"].to_pylist() == [0, 1, 2, 3]
    assert done_indices(tmp_path) == {0, 1, 2, 3}
    assert read_parts(tmp_path / "none").num_rows == 0
    assert not list(tmp_path.glob(".*"))


def test_a_folder_with_other_samples_is_rejected(tmp_path):
    write_manifest(tmp_path, open_folder(tmp_path, "one"))
    assert open_folder(tmp_path, "one") == {"fingerprint": "one", "complete": False}
    with pytest.raises(InputError, match="another model"):
        open_folder(tmp_path, "two")


def test_the_fingerprint_changes_with_what_changes_samples(tiny_model, prompts):
    plain = GenerationConfig()

    def of(generation=plain, asked=prompts, seed=0):
        return sampling_fingerprint(tiny_model, asked, generation, seed=seed)

    assert of() == of(GenerationConfig(batch_size=3, engines=[1, 4]))
    others = [of(GenerationConfig(temperature=0.5)), of(asked=prompts[1:]), of(seed=1)]
    assert len({of(), *others}) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [PromptTokens("a", [1], "a"), PromptTokens("a", [1], "a")]}, "unique"),
        ({"model": "/nowhere/model"}, "/nowhere/model"),
        ({"model": "EMPTY"}, r"config\.json"),
        ({"adapter": "EMPTY"}, r"adapter_config\.json"),
    ],
)
def test_invalid_input_is_rejected_before_an_engine_starts(words, message, tiny_model, prompts, tmp_path):
    (tmp_path / "empty").mkdir()
    given = {
        "model": tiny_model,
        "prompts": prompts,
        "generation": GenerationConfig(),
        "output": tmp_path / "out",
    }
    given |= {key: str(tmp_path / "empty") if value == "EMPTY" else value for key, value in words.items()}
    with pytest.raises(InputError, match=message):
        generate(**given)


def adapter_for(width: int, folder) -> str:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.zeros(8, width), f"{name}.lora_B.weight": torch.zeros(width, 8)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    return str(folder)


def test_an_adapter_of_another_model_is_rejected(tiny_model, tmp_path):
    check_model(tiny_model, adapter_for(192, tmp_path / "fits"))
    with pytest.raises(InputError, match=r"\[8, 96\].*192"):
        check_model(tiny_model, adapter_for(96, tmp_path / "other"))


def test_an_engine_uses_the_cpus_that_are_free():
    generation = GenerationConfig(tensor_parallel=2)
    assert engine_resources(generation, use_gpu=True, free_cpus=0.1, engines=1) == {"CPU": 1.0, "GPU": 2.0}
    assert engine_resources(generation, use_gpu=False, free_cpus=2.0, engines=1) == {"CPU": 1.0}
    assert engine_resources(generation, use_gpu=False, free_cpus=0.7, engines=1) == {"CPU": 0.5}
    assert engine_resources(generation, use_gpu=False, free_cpus=0.0, engines=1) == {"CPU": 1.0}


def test_engine_arguments(tiny_model, tmp_path):
    cpu = engine_arguments(GenerationConfig(engine={"max_num_seqs": 4}), use_gpu=False, adapter=None)
    assert cpu["enforce_eager"] and cpu["dtype"] == "float32" and cpu["max_num_seqs"] == 4
    assert cpu["trust_remote_code"] is False
    gpu = engine_arguments(
        GenerationConfig(max_tokens=9, tensor_parallel=2, max_model_len=99), use_gpu=True, adapter=None
    )
    assert "dtype" not in gpu and gpu["distributed_executor_backend"] == "mp" and gpu["max_model_len"] == 99
    lora = engine_arguments(GenerationConfig(), use_gpu=True, adapter=adapter_for(192, tmp_path / "a"))
    assert lora["enable_lora"] and lora["max_lora_rank"] == 8
    assert "VLLM_CPU_KVCACHE_SPACE" in environment(use_gpu=False, engines=1)


def model_with(folder: Path, config: dict, tokenizer: dict | None = None) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(folder)


def test_an_engine_reserves_cache_for_what_prompts_and_answers_need(tmp_path):
    generation = GenerationConfig(max_tokens=256)
    long = model_with(tmp_path / "long", {"max_position_embeddings": 131072}, {"model_max_length": 10**30})
    assert needed_length(long, 500, generation) == 768
    assert needed_length(long, 512, generation) == 768
    assert needed_length(long, 513, generation) == 832
    nested = model_with(
        tmp_path / "nested", {"text_config": {"max_position_embeddings": 4096}}, {"bos": "<s>"}
    )
    assert needed_length(nested, 100, generation) == 384
    # Where the model or its tokenizer allows no more, the limit is theirs.
    assert needed_length(model_with(tmp_path / "short", {"n_positions": 512}), 400, generation) is None
    limited = model_with(tmp_path / "limited", {"max_position_embeddings": 4096}, {"model_max_length": 512})
    assert needed_length(limited, 400, generation) is None
    assert needed_length(model_with(tmp_path / "unknown", {}), 10, generation) is None
    found = engine_arguments(generation, use_gpu=True, adapter=None, length=768)
    assert found["max_model_len"] == 768
    given = engine_arguments(
        GenerationConfig(max_tokens=9, max_model_len=99), use_gpu=True, adapter=None, length=768
    )
    assert given["max_model_len"] == 99
    other = engine_arguments(
        GenerationConfig(max_tokens=9, engine={"max_model_len": 50}), use_gpu=True, adapter=None, length=7
    )
    assert other["max_model_len"] == 50


@pytest.mark.parametrize(
    ("config", "settings", "accepted"),
    [
        ({"max_position_embeddings": 512}, {"max_model_len": 512}, True),
        ({"max_position_embeddings": 512}, {"max_model_len": 513}, False),
        ({"max_position_embeddings": 512}, {"engine": {"max_model_len": 513}}, False),
        ({"max_position_embeddings": 512, "model_max_length": 600}, {"max_model_len": 600}, True),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "yarn"}}, {"max_model_len": 900}, True),
        (
            {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default"}},
            {"max_model_len": 900},
            False,
        ),
        (
            {"max_position_embeddings": 512, "rope_parameters": {"full": {"rope_type": "llama3"}}},
            {"max_model_len": 900},
            True,
        ),
        ({}, {"max_model_len": 900}, True),
    ],
    ids=["all", "above", "engine", "vllms-key", "scaled", "not-scaled", "by-layer", "unknown"],
)
def test_a_length_that_the_model_does_not_have_is_refused(tmp_path, config, settings, accepted):
    folder = model_with(tmp_path / "model", config)
    generation = GenerationConfig(**settings)
    if accepted:
        check_length(folder, generation)
    else:
        with pytest.raises(InputError, match=r"max_model_len=\d+: .* has 512 positions; must be at most 512"):
            check_length(folder, generation)


def test_prompts_that_do_not_fit_are_counted(tmp_path):
    model = model_with(tmp_path / "model", {"max_position_embeddings": 512})
    generation = GenerationConfig(max_tokens=100)
    lengths = [10, 412, 413, 511, 512, 900]
    assert engine_length(model, 900, generation) == 512
    assert engine_length(model, 10, generation) == 128
    assert engine_length(model, 10, GenerationConfig(max_model_len=300)) == 300
    facts = pool._length_facts(512, lengths, generation)
    assert facts == {"max_model_len": 512, "prompts_too_long": 2, "answers_shortened": 2}
    assert pool._length_facts(None, lengths, generation) == {"max_model_len": None}


def test_an_answer_ends_at_every_stop_token_of_the_model(tiny_model, prompts, tmp_path):
    """Also where `generation_config.json` names another token than the tokenizer."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "generation_config.json"
    tree = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(tree | {"eos_token_id": [7]}))
    stops = stop_token_ids(str(model))
    assert {2, 7} <= set(stops)
    generated = input_rows(prompts[:1], GenerationConfig(max_tokens=3), 0, None, stops)[0]
    assert to_request(generated)["sampling_params"]["stop_token_ids"] == stops
    reasons = {}
    for tokens in ([5, 2], [5, 7], [5, 6, 8], [2], []):
        answered = {
            "generated_tokens": tokens,
            "generated_text": "",
            "logprobs": [{token: {"logprob": -1.0}} for token in tokens],
        }
        reasons[tuple(tokens)] = to_result(generated | answered)["finish_reason"]
    assert reasons == {(5, 2): "stop", (5, 7): "stop", (5, 6, 8): "length", (2,): "stop", (): "length"}
