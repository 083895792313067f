"""`builtin:copyedit`: a generated preference task with one correct answer and mistakes at known positions.

A prompt is a short instruction about words (`reverse: cat tree blue`). The chosen answer is the correct one
(`blue tree cat`), and the rejected answer is the same with one or two mistakes, whose character spans are in
the metadata. Row `i` of a split depends only on `(seed, split, i)`. A hash of the prompt determines its
split, so that no two splits share a prompt, regardless of the seed. Imports neither torch nor ray.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from tbpo_ray.errors import InputError

PREFIX = "builtin:copyedit"

# fmt: off
WORDS: tuple[str, ...] = (
    "ant", "arm", "bag", "bed", "bird", "blue", "boat", "book", "box", "cat", "coin", "cold", "cup",
    "desk", "dog", "door", "egg", "fish", "fire", "food", "gold", "green", "hand", "hat", "ice", "jar",
    "key", "lamp", "leaf", "milk", "moon", "nose", "old", "pen", "pig", "rain", "red", "ring", "salt",
    "sand", "ship", "snow", "star", "sun", "tea", "tree", "wall", "wind",
)
# fmt: on

TASKS: tuple[str, ...] = ("copy", "reverse", "sort", "swap", "drop", "replace", "upper")
"""Copy; reverse; sort alphabetically; swap first and last; drop the first; replace one word; upper-case."""

_SPLITS: dict[str, tuple[range, int]] = {
    "train": (range(0, 45), 20_000),
    "sft": (range(45, 90), 60_000),
    "eval": (range(90, 95), 500),
    "test": (range(95, 100), 500),
}
"""The hash buckets of each split, out of 100, and its default number of pairs."""


@dataclass(frozen=True)
class CopyEditConfig:
    """The parameters in the query of a source string."""

    split: str = "train"
    pairs: int = 0
    """0 means the default of the split."""
    damaged: float = 0.3
    """Share of the targets of the split `sft` that contain a mistake."""
    seed: int = 0
    tasks: tuple[str, ...] = TASKS
    min_words: int = 3
    max_words: int = 7
    flipped: float = 0.0
    """Share of the pairs whose answers are exchanged: label noise."""

    def describe(self) -> str:
        """All parameters as text that never changes, since fingerprints of prepared pairs contain it."""
        values = asdict(self)
        if not self.flipped:
            del values["flipped"]  # the text of sources that were prepared before the parameter existed
        return f"CopyEdit({', '.join(f'{key}={value!r}' for key, value in values.items())})"

    @property
    def rows(self) -> int:
        return self.pairs or _SPLITS[self.split][1]


@lru_cache(maxsize=64)
def parse_source(source: str) -> CopyEditConfig:
    """The parameters of `builtin:copyedit?split=train&pairs=N&damaged=0.3&seed=0&tasks=copy,sort`.

    Raises:
        InputError: for an unknown parameter or an impossible value.
    """
    name, _, query = source.partition("?")
    if name != PREFIX:
        raise InputError(f"{source!r}: no such builtin source; must be {PREFIX}?split=train|sft|eval|test")
    known = {item.name: item for item in fields(CopyEditConfig)}
    values: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise InputError(f"{source!r}: unknown parameter {key!r}; must be one of {', '.join(known)}")
        try:
            values[key] = _PARSERS[key](text)
        except ValueError:
            raise InputError(f"{source!r}: {key}={text!r} must be {_EXPECTED[key]}") from None
    settings = CopyEditConfig(**values)
    for key, ok in _checks(settings).items():
        if not ok:
            raise InputError(f"{source!r}: {key}={values.get(key)!r} must be {_EXPECTED[key]}")
    return settings


_PARSERS: dict[str, Any] = {
    "split": str,
    "pairs": int,
    "damaged": float,
    "seed": int,
    "tasks": lambda text: tuple(text.split(",")),
    "min_words": int,
    "max_words": int,
    "flipped": float,
}
_EXPECTED = {
    "split": "one of " + ", ".join(_SPLITS),
    "pairs": "a number from 1 to 100 million",
    "damaged": "a share from 0 to 1",
    "seed": "an integer",
    "tasks": "a comma-separated list of " + ", ".join(TASKS),
    "min_words": "a number from 2 to max_words",
    "max_words": "a number from min_words to 12",
    "flipped": "a share from 0 to 0.5, of a split other than sft",
}


def _checks(s: CopyEditConfig) -> dict[str, bool]:
    return {
        "split": s.split in _SPLITS,
        "pairs": 0 <= s.pairs <= 100_000_000,
        "damaged": 0 <= s.damaged <= 1,
        "tasks": bool(s.tasks) and set(s.tasks) <= set(TASKS),
        "min_words": 2 <= s.min_words <= s.max_words,
        "max_words": s.max_words <= 12,
        "flipped": 0 <= s.flipped <= 0.5 and not (s.flipped and s.split == "sft"),
    }


def example(settings: CopyEditConfig, row: int) -> dict[str, Any]:
    """Row `row` as a raw record: prompt, chosen, rejected, task, answer, damage and chosen_damage.

    `damage` lists the `[start, end)` character spans of the mistakes in the rejected text, in order: a wrong,
    a duplicated or a moved word; for a missing word the one in its place, or an empty span at the end. With
    `flipped`, records also have the key `flipped`: whether their chosen answer is the one with the mistakes,
    whose spans are then `chosen_damage`.
    """
    rng = random.Random(f"{settings.seed}:{settings.split}:{row}")
    buckets = _SPLITS[settings.split][0]
    while True:
        task, prompt, words = _instruction(rng, settings)
        if split_bucket(prompt) in buckets:
            break
    answer = " ".join(words)
    pool = [word.upper() for word in WORDS] if task == "upper" else list(WORDS)
    chosen: str = answer
    chosen_spans: list[list[int]] = []
    if settings.split == "sft" and rng.random() < settings.damaged:
        chosen, chosen_spans = _damage(rng, words, pool)
    rejected, spans = _damage(rng, words, pool)
    while rejected == chosen:
        rejected, spans = _damage(rng, words, pool)
    flipped = {}
    if settings.flipped:
        # A generator of its own, so that the records differ from those without noise only in their order.
        is_flipped = random.Random(f"flip:{settings.seed}:{settings.split}:{row}").random() < settings.flipped
        flipped = {"flipped": is_flipped}
        if is_flipped:
            chosen, rejected, chosen_spans, spans = rejected, chosen, spans, chosen_spans
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "task": task,
        "answer": answer,
        "damage": spans,
        "chosen_damage": chosen_spans,
        **flipped,
    }


def split_bucket(prompt: str) -> int:
    """The hash bucket of a prompt, from 0 to 99, which determines its split."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest(), "big") % 100


def check(metadata: Mapping[str, Any], answer: str) -> bool:
    """Whether `answer` is correct, ignoring white space around it."""
    return bool(answer.strip() == metadata["answer"])


def _instruction(rng: random.Random, settings: CopyEditConfig) -> tuple[str, str, list[str]]:
    """The task, the prompt and the words of the correct answer."""
    task = rng.choice(settings.tasks)
    words = rng.sample(WORDS, rng.randint(settings.min_words, settings.max_words))
    text = " ".join(words)
    if task == "replace":
        old = rng.choice(words)
        new = rng.choice([word for word in WORDS if word not in words])
        return task, f"replace {old} by {new}: {text}", [new if word == old else word for word in words]
    answers = {
        "copy": words,
        "reverse": words[::-1],
        "sort": sorted(words),
        "swap": [words[-1], *words[1:-1], words[0]],
        "drop": words[1:],
        "upper": [word.upper() for word in words],
    }
    return task, f"{task}: {text}", answers[task]


def _damage(rng: random.Random, correct: list[str], pool: list[str]) -> tuple[str, list[list[int]]]:
    """The text of the answer with one or two mistakes, and their character spans."""
    while True:
        draft = _Draft(list(correct), [False] * len(correct))
        for _ in range(rng.choice((1, 1, 2))):
            _add_mistake(draft, rng, correct, pool)
        if draft.words != correct:  # two mistakes may cancel each other
            end_missing = draft.end_missing and len(draft.words) < len(correct)
            return _spans(draft.words, draft.is_wrong, end_missing)


@dataclass
class _Draft:
    """The words of an answer while mistakes are added to it."""

    words: list[str]
    is_wrong: list[bool]
    end_missing: bool = False

    def replace(self, at: int, word: str) -> None:
        self.words[at], self.is_wrong[at] = word, True

    def remove(self, at: int) -> None:
        del self.words[at], self.is_wrong[at]
        if at < len(self.words):
            self.is_wrong[at] = True
        else:
            self.end_missing = True

    def double(self, at: int) -> None:
        self.words.insert(at + 1, self.words[at])
        self.is_wrong.insert(at + 1, True)

    def swap(self, at: int, other: int) -> None:
        self.words[at], self.words[other] = self.words[other], self.words[at]
        self.is_wrong[at] = self.is_wrong[other] = True


def _add_mistake(draft: _Draft, rng: random.Random, correct: list[str], pool: list[str]) -> None:
    """Add one random mistake at a word that is still correct, if the kind of mistake is possible there."""
    intact = [index for index, wrong in enumerate(draft.is_wrong) if not wrong]
    kind = rng.choice(("wrong", "missing", "doubled", "swapped"))
    too_short = (kind == "swapped" and len(intact) < 2) or (kind == "missing" and len(draft.words) < 2)
    if not intact or too_short:
        return
    at = rng.choice(intact)
    if kind == "wrong":
        draft.replace(at, rng.choice([word for word in pool if word not in correct]))
    elif kind == "missing":
        draft.remove(at)
    elif kind == "doubled":
        draft.double(at)
    else:
        draft.swap(at, rng.choice([index for index in intact if index != at]))


def _spans(words: list[str], is_wrong: list[bool], end: bool) -> tuple[str, list[list[int]]]:
    text = " ".join(words)
    spans, start = [], 0
    for word, flag in zip(words, is_wrong, strict=True):
        if flag:
            spans.append([start, start + len(word)])
        start += len(word) + 1
    if end:
        spans.append([len(text), len(text)])
    return text, spans
