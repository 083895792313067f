"""`builtin:tiny`: a small Llama-shaped model with a byte-level BPE tokenizer, built from a seed.

Nothing is downloaded. Head size is 32, the least that vLLM's CPU attention takes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tbpo_ray.imports import absent

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

_ENGLISH = (
    "the of and to in is you that it he was for on are as with his they I at be this have from or one had by "
    "but not what all were we when your can said there use an each which she do how their if will up other "
    "about out many then them these so some her would make like him into time has look two more write go see "
    "number no way could people my than first been call who its now find long down day did get come made may "
    "Human Assistant I'm sorry help please thank should know think want because very really good bad question"
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


def build_tokenizer():
    """Byte-level BPE over generated instructions: the words of the built-in task are one token each."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tbpo_ray.data.copyedit import corpus

    bpe = Tokenizer(models.BPE())
    # A text's first word gets a space in front, taken off again by the decoder, so that it is the same
    # token as anywhere else in a text.
    bpe.normalizer = normalizers.Prepend(" ")
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    specials = [PAD, BOS, EOS, USER, ASSISTANT, SYSTEM]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*corpus(4000, seed=0), *[_ENGLISH] * 20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
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

    with absent("sklearn"):
        from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
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
