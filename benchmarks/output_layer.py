"""Time and peak memory of `token_log_probs` and of the full-logits formula it replaces.

On the CPU every measurement runs in a process of its own, whose peak resident memory is read after the
inputs are made; on CUDA the allocator's own peak is read. Both count from the inputs upwards, through
forward and backward, gradients included.

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
    """One thing to measure: which outputs, of what size, with a frozen output weight or a learning one."""

    want: tuple[str, ...]
    frozen: bool
    tokens: int
    hidden: int
    vocab: int
    dtype: str = "float32"
    device: str = "cpu"


@dataclass
class Layer:
    """Inputs of the output layer. hidden [N, H], weight [V, H], labels [N]; the reference's likewise."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None


def make_inputs(case: Case) -> Layer:
    """Random inputs with logits of standard deviation about 1."""
    options = {"dtype": getattr(torch, case.dtype), "device": case.device}
    torch.manual_seed(0)
    kl = "kl" in case.want

    def weight() -> Tensor:
        return torch.randn(case.vocab, case.hidden, **options).mul_(case.hidden**-0.5)

    return Layer(
        hidden=torch.randn(case.tokens, case.hidden, **options).requires_grad_(),
        weight=weight().requires_grad_(not case.frozen),
        labels=torch.randint(case.vocab, (case.tokens,), device=case.device),
        ref_hidden=torch.randn(case.tokens, case.hidden, **options) if kl else None,
        ref_weight=weight() if kl else None,
    )


def full_logits(x: Layer, want: tuple[str, ...]) -> list[Tensor]:
    """The outputs from [N, V] logits, the way one writes it down. [N] each"""
    logp = torch.log_softmax((x.hidden @ x.weight.T).float(), -1)
    found = {"logp": logp.gather(-1, x.labels[:, None])[:, 0]}
    if "entropy" in want:
        found["entropy"] = -(logp.exp() * logp).sum(-1)
    if "kl" in want:
        assert x.ref_hidden is not None and x.ref_weight is not None
        with torch.no_grad():
            ref = torch.log_softmax((x.ref_hidden @ x.ref_weight.T).float(), -1)
        found["kl"] = (ref.exp() * (ref - logp)).sum(-1)
    return [found[name] for name in want]


def blockwise(x: Layer, want: tuple[str, ...]) -> list[Tensor]:
    """The outputs from `token_log_probs`. [N] each"""
    mask = torch.ones_like(x.labels, dtype=torch.bool)
    stats = token_log_probs(x.hidden, x.weight, x.labels, mask, x.ref_hidden, x.ref_weight, want)
    return [getattr(stats, name) for name in want]


WAYS: dict[str, Callable[[Layer, tuple[str, ...]], list[Tensor]]] = {
    "full_logits": full_logits,
    "blockwise": blockwise,
}


def forward_backward(way: str, x: Layer, want: tuple[str, ...]) -> None:
    """One forward and one backward pass; gradients end in the leaves."""
    torch.stack(WAYS[way](x, want)).sum().backward()
    x.hidden.grad = x.weight.grad = None


def measure(case: Case, way: str) -> dict[str, float]:
    """Seconds of one forward plus backward and its peak bytes above the inputs.

    On the CPU in a fresh process: {seconds, cpu_seconds, peak_bytes}. On CUDA here: {seconds, peak_bytes},
    or {} where it does not fit.
    """
    if case.device != "cpu":
        return measure_cuda(case, way)
    arguments = json.dumps({"way": way, **asdict(case)})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.output_layer", arguments],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring {way} of {case} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure_here(case: Case, way: str) -> dict[str, float]:
    """Measure on the CPU in this process, which should have done nothing before."""
    x = make_inputs(case)
    small = make_inputs(Case(case.want, case.frozen, 8, 64, 512))
    forward_backward(way, small, case.want)  # libraries and thread pools
    before = resident_bytes()
    reset = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    forward_backward(way, x, case.want)
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
    """Let VmHWM start again from here. False where the kernel does not let us: then making the inputs
    counts towards the peak too."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def measure_cuda(case: Case, way: str, repeats: int = 3) -> dict[str, float]:
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
            forward_backward(way, x, case.want)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return {}
    return {
        "seconds": sorted(seconds[1:])[repeats // 2],
        "peak_bytes": float(torch.cuda.max_memory_allocated() - before),
    }


def main() -> None:
    """Measure the case given as JSON in the first argument, in this process."""
    arguments = json.loads(sys.argv[1])
    way = arguments.pop("way")
    arguments["want"] = tuple(arguments["want"])
    print(json.dumps(measure_here(Case(**arguments), way)))


if __name__ == "__main__":
    main()
