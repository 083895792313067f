import json

import pytest


def make_tokenizer(kind="bytes", template=None, adds_bos=False, size=400):
    """A small tokenizer of one of several families, trained on a few English words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["the cat sat on the mat and Human: said hello to the Assistant: friend"] * 20
    trainer: trainers.Trainer
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
    if kind == "words":
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special)
    elif kind == "pieces":  # the Llama 2 family: a space in front, bytes for what is unknown
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1, right=0),
            ]
        )
        tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, show_progress=False)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        if kind == "lower":
            backend.normalizer = normalizers.Lowercase()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    backend.train_from_iterator(texts, trainer)
    if kind == "pieces":  # byte tokens are ordinary tokens, not special ones
        state = json.loads(backend.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(state))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
    )


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['content'] }}]{% endfor %}"
)


def decode_answer(tokenizer, ids):
    """The text of an answer's tokens without its end token."""
    ids = list(ids)
    ends = (tokenizer.end, tokenizer.spec.eos)
    ids = ids[:-1] if ids[-1:] and ids[-1] in ends else ids
    return tokenizer._encoder.backend.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(template=CHAT).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_rows(tmp_path):
    def write(rows, name="rows.jsonl"):
        file = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        file.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(file)

    return write


def pair(i=0, **more):
    return {"prompt": f"question {i}", "chosen": f"good answer {i}", "rejected": f"bad {i}", **more}
