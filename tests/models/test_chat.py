import datetime
import json

import pytest

from tbpo_ray.models.chat import ChatTemplate, stop_token_ids
from tbpo_ray.models.turn_tokens import TemplateRefusedError

USER = {"role": "user", "content": "hello"}


def template(source, **special):
    return ChatTemplate(source, special)


def call(arguments, **more):
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
        **more,
    }


@pytest.mark.parametrize(
    "source, text",
    [
        ("{{ strftime_now('%d %B %Y') }}", "26 July 2024"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        ("{{ strftime_now('%A, %H:%M:%S') }}", "Friday, 00:00:00"),
        ("{{ date_string }}", "26 Jul 2024"),
        ("{% if not date_string is defined %}{{ strftime_now('%c') }}{% endif %}", ""),
        ("{% set f = strftime_now %}{{ f('%d/%m/%y') }}", "26/07/24"),
    ],
)
def test_the_date_is_the_same_on_every_day(source, text):
    assert template(source).render([USER]) == text
    assert str(datetime.date.today().year) not in text


def test_arguments_reach_the_template_and_win_over_defaults():
    chat = template(
        "{{ date_string }}{% if enable_thinking is false %}<no>{% endif %}{{ bos_token }}", bos_token="<s>"
    )
    assert chat.render([USER]) == "26 Jul 2024<s>"
    kwargs = {"enable_thinking": False, "date_string": "today"}
    assert chat.render([USER], template_kwargs=kwargs) == "today<no><s>"


def test_every_field_of_a_message_reaches_the_template():
    chat = template(
        "{% for m in messages %}{{ m.name }}/{{ m.tool_call_id }}/{{ m.weight }};{% endfor %}{{ tools }}"
    )
    turn = {"role": "tool", "content": "12", "name": "get_weather", "tool_call_id": "a1", "weight": 2}
    assert chat.render([turn], tools=[{"name": "x"}]) == "get_weather/a1/2;[{'name': 'x'}]"


def test_a_null_content_is_never_written_out():
    turns = [USER, call({}, content=None)]
    for source in (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}",
        "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}",
        "{% for m in messages %}[{{ m.content or '' }}]{% endfor %}",
    ):
        assert template(source).render(turns) == "[hello][]"
    marks = "{% for m in messages %}{{ 'null' if m.content is none else m.content }},{% endfor %}"
    assert template(marks).render(turns) == "hello,null,"
    assert (
        template("{% for m in messages %}[{{ m.content }}]{% endfor %}").render(
            [{"role": "user", "content": "None of it"}, *turns]
        )
        == "[None of it][hello][]"
    )


@pytest.mark.parametrize("given", [{"city": "Oslo"}, '{"city": "Oslo"}'])
@pytest.mark.parametrize(
    "expression",
    [
        "f.arguments | tojson",
        "'' + f.arguments",
        "f.arguments if f.arguments is string else f.arguments | tojson",
    ],
)
def test_arguments_of_tool_calls_are_written_as_json_once(expression, given):
    calls = "{% for c in m.tool_calls or [] %}{% set f = c.function %}{{ X }}{% endfor %}"
    source = "{% for m in messages %}" + calls + "{% endfor %}"
    text = template(source.replace("X", expression)).render([USER, call(given)])
    assert text == '{"city": "Oslo"}'


def test_arguments_may_be_walked_by_key():
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}{% endfor %}{% endfor %}"
    )
    for given in ({"city": "Oslo"}, '{"city": "Oslo"}'):
        assert template(source).render([USER, call(given)]) == "<city>Oslo"


def test_content_parts_are_passed_to_templates_that_read_them_and_joined_for_others():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    turn = [{"role": "user", "content": parts}]
    for source in (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}",
        "{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}",
    ):
        assert template(source).render(turn) == "[one two]"
    reads = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}"
    )
    assert template(reads).render(turn) == "<one ><two>"


def test_a_developer_turn_is_a_system_turn_unless_the_template_knows_developers():
    turn = [{"role": "developer", "content": "x"}]
    assert template("{% for m in messages %}{{ m.role }}{% endfor %}").render(turn) == "system"
    knows = "{% for m in messages %}{% if m.role == 'developer' %}D{% endif %}{% endfor %}"
    assert template(knows).render(turn) == "D"


def test_a_template_for_tools_is_used_where_there_are_tools():
    chat = ChatTemplate("plain", {}, "tools")
    assert chat.render([USER]) == "plain" and chat.render([USER], tools=[{"name": "x"}]) == "tools"


def test_what_a_template_refuses_is_said_in_its_words():
    with pytest.raises(TemplateRefusedError, match="one at a time"):
        template("{{ raise_exception('one at a time') }}").render([USER])


@pytest.mark.parametrize(
    "source, end",
    [
        ("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}</s>", "<|end|>"),
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}</s>", None),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{{ messages[0].content }}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_token_behind_a_turn_is_found(source, end):
    assert template(source).turn_end(["</s>", "<|im_start|>", "<|im_end|>", "<|end|>", " "]) == end


TURNS = "{% for m in messages %}<|user|>{{ m.content }}END{% endfor %}"


@pytest.mark.parametrize(
    "source, ends",
    [
        (TURNS.replace("END", "<|end|></s>"), ("<|end|>", "</s>")),
        (TURNS.replace("END", "\n<|end|></s>\n"), ("<|end|>", "</s>")),
        (TURNS.replace("END", "<|end|>\n</s>"), ("<|end|>",)),
        # The conversation's own end is not that of a turn.
        (TURNS.replace("END", "<|end|>") + "</s>", ("<|end|>",)),
        (TURNS.replace("END", "{% if loop.last %}<|end|>{% endif %}"), ("<|end|>",)),
        (TURNS.replace("END", "") + "<|end|></s>", ("<|end|>", "</s>")),
        # What begins the next turn is neither.
        ("{% for m in messages %}<s>{{ m.content }}<|end|>{% endfor %}", ("<|end|>",)),
        ("{% for m in messages %}{{ m.content }}<|end|><s>{% endfor %}", ("<|end|>",)),
        (TURNS.replace("END", "] .<|end|></s>"), ("<|end|>", "</s>")),
        (TURNS.replace("END", ""), ()),
    ],
)
def test_the_last_of_adjacent_tokens_ends_a_turn(source, ends):
    chat = template(source, bos_token="<s>", eos_token="</s>")
    tokens = ["<s>", "</s>", "<|user|>", "<|end|>"]
    assert chat.turn_ends(tokens, tokens) == ends
    assert chat.turn_end(tokens, tokens) == (ends[-1] if ends else None)


@pytest.mark.parametrize(
    "refuses",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% if not tools %}{{ raise_exception('no tools') }}{% endif %}",
        "{% if not tools or messages[0].role != 'system' %}{{ raise_exception('neither') }}{% endif %}",
    ],
)
def test_the_token_behind_a_turn_is_found_where_the_plain_conversation_is_refused(refuses):
    source = refuses + "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    assert template(source).turn_end(["</s>", "<|end|>"]) == "<|end|>"


def test_a_special_token_counts_behind_other_text_than_white_space():
    chat = template("{% for m in messages %}[{{ m.content }}] .<|end|>\n</s>{% endfor %}")
    assert chat.turn_end(["</s>", "<|end|>"], ["</s>", "<|end|>"]) == "<|end|>"
    assert chat.turn_end(["]", "</s>", "<|end|>"], ["</s>", "<|end|>"]) == "]"
    assert chat.turn_end(["</s>", "<|end|>"]) is None


def test_stop_tokens_are_those_of_template_tokenizer_and_configurations(tmp_path):
    from tests.data.conftest import make_tokenizer

    source = "{% for m in messages %}<|user|>{{ m.content }}<|assistant|>{% endfor %}"
    tokenizer = make_tokenizer(template=source)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 9}))
    assistant, eos = tokenizer.convert_tokens_to_ids(["<|assistant|>", "</s>"])
    assert stop_token_ids(str(tmp_path)) == sorted([eos, assistant, 9])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, eos]}))
    assert stop_token_ids(str(tmp_path)) == sorted([eos, assistant, 7, 9])
    assert stop_token_ids(str(tmp_path), chat_template="none") == sorted([eos, 7, 9])
    # Of two tokens behind a turn the first does not end an answer that is being sampled.
    source = "{% for m in messages %}{{ m.content }}<|user|><|assistant|>\n{% endfor %}"
    make_tokenizer(template=source).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert stop_token_ids(str(tmp_path)) == sorted([eos, assistant, 9])
