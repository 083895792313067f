"""Where a prompt ends and an answer begins, and that no field of a message is lost on the way."""

import json
from typing import Any

import pytest

from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.records import parse_prompt, parse_records
from tbpo_ray.data.rejection_reasons import RecordError

U, A, S = (
    lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system")
)
DEVELOPER = {"role": "developer", "content": "D"}
CALL: dict[str, Any] = {
    "type": "function",
    "id": "1",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5", "tool_call_id": "1", "name": "weather"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def pair(prompt=None, chosen="yes", rejected="no", **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def both(*start, a="yes", b="no"):
    return {"chosen": [*start, A(a)], "rejected": [*start, A(b)]}


PROMPTS = {
    "answers repeat all but the system turn": (
        {"prompt": [S("French."), U("Q")], **both(U("Q"))},
        [S("French."), U("Q")],
    ),
    "answers repeat all": ({"prompt": [S("F."), U("Q")], **both(S("F."), U("Q"))}, [S("F."), U("Q")]),
    "answers repeat nothing": ({"prompt": [S("F."), U("Q")], **both()}, [S("F."), U("Q")]),
    "answers state the system turn": ({"prompt": [U("Q")], **both(S("F."), U("Q"))}, [S("F."), U("Q")]),
    "answers repeat the last turn": (
        {"prompt": [U("x"), A("y"), U("Q")], **both(U("Q"))},
        [U("x"), A("y"), U("Q")],
    ),
    "answers repeat the last turns from an assistant's": (
        {"prompt": [U("w"), U("x"), A("y"), U("Q")], **both(A("y"), U("Q"))},
        [U("w"), U("x"), A("y"), U("Q")],
    ),
    "answers repeat a call's result": (
        {"prompt": [U("Q"), CALLING, RESULT], **both(CALLING, RESULT)},
        [U("Q"), CALLING, RESULT],
    ),
    "answers go on": ({"prompt": [U("x")], **both(U("x"), A("y"), U("Q"))}, [U("x"), A("y"), U("Q")]),
    "only a system turn": ({"prompt": [S("F.")], **both(U("Q"))}, [S("F."), U("Q")]),
    "other white space": (
        {"prompt": [U("a  b")], "chosen": [U("a b\n"), A("yes")], "rejected": [U("a  b"), A("no")]},
        [U("a  b")],
    ),
    "text is the last turn": (
        {"prompt": "Q", **both(U("x"), A("y"), U("Q"))},
        [U("x"), A("y"), U("Q")],
    ),
    "text is the first turn": (
        {"prompt": "x", **both(U("x"), A("y"), U("Q"))},
        [U("x"), A("y"), U("Q")],
    ),
    "text and a system turn": ({"prompt": "Q", **both(S("F."), U("Q"))}, [S("F."), U("Q")]),
    "JSON text": (
        pair(json.dumps([S("F."), U("Q")]), json.dumps([A("yes")]), json.dumps([A("no")])),
        [S("F."), U("Q")],
    ),
    "a single message": (pair(U("Q"), A("yes"), A("no")), [U("Q")]),
    "system column": (pair("Q", system="F."), [S("F."), U("Q")]),
    "system_prompt column": ({"system_prompt": "F.", **both(U("Q"))}, [S("F."), U("Q")]),
    "the same system turn twice": (pair([S("F."), U("Q")], system=" F.\n"), [S("F."), U("Q")]),
    "an empty system column": (pair("Q", system=" "), [U("Q")]),
    "an empty column before the filled one": (pair("Q", system="", system_prompt="F."), [S("F."), U("Q")]),
    "a null column before the filled one": (pair("Q", system=None, system_prompt="F."), [S("F."), U("Q")]),
    "a system column of messages": (pair("Q", system=[S("F.")]), [S("F."), U("Q")]),
    "a system column with a list of one text": (pair("Q", system=["F."]), [S("F."), U("Q")]),
    "messages as JSON text": (
        pair("Q", messages=json.dumps([S("F."), U("Q")])),
        [S("F."), U("Q")],
    ),
    "a prompt in messages": (
        pair("Q", messages=[S("F."), U("Q"), A("yes")]),
        [S("F."), U("Q")],
    ),
    "developer": (
        pair([{"role": "developer", "content": "D"}, U("Q")]),
        [{"role": "developer", "content": "D"}, U("Q")],
    ),
    "the same conversation twice": (
        pair(messages=[S("F."), U("Q")], conversations=[S("F. "), {"from": "human", "value": "Q"}, A("yes")]),
        [S("F."), U("Q")],
    ),
    "the same system column twice": (pair("Q", system="F.", system_prompt="F. "), [S("F."), U("Q")]),
    "a system turn before one answer, the other plain": (
        {"prompt": [U("Q")], "chosen": [S("F."), U("Q"), A("yes")], "rejected": "no"},
        [S("F."), U("Q")],
    ),
    "a system turn before one answer, the other alone": (
        {"prompt": [U("Q")], "chosen": [A("yes")], "rejected": [S("F."), U("Q"), A("no")]},
        [S("F."), U("Q")],
    ),
    "transcript that ends in Human": (pair("\n\nHuman: Q"), [U("Q")]),
    "text that looks like JSON": (pair('{"role": 1'), [U('{"role": 1')]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_explicit_prompt_is_followed_by_what_the_answers_share(name):
    row, prompt = PROMPTS[name]
    (record,) = parse_records(row)
    assert record.prompt == prompt == parse_prompt(row).prompt
    assert (record.chosen, record.rejected) == ([A("yes")], [A("no")])


REFUSED = {
    "another question": ({"prompt": "one", **both(U("two"))}, "prompts_differ"),
    "another question in messages": ({"prompt": [U("one")], **both(U("two"))}, "prompts_differ"),
    "another system turn": ({"prompt": [S("F."), U("Q")], **both(S("G."), U("Q"))}, "prompts_differ"),
    "another system column": (pair([S("F."), U("Q")], system="G."), "prompts_differ"),
    "a number in the system column": (pair("Q", system=7), "message_malformed"),
    "two texts in the system column": (pair("Q", system=["F.", "G."]), "message_malformed"),
    "a user's turn in the system column": (pair("Q", system=[U("F.")]), "message_malformed"),
    "a system turn before one answer": (
        {"prompt": [U("Q")], "chosen": [S("F."), U("Q"), A("yes")], "rejected": [U("Q"), A("no")]},
        "prompts_differ",
    ),
    "a history before one answer": (
        {"prompt": "Q", "chosen": [U("x"), A("y"), U("Q"), A("yes")], "rejected": [U("Q"), A("no")]},
        "prompts_differ",
    ),
    "prompt and messages": (pair("one", messages=[U("two")]), "prompts_differ"),
    "transcripts with another question": (
        pair("Q", "\n\nHuman: R\n\nAssistant: yes", "\n\nHuman: R\n\nAssistant: no"),
        "prompts_differ",
    ),
    "a begun answer": (pair([U("Q"), A("Sure, ")], [A("yes")], [A("no")]), "prompt_ends_in_answer"),
    "a begun answer in a transcript": (pair("\n\nHuman: Q\n\nAssistant: Sure,"), "prompt_ends_in_answer"),
    "a begun answer that is repeated": (
        pair([U("Q"), A("Sure, ")], [A("Sure, "), A("yes")], [A("Sure, "), A("no")]),
        "prompt_ends_in_answer",
    ),
    "a call that is not JSON": (
        pair("Q", [{**CALLING, "tool_calls": ["weather"]}, RESULT, A("yes")]),
        "message_malformed",
    ),
    "an image part": (
        pair([{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image"}]}]),
        "media_not_supported",
    ),
    "an image address": (
        pair([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "media_not_supported",
    ),
    "audio": (
        pair([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]),
        "media_not_supported",
    ),
    "an image column": (pair("Q", images=["x.png"]), "media_not_supported"),
    "a video column": (pair("Q", video={"path": "x", "bytes": None}), "media_not_supported"),
    "null content": (pair("Q", [{"role": "assistant", "content": None}]), "message_malformed"),
    "an unknown part": (pair("Q", [{"role": "assistant", "content": [{"type": "x"}]}]), "message_malformed"),
    "an unknown call": (
        pair([U("Q"), {"from": "function_call", "value": "not JSON"}]),
        "message_malformed",
    ),
    "another conversation": (
        pair(messages=[U("Q")], conversations=[{"from": "human", "value": "R"}]),
        "prompts_differ",
    ),
    "more turns in another conversation": (
        pair(messages=[U("Q")], conversations=[U("Q"), A("a"), U("R")]),
        "prompts_differ",
    ),
    "two system columns": (pair("Q", system="F.", system_prompt="G."), "prompts_differ"),
    "two contents": (pair([{**U("Q"), "value": "R"}]), "message_malformed"),
    "two roles": (pair([{**U("Q"), "from": "gpt"}]), "message_malformed"),
    "two calls": (
        pair("Q", [{**CALLING, "function_call": {"name": "other", "arguments": "{}"}}]),
        "message_malformed",
    ),
    "two arguments of a call": (
        pair("Q", [{**CALLING, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}}]),
        "message_malformed",
    ),
    "other tools in a message": (
        pair([{**S("F."), "tools": [{"type": "function", "function": {"name": "x"}}]}, U("Q")], tools=TOOLS),
        "tools_malformed",
    ),
    "other tools in another message": (
        pair([{**U("Q"), "tools": TOOLS}], [{**A("yes"), "functions": [{"name": "x"}]}]),
        "tools_malformed",
    ),
    "other functions": (pair("Q", tools=TOOLS, functions=[{"name": "x"}]), "tools_malformed"),
    "tools of a message": (pair([{**S("F."), "tools": "calculator"}, U("Q")]), "tools_malformed"),
    "tools": (pair("Q", tools="calculator"), "tools_malformed"),
    "tools of text": (pair("Q", tools=["calculator"]), "tools_malformed"),
    "template arguments": (pair("Q", chat_template_kwargs="x"), "template_kwargs_malformed"),
    "half a character in an argument": (
        pair("Q", [{**CALLING, "tool_calls": [{"function": {"name": "w", "arguments": {"a": ["\ud800"]}}}]}]),
        "text_not_unicode",
    ),
    "half a character in a tool": (pair("Q", tools=[{"description": "\ud800"}]), "text_not_unicode"),
    "half a character in reasoning": (
        pair("Q", [{**A("x"), "reasoning_content": "\ud800"}]),
        "text_not_unicode",
    ),
    "an empty last turn": (pair("Q", [CALLING, RESULT, A(" ")]), "chosen_empty"),
    "the result of a tool last": (pair("Q", [CALLING, RESULT]), "no_final_answer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_and_what_cannot_be_trained_are_quarantined(name):
    row, reason = REFUSED[name]
    with pytest.raises(RecordError) as caught:
        parse_records(row)
    assert caught.value.reason == reason


def test_an_answer_is_json_messages_only_where_both_are():
    written = json.dumps({"role": "assistant", "content": "5"})
    for chosen, rejected in ((written, "five"), ("five", written)):
        (record,) = parse_records(pair("Write a message.", chosen, rejected))
        assert (record.chosen, record.rejected) == ([A(chosen)], [A(rejected)])
    (record,) = parse_records(pair("Q", written, [A("five")]))
    assert (record.chosen, record.rejected) == ([A("5")], [A("five")])


def test_media_are_named():
    with pytest.raises(RecordError, match="column images"):
        parse_records(pair("Q", images=["x.png"]))
    with pytest.raises(RecordError, match="video_url of the user"):
        parse_records(pair([{"role": "user", "content": [{"type": "video_url"}]}]))
    for name in ("image_url", "input_audio", "audio_url", "video_url", "image_path", "pixel_values"):
        with pytest.raises(RecordError, match=f"column {name}"):
            parse_records(pair("Q", **{name: ["x"]}))
        with pytest.raises(RecordError, match=f"field {name} of the user"):
            parse_records(pair([{**U("Q"), name: {"url": "x"}}]))
        assert parse_records(pair([{**U("Q"), name: ""}], **{name: None}))
    with pytest.raises(RecordError, match="column audio_bytes"):
        parse_records(pair("Q", audio_bytes=b"x"))
    empty = {"images": [], "image": None, "audio": {"path": None, "bytes": None}, "videos": [None]}
    assert parse_records(pair("Q", **empty))[0].prompt == [U("Q")]


def test_every_field_of_a_message_is_kept():
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Q"}], "name": "Eve"},
        CALLING,
        RESULT,
        {**A("warm"), "reasoning_content": "5 is more than 0"},
    ]
    row = {"chosen": turns, "rejected": [*turns[:3], A("cold")], "tools": json.dumps(TOOLS)}
    (record,) = parse_records({**row, "chat_template_kwargs": {"enable_thinking": False}, "topic": "x"})
    assert (record.prompt, record.chosen, record.rejected) == (turns[:3], turns[3:], [A("cold")])
    assert (record.tools, record.template_kwargs) == (TOOLS, {"enable_thinking": False})
    assert record.metadata == {"topic": "x"} and answer_text(record.chosen) == "warm"
    prompt = parse_prompt(row)
    assert (prompt.prompt, prompt.tools) == (turns[:3], TOOLS)


def test_an_answer_may_call_tools_and_a_preference_may_lie_over_several_turns():
    (record,) = parse_records(pair("Q", [CALLING, RESULT, A("warm")], "cold", tools=TOOLS))
    assert (record.prompt, record.chosen, record.rejected) == (
        [U("Q")],
        [CALLING, RESULT, A("warm")],
        [A("cold")],
    )
    (record,) = parse_records(pair("Q", [CALLING], "cold"))
    assert record.chosen == [CALLING] and answer_text(record.chosen) == ""
    talk = [U("Q"), A("a"), U("more"), A("b")], [U("Q"), A("c"), U("why"), A("d")]
    (record,) = parse_records({"chosen": talk[0], "rejected": talk[1]})
    assert (record.prompt, record.chosen, record.rejected) == ([U("Q")], talk[0][1:], talk[1][1:])
    assert answer_text(record.chosen) == "a\n\nb"


def test_answers_that_differ_in_a_field_are_different():
    thought = [{**A("5"), "reasoning_content": text} for text in ("2 + 3", "a guess")]
    (record,) = parse_records(pair("Q", *([turn] for turn in thought)))
    assert (record.chosen, record.rejected) == ([thought[0]], [thought[1]])


def test_null_fields_of_tables_are_absent():
    null = {"tool_calls": None, "name": None, "tool_call_id": None}
    (record,) = parse_records(pair([{**U("Q"), **null}], [{**A("yes"), **null, "tool_calls": []}]))
    assert (record.prompt, record.chosen) == ([U("Q")], [A("yes")])


def test_sharegpt_calls_and_openai_s_older_calls_become_tool_calls():
    talk = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})},
        {"from": "observation", "value": "5"},
    ]
    call = {"type": "function", "function": CALL["function"]}
    (record,) = parse_records(
        {"conversations": talk, "chosen": {"from": "gpt", "value": "warm"}, "rejected": "cold"}
    )
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert record.prompt == [U("Q"), calling, {"role": "tool", "content": "5"}]
    older = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    answer = {"role": "function", "name": "weather", "content": "5"}
    (record,) = parse_records(pair("Q", [older, answer, A("warm")], "cold", functions=[TOOLS[0]["function"]]))
    assert record.chosen == [calling, {**answer, "role": "tool"}, A("warm")] and record.tools == TOOLS


def test_tools_and_calls_may_be_json_texts_and_calls_bare():
    bare = CALL["function"]
    for tools in ([json.dumps(TOOLS[0])], json.dumps([json.dumps(TOOLS[0])])):
        assert parse_records(pair("Q", tools=tools))[0].tools == TOOLS
    wrapped = {"type": "function", "function": bare}
    forms = [
        (bare, wrapped),
        (json.dumps(bare), wrapped),
        (json.dumps(CALL), CALL),
        ({**bare, "id": "1"}, CALL),
    ]
    for form, call in forms:
        (record,) = parse_records(pair("Q", [{**CALLING, "tool_calls": [form]}, RESULT, A("warm")], "cold"))
        assert record.chosen[0]["tool_calls"] == [call]


def test_openai_s_preference_format():
    row = {
        "input": {"messages": [S("F."), U("Q")], "tools": TOOLS, "parallel_tool_calls": True},
        "preferred_output": [CALLING],
        "non_preferred_output": [A("no")],
        "topic": "x",
    }
    (record,) = parse_records(row)
    assert (record.prompt, record.chosen, record.rejected) == ([S("F."), U("Q")], [CALLING], [A("no")])
    assert record.tools == TOOLS == parse_prompt(row).tools
    assert record.metadata == {"parallel_tool_calls": True, "topic": "x"}


def test_a_call_in_both_of_openai_s_formats_is_one_call():
    both_formats = {**CALLING, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    (record,) = parse_records(pair("Q", [both_formats], "cold"))
    assert record.chosen == [CALLING]


def test_other_fields_named_from_and_value_stay():
    turn = {**U("Q"), "from": "Eve", "value": 0.5}
    assert parse_records(pair([turn]))[0].prompt == [turn]


@pytest.mark.parametrize(
    "field", [{"tools": TOOLS}, {"tools": json.dumps(TOOLS)}, {"functions": [TOOLS[0]["function"]]}]
)
def test_tools_of_a_message_are_those_of_the_record(field):
    for columns in ({}, {"tools": TOOLS}, {"functions": [TOOLS[0]["function"]]}):
        row = pair([{**S("F."), **field}, U("Q")], [{**A("yes"), "tools": []}], **columns)
        assert parse_records(row)[0].tools == TOOLS == parse_prompt(row).tools


def test_content_parts_are_kept_for_templates_that_read_them():
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}]
    (record,) = parse_records({"prompt": "QR", **both({"role": "user", "content": parts})})
    assert record.prompt == [U("QR")]
    (record,) = parse_records(both({"role": "user", "content": parts}))
    assert record.prompt == [{"role": "user", "content": parts}]


def test_the_list_that_a_tool_returns_stays_its_json():
    parts = [{"type": "text", "text": "5"}]
    results: tuple[list[Any], ...] = (
        [],
        [1, 2],
        ["a"],
        [{"city": "Oslo", "text": "x"}],
        [*parts, {"id": 1}],
        [{"type": "street"}],
    )
    for content in results:
        (record,) = parse_records(pair("Q", [CALLING, {**RESULT, "content": content}, A("warm")], "cold"))
        assert json.loads(record.chosen[1]["content"]) == content
    (record,) = parse_records(pair("Q", [CALLING, {**RESULT, "content": parts}, A("warm")], "cold"))
    assert record.chosen[1]["content"] == parts
    with pytest.raises(RecordError, match="image_url of the tool"):
        parse_records(pair("Q", [CALLING, {**RESULT, "content": [{"type": "image_url"}]}, A("x")], "cold"))


def test_an_sft_row_is_read_up_to_its_answer():
    assert parse_prompt({"messages": [S("F."), U("Q"), A("yes")]}).prompt == [S("F."), U("Q")]
    assert parse_prompt({"prompt": "Q", "completion": "yes"}).prompt == [U("Q")]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": "false"}])
def test_an_answer_with_a_turn_that_is_not_to_be_trained_is_quarantined(flag):
    turns = [{**A("x"), **flag}, U("R"), A("yes")]
    with pytest.raises(RecordError, match=f"{next(iter(flag))}=") as caught:
        parse_records(pair("Q", turns, "no"))
    assert caught.value.reason == "turn_not_trained"
    # It is never trained in the prompt.
    assert parse_records(pair([U("P"), {**A("x"), **flag}, U("Q")]))[0].chosen == [A("yes")]
    trained = [{**A("yes"), "weight": 1, "train": True}]
    assert parse_records(pair("Q", trained, "no"))[0].chosen == trained


def test_messages_in_python_s_notation_are_messages():
    (record,) = parse_records(pair(str([S("F."), U("it's")]), str([A('say "yes"')]), str([A("no")])))
    assert record.prompt == [S("F."), U("it's")] and record.chosen == [A('say "yes"')]
    # NumPy writes no commas between them.
    with pytest.raises(RecordError, match="Python's notation") as caught:
        parse_records(pair("Q", str([U("Q"), A("yes")]).replace("}, {", "}\n {"), str([U("Q"), A("no")])))
    assert caught.value.reason == "message_malformed"
    code = "[{'city': 'Oslo'}]"
    assert parse_records(pair("Q", code, "no"))[0].chosen == [A(code)]


def test_an_image_of_a_table_is_refused_whatever_its_column_is_named():
    for value in ({"bytes": b"x", "path": None}, [{"bytes": b"x", "path": "a.png"}]):
        with pytest.raises(RecordError, match="screenshot") as caught:
            parse_records(pair("Q", screenshot=value))
        assert caught.value.reason == "media_not_supported"
    assert parse_records(pair("Q", screenshot={"bytes": None, "path": None}))


@pytest.mark.parametrize("name", ["system_message", "system_instruction", "sys_prompt"])
def test_other_names_of_the_system_column(name):
    (record,) = parse_records({"question": "Q", "chosen": "yes", "rejected": "no", name: "F."})
    assert record.prompt == [S("F."), U("Q")] and record.metadata == {}
    with pytest.raises(RecordError, match="columns system and"):
        parse_records({"question": "Q", "chosen": "yes", "rejected": "no", name: "F.", "system": "G."})


def test_documents_reach_the_template():
    documents = [{"title": "a", "text": "b"}]
    for value in (documents, json.dumps(documents)):
        (record,) = parse_records(pair("Q", documents=value))
        assert record.template_kwargs == {"documents": documents}
    assert parse_records(pair("Q", documents=["a"]))[0].template_kwargs == {}
    own = pair("Q", documents=documents, chat_template_kwargs={"documents": []})
    assert parse_records(own)[0].template_kwargs == {"documents": []}
