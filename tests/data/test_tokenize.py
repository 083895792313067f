import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.messages import answer_text
from tbpo_ray.data.records import Record, parse_records
from tbpo_ray.data.rejection_reasons import REASONS, RecordError
from tbpo_ray.data.tokenize import PairTokenizer, TokenizedPair, TokenizerSpec, prompt_tokens
from tbpo_ray.models.chat import ChatTemplate
from tests.data.turns import BOS, CHATML, EOS, TOOL_CHAT, answer_of, pair_of, pairs_of, user

from .conftest import CHAT, STRICT, decode_answer, make_tokenizer


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize(
    "template", [None, CHAT, "{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}"]
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_and_eos_occur_exactly_once(kind, template, adds_bos):
    tokenizer = pairs_of(make_tokenizer(kind, template, adds_bos))
    (pair,) = tokenizer.pairs([pair_of(user("the cat"), "sat on the mat", "friend")])
    assert pair.prompt_ids.count(BOS) == (adds_bos or template is not None)
    assert pair.prompt_ids[0] == BOS or not (adds_bos or template)
    for ids, text in ((pair.chosen_ids, "sat on the mat"), (pair.rejected_ids, "friend")):
        assert ids.count(EOS) == 1 and ids[-1] == EOS and BOS not in ids
        assert decode_answer(tokenizer, ids) == text


def test_the_boundary_holds_where_the_tokenizer_would_merge_across_it():
    plain = make_tokenizer()
    whole = plain("the friend", add_special_tokens=False)["input_ids"]
    (pair,) = pairs_of(plain).pairs([pair_of(user("the fri"), "end", "sat")])
    assert pair.prompt_ids + pair.chosen_ids[:-1] != whole
    assert pair.prompt_ids == plain("the fri", add_special_tokens=False)["input_ids"]
    assert pair.chosen_ids[:-1] == plain("end", add_special_tokens=False)["input_ids"]
    assert plain.decode(pair.prompt_ids + pair.chosen_ids[:-1]) == "the friend"


def test_special_tokens_spelled_in_an_answer_are_plain_text():
    tokenizer = pairs_of(make_tokenizer(template=CHAT))
    (pair,) = tokenizer.pairs([pair_of(user("say </s>"), "it is </s> <s>", "<|assistant|>")])
    assert pair.chosen_ids.count(EOS) == 1 and BOS not in pair.chosen_ids
    assert decode_answer(tokenizer, pair.chosen_ids) == "it is </s> <s>"
    assert decode_answer(tokenizer, pair.rejected_ids) == "<|assistant|>"
    assert tokenizer.counts["special_text_in_prompt"] == 1


def test_truncation_removes_the_front_of_the_prompt_and_never_empties_an_answer():
    tokenizer = pairs_of(make_tokenizer(template=CHAT), max_length=12, prompt_limit=8)
    full = pairs_of(make_tokenizer(template=CHAT))
    record = pair_of(user("the cat sat on the mat and said hello"), "hello to the friend on the mat", "sat")
    (cut,), (whole,) = tokenizer.pairs([record]), full.pairs([record])
    assert len(cut.prompt_ids) == 8 and cut.prompt_ids == [BOS, *whole.prompt_ids[-7:]]
    assert len(cut.chosen_ids) == 4 and cut.chosen_ids == whole.chosen_ids[:4] and EOS not in cut.chosen_ids
    assert cut.rejected_ids == whole.rejected_ids and cut.rejected_ids[-1] == EOS
    assert tokenizer.counts["prompt_truncated"] == tokenizer.counts["chosen_truncated"] == 1
    assert not tokenizer.counts["rejected_truncated"]
    least = pairs_of(make_tokenizer(template=CHAT), max_length=2, prompt_limit=1)
    (pair,) = least.pairs([record])
    assert pair.prompt_ids == whole.prompt_ids[-1:] and len(pair.chosen_ids) == len(pair.rejected_ids) == 1


def test_pairs_that_become_identical_are_quarantined():
    tokenizer = pairs_of(make_tokenizer(), max_length=6, prompt_limit=2)
    (error,) = tokenizer.pairs([pair_of(user("the cat"), "the cat sat on the mat", "the cat sat on the cat")])
    assert isinstance(error, RecordError) and error.reason == "pair_same_tokens"


def test_refusing_templates_and_lossy_tokenizers_give_reasons():
    strict = pairs_of(make_tokenizer(template=STRICT))
    talk = [{"role": "system", "content": "x"}, *user("y")]
    assert [
        getattr(p, "reason", None)
        for p in strict.pairs([pair_of(talk, "a", "b"), pair_of(user("y"), "a", "b")])
    ] == [
        "template_refused",
        None,
    ]
    for kind in ("lower", "words"):
        (error,) = pairs_of(make_tokenizer(kind)).pairs([pair_of(user("the cat"), "The Zebra", "mat")])
        assert error.reason == "answer_not_representable"
    (error,) = pairs_of(make_tokenizer(template="{{ '' }}")).pairs([pair_of(user("y"), "a", "b")])
    assert error.reason == "prompt_without_tokens"


def test_evaluation_prompts_are_tokenized_as_training_prompts():
    tokenizer = make_tokenizer(template=CHAT)
    data = DataConfig(max_length=24, max_prompt_length=9)
    messages = user("the cat sat on the mat and said hello to the Assistant")
    (pair,) = pairs_of(tokenizer, 24, 9).pairs([pair_of(messages, "sat", "mat")])
    assert prompt_tokens(tokenizer, messages, data) == pair.prompt_ids
    tokenizer.chat_template = None
    assert prompt_tokens(tokenizer, messages, data) != pair.prompt_ids


def test_the_date_does_not_enter_a_template():
    template = "{{ date_string }}{{ messages[0]['content'] }}"
    tokenizer = pairs_of(make_tokenizer(template=template))
    assert "2024" in tokenizer._encoder.backend.decode(tokenizer.prompts([user("x")])[0])


TOKENIZERS = {
    (kind, name): pairs_of(make_tokenizer(kind, template, adds_bos), 48, 16)
    for kind in ("bytes", "pieces", "words", "lower")
    for name, template, adds_bos in [("plain", None, True), ("chat", CHAT, False), ("strict", STRICT, True)]
}


PIECES = [
    "the",
    " cat",
    "\n\nHuman: ",
    "\n\nAssistant: ",
    "</s>",
    "<s>",
    "é",
    "e\u0301",
    "\ud800",
    "\0",
    "🙂",
    "  ",
]


TEXT = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))


MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "wizard"]),
        "content": st.one_of(TEXT, st.none()),
    }
)


VALUE: st.SearchStrategy[object] = st.one_of(
    TEXT, st.lists(MESSAGE, max_size=3), st.none(), st.integers(), st.just({})
)


RECORD = st.one_of(
    st.fixed_dictionaries(
        {}, optional={"prompt": VALUE, "chosen": VALUE, "rejected": VALUE, "messages": VALUE}
    ),
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    st.builds(
        lambda talk, a, b: {
            "chosen": [*talk, {"role": "assistant", "content": a}],
            "rejected": [*talk, {"role": "assistant", "content": b}],
        },
        st.lists(MESSAGE, min_size=1, max_size=3),
        TEXT,
        TEXT,
    ),
    st.none(),
    st.lists(TEXT, max_size=2),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw=RECORD, which=st.sampled_from(sorted(TOKENIZERS)))
def test_every_record_is_a_complete_pair_or_has_a_reason(raw, which):
    tokenizer = TOKENIZERS[which]
    try:
        (record,) = parse_records(raw)
    except RecordError as error:
        assert error.reason in REASONS
        return
    (pair,) = tokenizer.pairs([record])
    if isinstance(pair, RecordError):
        assert pair.reason in REASONS
        return
    assert isinstance(pair, TokenizedPair)
    assert 1 <= len(pair.prompt_ids) <= 16
    for ids, turns in ((pair.chosen_ids, record.chosen), (pair.rejected_ids, record.rejected)):
        text = answer_text(turns)
        assert ids and len(pair.prompt_ids) + len(ids) <= 48
        if len(turns) > 1:  # each turn of an answer has an end of its own
            assert ids[-1] == EOS or len(pair.prompt_ids) + len(ids) == 48
        elif ids[-1] == EOS:
            assert EOS not in ids[:-1]
            decoded = decode_answer(tokenizer, ids)
            if which[1] == "strict":  # this template writes brackets around every turn
                text = f"[{text}]"
            assert decoded in (text, " " + text) or (which[0] == "lower" and decoded == text.lower())
        else:
            assert EOS not in ids and len(pair.prompt_ids) + len(ids) == 48


def test_an_answer_ends_in_what_the_template_puts_behind_a_turn():
    tokenizer = pairs_of(make_tokenizer(template=CHATML))
    (pair,) = tokenizer.pairs([pair_of(user("the cat"), "sat", "mat </s> <unk>")])
    unknown = tokenizer._encoder.backend.token_to_id("<unk>")
    assert pair.chosen_ids[-1] == unknown and EOS not in pair.chosen_ids
    assert pair.rejected_ids.count(unknown) == 1 and EOS not in pair.rejected_ids
    assert decode_answer(tokenizer, pair.rejected_ids) == "mat </s> <unk>"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_special_tokens_of_the_template_are_told_from_those_that_an_answer_spells(kind):
    turns = "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<|user|>{% endif %}"
    tokenizer = pairs_of(make_tokenizer(kind, template))
    answer = [*answer_of("a </s> b"), *user("c"), *answer_of("d <|user|></s>")]
    (pair,) = tokenizer.pairs([Record(user("the </s> cat"), answer, answer_of("x"))])
    assert pair.chosen_ids.count(EOS) == 3 and pair.prompt_ids.count(EOS) == 2
    trained = [t for t, mask in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if mask]
    assert trained.count(EOS) == 2
    assert tokenizer._encoder.backend.decode(trained, skip_special_tokens=False).replace(" ", "") == (
        "a</s>b</s>d<|user|></s></s>"
    )


def test_a_generation_prompt_that_finished_answers_lack_is_not_part_of_the_prompt():
    template = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
    tokenizer = pairs_of(make_tokenizer(template=template))
    (pair,) = tokenizer.pairs([pair_of(user("the cat"), "<this is it", "mat")])
    plain = pairs_of(make_tokenizer(template=CHAT))
    assert [pair] == plain.pairs([pair_of(user("the cat"), "<this is it", "mat")])
    assert (
        tokenizer.counts["generation_prompt_differs"] == 2 and not plain.counts["generation_prompt_differs"]
    )
    assert "<think>" in tokenizer._encoder.backend.decode(tokenizer.prompts([user("the cat")])[0])


def test_tools_need_a_template():
    tokenizer = pairs_of(make_tokenizer())
    tools = [{"type": "function", "function": {"name": "x"}}]
    (error,) = tokenizer.pairs([Record(user("x"), answer_of("a"), answer_of("b"), tools=tools)])
    assert error.reason == "template_missing"
    assert tokenizer.prompts([user("x")], tools=[tools])[0].reason == "template_missing"
    several = [*answer_of("sat"), *user("on"), *answer_of("mat")]
    (pair,) = tokenizer.pairs([Record(user("the cat"), several, answer_of("end"))])
    trained = [t for t, mask in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if mask]
    assert tokenizer._encoder.backend.decode(trained) == "satmat" and trained[-1] == EOS


def test_arguments_for_the_template_are_part_of_the_tokens_and_of_the_digest():
    template = CHAT + "{% if add_generation_prompt and quiet %}hello{% endif %}"
    tokenizer = make_tokenizer(template=template)
    plain, quiet = TokenizerSpec.of(tokenizer), TokenizerSpec.of(tokenizer, {"quiet": True})
    assert plain.digest != quiet.digest and TokenizerSpec.from_json(quiet.to_json()) == quiet
    prompts = [PairTokenizer(spec, 64, 32).prompts([user("x")])[0] for spec in (plain, quiet)]
    assert prompts[0] != prompts[1]
    loud = PairTokenizer(quiet, 64, 32).prompts([user("x")], template_kwargs=[{"quiet": False}])
    assert loud == [prompts[0]]
    # Columnar files fill the arguments that a record does not have with null.
    null = {"quiet": None, "loud": None}
    assert PairTokenizer(quiet, 64, 32).prompts([user("x")], template_kwargs=[null]) == [prompts[1]]
    spec = TokenizerSpec.of(make_tokenizer(template="{% if quiet %}hello{% endif %}" + CHAT), {"quiet": True})
    given = [
        Record(user("x"), answer_of("sat"), answer_of("mat"), template_kwargs=own)
        for own in ({}, null, {"quiet": False})
    ]
    unset, nulls, loud_pair = PairTokenizer(spec, 64, 32).pairs(given)
    assert isinstance(unset, TokenizedPair) and nulls == unset != loud_pair
    data = DataConfig(max_length=64, template_kwargs={"quiet": True})
    assert prompt_tokens(tokenizer, user("x"), data) == prompts[1]
    assert prompt_tokens(tokenizer, user("x"), DataConfig(max_length=64)) == prompts[0]


@pytest.mark.parametrize(
    "header, opening, prompt",
    [
        ("<|user|>", "<|assistant|>", "the cat</s>"),
        ("<|assistant|>final:", "<|assistant|>find:", "the cat</s><|assistant|>"),
        ("<|assistant|><s>", "<|assistant|><think>", "the cat</s><|assistant|>"),
        ("<|assistant|>\n", "<|assistant|>\n<think>\n", "the cat</s><|assistant|>\n"),
    ],
)
def test_a_prompt_never_ends_inside_a_special_token_or_a_word(header, opening, prompt):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}HEADER{% endif %}{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}OPENING{% endif %}"
    )
    template = template.replace("HEADER", header).replace("OPENING", opening)
    tokenizer = pairs_of(make_tokenizer(template=template))
    (pair,) = tokenizer.pairs([pair_of(user("the cat"), "sat", "mat")])
    decode = tokenizer._encoder.backend.decode
    assert decode(pair.prompt_ids, skip_special_tokens=False) == prompt
    whole = decode([*pair.prompt_ids, *pair.chosen_ids], skip_special_tokens=False)
    assert whole == f"the cat</s>{header}sat</s>"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_need_a_template(name):
    tokenizer = pairs_of(make_tokenizer())
    thought = [{"role": "assistant", "content": "sat", name: "hello"}]
    (error,) = tokenizer.pairs([Record(user("x"), thought, answer_of("mat"))])
    assert isinstance(error, RecordError) and error.reason == "template_missing" and name in error.detail
    empty = [{"role": "assistant", "content": "sat", name: None}]
    (pair,) = tokenizer.pairs([Record(user("x"), empty, answer_of("mat"))])
    assert isinstance(pair, TokenizedPair)
    (refused,) = tokenizer.prompts([[*user("x"), *thought, *user("y")]])
    assert isinstance(refused, RecordError) and refused.reason == "template_missing"


def test_the_variables_of_a_template_are_those_that_a_caller_may_set():
    spec = TokenizerSpec.of(make_tokenizer(template="{% if thinking %}x{% endif %}" + CHAT))
    template = spec.chat_template
    assert template is not None and template.variables == {"thinking"}


@pytest.mark.parametrize(
    "template, end",
    [
        ("{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}", EOS),
        # The probes do not show the ends of these, which depend on the user's words.
        ("{% for m in messages %}{{ m.content }}{{ '</s>' if CAT }}{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.content }}{{ '<|user|>' if CAT }}{% endfor %}", 4),
    ],
)
def test_no_end_is_added_behind_one_that_the_template_writes(template, end):
    template = template.replace("CAT", "'cat' in messages[0].content")
    tokenizer = pairs_of(make_tokenizer(template=template))
    (pair,) = tokenizer.pairs([pair_of(user("the cat"), "sat", "mat </s>")])
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert ids[-1] == end and ids.count(EOS) + ids.count(4) == 1


@pytest.mark.parametrize("arguments", [{"role": "</s>"}, {"a </s>": 1}, {"a": [{"</s>": {"role": "</s>"}}]}])
def test_special_tokens_spelled_in_arguments_of_tool_calls_are_plain_text(arguments):
    template = TOOL_CHAT.replace("c['function']['name']", "c['function'] | tojson")
    tokenizer = pairs_of(make_tokenizer(template=template))
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": arguments}}]
    answer = [{"role": "assistant", "content": "", "tool_calls": calls}]
    (pair,) = tokenizer.pairs([Record(user("x"), answer, answer_of("mat"))])
    assert isinstance(pair, TokenizedPair) and pair.chosen_ids.count(EOS) == 1
    assert "</s>" in decode_answer(tokenizer, pair.chosen_ids)
    (prompt,) = tokenizer.prompts([[*user("x"), *answer, *user("y")]])
    assert isinstance(prompt, list) and tokenizer.counts["special_text_in_prompt"] == 1


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize(
    "odd", ["\U0010ffff", "\U0010ffff\U0010ffff", "\U000f0000", "\U000f0001\U0010ffff", "<\U0010ffff/s>"]
)
def test_characters_that_mark_spelled_tokens_stay_in_a_text(kind, odd):
    turns = "{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"
    tokenizer = pairs_of(make_tokenizer(kind, turns + "{% if add_generation_prompt %}<|user|>{% endif %}"))
    answer = [*answer_of(f"a{odd}</s>b"), *user(f"{odd}</s>"), *answer_of(f"d{odd}")]
    (pair,) = tokenizer.pairs([Record(user(f"the {odd} cat"), answer, answer_of("x"))])
    assert isinstance(pair, TokenizedPair)
    decode = tokenizer._encoder.backend.decode
    text = decode(pair.chosen_ids, skip_special_tokens=False).replace(" ", "")
    assert text == f"a{odd}</s>b</s><|user|>{odd}</s></s><|user|>d{odd}</s>"
    assert pair.chosen_ids.count(EOS) == 3
    assert odd in decode(pair.prompt_ids, skip_special_tokens=False)


def test_a_null_argument_of_a_record_reaches_a_template_that_has_no_other():
    template = "{{ 'given' if quiet is defined }}" + CHAT
    tokenizer = pairs_of(make_tokenizer(template=template))
    given = [
        Record(user("x"), answer_of("sat"), answer_of("mat"), template_kwargs=own)
        for own in ({}, {"quiet": None})
    ]
    decode = tokenizer._encoder.backend.decode
    assert ["given" in decode(pair.prompt_ids) for pair in tokenizer.pairs(given)] == [False, True]


def test_the_text_in_front_of_answers_is_rendered_once_per_record(monkeypatch):
    frames = []
    frame = ChatTemplate.frame

    def counted(self, *args, **options):
        frames.append(1)
        return frame(self, *args, **options)

    monkeypatch.setattr(ChatTemplate, "frame", counted)
    template = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
    tokenizer = pairs_of(make_tokenizer(template=template))
    tokenizer.pairs([pair_of(user("the cat"), "<b>", "<i>")])
    assert len(frames) == 1


def test_a_special_token_of_one_character_is_text_where_an_answer_spells_it():
    tokenizer = make_tokenizer("pieces", "{% for m in messages %}§{{ m.content }}</s>{% endfor %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["§"]})
    section = tokenizer.convert_tokens_to_ids("§")
    pairs = pairs_of(tokenizer)
    answer = [*answer_of("a § b"), *user("§§"), *answer_of("§")]
    (pair,) = pairs.pairs([Record(user("the cat"), answer, answer_of("x"))])
    assert isinstance(pair, TokenizedPair)
    assert pair.chosen_ids.count(section) == 3 and pairs.counts["special_text_in_answer"] == 1
    text = pairs._encoder.backend.decode(pair.chosen_ids, skip_special_tokens=False)
    assert text.replace(" ", "") == "§a§b</s>§§§</s>§§</s>"
