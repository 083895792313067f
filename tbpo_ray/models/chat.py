"""Chat templates: conversations as text, with every field that a template may read, the same on every day.

A template is a program that comes with a tokenizer. It is run by transformers' sandbox on exactly what the
record holds; the few adjustments below exist because public templates differ in what they accept. What a
template accepts is found by rendering probes, not by reading its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.models.turn_tokens import (
    PROBE,
    PROBE_TOOL,
    TemplateRefusedError,
    assistant_markers,
    turn_ends,
)
from tbpo_ray.storage.json_lines import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""One turn: `role`, `content` and every further field of the record's message."""

FIXED_DATE = datetime(2024, 7, 26)
"""Given to templates that print today's date: tokens must not change overnight."""

MEDIA_PARTS = ("image", "image_url", "audio", "input_audio", "audio_url", "video", "video_url", "file")
"""Types of content parts that are not text."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens that it refers to.

    Attributes:
        source: the template's text.
        special_tokens: names to texts, such as `bos_token`: `<s>`.
        tool_source: another template for conversations with tools, where the tokenizer has one.
    """

    source: str
    special_tokens: Mapping[str, str]
    tool_source: str | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text.

        Args:
            messages: turns in order.
            tools: JSON schemas of the functions that the assistant may call.
            template_kwargs: further values for the template (`enable_thinking` ...); they win over the
                defaults.
            add_generation_prompt: end in what the template puts in front of an answer.

        Raises:
            TemplateRefusedError: with the template's own reason.
        """
        # A template that writes the tools of a message would write those of the conversation a second time.
        if tools and any(message.get(name) for message in messages for name in self._message_tools):
            tools = None
        values: dict[str, Any] = {
            "tools": tools,
            "template_kwargs": template_kwargs,
            "add_generation_prompt": add_generation_prompt,
        }
        if all(type(m.get("content")) is str and len(m) == 2 and m["role"] != "developer" for m in messages):
            return self._run(list(messages), **values)
        turns = [self._adjust(message) for message in messages]
        if all(turn.get("content", "") is not None for turn in turns):
            return self._run(turns, **values)
        # Most templates test a null content for truth; some would print `None`, others fail on it.
        emptied = [turn | {"content": ""} if turn.get("content", "") is None else turn for turn in turns]
        try:
            with_null = self._run(turns, **values)
        except TemplateRefusedError:
            return self._run(emptied, **values)
        if "None" not in with_null:
            return with_null
        try:
            without = self._run(emptied, **values)
        except TemplateRefusedError:
            return with_null
        return without if with_null.count("None") > without.count("None") else with_null

    def frame(
        self,
        prompt: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        ends: Sequence[str] = (),
        rest: Sequence[Message] = (),
    ) -> tuple[str, str] | None:
        """Text of the prompt alone, and text between it and an answer's content.

        Found by rendering an answer that no template alters; None where the template refuses or hides it.

        Args:
            ends: the tokens behind a turn, which some templates write behind a prompt too.
            rest: turns behind the answer.
        """
        probe = {"role": "assistant", "content": PROBE}
        try:
            alone = self.render(prompt, tools=tools, template_kwargs=template_kwargs)
            text = self.render([*prompt, probe, *rest], tools=tools, template_kwargs=template_kwargs)
        except TemplateRefusedError:
            return None
        before, found, _ = text.rpartition(PROBE)
        if not before.startswith(alone):
            alone = alone.rstrip().removesuffix("".join(ends)).rstrip()
        if not found or not before.startswith(alone):
            return None
        return alone, before[len(alone) :]

    def turn_ends(self, tokens: Iterable[str], special: Iterable[str] = ()) -> tuple[str, ...]:
        """The tokens directly behind an assistant's turn; see :func:`tbpo_ray.models.turn_tokens.turn_ends`.

        Args:
            tokens: texts of the tokenizer's added tokens.
            special: those that count even where the template writes other text between the turn and them.
        """
        return turn_ends(self, list(tokens), list(special))

    def turn_end(self, tokens: Iterable[str], special: Iterable[str] = ()) -> str | None:
        """The last token that the template puts behind an assistant's turn (`<|im_end|>`, `<end_of_turn>`).

        Returns:
            None where the template ends an answer in plain text or in nothing.
        """
        ends = self.turn_ends(tokens, special)
        return ends[-1] if ends else None

    def markers(self, special: Iterable[str], ends: Iterable[str]) -> frozenset[str]:
        """Special tokens of an assistant's own content, such as `<think>`; see :func:`assistant_markers`."""
        return assistant_markers(self, list(special), ends)

    def _run(
        self,
        turns: list[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        source = self.tool_source if tools and self.tool_source is not None else self.source
        try:
            run, new_context, defaults = self._compiled[source]
            context = new_context(
                {
                    **defaults,
                    **(template_kwargs or {}),
                    "messages": turns,
                    "tools": [dict(tool) for tool in tools] if tools else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
            return "".join(run(context))
        except Exception as error:  # a template is a program of its own: whatever it raises is its refusal
            raise TemplateRefusedError(f"{type(error).__name__}: {error}"[:200]) from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and a caller may set, such as `enable_thinking`."""
        from jinja2 import meta
        from transformers.utils.chat_template_utils import _compile_jinja_template

        fixed = {"messages", "tools", "add_generation_prompt", "raise_exception", *self.special_tokens}
        found: set[str] = set()
        for source in filter(None, (self.source, self.tool_source)):
            environment = _compile_jinja_template(source).environment
            found |= meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals)
        return frozenset(found - fixed)

    @cached_property
    def _compiled(self) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
        """For each template text: the function that runs it, and the class and defaults of its variables.

        Jinja's own `render` copies all global variables in each call, which takes longer than most templates.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        found = {}
        for source in (self.source, self.tool_source):
            if source is None:
                continue
            template = _compile_jinja_template(source)
            defaults = {
                **dict(template.globals),
                **self.special_tokens,
                "documents": None,
                "date_string": FIXED_DATE.strftime("%d %b %Y"),
                "strftime_now": FIXED_DATE.strftime,
            }
            new = template.environment.context_class
            make = partial(_new_context, new, template.environment, template.name, template.blocks)
            found[source] = (template.root_render_func, make, defaults)
        return found

    def _adjust(self, message: Message) -> Message:
        """The message as this template accepts it; the same object if nothing has to change."""
        role, content = message.get("role"), message.get("content")
        if role == "developer" and "developer" not in self.source:
            message = {**message, "role": "system"}
        if isinstance(content, list) and str(message["role"]) not in self._roles_with_parts:
            message = {**message, "content": part_text(content)}
        calls = message.get("tool_calls")
        if isinstance(calls, list) and self._argument_type is not None:
            convert = _with_text_arguments if self._argument_type is str else _with_parsed_arguments
            message = {**message, "tool_calls": [convert(call) for call in calls]}
        return message

    @cached_property
    def _roles_with_parts(self) -> frozenset[str]:
        """The roles whose content may be a list of parts."""
        parts = [{"type": "text", "text": PROBE}]
        user: Message = {"role": "user", "content": "Hello"}
        call: Message = {"role": "assistant", "content": "Hello", "tool_calls": [_probe_call({})]}
        conversations: dict[str, list[Message]] = {
            "system": [{"role": "system", "content": parts}, user],
            "user": [{"role": "user", "content": parts}],
            "assistant": [user, {"role": "assistant", "content": parts}],
            "tool": [
                user,
                call,
                {"role": "tool", "content": parts, "name": "probe", "tool_call_id": "probe1234"},
            ],
        }
        return frozenset(role for role, turns in conversations.items() if PROBE in self._try(turns))

    @cached_property
    def _message_tools(self) -> frozenset[str]:
        """The fields of a message from which the template reads tools."""
        found = set()
        for name in ("tools", "functions"):
            for value in ([PROBE_TOOL], json.dumps([PROBE_TOOL])):
                turns: list[Message] = [{"role": "user", "content": "Hello", name: value}]
                system: Message = {"role": "system", "content": "Hello", name: value}
                if any("probe_it" in self._try(probe) for probe in (turns, [system, *turns])):
                    found.add(name)
        return frozenset(found)

    @cached_property
    def _argument_type(self) -> type | None:
        """The type of a tool call's `arguments` that the template needs: dict, str, or None for either."""
        arguments = {"qkey": PROBE}
        found = {}
        for kind, value in ((dict, arguments), (str, json.dumps(arguments))):
            turns: list[Message] = [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "", "tool_calls": [_probe_call(value)]},
            ]
            rendered = self._try(turns)
            # Python's notation of a mapping has single quotes; JSON text that was dumped again has escapes.
            wrong = "'qkey'" in rendered or '\\"qkey' in rendered
            found[kind] = "qkey" in rendered and PROBE in rendered and not wrong
        if found[dict] and found[str]:
            return None
        return str if found[str] else dict

    def _try(self, turns: list[Message]) -> str:
        """The text of a probe conversation; empty if the template refuses it or prints a list of parts."""
        try:
            text = self._run(turns)
        except TemplateRefusedError:
            return ""
        return "" if re.search(r"""['"]type['"]: ['"]text['"]""", text) else text


def _new_context(
    kind: Any, environment: Any, name: str | None, blocks: dict[str, Any], values: dict[str, Any]
) -> Any:
    return kind(environment, values, name, blocks)


def part_text(parts: Sequence[Any]) -> str:
    """The texts of content parts, joined."""
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)


def stop_token_ids(model: str, *, chat_template: str | None = None, revision: str | None = None) -> list[int]:
    """Every token id that ends an answer of a model, in ascending order.

    These are the token that the chat template puts behind an assistant's turn, the tokenizer's EOS token and
    the `eos_token_id` of `generation_config.json` and `config.json`.

    Args:
        model: a folder or a hub name.
        chat_template: a Jinja file that replaces the tokenizer's own template, or `none`.
        revision: of the hub repository.
    """
    from tbpo_ray.models.load import load_tokenizer

    tokenizer = load_tokenizer(model, chat_template=chat_template, revision=revision)
    ids: list[Any] = [turn_end_id(tokenizer), tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        tree = _read_json(model, name, revision)
        text = tree.get("text_config")
        for holder in (tree, text if isinstance(text, dict) else {}):
            value = holder.get("eos_token_id")
            ids += value if isinstance(value, list) else [value]
    return sorted({token for token in ids if type(token) is int and token >= 0})


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token behind an assistant's turn; EOS where the chat template has none."""
    template = template_of(tokenizer)
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    text = template.turn_end(added, special) if template is not None else None
    return added[text] if text is not None else tokenizer.eos_token_id


def template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The chat template of a tokenizer, None if it has none."""
    source: Any = tokenizer.chat_template
    if not source:
        return None
    with_tools = None
    if isinstance(source, Mapping):
        with_tools = source.get("tool_use")
        source = source.get("default") or tokenizer.get_chat_template()
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    return ChatTemplate(source, special, with_tools)


def _read_json(model: str, name: str, revision: str | None) -> dict[str, Any]:
    """A file of a model folder or hub repository; empty if there is none."""
    file: str | None = str(Path(model) / name)
    if not Path(model).is_dir():
        from transformers.utils.hub import cached_file

        file = cached_file(
            model,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if file is None or not Path(file).is_file():
        return {}
    return read_object(Path(file), "save or download the model again")


def _probe_call(arguments: Any) -> dict[str, Any]:
    return {"id": "probe1234", "type": "function", "function": {"name": "probe_it", "arguments": arguments}}


def _with_parsed_arguments(call: Any) -> Any:
    """A tool call whose `arguments`, JSON text in OpenAI's format, are parsed: templates dump them again."""
    given = function_of(call).get("arguments")
    if not isinstance(given, str):
        return call
    try:
        parsed = json.loads(given)
    except ValueError:
        return call
    return _with_arguments(call, parsed) if isinstance(parsed, Mapping) else call


def _with_text_arguments(call: Any) -> Any:
    """A tool call whose `arguments` are JSON text, for templates that insert them as they are."""
    given = function_of(call).get("arguments")
    return (
        call
        if given is None or isinstance(given, str)
        else _with_arguments(call, json.dumps(given, ensure_ascii=False))
    )


def function_of(call: Any) -> Mapping[str, Any]:
    """The name and arguments of a tool call, which OpenAI's format wraps in `function`."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _with_arguments(call: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    changed = {**function_of(call), "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed
