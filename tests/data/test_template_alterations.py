"""What a chat template drops, hides or changes is counted or quarantined."""

import pytest

from tbpo_ray.data.records import Record
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.tokenize import TokenizedPair
from tests.data.turns import (
    EOS,
    TOOL_CHAT,
    answer_of,
    call_of,
    pair_of,
    pairs_of,
    tool_result,
    user,
)

from .conftest import CHAT, decode_answer, make_tokenizer


def test_an_answer_that_the_template_refuses_or_hides_is_its_text():
    refuses = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    for template in (refuses + "{{ messages[0].content }}", "{{ messages[0].content }}"):
        tokenizer = pairs_of(make_tokenizer(template=template))
        (pair,) = tokenizer.pairs([pair_of(user("the cat"), "sat", "mat")])
        assert decode_answer(tokenizer, pair.chosen_ids) == "sat" and pair.chosen_ids[-1] == EOS
        assert tokenizer.counts["answer_rendered_plain"] == 2


def test_thoughts_that_a_template_drops_are_counted():
    template = CHAT.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
    tokenizer = pairs_of(make_tokenizer(template=template))
    tokenizer.pairs([pair_of(user("the cat"), "<think>hello</think>sat", "mat")])
    assert tokenizer.counts["answer_altered_by_template"] == 1


def test_turns_that_change_once_others_follow_are_quarantined():
    template = "{% for m in messages %}{{ m.role ~ loop.revindex ~ m.content }}</s>{% endfor %}"
    tokenizer = pairs_of(make_tokenizer(template=template))
    answer = [*answer_of("a"), *user("b"), *answer_of("c")]
    (error,) = tokenizer.pairs([Record(user("x"), answer, answer_of("y"))])
    assert error.reason == "template_not_prefix_stable"


def test_a_tool_result_behind_a_hidden_first_turn_is_never_trained():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA:"
        "{% elif m.role == 'assistant' %}{% if m.content %} {{ m.content }}{% endif %}\n"
        "{% else %}Tool: {{ m.content }}\nA:{% endif %}{% endfor %}"
    )
    tokenizer = pairs_of(make_tokenizer(template=template))
    answer = [*call_of("look_up"), *tool_result("the mat"), *answer_of("hello")]
    (error,) = tokenizer.pairs([Record(user("x"), answer, answer_of("sat"))])
    assert isinstance(error, RecordError) and error.reason == "template_not_prefix_stable"


def test_what_a_template_drops_from_any_turn_of_an_answer_is_counted():
    thought = [{"role": "assistant", "content": "sat", "reasoning_content": "hmm"}]
    for template, first, altered in (
        (CHAT, call_of("look_up") + thought, 1),
        (TOOL_CHAT, call_of("look_up", reasoning_content="hmm"), 1),
        (TOOL_CHAT, call_of("look_up"), 0),
        (CHAT, answer_of("hello"), 0),
    ):
        first = [turn | {"content": turn["content"] or "cat"} for turn in first]
        tokenizer = pairs_of(make_tokenizer(template=template))
        answer = [*first, *tool_result("the mat"), *answer_of("friend")]
        (pair,) = tokenizer.pairs([Record(user("x"), answer, answer_of("mat"))])
        assert isinstance(pair, TokenizedPair)
        assert tokenizer.counts["answer_altered_by_template"] == altered


def test_arguments_of_a_call_that_a_template_drops_are_counted():
    drops = TOOL_CHAT.replace("{{ c['function']['arguments'] | tojson }}", "")
    for template, altered in ((drops, 1), (TOOL_CHAT, 0)):
        tokenizer = pairs_of(make_tokenizer(template=template))
        tokenizer.pairs([Record(user("x"), call_of("look_up"), answer_of("mat"))])
        assert tokenizer.counts["answer_altered_by_template"] == altered


@pytest.mark.parametrize(
    "first, counted",
    [
        ([{"role": "system", "content": "the friend"}], 1),
        ([*user("sat"), *call_of("look_up"), *tool_result("the friend")], 1),
        ([*user("sat"), *answer_of("<think>hello</think>on")], 0),
        ([], 0),
    ],
)
def test_turns_of_a_prompt_that_a_template_drops_are_counted(first, counted):
    template = CHAT.replace("for m in messages", "for m in messages if m.role in ('user', 'assistant')")
    template = template.replace("m['content'] }}", "(m['content'] or '').split('</think>')[-1] }}")
    prompt = [*first, *user("the cat")]
    for read in (
        lambda tokenizer: tokenizer.pairs([pair_of(prompt, "sat", "mat")]),
        lambda tokenizer: tokenizer.prompts([prompt]),
    ):
        tokenizer = pairs_of(make_tokenizer(template=template))
        read(tokenizer)
        assert tokenizer.counts["prompt_altered_by_template"] == counted


def test_an_answer_behind_an_opened_thought_is_not_altered():
    template = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
    tokenizer = pairs_of(make_tokenizer(template=template))
    tokenizer.pairs([pair_of(user("the cat"), "<think>\non\n</think>sat", "<think>\non\n</think>mat")])
    assert tokenizer.counts["answer_altered_by_template"] == 0


def test_a_turn_that_is_hidden_but_for_its_end_is_quarantined():
    hides = CHAT.replace("m['content'] }}", "(m['content'] or '') }}")
    thought = [{"role": "assistant", "content": "", "reasoning_content": "hmm"}]
    for hidden in (call_of("look_up"), thought):
        tokenizer = pairs_of(make_tokenizer(template=hides))
        for answer in (hidden, [*answer_of("sat"), *user("on"), *hidden]):
            (error,) = tokenizer.pairs([Record(user("x"), answer, answer_of("mat"))])
            assert isinstance(error, RecordError) and error.reason == "answer_without_tokens"
    # A turn that says nothing may be written as nothing.
    answer = [*answer_of(""), *user("on"), *answer_of("sat")]
    (pair,) = pairs_of(make_tokenizer(template=hides)).pairs([Record(user("x"), answer, answer_of("mat"))])
    assert isinstance(pair, TokenizedPair)


def test_tools_that_the_template_ignores_are_counted():
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    for template, ignored in ((CHAT, 1), ("{{ tools | tojson if tools }}" + CHAT, 0)):
        tokenizer = pairs_of(make_tokenizer(template=template))
        tokenizer.pairs([Record(user("x"), answer_of("sat"), answer_of("mat"), tools=tools)])
        tokenizer.pairs([Record(user("x"), answer_of("sat"), answer_of("mat"))])
        assert tokenizer.counts["tools_ignored_by_template"] == ignored
