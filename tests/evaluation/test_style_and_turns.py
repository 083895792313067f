"""Style control of win rates, and conversations of two turns."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation import style_controlled_win_rate, win_rate
from tbpo_ray.evaluation.measures import compare
from tbpo_ray.evaluation.prompts import read_prompts
from tbpo_ray.evaluation.style import style_features
from tbpo_ray.evaluation.two_turns import has_second_turn, join_turns, second_questions
from tbpo_ray.generation.samples import Sample

LISTS = "# Title\n\n- one\n* two\n3. three\n\nSome **bold** text and __more__.\n"
MARKDOWN = LISTS + "```\n# no heading\n- no item\n```\n"


def test_features_count_markdown_outside_of_code():
    assert style_features(MARKDOWN) == [len(MARKDOWN), 1, 3, 2]
    assert style_features("") == [0, 0, 0, 0]
    assert style_features("#tag and -dash and 2*3*4") == [24, 0, 0, 0]
    assert style_features("```\n- unfinished") == [16, 0, 0, 0]


def preferences_by_lists(rng, count: int, quality: float):
    """A judge that likes lists: log-odds of quality plus twice the normalized difference of list items."""
    own = np.stack([rng.integers(100, 200, count), rng.integers(0, 9, count)], axis=1)
    other = np.stack([rng.integers(100, 200, count), rng.integers(0, 3, count)], axis=1)
    total = own + other
    delta = np.divide(own - other, total, out=np.zeros(total.shape), where=total > 0)[:, 1]
    odds = quality + 2 * delta
    return (rng.random(count) < 1 / (1 + np.exp(-odds))).astype(float), own, other


def test_a_preference_for_lists_is_removed():
    preferences, own, other = preferences_by_lists(np.random.default_rng(0), 4000, 0.0)
    controlled = style_controlled_win_rate(preferences, own, other)
    assert win_rate(preferences).rate > 0.65
    assert controlled.low < 0.5 < controlled.high and controlled.high - controlled.low < 0.06
    assert abs(controlled.effects[0]) < 0.1 and controlled.effects[1] > 0.8


def test_quality_is_kept():
    preferences, own, other = preferences_by_lists(np.random.default_rng(1), 4000, 1.0)
    controlled = style_controlled_win_rate(preferences, own, other)
    assert controlled.rate == pytest.approx(1 / (1 + np.exp(-1)), abs=0.03)
    mirrored = style_controlled_win_rate(1 - preferences, other, own)
    assert mirrored.rate == pytest.approx(1 - controlled.rate, abs=1e-6)


def test_equal_styles_leave_the_win_rate():
    preferences = [1.0] * 60 + [0.0] * 40
    same = [[100, 2]] * 100
    controlled = style_controlled_win_rate(preferences, same, same)
    assert controlled.rate == pytest.approx(0.6, abs=1e-3) and controlled.effects == (0.0, 0.0)


@pytest.mark.parametrize("styles", [[[1, 2]], [1, 2], [[-1.0], [1.0]], [[float("nan")], [1.0]]])
def test_styles_that_do_not_match(styles):
    with pytest.raises(InputError, match="candidate_styles, baseline_styles: must both be 2 rows"):
        style_controlled_win_rate([0.0, 1.0], styles, styles)


def answer(prompt: str, text: str, **changes) -> Sample:
    plain = Sample(prompt, 0, f"q{prompt}", [1], text, [5], [-0.1], "stop", {}, "")
    return dataclasses.replace(plain, **changes)


def test_the_verdict_has_a_style_controlled_rate_only_with_markdown():
    plain = [(answer(str(i), "a" * (i + 1)), answer(str(i), "b")) for i in range(6)]
    assert "style_win_rate" not in compare(plain, [1.0, 0.0] * 3)
    listed = [(answer(str(i), "- a" * (i % 2)), answer(str(i), "b")) for i in range(6)]
    metrics = compare(listed, [0.0, 1.0] * 3)
    assert metrics["style_win_rate"].low is not None
    assert metrics["style_effect/list_items"].value > 0


class Answers:
    """Stands in for the samples of a folder."""

    def __init__(self, *samples: Sample):
        self.samples = samples

    def by_prompt(self) -> dict[str, list[Sample]]:
        groups: dict[str, list[Sample]] = {}
        for sample in self.samples:
            groups.setdefault(sample.prompt_id, []).append(sample)
        return groups


def mt_bench(tmp_path: Path, rows: list[dict]):
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_config(None, ["evaluation.suite=mt_bench", f"evaluation.prompts={file}"])


ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorten it."]},
    {"question_id": 82, "category": "math", "turns": ["Add 1 and 2.", "Double it."], "reference": ["3", "6"]},
    {"question_id": 83, "category": "math", "turns": ["Only one."]},
]


def test_the_second_question_follows_the_first_answer(tmp_path):
    prompts = read_prompts(mt_bench(tmp_path, ROWS))
    assert [prompt.prompt[-1]["content"] for prompt in prompts.prompts] == ["Write a poem.", "Add 1 and 2."]
    assert [bad.reason for bad in prompts.skipped] == ["prompt_missing"]
    assert prompts.prompts[1].metadata["category"] == "math" and has_second_turn(prompts)
    first = Answers(answer("000001", "Three."), answer("000001", "3", sample=1))
    second = second_questions(prompts, first)  # type: ignore[arg-type]
    assert second.ids == prompts.ids and second.digest != prompts.digest
    roles = [[(turn["role"], turn["content"]) for turn in prompt.prompt] for prompt in second.prompts]
    assert roles[1] == [("user", "Add 1 and 2."), ("assistant", "Three."), ("user", "Double it.")]
    assert roles[0][1] == ("assistant", "")


def test_judges_see_both_turns():
    metadata = {"second_turn": "Double it."}
    first = Answers(answer("0", "Three.", metadata=metadata), answer("2", "x", metadata=metadata))
    second = Answers(
        answer("0", "Six.", metadata=metadata),
        answer("0", "6", sample=1, metadata=metadata),
        answer("1", "?", metadata=metadata),
    )
    groups = join_turns(first, second)  # type: ignore[arg-type]
    assert list(groups) == ["0"]
    assert [item.sample for item in groups["0"]] == [0, 1]
    assert groups["0"][0].prompt_text == "[Turn 1]\nq0\n\n[Turn 2]\nDouble it."
    assert groups["0"][1].answer == "[Turn 1]\nThree.\n\n[Turn 2]\n6"
    assert groups["0"][0].token_ids == [5]


def test_other_prompts_have_one_turn(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    prompts = read_prompts(load_config(None, [f"evaluation.prompts={file}"]))
    assert not has_second_turn(prompts) and prompts.counts == Counter()
