"""Everything in a tokenizer that determines token ids, as plain text that workers and fingerprints share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tbpo_ray.errors import InputError
from tbpo_ray.models.chat import ChatTemplate, template_of
from tbpo_ray.models.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything in a tokenizer that determines token ids, as plain text.

    It is small to send to workers, and its digest is part of the fingerprint of prepared pairs.
    """

    backend: str
    """The content of `tokenizer.json`."""
    template: str | None
    special_tokens: dict[str, str]
    """Names to texts (`bos_token`: `<s>`), which templates refer to."""
    bos: int | None
    eos: int
    adds_bos: bool
    """Whether the tokenizer itself puts BOS in front of a text."""
    tool_template: str | None = None
    """Another template, for conversations with tools, where the tokenizer has one."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """`data.template_kwargs`"""

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None
    ) -> TokenizerSpec:
        """The specification of a transformers tokenizer.

        Args:
            template_kwargs: arguments for the chat template, `data.template_kwargs`.

        Raises:
            InputError: when it has no fast backend or no EOS token.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if backend is None:
            raise InputError(f"model.name_or_path={name}: needs a fast tokenizer (tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"model.name_or_path={name}: its tokenizer has no EOS token, so answers cannot end"
            )
        template = template_of(tokenizer)
        special = tokenizer.special_tokens_map.items()
        from tokenizers import Tokenizer

        # A saved tokenizer may keep truncation and padding switched on; here both are decided elsewhere.
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and copy.encode("a").ids[:1] == [bos]
        return cls(
            backend=copy.to_str(),
            template=template.source if template is not None else None,
            special_tokens={key: str(value) for key, value in special if isinstance(value, str)},
            bos=bos,
            eos=tokenizer.eos_token_id,
            adds_bos=adds_bos,
            tool_template=template.tool_source if template is not None else None,
            template_kwargs=dict(template_kwargs or {}),
        )

    @classmethod
    def load(
        cls,
        path: str,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokenizerSpec:
        """The tokenizer in a model folder or on the hub; remote code is never run.

        Args:
            path: a folder or a hub name.
            chat_template: a Jinja file that replaces the tokenizer's own template, or `none` for plain text.
            template_kwargs: arguments for the chat template, `data.template_kwargs`.

        Raises:
            InputError: when the tokenizer or the template does not exist.
        """
        return cls.of(load_tokenizer(path, chat_template=chat_template), template_kwargs)

    @property
    def chat_template(self) -> ChatTemplate | None:
        return (
            ChatTemplate(self.template, self.special_tokens, self.tool_template)
            if self.template is not None
            else None
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TokenizerSpec:
        return cls(**json.loads(text))
