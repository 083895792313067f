"""What a model's configuration and files rule out, found without loading a weight or starting a worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tbpo_ray.config.schema import Config, ModelConfig
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.models.attention import choose_attention
from tbpo_ray.models.load import lora_targets, model_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelFacts:
    """A model whose parameters have shapes but no values.

    Attributes:
        folder: the model's folder, or a hub name.
        key: the configuration key that names the model, for messages.
        source: revision and GGUF file; default: a folder that is ready to load.
    """

    folder: str
    key: str = "model.name_or_path"
    source: ModelConfig | None = None

    @cached_property
    def config(self) -> Any:
        """The transformers configuration."""
        return model_config(self.folder, self.source or ModelConfig())

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device.

        Raises:
            InputError: no causal model can be built from the configuration.
        """
        import torch
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                    self.config, trust_remote_code=False, attn_implementation="eager"
                )
        # A configuration is data from elsewhere, and each architecture reads it in its own way.
        except Exception as error:
            raise InputError(
                f"{self.key}={self.folder}: no causal model can be built from its config.json "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        return model

    @property
    def embedding_rows(self) -> int:
        """The number of token ids that the model knows."""
        embedding: Any = self.skeleton.get_input_embeddings()
        return int(embedding.weight.shape[0])

    @cached_property
    def learned_positions(self) -> int | None:
        """The number of positions in the model's tables; None where positions are computed."""
        sizes = list(_position_tables(self.skeleton))
        return min(sizes) if sizes else None


def _position_tables(model: Any) -> Iterator[int]:
    from torch import Tensor, nn

    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        # OPT and BioGPT reserve the first rows of the table.
        if isinstance(module, nn.Embedding) and ("pos" in name or name == "wpe"):
            yield module.num_embeddings - int(getattr(module, "offset", 0))
        # GPT-J and CTRL keep sines and cosines in a table [positions, width] of fixed length.
        for name, value in (*vars(module).items(), *module.named_buffers(recurse=False)):
            if isinstance(value, Tensor) and "pos" in name and value.ndim == 2 and min(value.shape) > 1:
                yield value.shape[0]


def check_model(config: Config, facts: ModelFacts) -> list[str]:
    """Refuse a model that cannot train with this configuration.

    Returns:
        Sentences about what will be done differently, or deserves a look.

    Raises:
        InputError: naming each key, its value and an accepted one.
    """
    notes = []
    _check_trainable(facts)
    choice = choose_attention(facts.config, config.model.attention)
    if choice.reason is not None:
        notes.append(choice.reason)
    notes += _check_positions(config, facts)
    if config.model.lora is not None and facts.key == "model.name_or_path":
        lora_targets(facts.skeleton, config.model.lora.target_modules)
    return notes


def _check_trainable(facts: ModelFacts) -> None:
    """Refuse models whose weights or attention make the log-probs of training meaningless."""
    quantization = getattr(facts.config, "quantization_config", None)
    if quantization is not None and facts.key == "model.name_or_path":
        kind = quantization if isinstance(quantization, Mapping) else vars(quantization)
        raise InputError(
            f"{facts.key}={facts.folder}: its weights are quantized ({kind.get('quant_method')}), and "
            "quantized weights cannot be trained; must be a checkpoint in bf16, fp16 or fp32"
        )
    # Decoders made of an encoder, such as BartForCausalLM, set it when they are built.
    if getattr(facts.skeleton.config, "is_decoder", None) is False:
        raise InputError(
            f"{facts.key}={facts.folder}: {type(facts.skeleton).__name__} is an encoder (is_decoder is false "
            "in its config.json), whose attention sees the tokens to predict; must be a causal model"
        )


def _check_positions(config: Config, facts: ModelFacts) -> list[str]:
    length, table = config.data.max_length, facts.learned_positions
    if table is not None and length > table:
        raise InputError(
            f"data.max_length={length}: {facts.key}={facts.folder} has positions for {table} tokens only; "
            f"must be at most {table}"
        )
    text = facts.config.get_text_config() if hasattr(facts.config, "get_text_config") else facts.config
    trained = getattr(text, "max_position_embeddings", None)
    for rope in _rope_parameters(text):
        kind = str(rope.get("rope_type") or rope.get("type"))
        original = rope.get("original_max_position_embeddings") or trained
        if not isinstance(original, int):
            continue
        if ("dynamic" in kind or kind == "longrope") and length > original:
            # Transformers chooses the frequencies by the longest row of a batch, for all of its rows.
            raise InputError(
                f"data.max_length={length}: the {kind} rotary positions of {facts.key}={facts.folder} change "
                f"for a whole batch if one of its rows has more than {original} tokens, so that log-probs "
                f"would depend on the batch; must be at most {original}"
            )
        factor = rope.get("factor")
        if isinstance(factor, int | float) and isinstance(trained, int):
            trained = max(trained, int(factor * original))
    if table is None and isinstance(trained, int) and length > trained > 0:
        return [
            f"data.max_length={length}: {facts.key}={facts.folder} is configured for {trained} "
            "positions; longer rows are computed, but the model has not seen such positions"
        ]
    return []


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of rotary positions, of which each kind of layer may have its own."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(given, Mapping):
        nested = [value for value in given.values() if isinstance(value, Mapping)]
        yield from nested or [given]


def check_token_ids(facts: ModelFacts, largest: int, where: str) -> None:
    """Refuse data that holds a token which the model does not know.

    Args:
        largest: the largest token id.
        where: what holds it, for the message.

    Raises:
        InputError: naming both numbers.
    """
    if largest >= facts.embedding_rows:
        raise InputError(
            f"{facts.key}={facts.folder}: {where} holds the token id {largest}, but the model's "
            f"embedding has {facts.embedding_rows} rows; use the tokenizer that belongs to the model, or "
            "resize the embedding"
        )
