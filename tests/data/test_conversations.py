"""A corpus of conversations through the styles of public templates: the tokens of `apply_chat_template`."""

import pytest

from tbpo_ray.data.records import Record
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec
from tbpo_ray.models.chat import FIXED_DATE

from .chat_styles import ENDS, STYLES, style_tokenizer

KINDS = ("bytes", "metaspace", "metaspace_always", "prepend")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(city):
    function = {"name": "get_weather", "arguments": {"city": city}}
    return say("assistant", "", tool_calls=[{"id": "abcdefghi", "type": "function", "function": function}])


def result(text):
    return say("tool", text, name="get_weather", tool_call_id="abcdefghi")


HELLO = [say("user", "hello")]
CORPUS = {
    "plain": (HELLO, [say("assistant", "hello world")], None),
    "system": ([say("system", "be brief"), *HELLO], [say("assistant", "the fox")], None),
    "several turns": (
        [say("user", "the fox"), say("assistant", "the dog"), say("user", "and?")],
        [say("assistant", "the weather in Oslo")],
        None,
    ),
    "cjk": (
        [say("user", "天气 怎么样?")],
        [say("assistant", "奥斯陆 12 度。\n\n日本語も、한국어도。")],
        None,
    ),
    "rtl": ([say("user", "مرحبا")], [say("assistant", "مرحبا بك، שלום")], None),
    "emoji": ([say("user", "🙂👩‍👩‍👧")], [say("assistant", "👍🏽 ok 🇳🇴")], None),
    "white space": ([say("user", "a\n\n b ")], [say("assistant", "one\n\n    two\n\tthree")], None),
    "white space at the end": (HELLO, [say("assistant", "the fox \n ")], None),
    "empty turn": ([say("user", ""), say("assistant", ""), *HELLO], [say("assistant", "hello")], None),
    "thinking": (HELLO, [say("assistant", "<think>\nthe fox\n</think>\n\nthe dog")], None),
    "thinking without an opener": (HELLO, [say("assistant", "the fox\n</think>\n\nthe dog")], None),
    "other thinking": (HELLO, [say("assistant", "◁think▷the fox◁/think▷the dog")], None),
    "thinking in the prompt": (
        [*HELLO, say("assistant", "<think>\nthe fox\n</think>\n\nthe dog"), *HELLO],
        [say("assistant", "<think>\nthe weather\n</think>\n\nin Oslo")],
        None,
    ),
    "reasoning": (HELLO, [say("assistant", "the dog", reasoning_content="the fox jumps")], None),
    "code": (HELLO, [say("assistant", "```python\nx = {'a': [1, 2]}\n```")], None),
    "tool call": (HELLO, [call("Oslo")], TOOLS),
    "tool result in the prompt": (
        [*HELLO, call("Oslo"), result("12")],
        [say("assistant", "12 degrees")],
        TOOLS,
    ),
    "tool result in the answer": (HELLO, [call("天气"), result("12"), say("assistant", "12 degrees")], TOOLS),
    "user turn in the answer": (HELLO, [say("assistant", "fox"), *HELLO, say("assistant", "the dog")], None),
}
ENDS_ONCE = ("last eos", "last eos, words", "always eos", "harmony")
"""Styles that write their end token behind the last turn only."""
_NEEDS = {"system": ("system",), "tool call": ("tool",), "tool result in the prompt": ("tool",)}
_NEEDS |= {"tool result in the answer": ("tool",)}


def encode(tokenizer, prompt, answer, tools=None, **kwargs):
    other = [say("assistant", "the lazy dog")]
    pairs = PairTokenizer(TokenizerSpec.of(tokenizer), 4096, 2048)
    record = Record(prompt, answer, other, tools=tools, template_kwargs=kwargs)
    (pair,) = pairs.pairs([record])
    return pairs, pair


def expected(tokenizer, style, messages, tools=None, **kwargs):
    """transformers' tokens of a conversation up to the end of its last turn."""
    options = {"date_string": FIXED_DATE.strftime("%d %b %Y"), "strftime_now": FIXED_DATE.strftime}
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=False, **options, **kwargs
    )
    end = tokenizer.convert_tokens_to_ids(ENDS[style])
    return encoded[: len(encoded) - encoded[::-1].index(end)] if end in encoded else encoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", STYLES)
def test_prompt_and_answer_are_the_tokens_of_the_whole_conversation(style, kind):
    tokenizer = style_tokenizer(style, kind)
    for name, (prompt, answer, tools) in CORPUS.items():
        pairs, pair = encode(tokenizer, prompt, answer, tools)
        if set(_NEEDS.get(name, ())) & set(STYLES[style][5]) or (style == "gemma" and name == "tool call"):
            assert isinstance(pair, RecordError) or name == "tool call", name
            continue
        assert not isinstance(pair, RecordError), (name, pair)
        want = expected(tokenizer, style, [*prompt, *answer], tools)
        got = pair.prompt_ids + pair.chosen_ids
        assert got == want, (name, *map(tokenizer.convert_ids_to_tokens, (got, want)))
        assert not pairs.counts["answer_rendered_plain"]


@pytest.mark.parametrize("style", STYLES)
def test_only_the_assistant_s_turns_are_trained(style):
    tokenizer = style_tokenizer(style, "bytes")
    for name in ("tool result in the answer", "user turn in the answer"):
        prompt, answer, tools = CORPUS[name]
        if set(_NEEDS.get(name, ())) & set(STYLES[style][5]):
            continue
        _, pair = encode(tokenizer, prompt, answer, tools)
        trained = [t for t, mask in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if mask]
        context = [t for t, mask in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if not mask]
        end = tokenizer.convert_tokens_to_ids(ENDS[style])
        assert len(pair.chosen_mask) == len(pair.chosen_ids) and pair.rejected_mask is None
        assert trained.count(end) == (1 if style in ENDS_ONCE else 2) and pair.chosen_mask[-1]
        assert answer[1]["content"] in tokenizer.decode(context)
        assert answer[-1]["content"] in tokenizer.decode(trained)
        assert "hello" not in tokenizer.decode(trained)


def pair_of(style, answer):
    tokenizer = style_tokenizer(style, "bytes")
    return tokenizer, *encode(tokenizer, HELLO, answer)


@pytest.mark.parametrize("style", ["qwen3 special", "deepseek r1", "qwq"])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_markers_in_the_words_of_users_and_tools_stay_text(style, role):
    spelled = "say </think> <think> and <|im_end|> <｜User｜>"
    answer = [say("assistant", "fox"), say(role, spelled), say("assistant", "<think>\na\n</think>\n\ndog")]
    tokenizer, pairs, pair = pair_of(style, answer)
    context = [t for t, trained in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if not trained]
    markers = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert spelled in tokenizer.decode(context) and not set(markers) & set(context[:-3])
    assert pairs.counts["special_text_in_answer"] == 1


def test_structure_spelled_in_an_assistant_s_content_stays_text():
    for style, spelled in (
        ("qwen3 special", "<|im_end|><|im_start|>user <tool_call>"),
        ("cohere", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|><|START_ACTION|>"),
        ("granite", "<|tool_call|><|end_of_text|>"),
        ("phi4 mini", "<|end|><|user|>"),
    ):
        tokenizer, pairs, pair = pair_of(style, [say("assistant", f"the {spelled} fox")])
        _, _, plain = pair_of(style, [say("assistant", "the fox")])
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        found, known = ([t for t in p.chosen_ids if t in special] for p in (pair, plain))
        assert found == known, style
        assert spelled in tokenizer.decode(pair.chosen_ids)
        assert pairs.counts["special_text_in_answer"] == 1 and plain


def test_thoughts_in_a_field_stay_text():
    thought = say("assistant", "dog", reasoning_content="the </think> fox")
    tokenizer, _, pair = pair_of("qwen3 special", [thought])
    assert pair.chosen_ids.count(tokenizer.convert_tokens_to_ids("</think>")) == 1
    assert "the </think> fox" in tokenizer.decode(pair.chosen_ids)


MARKERS = {
    "qwen2": (), "llama3": (), "gemma": (), "mistral": (), "phi3": (), "granite": (), "phi4 mini": (),
    "qwen3 special": ("<think>", "</think>"), "qwq": ("<think>", "</think>"),
    "deepseek r1": ("<think>", "</think>"), "kimi": ("◁think▷", "◁/think▷"),
    "cohere": ("<|START_THINKING|>", "<|END_THINKING|>"), "always eos": (),
}  # fmt: skip


@pytest.mark.parametrize("style", MARKERS)
def test_the_markers_of_a_template_are_found(style):
    pairs = PairTokenizer(TokenizerSpec.of(style_tokenizer(style, "bytes")), 64, 32)
    assert pairs._markers == set(MARKERS[style])


def test_both_ends_of_a_turn_belong_to_the_answer():
    for answer in ([say("assistant", "the fox")], CORPUS["user turn in the answer"][1]):
        tokenizer, pairs, pair = pair_of("cohere", answer)
        first, last = tokenizer.convert_tokens_to_ids(["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"])
        assert pair.chosen_ids[-2:] == [first, last] and pairs.end == last
        trained = [t for t, m in zip(pair.chosen_ids, pair.chosen_mask or [True] * 99, strict=False) if m]
        turns = sum(turn["role"] == "assistant" for turn in answer)
        assert trained.count(first) == trained.count(last) == turns


@pytest.mark.parametrize("style", ["last eos", "last eos, words", "always eos"])
def test_a_turn_has_no_end_where_the_template_writes_one_behind_the_last_only(style):
    tokenizer, pairs, pair = pair_of(style, CORPUS["user turn in the answer"][1])
    trained = [t for t, mask in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if mask]
    end = tokenizer.convert_tokens_to_ids("</s>")
    assert trained.count(end) == 1 and trained[-1] == end and pair.chosen_ids.count(end) == 1
    assert tokenizer.decode(trained).split() == ["foxthe", "dog</s>"] or "fox" in tokenizer.decode(trained)
    assert pairs.counts["turn_without_end"] == 1


def test_a_turn_that_says_nothing_never_swallows_the_next_ones():
    answer = [say("assistant", "  "), *HELLO, say("assistant", "fox")]
    _, _, pair = pair_of("last eos, words", answer)
    assert isinstance(pair, RecordError) and pair.reason == "template_not_prefix_stable"


def test_tools_of_a_message_are_written_once():
    reads = "{{ m.tools | tojson if m.tools }}{{ m.content }}</s>{% endfor %}"
    reads = "{% for m in messages %}" + reads
    for template, count in (
        (reads, 1),
        ("{{ tools | tojson if tools }}" + reads, 1),
        ("{{ tools }}" + reads, 1),
    ):
        tokenizer = style_tokenizer("mistral", "bytes")
        tokenizer.chat_template = template
        turn = say("user", "hello", tools=TOOLS)
        _, pair = encode(tokenizer, [turn], [say("assistant", "fox")], TOOLS)
        assert tokenizer.decode(pair.prompt_ids).count("get_weather") == count
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + reads.replace("m.tools", "m.other")
    _, pair = encode(tokenizer, [turn], [say("assistant", "fox")], TOOLS)
    assert tokenizer.decode(pair.prompt_ids).count("get_weather") == 1
