"""A reward model as judge: a Hugging Face sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.judge import ScoringJudge, refuse_unknown
from tbpo_ray.generation.samples import Sample


class RewardModelJudge(ScoringJudge):
    """Scores an answer by the classifier's single logit.

    The classifier reads the prompt's text as one user message and the answer, through its own chat template
    where it has one, else joined by a blank line. Texts longer than the classifier lose their front.
    """

    kind = "reward_model"

    def __init__(self, model: str, *, batch_size: int, use_gpu: bool):
        self.model, self.batch_size, self.use_gpu = model, batch_size, use_gpu
        self.shortened = 0

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, use_gpu: bool) -> RewardModelJudge:
        """Raises InputError for settings that cannot be, or a folder that is no such classifier."""
        refuse_unknown(settings, ("model", "batch_size"))
        model = settings.get("model")
        if not model:
            raise InputError("evaluation.judge.model: a sequence classifier's folder or hub name is wanted")
        size = settings.get("batch_size", 16)
        if not isinstance(size, int) or size < 1:
            raise InputError(f"evaluation.judge.batch_size={size}: a number of at least 1 is wanted")
        judge = cls(str(model), batch_size=size, use_gpu=use_gpu)
        judge.check()
        return judge

    def check(self) -> None:
        """Look at the classifier's configuration alone."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"evaluation.judge.model={self.model}: {str(error).splitlines()[0]}") from error
        kinds = config.architectures or []
        if config.num_labels != 1 or not any("SequenceClassification" in name for name in kinds):
            raise InputError(
                f"evaluation.judge.model={self.model}: a sequence classifier with one output is wanted, "
                f"this is {', '.join(kinds) or 'unknown'} with {config.num_labels}"
            )

    def scores(self, samples: Sequence[Sample]) -> list[float]:
        texts = [(sample.prompt_text, sample.answer) for sample in samples]
        if not self.use_gpu:
            values, shortened = classify(self.model, texts, self.batch_size, "cpu")
        else:
            import ray

            remote = ray.remote(num_gpus=1, max_calls=1)(classify)
            values, shortened = ray.get(remote.remote(self.model, texts, self.batch_size, "cuda"))
        self.shortened += shortened
        return values

    def report(self) -> dict[str, Any]:
        return {"kind": self.kind, "model": self.model, "shortened": self.shortened}


def classify(
    model: str, texts: Sequence[tuple[str, str]], batch_size: int, device: str
) -> tuple[list[float], int]:
    """The classifier's logit for each (prompt, answer), and how many were longer than it reads."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from tbpo_ray.models.load import inference_dtype, quiet_transformers

    quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, truncation_side="left")
    dtype = inference_dtype(device)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    classifier.to(torch.device(device)).eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    classifier.config.pad_token_id = tokenizer.pad_token_id
    limit = min(tokenizer.model_max_length, getattr(classifier.config, "max_position_embeddings", 10**9))
    rendered = [_render(tokenizer, prompt, answer) for prompt, answer in texts]
    has_template = tokenizer.chat_template is not None
    lengths = [len(ids) for ids in tokenizer(rendered, add_special_tokens=not has_template)["input_ids"]]
    out = [0.0] * len(rendered)
    order = sorted(range(len(rendered)), key=lengths.__getitem__)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [rendered[i] for i in chosen],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=limit,
                add_special_tokens=not has_template,
            ).to(device)
            for i, value in zip(chosen, classifier(**batch).logits[:, 0].float().tolist(), strict=True):
                out[i] = value
    return out, sum(length > limit for length in lengths)


def _render(tokenizer: Any, prompt: str, answer: str) -> str:
    if tokenizer.chat_template is None:
        return f"{prompt}\n\n{answer}"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, tokenize=False)
