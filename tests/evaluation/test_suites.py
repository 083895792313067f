"""Suites: which prompts, how many, how they are rendered, their rubric and reference; ROUGE-L."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.records import parse_records
from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.judges import make_judge
from tbpo_ray.evaluation.llm_judge import LlmJudge
from tbpo_ray.evaluation.prompts import read_prompts
from tbpo_ray.evaluation.rouge import references_of, rouge_l, rouge_metrics
from tbpo_ray.evaluation.rubrics import load_rubric
from tbpo_ray.evaluation.suites import (
    judge_settings,
    load_suite,
    prompt_limit,
    reference_column,
    slice_columns,
    suite_names,
    summarization_row,
)

from .summarization import check, make_posts

JUDGE = "evaluation.judge={kind: llm, url: 'http://x/v1', model: m}"


def config(*overrides: str):
    return load_config(None, [JUDGE, *overrides])


def write(folder: Path, rows, name="prompts.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("suite", "rubric", "limit", "reference", "columns"),
    [
        ("helpful", "helpful", 200, None, []),
        ("harmless", "harmless", 200, None, []),
        ("tldr", "summary", 200, "reference", []),
        ("alpaca_eval", "helpful", 805, None, ["dataset"]),
        ("arena_hard_v2", "general", 750, None, ["category"]),
        ("mt_bench", "general", 80, None, ["category"]),
    ],
)
def test_what_a_suite_sets_and_what_overrules_it(suite, rubric, limit, reference, columns):
    made = config(f"evaluation.suite={suite}")
    assert judge_settings(made)["rubric"] == rubric and prompt_limit(made) == limit
    assert (reference_column(made), slice_columns(made)) == (reference, columns)
    own = config(
        f"evaluation.suite={suite}",
        "evaluation.max_prompts=7",
        "evaluation.reference_column=gold",
        "evaluation.slice_by=[topic]",
        "evaluation.judge.rubric=general",
    )
    assert (prompt_limit(own), reference_column(own), slice_columns(own)) == (7, "gold", ["topic"])
    assert judge_settings(own)["rubric"] == "general"
    assert prompt_limit(config(f"evaluation.suite={suite}", "evaluation.max_prompts=null")) is None


def test_every_packaged_suite_is_tested_and_without_one_nothing_changes():
    assert suite_names() == ["alpaca_eval", "arena_hard_v2", "harmless", "helpful", "mt_bench", "tldr"]
    plain = config()
    assert load_suite(plain) is None and prompt_limit(plain) == 400
    assert "rubric" not in judge_settings(plain) and reference_column(plain) is None


def template(made, output):
    judge = make_judge(made, source="x", output=output)
    assert isinstance(judge, LlmJudge)
    return judge.template


def test_the_judge_gets_the_rubric_of_the_suite(tmp_path):
    assert load_rubric("summary") in template(config("evaluation.suite=tldr"), tmp_path)
    file = tmp_path / "p.txt"
    file.write_text("{prompt} {answer_a} {answer_b}")
    own = make_judge(
        config("evaluation.suite=tldr", f"evaluation.judge.prompt_file={file}"), source="x", output=tmp_path
    )
    assert own.report()["rubric"] is None


def test_hh_dialogues_become_prompts_each_once(tmp_path):
    turns = "\n\nHuman: Hello {}\n\nAssistant: Hi.\n\nHuman: Help?\n\nAssistant:"
    rows = [
        {"chosen": turns.format(i // 2) + f" Yes {i}.", "rejected": turns.format(i // 2) + " No."}
        for i in range(600)
    ]
    file = write(tmp_path, rows)
    prompts = read_prompts(config("evaluation.suite=helpful", f"evaluation.prompts={file}"))
    assert len(prompts.prompts) == 200 and prompts.summary()["suite"] == "helpful"
    assert [message["content"] for message in prompts.prompts[199].prompt] == ["Hello 199", "Hi.", "Help?"]


POST = {"subreddit": "sea", "title": "A day", "post": "We sailed all day."}
RENDERED = "SUBREDDIT: r/sea\n\nTITLE: A day\n\nPOST: We sailed all day.\n\nTL;DR:"


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({**POST, "id": "t1", "summary": "Sailed."}, RENDERED, "Sailed."),
        (
            {"info": POST, "summaries": [{"text": "x"}, {"text": " Sailed.", "policy": "ref"}], "choice": 0},
            RENDERED,
            "Sailed.",
        ),
        ({"info": POST, "summary": {"text": "x", "axes": {"overall": 5}}}, RENDERED, None),
        ({"article": "Long.", "highlights": "Short."}, "ARTICLE: Long.\n\nTL;DR:", "Short."),
        ({"prompt": RENDERED, "completion": " Sailed."}, RENDERED, "Sailed."),
        ({"prompt": RENDERED, "label": "Sailed."}, RENDERED, "Sailed."),
        ({"prompt": RENDERED, "chosen": "a", "rejected": "b"}, RENDERED, None),
    ],
)  # fmt: skip
def test_the_forms_of_summarization_sets(row, prompt, reference, tmp_path):
    file = write(tmp_path, [row])
    (got,) = read_prompts(config("evaluation.suite=tldr", f"evaluation.prompts={file}")).prompts
    assert got.prompt == [{"role": "user", "content": prompt}]
    assert got.metadata.get("reference") == reference


def test_generated_summaries_are_checkable_and_load_as_they_are(tmp_path):
    """A summary that was preferred has every fact; the other one misses one, invents one or is too long."""
    rows = make_posts(40)
    for row in rows:
        (record,) = parse_records(row)
        assert check(record.metadata, answer_text(record.chosen)) == 1
        assert check(record.metadata, answer_text(record.rejected)) < 1
        assert record.prompt[0]["content"].endswith("TL;DR:") and record.metadata["worker"] == "w"
    file = write(tmp_path, [*rows, *rows])
    prompts = read_prompts(config("evaluation.suite=tldr", f"evaluation.prompts={file}")).prompts
    assert len(prompts) == 40 and all(" bought a " in p.metadata["reference"] for p in prompts)
    worst = [row["summaries"][1 - row["choice"]]["text"] for row in rows]
    good = [row["summaries"][row["choice"]]["text"] for row in rows]
    references = [[p.metadata["reference"]] for p in prompts]
    assert rouge_l(good, references) == [1.0] * 40 and max(rouge_l(worst, references)) < 1


def test_a_summary_of_one_row_without_text_is_skipped(tmp_path):
    file = write(tmp_path, [{"info": {"title": "x"}}, {"info": POST}])
    prompts = read_prompts(config("evaluation.suite=tldr", f"evaluation.prompts={file}"))
    assert len(prompts.prompts) == 1 and [bad.reason for bad in prompts.skipped] == ["prompt_missing"]
    assert summarization_row({"article": "", "prompt": "p"}) == {"article": "", "prompt": "p"}


def test_public_prompt_files_of_other_suites_load(tmp_path):
    alpaca = write(
        tmp_path, [{"instruction": "Name a sea.", "output": "x", "generator": "g", "dataset": "d"}], "a.jsonl"
    )
    arena = write(
        tmp_path,
        [{"uid": "1", "category": "hard_prompt", "subcategory": "s", "prompt": "Sort it."}],
        "b.jsonl",
    )
    for suite, file, text, column in (
        ("alpaca_eval", alpaca, "Name a sea.", "dataset"),
        ("arena_hard_v2", arena, "Sort it.", "category"),
    ):
        (prompt,) = read_prompts(config(f"evaluation.suite={suite}", f"evaluation.prompts={file}")).prompts
        assert prompt.prompt == [{"role": "user", "content": text}] and column in prompt.metadata


def test_a_suite_of_the_user(tmp_path):
    write(tmp_path, [{"prompt": f"p{i}", "gold": "g"} for i in range(5)])
    (tmp_path / "mine.txt").write_text("Prefer rhymes.")
    (tmp_path / "mine.yaml").write_text(
        "prompts: prompts.jsonl\nrubric: mine.txt\nmax_prompts: 3\n"
        "reference_column: gold\nslice_by: [topic]\n"
    )
    made = config(f"evaluation.suite={tmp_path / 'mine.yaml'}")
    assert [p.prompt[0]["content"] for p in read_prompts(made).prompts] == ["p0", "p1", "p2"]
    assert "Prefer rhymes." in template(made, tmp_path)
    assert (reference_column(made), slice_columns(made)) == ("gold", ["topic"])


@pytest.mark.parametrize(
    ("suite", "content", "message"),
    [
        ("mt_bank", None, r"evaluation\.suite=mt_bank: unknown; must be one of alpaca_eval, .*, tldr, or"),
        ("x.jsonl", "{}", "a file of prompts goes to evaluation.prompts"),
        ("x.yaml", "prompt: x", r"evaluation\.suite\.prompt: unknown key.*prompts"),
        ("x.yaml", "max_prompts: 0", r"evaluation\.suite\.max_prompts=0"),
        ("x.yaml", "- a", "must contain a mapping"),
        ("x.yaml", "rubric: none.txt", r"rubric=none\.txt: unknown; must be one of general"),
        ("x.yaml", "rubric: general", r"evaluation\.prompts: missing"),
    ],
)
def test_an_unusable_suite_is_refused(suite, content, message, tmp_path):
    name = suite
    if content is not None:
        (tmp_path / suite).write_text(content)
        name = str(tmp_path / suite)
    with pytest.raises(InputError, match=message):
        read_prompts(config(f"evaluation.suite={name}"))


def test_missing_prompts_name_where_to_get_them():
    with pytest.raises(
        InputError, match=r"evaluation\.prompts: missing; evaluation\.suite=tldr .*openai/summ"
    ):
        read_prompts(config("evaluation.suite=tldr", "data.eval=builtin:copyedit"))


def test_a_suite_without_a_judge_of_free_text_is_refused(tmp_path):
    plain = load_config(None, ["evaluation.suite=helpful"])
    with pytest.raises(InputError, match=r"evaluation\.judge\.kind=checker: .*use llm or reward_model"):
        make_judge(plain, source="x", output=tmp_path)


def test_a_reference_column_that_no_prompt_has_is_refused(tmp_path):
    file = write(tmp_path, [{"prompt": "p", "topic": "t"}])
    with pytest.raises(InputError, match=r"evaluation\.reference_column=gold: none of the 1 .* topic"):
        read_prompts(config(f"evaluation.prompts={file}", "evaluation.reference_column=gold"))


def test_rouge_l_is_the_longest_common_subsequence_of_words():
    # 3 of 4 words in order: precision 3/4, recall 3/5, F = 2 * 0.75 * 0.6 / 1.35.
    (value,) = rouge_l(["the cat sat down"], [["the big cat sat there"]])
    assert value == pytest.approx(2 / 3)
    assert rouge_l(["cats sat"], [["cat sits"]])[0] == pytest.approx(0.5)  # stemmed: cat
    assert rouge_l(["b", ""], [["a", "b"], ["a"]]) == [1.0, 0.0]  # the most similar reference


def test_rouge_metrics_are_means_over_the_prompts_with_a_reference(make_sample):
    one = replace(make_sample(0, "a b"), metadata={"gold": "a b"})
    other = replace(make_sample(0, "x y", 1), metadata={"gold": "a b"})
    two = replace(make_sample(1, "a b"), metadata={"gold": ["a b", "c"]})
    three = replace(make_sample(2, "a b"), metadata={"gold": None})
    groups = {"0": [one, other], "1": [two], "2": [three]}
    metrics = rouge_metrics(groups, "gold")
    assert metrics["rouge_l"].value == pytest.approx((0.5 + 1) / 2) and metrics["rouge_l_prompts"].value == 2
    low, high = metrics["rouge_l"].low, metrics["rouge_l"].high
    assert low is not None and high is not None and low < 0.75 < high
    assert rouge_metrics(groups, "other") == {} and references_of({"gold": ["", 3, "x"]}, "gold") == ["x"]
