"""A reward model as judge: a Hugging Face sequence classifier with one output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tbpo_ray.config.open_values import JUDGE_KEYS
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.evaluation.gpu_task import run_on_gpu
from tbpo_ray.evaluation.judge import ScoringJudge, refuse_unknown
from tbpo_ray.generation.samples import Sample
from tbpo_ray.models.chat import ChatTemplate, template_of
from tbpo_ray.models.resolve import local_model


class RewardModelJudge(ScoringJudge):
    """Scores an answer by the classifier's single logit.

    The prompt's text is one user message and the answer one assistant message, rendered by the classifier's
    own chat template; without a template they are joined by a blank line. Texts longer than the classifier
    accepts are truncated at the front.
    """

    kind = "reward_model"

    def __init__(self, model: str, *, name: str, batch_size: int, attention: str = "sdpa"):
        self.model, self.name, self.batch_size = model, name, batch_size
        self.attention = attention
        self.gpu_labels: Mapping[str, str] | None = None
        self.truncated = 0

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        *,
        cache: Path,
        attention: str = "sdpa",
        gpu_labels: Mapping[str, str] | None = None,
    ) -> RewardModelJudge:
        """Validate `evaluation.judge` without `kind` and build the judge.

        Args:
            cache: the folder for snapshots of the hub, which all nodes share.
            attention: `model.attention`.
            gpu_labels: as for :func:`tbpo_ray.evaluation.reference_kl.reference_logprobs`.

        Raises:
            InputError: invalid settings, or a model that is not such a classifier.
        """
        refuse_unknown(settings, JUDGE_KEYS["reward_model"])
        model = settings.get("model")
        if not model:
            raise InputError(
                "evaluation.judge.model: missing; must be the folder or hub name of a sequence classifier"
            )
        size = settings.get("batch_size", 16)
        if not isinstance(size, int) or size < 1:
            raise InputError(f"evaluation.judge.batch_size={size}: must be an integer of at least 1")
        revision = settings.get("revision")
        folder = local_model(str(model), cache, key="evaluation.judge.model", revision=revision)
        name = f"{model}@{revision}" if revision else str(model)
        judge = cls(folder, name=name, batch_size=size, attention=attention)
        judge.gpu_labels = gpu_labels
        judge.check()
        return judge

    def check(self) -> None:
        """Check the classifier's configuration, without loading its weights.

        Raises:
            InputError: it cannot be read, or is not a sequence classifier with one output.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"evaluation.judge.model={self.name}: {first_line(error)}") from error
        kinds = config.architectures or []
        if config.num_labels != 1 or not any("SequenceClassification" in name for name in kinds):
            raise InputError(
                f"evaluation.judge.model={self.name}: is {', '.join(kinds) or 'unknown'} with "
                f"{config.num_labels} outputs; must be a sequence classifier with one output"
            )

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        texts = [(sample.prompt_text, sample.answer) for sample in samples]
        if self.gpu_labels is None:
            values, truncated = classify(self.model, texts, self.batch_size, "cpu", self.attention)
        else:
            values, truncated = run_on_gpu(
                self.gpu_labels, classify, self.model, texts, self.batch_size, "cuda", self.attention
            )
        self.truncated += truncated
        bad = sum(not math.isfinite(value) for value in values)
        if bad:
            raise InputError(
                f"evaluation.judge.model={self.name}: {bad} of {len(values)} scores are not finite, so "
                "that no answer can be preferred; must be a model whose weights are finite"
            )
        return values

    def report(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": self.name, "truncated": self.truncated}


def classify(
    model: str, texts: Sequence[tuple[str, str]], batch_size: int, device: str, attention: str = "sdpa"
) -> tuple[list[float], int]:
    """Return the classifier's logit for each (prompt, answer), and how many of them had to be truncated."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from tbpo_ray.models.attention import choose_attention, cpu_attention
    from tbpo_ray.models.load import inference_dtype, quiet_transformers

    quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, truncation_side="left")
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    known: Any = AutoModelForSequenceClassification._model_mapping
    if device == "cpu":
        attention = cpu_attention(attention)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model,
        dtype=inference_dtype(device),
        attn_implementation=choose_attention(config, attention, known[type(config)]).implementation,
        trust_remote_code=False,
        use_safetensors=True,
    )
    classifier.to(torch.device(device)).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id
    limit = min(tokenizer.model_max_length, getattr(classifier.config, "max_position_embeddings", 10**9))
    template = template_of(tokenizer)
    rendered = [_render(template, prompt, answer) for prompt, answer in texts]
    has_template = template is not None
    lengths = [len(ids) for ids in tokenizer(rendered, add_special_tokens=not has_template)["input_ids"]]
    out = [0.0] * len(rendered)
    order = sorted(range(len(rendered)), key=lengths.__getitem__)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = tokenizer(
                [rendered[i] for i in indices],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=limit,
                add_special_tokens=not has_template,
            ).to(device)
            for i, value in zip(indices, classifier(**batch).logits[:, 0].float().tolist(), strict=True):
                out[i] = value
    return out, sum(length > limit for length in lengths)


def _render(template: ChatTemplate | None, prompt: str, answer: str) -> str:
    if template is None:
        return f"{prompt}\n\n{answer}"
    return template.render([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
