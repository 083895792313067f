"""Conversations of two questions, the second of which follows the policy's own answer to the first."""

from __future__ import annotations

from dataclasses import replace

from tbpo_ray.evaluation.prompts import PromptSet
from tbpo_ray.evaluation.suites import SECOND_TURN
from tbpo_ray.generation.samples import Sample, Samples

Groups = dict[str, list[Sample]]


def has_second_turn(prompts: PromptSet) -> bool:
    """Whether every prompt is the first question of two."""
    return bool(prompts.prompts) and all(SECOND_TURN in prompt.metadata for prompt in prompts.prompts)


def second_questions(prompts: PromptSet, first: Samples) -> PromptSet:
    """The conversations up to the second question, in the same order, with a policy's first answers.

    The first of several answers to a prompt is continued; a prompt without one gets an empty answer.
    """
    answers = {key: group[0].answer for key, group in first.by_prompt().items()}
    return replace(
        prompts,
        prompts=[
            replace(
                prompt,
                prompt=[
                    *prompt.prompt,
                    {"role": "assistant", "content": answers.get(key, "")},
                    {"role": "user", "content": prompt.metadata[SECOND_TURN]},
                ],
            )
            for key, prompt in zip(prompts.ids, prompts.prompts, strict=True)
        ],
    )


def join_turns(first: Samples, second: Samples) -> Groups:
    """The second answers with both questions and both answers as their text, for judges and reports.

    Token ids and log-probs are those of the second answer. Prompts without a first answer are skipped.
    """
    openings = {key: group[0] for key, group in first.by_prompt().items()}
    return {
        key: [_joined(openings[key], answer) for answer in group]
        for key, group in second.by_prompt().items()
        if key in openings
    }


def _joined(first: Sample, second: Sample) -> Sample:
    questions = (first.prompt_text, second.metadata[SECOND_TURN])
    prompt, answer = (
        f"[Turn 1]\n{one}\n\n[Turn 2]\n{two}" for one, two in (questions, (first.answer, second.answer))
    )
    return replace(second, prompt_text=prompt, answer=answer)
