"""Prompts reach policies in the tokens of training, and judges as text that hides nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.evaluation.prompts import read_prompts, tokenize_prompts
from tbpo_ray.evaluation.readable import conversation_text
from tbpo_ray.generation.pool import sampling_fingerprint
from tbpo_ray.generation.rows import input_rows
from tbpo_ray.generation.samples import PromptTokens

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Will it rain in Oslo?"},
    {"role": "assistant", "content": None, "reasoning_content": "I need the weather.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "heavy rain"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": " Rome?"}]},
]
TEMPLATE = """{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}\
{% for m in messages %}{{ m.role }}: {{ m.content }}%(end)s{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""
PLAIN = TEMPLATE[TEMPLATE.index("{% for m") :]


def test_a_conversation_for_a_judge_shows_calls_results_and_reasoning():
    assert conversation_text(TURNS, [TOOL]).split("\n") == [
        f"tool definition: {json.dumps(TOOL)}",
        "system: Be brief.",
        "user: Will it rain in Oslo?",
        "assistant (reasoning content): I need the weather.",
        'assistant calls weather: {"city": "Oslo"}',
        "tool weather: heavy rain",
        "assistant: Yes.",
        "user: And Rome?",
    ]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": "a\nb"}, "a\nb"),
        ({"role": "user", "content": ""}, ""),
        ({"role": "tool", "content": "4", "tool_call_id": "c7"}, "tool c7: 4"),
        (
            {"role": "assistant", "content": "Wait.", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
            'assistant: Wait.\nassistant calls f: {"x": 1}',
        ),
        (
            {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": {"é": 1}}},
            'assistant calls f: {"é": 1}',
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": CALL},
            'assistant calls weather: {"city": "Oslo"}',
        ),
        ({"role": "assistant", "content": "a", "thinking": "b"}, "assistant (thinking): b\nassistant: a"),
    ],
)
def test_single_messages(message, text):
    assert conversation_text([message]) == text


@pytest.fixture
def evaluate(tmp_path, tiny_model):
    """Tokenize two prompts, the second one with tools, with a template of our own or the tokenizer's."""
    source = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [TURNS[1]]}, {"prompt": [TURNS[1]], "tools": [TOOL]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(template=None):
        overrides = [f"evaluation.prompts={source}"]
        if template is not None:
            file = tmp_path / "t.jinja"
            file.write_text(template)
            overrides.append(f"model.chat_template={file}")
        config = load_config(None, overrides)
        prompts = read_prompts(config)
        return prompts, tokenize_prompts(prompts, tiny_model, config)

    return run


def test_the_overriding_template_renders_prompts_and_ends_answers(evaluate, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    special = [t for t in tokenizer.all_special_tokens if t not in (tokenizer.eos_token, tokenizer.bos_token)]
    assert special, "the tiny tokenizer has a further special token"
    prompts, (plain, _) = evaluate(TEMPLATE.replace("%(end)s", special[0]))
    text = str(tokenizer.decode(plain.token_ids))
    assert "user: Will it rain in Oslo?" in text and text.endswith("assistant: ")
    assert list(plain.stop_ids) == [tokenizer.convert_tokens_to_ids(special[0])]
    assert prompts.counts == {}
    rows = input_rows([plain, PromptTokens("b", [1], "b")], GenerationConfig(samples=2), 0, None, [9])
    ends = [json.loads(row["sampling"])["stop_token_ids"] for row in rows]
    assert ends == [sorted([9, *plain.stop_ids])] * 2 + [[9]] * 2
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    _, (own, _) = evaluate()
    assert own.stop_ids == () and own.token_ids != plain.token_ids


def test_tools_that_a_template_does_not_write_are_counted(evaluate, capfd):
    prompts, (plain, tools) = evaluate(TEMPLATE.replace("%(end)s", ""))
    assert prompts.summary().get("tools_ignored_by_template") is None
    assert len(tools.token_ids) > len(plain.token_ids)
    assert tools.text == f"tool definition: {json.dumps(TOOL)}\nuser: Will it rain in Oslo?"
    prompts, (plain, tools) = evaluate(PLAIN.replace("%(end)s", ""))
    assert prompts.summary()["tools_ignored_by_template"] == 1
    assert tools.token_ids == plain.token_ids
    assert "1 of 2 prompts" in "".join(capfd.readouterr())


def test_prompts_that_a_template_rejects_are_counted(evaluate):
    refusing = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN.replace("%(end)s", "")
    prompts, tokens = evaluate(refusing)
    assert [item.id for item in tokens] == ["000000"]
    assert prompts.summary()["rejected_by_template"] == 1


def test_samples_depend_on_the_text_that_judges_read_and_on_further_stop_tokens(tiny_model):
    def of(**changes):
        prompt = PromptTokens(**{"id": "a", "token_ids": [1, 3], "text": "x"} | changes)
        return sampling_fingerprint(tiny_model, [prompt], GenerationConfig(), seed=0)

    assert of() == of(stop_ids=()) and len({of(), of(text="y"), of(stop_ids=(5,)), of(stop_ids=(6,))}) == 4
