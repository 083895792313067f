"""Sections 5 to 7 of `gpu_check`: attention in shared rows, the output layer, and DeepSpeed's ZeRO."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.flex_attention import answer_block_mask, flex_pair_attention
from benchmarks.gpu_parts import (
    TINY,
    Budget,
    Machine,
    Row,
    Shape,
    collated,
    llama,
    relative_error,
    training_config,
)
from benchmarks.output_layer import Case, Layer, forward_backward, make_inputs, measure_cuda
from tbpo_ray.models.hidden_modules import hide_modules
from tbpo_ray.objectives import token_stats
from tbpo_ray.training.batch import PairBatch
from tbpo_ray.training.pair_attention import encode_indices, pair_attention
from tbpo_ray.training.readback import Readback
from tbpo_ray.training.scorer import PairScorer

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[R, D, L, H] queries, keys and values to [R, L, D, H]"""
HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 32, 8, 64


def attention(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Attention in shared rows, forward and backward: values against the dense mask, and time by length.

    Half of a row's tokens are the prompt's, a quarter each answer's; 16k positions in all.
    """
    lengths = (32, 64) if machine.quick else (256, 512, 1024, 2048, 4096, 8192)
    total = 128 if machine.quick else 16_384
    # FlexAttention compiles for seconds, so it comes last.
    names = ("dense mask", "dense bias", "gathered rows", "varlen")
    cases = [(length, name) for length in lengths for name in names]
    for length, name in [*cases, *((length, "FlexAttention") for length in lengths)]:
        row: Row = {"case": f"{length} tokens: {name}"}
        if budget.is_spent:
            yield row | {"result": "skipped: the section's time is up"}
            continue
        try:
            yield row | _measure_attention(machine, name, length, max(1, total // length))
        except (ImportError, RuntimeError, NotImplementedError) as error:
            yield row | {"result": f"not run: {_first_line(error)}"}
            machine.reset_peak()


def _measure_attention(machine: Machine, name: str, length: int, rows: int) -> Row:
    sizes = np.tile([length // 2, length // 4 + 1, length // 4 + 1], (rows, 1))
    batch = collated(sizes, 100, machine.device)
    heads = (4, 2, 16) if machine.quick else (HEADS, KEY_VALUE_HEADS, HEAD_SIZE)
    inputs = _inputs(batch, heads, machine.device, torch.bfloat16 if machine.is_cuda else torch.float32)
    kernel = _kernel(name, batch)
    # The CPU has no backward pass of FlexAttention.
    run = _forward if name == "FlexAttention" and not machine.is_cuda else _forward_backward
    found = run(kernel, inputs)
    row: Row = {}
    if name != "dense mask" and length <= 2048:
        expected = run(_kernel("dense mask", batch), inputs)
        real = (batch.segment >= 0).reshape(-1)
        errors = [
            relative_error(_flat(a, i)[real], _flat(b, i)[real])
            for i, (a, b) in enumerate(zip(found, expected, strict=True))
        ]
        row = {"value_error": errors[0], "gradient_error": max(errors[1:], default=None)}
    machine.reset_peak()
    row["milliseconds"] = 1000 * machine.seconds(lambda: run(kernel, inputs))
    peak = machine.peak_bytes()
    return row | {"peak_gib": None if peak is None else peak / 2**30}


def _flat(tensor: Tensor, index: int) -> Tensor:
    """[R L, ...] of the output [R, L, D, H] or of a gradient [R, D, L, H]."""
    return (tensor if index == 0 else tensor.transpose(1, 2)).flatten(0, 1)


def _inputs(
    batch: PairBatch, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    rows, length = batch.input_ids.shape
    torch.manual_seed(0)
    shapes = [(rows, count, length, heads[2]) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def _forward_backward(kernel: Attention, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a loss that weighs its elements differently."""
    out = kernel(*inputs)
    weights = torch.linspace(-1, 1, out.shape[-1], device=out.device, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@torch.no_grad()
def _forward(kernel: Attention, inputs: list[Tensor]) -> list[Tensor]:
    return [kernel(*(tensor.detach() for tensor in inputs))]


def _kernel(name: str, batch: PairBatch) -> Attention:
    return {
        "dense mask": _dense,
        "dense bias": _bias,
        "gathered rows": _gathered,
        "FlexAttention": _flex,
        "varlen": _varlen,
    }[name](batch)


class _Module(nn.Module):
    """What transformers hands to an attention function."""

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def _dense(batch: PairBatch) -> Attention:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = batch.attention_mask()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention_forward(_Module(q.shape[1] // k.shape[1]), q, k, v, mask)[0]

    return run


def _bias(batch: PairBatch) -> Attention:
    """The mask as a term of the scores, as the kernel wants it: made once instead of in every layer."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    made: dict[torch.dtype, Tensor] = {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype not in made:
            allowed = batch.attention_mask()
            rows, _, length, _ = allowed.shape
            width = -(-length // 16) * 16  # the kernel pads rows that are not aligned, every time
            whole = torch.zeros(rows, 1, length, width, dtype=q.dtype, device=q.device)
            made[q.dtype] = whole[..., :length].masked_fill_(~allowed, -torch.inf)
        return sdpa_attention_forward(_Module(q.shape[1] // k.shape[1]), q, k, v, made[q.dtype])[0]

    return run


def _gathered(batch: PairBatch) -> Attention:
    assert batch.gather_index is not None and batch.scatter_index is not None
    indices = encode_indices(batch.gather_index, batch.scatter_index, None)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pair_attention(_Module(q.shape[1] // k.shape[1]), q, k, v, indices)[0]

    return run


def _flex(batch: PairBatch) -> Attention:
    mask = answer_block_mask(batch)
    return lambda q, k, v: flex_pair_attention(nn.Module(), q, k, v, mask)[0]


def _varlen(batch: PairBatch) -> Attention:
    """Rows [prompt][answer] without padding, one after another."""
    from torch.nn.attention.varlen import varlen_attn

    assert batch.gather_index is not None and batch.scatter_index is not None
    rows, length = batch.input_ids.shape
    gathered, single = batch.gather_index.shape
    prompts = (batch.segment == 0).sum(1)
    sizes = torch.cat([prompts + (batch.segment == side).sum(1) for side in (1, 2)]).tolist()
    kept = torch.cat([torch.arange(n) + i * single for i, n in enumerate(sizes)]).to(batch.input_ids.device)
    index = batch.gather_index.reshape(-1)[kept]
    place = torch.zeros(gathered * single, dtype=torch.int64, device=index.device)
    place[kept] = torch.arange(len(kept), device=index.device)
    back = place[batch.scatter_index.reshape(-1)]
    ends = torch.tensor([0, *np.cumsum(sizes).tolist()], dtype=torch.int32, device=index.device)
    longest = max(sizes)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        query, key, value = (t.transpose(1, 2).flatten(0, 1)[index] for t in (q, k, v))
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        out: Any = varlen_attn(query, key, value, ends, ends, longest, longest, window_size=(-1, 0))
        return out[back].view(rows, length, *out.shape[1:])

    return run


def output_layer(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Tokens per second of the output layer, forward and backward, by vocabulary."""
    vocabularies = (1000, 2000) if machine.quick else (32_000, 64_000, 128_256, 262_144)
    tokens, width = (64, 32) if machine.quick else (8192, 2048)
    dtype = "bfloat16" if machine.is_cuda else "float32"
    layers = [(vocabulary, frozen) for vocabulary in vocabularies for frozen in (False, True)]
    cases: list[tuple[int, bool, tuple[str, ...], str]] = [
        (vocabulary, frozen, ("logp",), name)
        for vocabulary, frozen in layers
        for name in ("blockwise", "full_logits", "cut_cross_entropy", "liger")
    ]
    # With what a training step logs beside.
    cases += [
        (vocabularies[-2], False, ("logp", "entropy"), name)
        for name in ("blockwise", "blockwise, larger blocks", "full_logits")
    ]
    for vocabulary, frozen, outputs, name in cases:
        weight = "frozen" if frozen else "trained"
        row: Row = {"case": f"vocabulary {vocabulary}, weight {weight}, {' '.join(outputs)}: {name}"}
        if budget.is_spent:
            yield row | {"result": "skipped: the section's time is up"}
            continue
        case = Case(outputs, frozen, tokens, width, vocabulary, dtype, str(machine.device))
        with _block_bytes(4 if "larger" in name else 1):
            yield row | _measure_output(machine, case, name.partition(",")[0])


@contextmanager
def _block_bytes(factor: int) -> Iterator[None]:
    """Within the block, blocks on accelerators are `factor` times as large."""
    before = token_stats.DEVICE_BLOCK
    token_stats.DEVICE_BLOCK = (before[0] * factor, before[1])
    try:
        yield
    finally:
        token_stats.DEVICE_BLOCK = before


def _measure_output(machine: Machine, case: Case, name: str) -> Row:
    if name in ("cut_cross_entropy", "liger"):
        try:
            kernel = _optional_kernel(name)
        except ImportError as error:
            return {"result": f"not run: {_first_line(error)}"}
        x = make_inputs(case)
        try:
            return {"tokens_per_second": case.tokens / machine.seconds(lambda: kernel(x))}
        except (RuntimeError, ValueError) as error:
            return {"result": f"failed: {_first_line(error)}"}
    if not machine.is_cuda:
        x = make_inputs(case)
        return {
            "tokens_per_second": case.tokens
            / machine.seconds(lambda: forward_backward(name, x, case.outputs))
        }
    found = measure_cuda(case, name)
    if not found:
        return {"result": "out of memory"}
    return {"tokens_per_second": case.tokens / found["seconds"], "peak_gib": found["peak_bytes"] / 2**30}


def _optional_kernel(name: str) -> Callable[[Layer], None]:
    """Forward and backward of the labels' log-probs by another library."""
    if name == "cut_cross_entropy":
        from cut_cross_entropy import linear_cross_entropy

        def cut(x: Layer) -> None:
            linear_cross_entropy(x.hidden, x.weight, x.labels, reduction="none").sum().backward()
            x.hidden.grad = x.weight.grad = None

        return cut
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def liger(x: Layer) -> None:
        LigerFusedLinearCrossEntropyLoss(reduction="sum")(x.weight, x.hidden, x.labels).backward()
        x.hidden.grad = x.weight.grad = None

    return liger


def zero(machine: Machine, budget: Budget) -> Iterator[Row]:
    """DeepSpeed's ZeRO 1 to 3 with one worker: the losses of each stage against each other, and time."""
    if not machine.is_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        with hide_modules("mlflow"):
            import deepspeed  # noqa: F401
    except Exception as error:  # a carried wheel can fail in its own ways: it compiles, looks for nvcc...
        yield {"case": "DeepSpeed", "result": f"not run: {type(error).__name__}: {_first_line(error)}"}
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if machine.is_cuda else "gloo", rank=0, world_size=1)
    first: list[float] = []
    for stage in (1, 2, 3):
        if budget.is_spent:
            yield {"case": f"ZeRO {stage}", "result": "skipped: the section's time is up"}
            continue
        try:
            losses, seconds = _train_stage(machine, stage)
        except Exception as error:  # reported, and the next stage may run
            yield {"case": f"ZeRO {stage}", "result": f"failed: {_first_line(error)}", "ok": False}
            continue
        first = first or losses
        difference = max(abs(a - b) for a, b in zip(first, losses, strict=True))
        yield {
            "case": f"ZeRO {stage}",
            "seconds_per_step": seconds,
            "losses": [round(loss, 5) for loss in losses],
            "difference_to_stage_1": difference,
            "ok": difference < 1e-2,
        }
    dist.destroy_process_group()


def _train_stage(machine: Machine, stage: int) -> tuple[list[float], float]:
    from benchmarks.gpu_parts import preference_step
    from tbpo_ray.training.deepspeed_engine import Engine

    shape = TINY if machine.quick else Shape(32_000, 1024, 8, 16, 8, 2816)
    section = {"name": "dpo"}
    scorer = PairScorer(llama(shape, machine.device)).train()
    config = training_config(section, precision="bf16", deepspeed={"stage": stage}, learning_rate=1e-4)
    engine = Engine(scorer, config, machine.device)
    step, _ = preference_step(section, shape.width, machine.device)
    batch = collated(np.tile([20, 10, 12], (4, 1)), shape.vocabulary, machine.device)
    losses = []
    began = time.perf_counter()
    for _ in range(3):
        loss, _ = step(engine, batch)
        engine.backward(loss / 4, last=True)
        readback = Readback(machine.device)
        readback.add("loss", loss / 4, guarded=True)
        engine.step(1e-4, readback)
        losses.append(readback["loss"][0])
    return losses, (time.perf_counter() - began) / 3


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
