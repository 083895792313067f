"""`builtin:tiny`: a small Llama-shaped model with a byte-level BPE tokenizer, built from a seed.

Nothing is downloaded. Head size is 32, the least that vLLM's CPU attention takes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from tbpo_ray.models.hidden_modules import hide_modules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
"""Entries of the tokenizer, specials included: 256 bytes, then merges."""
LAYERS, WIDTH, HEADS, INTERMEDIATE, POSITIONS = 4, 192, 6, 512, 2048
BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tiny(folder: str | Path, seed: int = 0) -> Path:
    """Write model and tokenizer into `folder`, unless a whole one is there; the folder appears at once.

    Args:
        folder: where `AutoModelForCausalLM.from_pretrained` will find it.
        seed: of the weights; the tokenizer does not depend on it.
    """
    target = Path(folder)
    if (target / "model.safetensors").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _save(partial, seed)
        partial.chmod(0o755)
        os.rename(partial, target)
    except OSError:
        # Another process was first: its folder is whole, since a rename is atomic.
        if not (target / "model.safetensors").is_file():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; the words of `builtin:copyedit` are one token each.

    The trained tokenizer ships with the package, so that the ids never depend on a library's version.
    `tests/models/test_tiny_tokenizer.py` trains it again and compares.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = resources.files("tbpo_ray.models").joinpath("tiny_tokenizer.json")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(file.read_text(encoding="utf-8")),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _save(folder: Path, seed: int) -> None:
    import torch

    with hide_modules("sklearn"):
        from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
