"""Chat templates that fail for every conversation, or that are random, are refused by file and line."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tbpo_ray.errors import InputError
from tbpo_ray.models.load import check_same_tokenizer, load_tokenizer
from tbpo_ray.models.tiny import build_tiny

LOOP = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
REFUSED = {
    "unclosed block": ("{% for m in messages %}\n{{ m['content'] }}\n", 2, "not a valid Jinja template"),
    "unclosed value": (f"{LOOP}\n\n{{{{ messages[0] }}", 4, "not a valid Jinja template"),
    "unknown filter": (f"{LOOP}\n{{{{ 'a' | shuffle }}}}", 3, "No filter named 'shuffle'"),
    "unknown tag": (f"{LOOP}{{% fro m in messages %}}", 2, "unknown tag 'fro'"),
    "random": (f"{LOOP}\n{{{{ ['a', 'b'] | random }}}}", 3, "the filter random"),
    "random in a branch": ("{% if tools %}\n{{ tools | random }}{% endif %}" + LOOP, 2, "the filter random"),
    "random by name": (f"{{{{ [messages] | map('random') | list }}}}{LOOP}", 1, "the filter random"),
    "random block": (f"{LOOP}{{% filter random %}}ab{{% endfilter %}}", 2, "the filter random"),
    "lipsum": (f"{LOOP}{{{{ lipsum(1) }}}}", 2, r"lipsum\(\)"),
    "include": (f"{LOOP}{{% include 'other.jinja' %}}", 2, "include loads another file"),
    "constant": ("Hello {{ messages | length }}", None, "does not write the content of a user's turn"),
    "address": (f"{LOOP}{{{{ raise_exception }}}}", None, "address in memory"),
}
ACCEPTED = {
    "plain": LOOP,
    "date": "{{ strftime_now('%d %b %Y') }}" + LOOP,
    "text": LOOP + "random {{ 'random' }} lipsum{# | random #}",
    "own variable": "{% set random = 'a' %}{{ random }}" + LOOP,
    "generation tag": "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}",
    "parts only": "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
    "refuses": "{{ raise_exception('no') }}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny(tmp_path_factory.mktemp("tiny") / "model", 0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_file_that_no_conversation_can_use_is_refused(folder, tmp_path, name):
    source, line, words = REFUSED[name]
    file = tmp_path / "chat.jinja"
    file.write_text(source, encoding="utf-8")
    place = re.escape(f"model.chat_template={file}") + (f", line {line}: " if line else ": ")
    with pytest.raises(InputError, match=rf"{place}.*{words}"):
        load_tokenizer(str(folder), chat_template=str(file))


@pytest.mark.parametrize("name", ACCEPTED)
def test_other_templates_are_accepted(folder, tmp_path, name):
    file = tmp_path / "chat.jinja"
    file.write_text(ACCEPTED[name], encoding="utf-8")
    assert load_tokenizer(str(folder), chat_template=str(file)).chat_template == ACCEPTED[name]


def test_the_template_of_the_model_itself_is_named_by_its_file(folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / "chat_template.jinja").write_text("{% if %}\n" + LOOP)
    with pytest.raises(InputError, match=r"template chat_template\.jinja, line 1: not a valid Jinja"):
        load_tokenizer(str(model))
    # A template that is replaced, or switched off, is not read, nor where only token ids matter.
    check_same_tokenizer(str(folder), str(model), "model.reference")
    assert load_tokenizer(str(model), chat_template="none").chat_template is None
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": LOOP},
        {"name": "tool_use", "template": "\n{{ tools | random }}"},
        {"name": "rag", "template": "{% if %}"},
    ]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json, line 2 \(the template 'tool_use'\): the filter"):
        load_tokenizer(str(model))


def test_an_empty_template_file_and_a_byte_order_mark(folder, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(" \n")
    with pytest.raises(InputError, match="the file is empty; must be a Jinja template file, or `none`"):
        load_tokenizer(str(folder), chat_template=str(file))
    file.write_bytes(b"\xef\xbb\xbf" + LOOP.encode())
    assert load_tokenizer(str(folder), chat_template=str(file)).chat_template == LOOP
