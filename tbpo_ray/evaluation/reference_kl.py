"""How far a policy is from its reference, measured on the policy's own samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tbpo_ray.evaluation.gpu_task import run_on_gpu
from tbpo_ray.evaluation.scoring import length_batches, load_scorer
from tbpo_ray.generation.samples import Sample


def reference_logprobs(
    samples: Sequence[Sample],
    model: str,
    *,
    attention: str = "sdpa",
    gpu_labels: Mapping[str, str] | None = None,
) -> list[list[float]]:
    """Score samples under the reference.

    Args:
        model: the reference's folder; it must share the policy's token ids.
        attention: `model.attention`.
        gpu_labels: run in a Ray task that holds a GPU of a node with these labels; None: on the CPU, in this
            process.

    Returns:
        For each sample log pi_ref of its tokens, in nats.
    """
    pairs = [(list(s.prompt_token_ids), list(s.token_ids)) for s in samples]
    if gpu_labels is None:
        return answer_logprobs(model, pairs, "cpu", attention)
    return run_on_gpu(gpu_labels, answer_logprobs, model, pairs, "cuda", attention)


def answer_logprobs(
    model: str, pairs: Sequence[tuple[list[int], list[int]]], device: str, attention: str = "sdpa"
) -> list[list[float]]:
    """Log-probs of the answer's tokens for each (prompt, answer), under the model in folder `model`."""
    import numpy as np
    import torch

    from tbpo_ray.training.batch import collate

    scorer = load_scorer(model, device, attention)
    scores: list[list[float]] = [[] for _ in pairs]
    with torch.inference_mode():
        for indices in length_batches([len(prompt) + len(answer) for prompt, answer in pairs]):
            prompts = [np.array(pairs[i][0]) for i in indices]
            answers = [np.array(pairs[i][1], dtype=np.int64) for i in indices]
            batch = collate(prompts, [answers], pad_id=0, shared=False, truncate_to_shorter=False)
            logps = scorer.reference_logps(batch.to(device))[0].tolist()
            for i, values in zip(indices, logps, strict=True):
                scores[i] = values[: len(pairs[i][1])]
    return scores


def kl_k1(samples: Sequence[Sample], reference: Sequence[Sequence[float]]) -> list[float]:
    """KL(pi || pi_ref) of whole answers by the k1 estimator: per sample, the sum of log pi - log pi_ref.

    Its mean over samples drawn from the policy at temperature 1 is unbiased; a single value may be negative.
    log pi comes from the sampling engine and log pi_ref from transformers, in bfloat16 on GPUs: equal models
    then differ by rounding, about 1e-2 per token, without a preferred sign.
    """
    return [
        math.fsum(sample.logprobs) - math.fsum(values)
        for sample, values in zip(samples, reference, strict=True)
    ]
