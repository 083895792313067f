"""Chat templates and tokenizers in the style of public model families, written for the tests.

Each style uses what makes its family hard: tools as JSON, thoughts that earlier turns lose, a header with a
date, a merged or refused system turn, turns without a special token at their beginning, a token that swallows
white space.
"""
# ruff: noqa: E501 - a line of a template is hard to read in parts

from __future__ import annotations

import json

QWEN2 = (
    "{%- if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}You are helpful.{% endif %}\n\n"
    "# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{%- elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
    "{%- else %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or "
    "(message.role == 'assistant' and not message.tool_calls) %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{%- if message.content %}{{ '\n' + message.content }}{% endif %}"
    "{%- for call in message.tool_calls %}{%- if call.function %}{% set call = call.function %}{% endif %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}{{ call.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{%- endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN3 = (
    "{%- if messages[0].role == 'system' or tools %}{{ '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{%- if tools %}{{ '\n\n# Tools' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for message in messages %}"
    "{%- set content = message.content if message.content is string else '' %}"
    "{%- if message.role == 'user' %}{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if message.reasoning_content is string %}{% set thought = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{ content }}{% endif %}"
    "{%- for call in message.tool_calls or [] %}{% set f = call.function if call.function else call %}"
    '{{ \'\n<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{%- if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}"
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}{% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{%- endif %}"
)

LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system }}"
    "{%- if tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{%- if message.content is mapping %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}"
    "{{ '<|eot_id|>' }}"
    "{%- elif message.tool_calls %}"
    "{%- if message.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}"
    "{%- set f = message.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{ f.arguments | tojson }}{{ '}' }}{{ '<|eot_id|>' }}"
    "{%- else %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{%- endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{% if loop.first and tools %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' }}{% if loop.first and ns.system %}{{ ns.system + '\n\n' }}{% endif %}"
    "{{ message.content + ' [/INST]' }}"
    "{% elif message.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in message.tool_calls %}"
    "{{ call.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% elif message.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' }}{{ message.content | tojson }}"
    "{{ '}[/TOOL_RESULTS]' }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}{% endif %}{% endfor %}"
)

PHI3 = (
    "{% for message in messages %}{% if message.role in ('system', 'user', 'assistant') %}"
    "{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}"
    "{% else %}{{ raise_exception('Unknown role') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

COHERE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{%- if m.role == 'system' %}{{ '<|SYSTEM_TOKEN|>' + m.content }}"
    "{%- elif m.role == 'user' %}{{ '<|USER_TOKEN|>' + m.content }}"
    "{%- elif m.role == 'tool' %}{{ '<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>' + m.content + '<|END_TOOL_RESULT|>' }}"
    "{%- else %}{{ '<|CHATBOT_TOKEN|>' }}"
    "{%- if m.thinking or m.reasoning_content %}"
    "{{ '<|START_THINKING|>' + (m.thinking or m.reasoning_content) + '<|END_THINKING|>' }}{% endif %}"
    "{%- if m.tool_calls %}{{ '<|START_ACTION|>[' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}"
    "{{ ']<|END_ACTION|>' }}"
    "{%- else %}{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{% endif %}"
    "{%- endif %}{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)

DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' and m.tool_calls %}{{ '<｜Assistant｜><｜tool▁call▁begin｜>' }}"
    "{{ m.tool_calls[0].function | tojson }}{{ '<｜tool▁call▁end｜><｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)

QWQ = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and not loop.last %}{{ (m.content or '').split('</think>')[-1].lstrip('\n') }}"
    "{%- else %}{{ m.content or '' }}{% endif %}"
    "{%- for c in m.tool_calls or [] %}{{ '\n<tool_call>' }}{{ c.function | tojson }}{{ '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

KIMI = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}"
    "{% if m.role == 'assistant' %}{{ (m.content or '').split('◁/think▷')[-1].lstrip('\n') if not loop.last else m.content }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)

PHI4_MINI = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% else %}{{ raise_exception('Unknown role') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

GRANITE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = 'Knowledge Cutoff Date: April 2024.\nToday\\'s Date: ' + strftime_now('%B %d, %Y') + '.' %}"
    "{% endif %}{{ '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
    "{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' }}{{ tools | tojson(indent=4) }}"
    "{{ '<|end_of_text|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '<|tool_call|>' }}{{ [c.function] | tojson }}{% endfor %}"
    "{{ '<|end_of_text|>\n' }}{% if loop.last and add_generation_prompt %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}{% endfor %}"
)

LAST_EOS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content }}{% if loop.last %}{{ eos_token }}{% endif %}"
    "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
)
ALWAYS_EOS = LAST_EOS.replace("{% if loop.last %}{{ eos_token }}{% endif %}", "") + "{{ eos_token }}"

NEMOTRON = (
    "<|role|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{{ tools | tojson if tools }}\n{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|role|>user\n' + m.content + '\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|role|>user\n[' + m.content + ']\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|role|>assistant\n' }}"
    "{% if loop.last and m.content %}{{ '<think>\n' }}{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}{{ '<TOOLCALL>' }}{{ c.function | tojson }}{% endfor %}{{ '\n<|stop|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|role|>assistant\n<think>\n' }}{% endif %}"
)

HARMONY = (
    "{% for m in messages %}{{ '<|start|>' }}{% if m.role == 'assistant' and m.tool_calls %}"
    "{{ 'assistant<|channel|>call<|message|>' }}{{ m.tool_calls[0].function | tojson }}{{ '<|call|>' }}"
    "{% elif m.role == 'assistant' %}{% if loop.last and m.thinking %}"
    "{{ 'assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>' }}{% endif %}"
    "{{ 'assistant<|channel|>final<|message|>' + m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}{{ m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

STYLES = {
    # name: template, special tokens, added tokens that are not special, BOS, EOS, what it cannot write
    "qwen2": (QWEN2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"], None,
              "<|im_end|>", ()),
    "qwen3": (QWEN3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool_call>"],
              None, "<|endoftext|>", ()),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                        "<|eot_id|>"], [], "<|begin_of_text|>", "<|end_of_text|>", ()),
    "gemma": (GEMMA, ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], [], "<bos>", "<eos>",
              ("system", "tool")),
    "mistral": (MISTRAL, ["<s>", "</s>", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
                          "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], [], "<s>", "</s>", ()),
    "llama2": (MISTRAL, ["<s>", "</s>"], [], "<s>", "</s>", ()),
    "phi3": (PHI3, ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"], [], "<s>",
             "<|endoftext|>", ("tool",)),
    "qwen3 special": (QWEN3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"],
                      [], None, "<|endoftext|>", ()),
    "cohere": (COHERE, ["<pad>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
                        "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_THINKING|>", "<|END_THINKING|>",
                        "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_ACTION|>", "<|END_ACTION|>",
                        "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"], [], "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", ()),
    "deepseek r1": (DEEPSEEK_R1, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
                                  "<think>", "</think>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
                                  "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"], [], "<｜begin▁of▁sentence｜>",
                    "<｜end▁of▁sentence｜>", ()),
    "qwq": (QWQ, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"], ["<tool_call>"], None,
            "<|im_end|>", ()),
    "kimi": (KIMI, ["[BOS]", "[EOS]", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>",
                    "◁think▷", "◁/think▷"], [], "[BOS]", "[EOS]", ("tool",)),
    "phi4 mini": (PHI4_MINI, ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"], [],
                  "<|endoftext|>", "<|endoftext|>", ("tool",)),
    "granite": (GRANITE, ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"], [],
                "<|end_of_text|>", "<|end_of_text|>", ()),
    "nemotron": (NEMOTRON, ["<s>", "<|role|>", "<|stop|>", "<think>", "</think>"], [], "<s>", "<|stop|>", ()),
    "harmony": (HARMONY, ["<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>", "<|call|>"], [], None,
                "<|return|>", ()),
    "last eos": (LAST_EOS, ["<s>", "</s>", "[INST]", "[/INST]"], [], "<s>", "</s>", ("system", "tool")),
    "last eos, words": (LAST_EOS, ["<s>", "</s>"], [], "<s>", "</s>", ("system", "tool")),
    "always eos": (ALWAYS_EOS, ["<s>", "</s>", "[INST]", "[/INST]"], [], "<s>", "</s>", ("system", "tool")),
}  # fmt: skip

ENDS = {
    "qwen2": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>",
    "mistral": "</s>", "llama2": "</s>", "phi3": "<|end|>", "qwen3 special": "<|im_end|>",
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek r1": "<｜end▁of▁sentence｜>", "qwq": "<|im_end|>",
    "kimi": "<|im_end|>", "phi4 mini": "<|end|>", "granite": "<|end_of_text|>", "last eos": "</s>",
    "last eos, words": "</s>", "always eos": "</s>", "nemotron": "<|stop|>", "harmony": "<|return|>",
}  # fmt: skip
TEXTS = [
    "the quick brown fox jumps over the lazy dog, and the weather in Oslo is 12 degrees",
    "user assistant system model tool arguments name city you are helpful Today Date 26 Jul 2024",
    "[INST] hello [/INST] world get_weather celsius 天气 مرحبا",
] * 20


def style_tokenizer(style: str, kind: str):
    """A tokenizer of a kind with a style's tokens and template.

    Args:
        kind: `bytes` (GPT-2, Llama 3, Qwen), `metaspace` (SentencePiece, a space in front of the first text
            only), `metaspace_always`, or `prepend` (Llama 2: a space in front of every text).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, special, plain, bos, eos, _ = STYLES[style]
    names = ["<unk>", *special]
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1, right=0)])
        if kind == "prepend":
            spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            backend.normalizer = normalizers.Sequence(spaces)
        else:
            scheme = "always" if kind == "metaspace_always" else "first"
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        names += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=names, show_progress=False)
    kept = backend.normalizer, backend.pre_tokenizer
    if kind != "bytes":  # tokens of several words do not occur in public tokenizers
        backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Metaspace()
    backend.train_from_iterator(TEXTS, trainer)
    if kind != "bytes":
        backend.normalizer, backend.pre_tokenizer = kept
    tree = json.loads(backend.to_str())
    # Byte tokens are ordinary tokens.
    tree["added_tokens"] = [t for t in tree["added_tokens"] if not t["content"].startswith("<0x")]
    for token in tree["added_tokens"]:
        # Phi-3's tokens swallow the white space behind them.
        token["rstrip"] = style == "phi3" and token["content"] in ("<|user|>", "<|assistant|>", "<|end|>")
        # Those of some others swallow the white space in front of them.
        token["lstrip"] = style == "phi4 mini" and token["content"] == "<|end|>"
    backend = Tokenizer.from_str(json.dumps(tree))
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
