"""Time and peak memory of `token_log_probs` and of the full-logits formula it replaces.

On the CPU every measurement runs in a separate process, whose peak resident memory is measured from when the
inputs exist; on CUDA the allocator's peak is used. Both count what forward and backward add to the inputs,
including gradients.

Shapes: N answer tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tbpo_ray.objectives import token_log_probs


@dataclass(frozen=True)
class Case:
    """One measurement: the outputs, the sizes, and whether the output weight is frozen."""

    outputs: tuple[str, ...]
    frozen: bool
    tokens: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    device: str = "cpu"


@dataclass
class Layer:
    """Inputs of the output layer: hidden [N, H], weight [V, H], labels [N]; the same for the reference."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None


def make_inputs(case: Case) -> Layer:
    """Random inputs with logits of standard deviation about 1."""
    options = {"dtype": getattr(torch, case.dtype), "device": case.device}
    torch.manual_seed(0)
    kl = "kl" in case.outputs

    def weight() -> Tensor:
        return torch.randn(case.vocab, case.hidden, **options).mul_(case.hidden**-0.5)

    return Layer(
        hidden=torch.randn(case.tokens, case.hidden, **options).requires_grad_(),
        weight=weight().requires_grad_(not case.frozen),
        labels=torch.randint(case.vocab, (case.tokens,), device=case.device),
        ref_hidden=torch.randn(case.tokens, case.hidden, **options) if kl else None,
        ref_weight=weight() if kl else None,
    )


def full_logits(x: Layer, outputs: tuple[str, ...]) -> list[Tensor]:
    """The outputs from [N, V] logits, written the plain way. [N] each"""
    logp = torch.log_softmax((x.hidden @ x.weight.T).float(), -1)
    found = {"logp": logp.gather(-1, x.labels[:, None])[:, 0]}
    if "entropy" in outputs:
        found["entropy"] = -(logp.exp() * logp).sum(-1)
    if "kl" in outputs:
        assert x.ref_hidden is not None and x.ref_weight is not None
        with torch.no_grad():
            ref = torch.log_softmax((x.ref_hidden @ x.ref_weight.T).float(), -1)
        found["kl"] = (ref.exp() * (ref - logp)).sum(-1)
    return [found[name] for name in outputs]


def blockwise(x: Layer, outputs: tuple[str, ...]) -> list[Tensor]:
    """The outputs from `token_log_probs`. [N] each"""
    mask = torch.ones_like(x.labels, dtype=torch.bool)
    stats = token_log_probs(x.hidden, x.weight, x.labels, mask, x.ref_hidden, x.ref_weight, outputs)
    return [getattr(stats, name) for name in outputs]


VARIANTS: dict[str, Callable[[Layer, tuple[str, ...]], list[Tensor]]] = {
    "full_logits": full_logits,
    "blockwise": blockwise,
}


def forward_backward(variant: str, x: Layer, outputs: tuple[str, ...]) -> None:
    """One forward and one backward pass; the gradients are discarded."""
    torch.stack(VARIANTS[variant](x, outputs)).sum().backward()
    x.hidden.grad = x.weight.grad = None


def measure(case: Case, variant: str) -> dict[str, float]:
    """Measure one forward and backward pass: seconds, and peak bytes above the inputs.

    Returns:
        On the CPU, in a fresh process, {seconds, cpu_seconds, peak_bytes}. On CUDA, in this process,
        {seconds, peak_bytes}, or {} if it does not fit into memory.
    """
    if case.device != "cpu":
        return measure_cuda(case, variant)
    arguments = json.dumps({"variant": variant, **asdict(case)})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.output_layer", arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring {variant} of {case} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure_here(case: Case, variant: str) -> dict[str, float]:
    """Measure on the CPU in this process, which must be fresh."""
    x = make_inputs(case)
    small = make_inputs(Case(case.outputs, case.frozen, 8, 64, 512))
    forward_backward(variant, small, case.outputs)  # loads libraries and starts thread pools
    before = resident_bytes()
    reset = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    forward_backward(variant, x, case.outputs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resident_bytes("VmHWM") if reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak - before}


def resident_bytes(key: str = "VmRSS") -> int:
    """This process's resident memory now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def reset_peak() -> bool:
    """Reset VmHWM to the present size; False if the kernel refuses, and the peak includes the inputs."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure_cuda(case: Case, variant: str, repeats: int = 3) -> dict[str, float]:
    """Median seconds over repeats after one warm-up, and the allocator's peak above the inputs."""
    torch.cuda.empty_cache()
    x = make_inputs(case)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            forward_backward(variant, x, case.outputs)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return {}
    return {
        "seconds": sorted(seconds[1:])[repeats // 2],
        "peak_bytes": float(torch.cuda.max_memory_allocated() - before),
    }


def main() -> None:
    """Measure the case given as JSON in the first argument in this process."""
    arguments = json.loads(sys.argv[1])
    variant = arguments.pop("variant")
    arguments["outputs"] = tuple(arguments["outputs"])
    print(json.dumps(measure_here(Case(**arguments), variant)))


if __name__ == "__main__":
    main()
