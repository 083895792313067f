"""The reason codes of the quarantine file: why a record is rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REASONS: dict[str, str] = {
    "not_utf8": "the line is not UTF-8 text",
    "not_json": "the line is not JSON",
    "duplicate_keys": "a JSON object has a key more than once",
    "not_object": "the row is not a mapping of columns",
    "label_malformed": "a label, score or rank is not a value of its kind",
    "prompt_ambiguous": "several columns may hold the prompt, and none is named prompt",
    "prompt_missing": "there is no prompt, and the answers do not repeat one",
    "prompt_not_text": "the prompt is neither a string nor a list of messages",
    "prompt_empty": "the prompt is empty",
    "prompts_differ": "the columns do not state one and the same prompt",
    "prompt_repeated_unclear": "both answers begin with the prompt, which may be their own first words; "
    "write answers without the prompt, or as messages",
    "prompt_ends_in_answer": "the prompt ends in an assistant turn; continuing one is not supported",
    "chosen_missing": "there is no chosen answer",
    "rejected_missing": "there is no rejected answer",
    "chosen_not_text": "the chosen answer is neither a string nor a list of messages",
    "rejected_not_text": "the rejected answer is neither a string nor a list of messages",
    "chosen_empty": "the chosen answer is empty",
    "rejected_empty": "the rejected answer is empty",
    "no_final_answer": "an answer does not end in an assistant message",
    "answers_identical": "chosen and rejected are identical",
    "message_malformed": "a message is not {role, content} with a known role and text",
    "turn_not_trained": "a turn of an answer is marked as not trained (weight, train, training or loss)",
    "media_not_supported": "images, audio and video are not supported",
    "tools_malformed": "the tools are not a list of JSON schemas",
    "template_kwargs_malformed": "chat_template_kwargs is not a mapping",
    "text_not_unicode": "a text contains a lone surrogate, which is not valid Unicode",
    "template_refused": "the chat template refuses this conversation",
    "template_not_prefix_stable": "the chat template writes the turns of an answer differently in the whole",
    "template_missing": "the tokenizer has no chat template, which this conversation needs",
    "prompt_without_tokens": "the rendered prompt has no tokens",
    "answer_without_tokens": "an answer has no tokens",
    "answer_not_representable": "decoding an answer's tokens does not return the same text",
    "pair_same_tokens": "chosen and rejected have the same tokens after truncation",
}
"""Every reason why a record is quarantined, by code."""

COUNT_PREFIX = "quarantined/"
"""What the names of per-reason counts begin with (`quarantined/chosen_empty`)."""


class RecordError(ValueError):
    """A record that is not a preference pair.

    Args:
        reason: a key of :data:`REASONS`.
        detail: the value or position that was found.
    """

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{REASONS[reason]}{': ' + detail if detail else ''}")

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled with `args`, here the finished message; Ray Data needs the two arguments.
        return (RecordError, (self.reason, self.detail))


def rejection_counts(counts: Mapping[str, float]) -> dict[str, int]:
    """The number of quarantined records by reason code, the most frequent reason first."""
    reasons = {
        name.removeprefix(COUNT_PREFIX): int(number)
        for name, number in counts.items()
        if name.startswith(COUNT_PREFIX)
    }
    return dict(sorted(reasons.items(), key=lambda item: -item[1]))
