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
    "empty turn": ([say("user", ""), say("assistant", ""), *HELLO], [say("assistant", "hello")], None),
    "thinking": (HELLO, [say("assistant", "<think>\nthe fox\n</think>\n\nthe dog")], None),
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
    return encoded[: len(encoded) - encoded[::-1].index(end)]


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
        assert trained.count(end) == 2 and pair.chosen_mask[-1]
        assert answer[1]["content"] in tokenizer.decode(context)
        assert answer[-1]["content"] in tokenizer.decode(trained)
        assert "hello" not in tokenizer.decode(trained)
