"""`builtin:tiny`: a small Llama-shaped model with a byte-level BPE tokenizer, built from a seed.

Nothing is downloaded. The head size is 32, the smallest that vLLM's CPU attention supports.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from tbpo_ray.models.hidden_modules import hide_modules
from tbpo_ray.storage.files import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1024
"""Entries of the tokenizer, including special tokens: 256 bytes, then merges."""
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
    """Write model and tokenizer to `folder` atomically, unless they are there already.

    Args:
        folder: the folder to load with `AutoModelForCausalLM.from_pretrained`.
        seed: seed of the weights; the tokenizer does not depend on it.
    """
    target = Path(folder)
    if (target / "model.safetensors").is_file():
        return target
    with atomic_folder(target) as partial:
        _save(partial, seed)
    return target


def load_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer, in which each word of `builtin:copyedit` is one token.

    The trained tokenizer is part of the package, so that token ids never depend on a library version.
    `tests/models/test_tiny_tokenizer.py` trains it again and compares the two.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = resources.files("tbpo_ray.models").joinpath("tiny_tokenizer.json")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
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
        from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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
    with torch.random.fork_rng(devices=[]):  # leave the random state of the caller alone
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
