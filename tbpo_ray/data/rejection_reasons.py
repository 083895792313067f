"""Why a record is put aside: the reason codes of the quarantine file."""

from __future__ import annotations

from typing import Any

REASONS: dict[str, str] = {
    "not_utf8": "the line is not UTF-8 text",
    "not_json": "the line is not JSON",
    "not_object": "the row is not a mapping of columns",
    "prompt_missing": "there is no prompt, and the answers do not repeat one",
    "prompt_not_text": "the prompt is neither a string nor a list of messages",
    "prompt_empty": "the prompt says nothing",
    "prompts_differ": "chosen and rejected do not answer the same prompt",
    "chosen_missing": "there is no chosen answer",
    "rejected_missing": "there is no rejected answer",
    "chosen_not_text": "the chosen answer is neither a string nor a list of messages",
    "rejected_not_text": "the rejected answer is neither a string nor a list of messages",
    "chosen_empty": "the chosen answer says nothing",
    "rejected_empty": "the rejected answer says nothing",
    "no_final_answer": "an answer does not end in one assistant message",
    "answers_identical": "chosen and rejected say the same",
    "message_malformed": "a message is not {role, content} with a known role and text",
    "text_not_unicode": "a text holds half a character (a lone surrogate)",
    "template_refused": "the chat template refuses this conversation",
    "prompt_without_tokens": "the rendered prompt has no token",
    "answer_without_tokens": "an answer has no token of its own",
    "answer_not_representable": "the tokenizer cannot give an answer back as it was",
    "pair_same_tokens": "chosen and rejected are the same tokens, after truncation",
}
"""Every reason why a record is put aside, by code."""


class RecordError(ValueError):
    """A record that is no pair: `reason` is a key of :data:`REASONS`, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{REASONS[reason]}{': ' + detail if detail else ''}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (RecordError, (self.reason, self.detail))
