"""The tokenizer that ships with `builtin:tiny` equals the result of its training."""

from __future__ import annotations

import json
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tbpo_ray.data.copyedit import WORDS, CopyEditConfig, example
from tbpo_ray.models.tiny import ASSISTANT, BOS, EOS, PAD, SYSTEM, USER, VOCAB_SIZE, load_tiny_tokenizer

_ENGLISH = (
    "the of and to in is you that it he was for on are as with his they I at be this have from or one had by "
    "but not what all were we when your can said there use an each which she do how their if will up other "
    "about out many then them these so some her would make like him into time has look two more write go see "
    "number no way could people my than first been call who its now find long down day did get come made may "
    "Human Assistant I'm sorry help please thank should know think want because very really good bad question"
)


def corpus(n: int, seed: int = 0) -> Iterator[str]:
    """Yield `n` texts of an instruction and its answer, with every word in lower and upper case."""
    settings = CopyEditConfig(split="sft", seed=seed, damaged=0.0)
    for row in range(n):
        raw = example(settings, row)
        yield f"{raw['prompt']}\n{raw['answer']}"


def train_tokenizer() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    # A text's first word gets a space in front, removed again by the decoder, so that it is the same token as
    # anywhere else in a text.
    bpe.normalizer = normalizers.Prepend(" ")
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT, SYSTEM],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*corpus(4000, seed=0), *[_ENGLISH] * 20], trainer)
    return bpe


def test_retraining_gives_the_shipped_vocabulary_and_merges():
    trained = json.loads(train_tokenizer().to_str())
    shipped = json.loads(load_tiny_tokenizer().backend_tokenizer.to_str())
    assert shipped["model"] == trained["model"]
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert shipped[part] == trained[part]
    assert [t["content"] for t in shipped["added_tokens"]] == [PAD, BOS, EOS, USER, ASSISTANT, SYSTEM]


def test_the_corpus_holds_every_word_in_both_cases():
    words = set(" ".join(corpus(2000)).replace(":", " ").split())
    assert set(WORDS) <= words and {w.upper() for w in WORDS} <= words
