"""Tiny random models of many architectures, and how this project runs each of them.

`python -m tests.training.architectures` writes the table that docs/architectures.md shows;
`tests/training/test_architectures.py` checks every line of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tbpo_ray.models.attention import choose_attention
from tbpo_ray.training.batch import BatchLayout, collate
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.self_check import CheckPairs, ScoringChoice, check_scoring

TABLE = Path(__file__).resolve().parents[2] / "docs" / "architectures.json"
VOCAB = 96
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "initializer_range": 0.2, **TOKENS,
}  # fmt: skip
NO_HEAD_DIM = {key: value for key, value in LLAMA.items() if key != "head_dim"}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_routed_experts": 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}


@dataclass(frozen=True)
class Architecture:
    """A model type, the features that its tiny model has, and its configuration."""

    model_type: str
    features: str
    config: dict[str, Any]
    slow: bool = False


def _list() -> dict[str, Architecture]:
    window = {"sliding_window": 8}
    entries = [
        Architecture("llama", "dense, grouped queries", LLAMA),
        Architecture("llama", "tied", LLAMA | {"tie_word_embeddings": True}),
        Architecture("llama", "biased", LLAMA | {"attention_bias": True, "mlp_bias": True}),
        Architecture("mistral", "sliding window", LLAMA | window),
        Architecture("mixtral", "experts", LLAMA | EXPERTS),
        Architecture("qwen2", "biased queries", LLAMA),
        Architecture(
            "qwen2", "window in some layers",
            LLAMA | window | {"use_sliding_window": True, "max_window_layers": 1},
        ),
        Architecture("qwen2_moe", "experts", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 32}),
        Architecture("qwen3", "normalized queries", LLAMA),
        Architecture("qwen3_moe", "experts", LLAMA | EXPERTS),
        Architecture("gemma", "scaled embedding, tied", LLAMA),
        Architecture(
            "gemma2", "soft-capped attention and logits",
            LLAMA | window
            | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
        ),
        Architecture(
            "gemma3_text", "window in some layers",
            LLAMA | window
            | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        Architecture("vaultgemma", "soft-capped attention", LLAMA | window),
        Architecture("phi", "biased head", NO_HEAD_DIM),
        Architecture("phi3", "sliding window", NO_HEAD_DIM | window),
        Architecture("phimoe", "experts", LLAMA | EXPERTS, slow=True),
        Architecture("gpt2", "learned positions", GPT2),
        Architecture(
            "gpt_neo", "learned positions, local attention",
            {
                "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256,
                "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
            },
        ),
        Architecture("gpt_neox", "parallel layers", LLAMA),
        Architecture("gptj", "partial rotary positions", GPT2 | {"rotary_dim": 4}),
        Architecture("codegen", "partial rotary positions", GPT2 | {"rotary_dim": 4}),
        Architecture("gpt_bigcode", "one key head", GPT2),
        Architecture(
            "opt", "learned positions",
            {
                "vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
                "init_std": 0.2, **TOKENS,
            },
        ),
        Architecture(
            "bloom", "ALiBi",
            {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        ),
        Architecture("falcon", "rotary, parallel", FALCON | {"alibi": False, "parallel_attn": True}),
        Architecture("falcon", "ALiBi", FALCON | {"alibi": True}),
        Architecture(
            "mpt", "ALiBi",
            {
                "vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256,
                "initializer_range": 0.2,
            },
        ),
        Architecture("stablelm", "partial rotary positions", LLAMA),
        Architecture("starcoder2", "sliding window", LLAMA | window),
        Architecture("olmo", "dense", LLAMA),
        Architecture("olmo2", "normalized queries", LLAMA),
        Architecture("olmo3", "window in some layers", LLAMA | window),
        Architecture("olmoe", "experts", LLAMA | EXPERTS, slow=True),
        Architecture("cohere", "scaled logits, tied", LLAMA | {"logit_scale": 0.5}),
        Architecture("cohere2", "scaled logits, window", LLAMA | window | {"logit_scale": 0.5}),
        Architecture(
            "granite", "scaled everywhere",
            LLAMA
            | {
                "logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5,
                "embedding_multiplier": 2.0,
            },
        ),
        Architecture("granitemoe", "experts, scaled", LLAMA | EXPERTS | {"logits_scaling": 3.0}, slow=True),
        Architecture("smollm3", "layers without positions", LLAMA),
        Architecture("glm", "interleaved rotary positions", LLAMA),
        Architecture("glm4", "dense", LLAMA),
        Architecture("exaone4", "window in some layers", LLAMA | window),
        Architecture("nemotron", "squared ReLU", LLAMA),
        Architecture("persimmon", "squared ReLU", LLAMA),
        Architecture("biogpt", "learned positions", LLAMA),
        Architecture(
            "xglm", "sinusoidal positions",
            {
                "vocab_size": VOCAB, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4,
                "max_position_embeddings": 256, "init_std": 0.2,
            },
        ),
        Architecture("gpt_oss", "experts, attention sinks", LLAMA | EXPERTS | window, slow=True),
        Architecture("seed_oss", "dense", LLAMA),
        Architecture("helium", "dense", LLAMA),
        Architecture("arcee", "squared ReLU", LLAMA),
        Architecture("ernie4_5", "dense", LLAMA),
        Architecture(
            "deepseek_v3", "latent attention, experts",
            NO_HEAD_DIM | EXPERTS
            | {
                "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4,
            },
            slow=True,
        ),
        Architecture(
            "dots1", "experts", LLAMA | EXPERTS | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
            slow=True,
        ),
        Architecture("diffllama", "differential attention", LLAMA),
        Architecture("doge", "dynamic mask", LLAMA, slow=True),
        Architecture("bitnet", "dense", LLAMA),
        Architecture("apertus", "dense", LLAMA),
        Architecture("nanochat", "soft-capped logits", LLAMA),
        Architecture("hunyuan_v1_dense", "dense", LLAMA),
        Architecture(
            "llama4_text", "experts, chunked attention", LLAMA | EXPERTS | {"attention_chunk_size": 16}
        ),
        Architecture(
            "ctrl", "sinusoidal positions",
            {"vocab_size": VOCAB, "n_embd": 32, "dff": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
        ),
        Architecture("openai-gpt", "learned positions", GPT2),
        Architecture(
            "mamba", "recurrent",
            {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        ),
        Architecture(
            "rwkv", "recurrent",
            {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        ),
        Architecture("lfm2", "convolution", LLAMA | {"layer_types": ["conv", "full_attention"]}),
        Architecture(
            "minimax", "linear attention",
            LLAMA | EXPERTS | {"layer_types": ["linear_attention", "full_attention"]}, slow=True,
        ),
        Architecture("bamba", "recurrent", LLAMA | MAMBA | {"attn_layer_indices": [1]}, slow=True),
        Architecture(
            "jamba", "recurrent, experts",
            LLAMA | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1}, slow=True,
        ),
        Architecture(
            "falcon_h1", "recurrent",
            LLAMA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}, slow=True,
        ),
    ]  # fmt: skip
    return {f"{entry.model_type}, {entry.features}": entry for entry in entries}


ARCHITECTURES = _list()

_RNG = np.random.default_rng(0)
PAIRS = {
    "prompt_ids": [_RNG.integers(3, VOCAB, n) for n in (23, 17, 30)],
    "chosen_ids": [_RNG.integers(3, VOCAB, n) for n in (12, 20, 9)],
    "rejected_ids": [_RNG.integers(3, VOCAB, n) for n in (15, 8, 9)],
}
LONGEST = {
    name: [_RNG.integers(3, VOCAB, n)]
    for name, n in {"prompt_ids": 60, "chosen_ids": 60, "rejected_ids": 50}.items()
}
LAYOUT = BatchLayout(sides=2, pad_id=2, shared_prompt=True, truncate_to_shorter=False)


class TinyModel:
    """One random model of an architecture, in any attention implementation."""

    def __init__(self, architecture: Architecture):
        torch.manual_seed(0)
        self.config = AutoConfig.for_model(architecture.model_type, **architecture.config)
        self.weights: dict[str, Any] = {}

    def load(self, attention: str) -> Any:
        model = AutoModelForCausalLM.from_config(self.config, attn_implementation=attention).float().eval()
        if self.weights:
            model.load_state_dict(self.weights)
        self.weights = self.weights or model.state_dict()
        model.config.use_cache = False
        return model

    def plain_logps(self) -> dict[str, list[torch.Tensor]]:
        """Log-probs of both answers of all pairs by transformers alone, one unpadded row each."""
        model = self.load("eager")

        def row(prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
            ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            return logits[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(answer)[:, None])[:, 0]

        with torch.no_grad():
            return {
                side: [row(p, a) for p, a in zip(PAIRS["prompt_ids"], PAIRS[f"{side}_ids"], strict=True)]
                for side in ("chosen", "rejected")
            }

    def choose(self, requested: str) -> tuple[Any, ScoringChoice]:
        """The model as a run with `model.attention=requested` would use it."""
        attention = choose_attention(self.config, requested).implementation
        return check_scoring(
            self.load(attention), CheckPairs(PAIRS, LONGEST), LAYOUT, key="model", reload=self.load
        )


def deviation(model: Any, plain: dict[str, list[torch.Tensor]], *, shared: bool) -> float:
    """The largest difference of a log-prob from the plain one, relative to its size beyond 10 nats."""
    answers = [PAIRS["chosen_ids"], PAIRS["rejected_ids"]]
    batch = collate(PAIRS["prompt_ids"], answers, pad_id=2, shared=shared, truncate_to_shorter=False)
    with torch.no_grad():
        logps = PairScorer(model).eval().reference_logps(batch)
    return max(
        float(((logps[side, row, : len(value)] - value).abs() / value.abs().div(10).clamp(min=1)).max())
        for side, values in enumerate(plain.values())
        for row, value in enumerate(values)
    )


def main() -> None:
    """Write the table of the documentation."""
    rows = []
    for architecture in ARCHITECTURES.values():
        _, choice = TinyModel(architecture).choose("sdpa")
        rows.append(
            {
                "model_type": architecture.model_type,
                "features": architecture.features,
                "attention": choice.attention,
                "rows": "shared" if choice.shared_prompt else "separate",
            }
        )
        print(rows[-1], flush=True)
    TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
