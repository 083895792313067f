"""How far a policy went from its reference, measured on the policy's own samples.

Shape letters: N samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tbpo_ray.generation.samples import Sample

_LOGITS = 2**28
"""Most logits of one batch: 1 GiB in float32."""


def reference_logprobs(samples: Sequence[Sample], model: str, *, use_gpu: bool = False) -> list[list[float]]:
    """log pi_ref of every sampled token, in nats: for each of N samples a list as long as its tokens.

    Samples of like length share a batch. On a CPU the model runs here in float32; with `use_gpu` in bfloat16
    in a Ray task that holds a GPU.

    Args:
        model: the reference's folder; it must share the policy's token ids.
    """
    pairs = [(list(s.prompt_token_ids), list(s.token_ids)) for s in samples]
    if not use_gpu:
        return score_tokens(model, pairs, "cpu")
    import ray

    remote = ray.remote(num_gpus=1, max_calls=1)(score_tokens)
    return ray.get(remote.remote(model, pairs, "cuda"))


def score_tokens(model: str, pairs: Sequence[tuple[list[int], list[int]]], device: str) -> list[list[float]]:
    """log-probabilities of answers after prompts under a causal model (see :func:`reference_logprobs`)."""
    import torch

    from tbpo_ray.models.load import inference_dtype, load_model, quiet_transformers

    quiet_transformers()

    policy = load_model(model, dtype=inference_dtype(device))
    policy.to(torch.device(device))  # type: ignore[arg-type]
    batch_tokens = min(8192, max(1, _LOGITS // policy.config.get_text_config().vocab_size))
    sizes = [len(prompt) + len(answer) for prompt, answer in pairs]
    out: list[list[float]] = [[] for _ in pairs]
    with torch.inference_mode():
        for batch in length_batches(sizes, batch_tokens):
            width = max(sizes[i] for i in batch)
            first = min(len(pairs[i][0]) for i in batch) - 1
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                tokens = torch.tensor([*pairs[i][0], *pairs[i][1]])
                ids[row, : len(tokens)] = tokens
                mask[row, : len(tokens)] = 1
            logits = policy(
                input_ids=ids.to(device), attention_mask=mask.to(device), logits_to_keep=width - first
            ).logits  # [N, width - first, V], the position `first` first
            for row, i in enumerate(batch):
                start, labels = len(pairs[i][0]) - 1 - first, torch.tensor(pairs[i][1], dtype=torch.long)
                logps = logits[row, start : start + len(labels)].float().log_softmax(-1)
                out[i] = logps.gather(1, labels.to(device)[:, None])[:, 0].tolist()
    return out


def length_batches(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices of sequences, sorted by size, in batches whose padded size stays within `most` where one alone
    does; those of size 0 are left out."""
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if not sizes[i]:
            continue
        if batches and sizes[i] * (len(batches[-1]) + 1) <= most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


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
