"""Instructions under which a model scores the answers to prompts that are already tokenized.

An instruction is a text that goes before the prompt, or a template with `{prompt}` and, behind it, optionally
`{answer}`: what follows `{prompt}` then goes to the end of the last turn, before the model's own begins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tbpo_ray.config.schema import Config
from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec
from tbpo_ray.errors import InputError

PROMPT, ANSWER = "{prompt}", "{answer}"


@dataclass(frozen=True)
class Instruction:
    """The tokens of an instruction, and where they go."""

    before: tuple[int, ...] = ()
    """Before the prompt, but after its BOS."""
    behind: tuple[int, ...] = ()
    """At the end of the prompt's last turn."""
    with_answer: bool = False
    """Whether the answer that is scored follows, without the token that ends it."""
    after_answer: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    """What ends the last turn of every prompt and begins the model's own."""
    bos: int | None = None
    end: int | None = None
    """The token that ends an answer."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on; empty for no instruction."""
        if not self.behind and not self.with_answer:
            return {"prefix": list(self.before)} if self.before else {}
        return {"instruction": asdict(self)}

    def revise(self, prompt: np.ndarray, answer: np.ndarray) -> np.ndarray:
        """The prompt under the instruction: [P] and [T] int64 to [P'] int64."""
        at = 1 if len(prompt) and prompt[0] == self.bos else 0
        ends_in_tail = self.tail and tuple(prompt[-len(self.tail) :]) == self.tail
        stop = len(prompt) - len(self.tail) if ends_in_tail else len(prompt)
        shown = answer[:-1] if len(answer) and answer[-1] == self.end else answer
        parts = [prompt[:at], self.before, prompt[at:stop], self.behind]
        parts += [shown, self.after_answer] if self.with_answer else []
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in (*parts, prompt[stop:])])


def check_instruction(text: str, key: str) -> None:
    """Refuse a template in which a placeholder is missing, repeated or in the wrong order.

    Raises:
        InputError: naming the key.
    """
    prompts, answers = text.count(PROMPT), text.count(ANSWER)
    if prompts > 1 or answers > 1 or (answers and text.find(ANSWER) < text.find(PROMPT)) or answers > prompts:
        raise InputError(
            f"{key}={text!r}: must be a text to place before the prompt, or a template with {PROMPT} once "
            f"and, behind it, {ANSWER} at most once"
        )


def tokenize_instruction(text: str, model: str, config: Config) -> Instruction | None:
    """The tokens of an instruction; None for an empty one.

    Args:
        text: valid for :func:`check_instruction`.
        model: the model whose tokenizer the prompts have.
        config: with the chat template that the prompts have.
    """
    if not text.strip():
        return None
    spec = TokenizerSpec.load(model, config.model.chat_template, config.data.template_kwargs)
    tokenizer = PairTokenizer(spec, config.data.max_length, config.data.prompt_limit)
    before, _, rest = text.partition(PROMPT) if PROMPT in text else (text.strip() + "\n\n", "", "")
    behind, _, after = rest.partition(ANSWER)
    return Instruction(
        before=_encode(before, model, config),
        behind=_encode(behind, model, config),
        with_answer=ANSWER in rest,
        after_answer=_encode(after, model, config),
        tail=_common_tail(tokenizer),
        bos=spec.bos,
        end=tokenizer.end,
    )


def _encode(text: str, model: str, config: Config) -> tuple[int, ...]:
    from tbpo_ray.models.load import load_tokenizer

    if not text:
        return ()
    tokenizer = load_tokenizer(model, chat_template=config.model.chat_template)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_tail(tokenizer: PairTokenizer) -> tuple[int, ...]:
    """The tokens that two prompts with nothing in common end in."""
    one, other = tokenizer.prompts([[{"role": "user", "content": text}] for text in ("a", "7")])
    if not isinstance(one, list) or not isinstance(other, list):
        return ()
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return tuple(one[len(one) - length :])
