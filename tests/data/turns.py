"""Turns and the pairs that a tokenizer makes of them."""

from tbpo_ray.data.records import Record
from tbpo_ray.data.tokenize import PairTokenizer, TokenizerSpec

from .conftest import CHAT

BOS, EOS = 1, 2


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def pairs_of(tokenizer, max_length=512, prompt_limit=256):
    return PairTokenizer(TokenizerSpec.of(tokenizer), max_length, prompt_limit)


def pair_of(prompt, chosen, rejected):
    """A record whose answers are one turn each."""
    return Record(prompt, assistant(chosen), assistant(rejected))


def answer_of(text):
    return [{"role": "assistant", "content": text}]


CHATML = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|assistant|>' }}\n"
    "{{ m.content }}<unk>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def call_of(name, **more):
    function = {"name": name, "arguments": {"city": "mat"}}
    return [{"role": "assistant", "content": None, "tool_calls": [{"function": function}], **more}]


def tool_result(text):
    return [{"role": "tool", "content": text}]


TOOL_CHAT = CHAT.replace(
    "m['content'] }}",
    "(m['content'] or '') }}{% for c in m['tool_calls'] or [] %}"
    "[{{ c['function']['name'] }}{{ c['function']['arguments'] | tojson }}]{% endfor %}",
)
