"""The memory that a training step needs, found by running it on tensors that have shapes but no values.

The real scorer, objective and backward pass run under torch's FakeTensorMode, so that a model of any size
takes seconds and no memory. Every storage that an operation creates is counted until it is freed.

Shapes: N pairs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import first_line
from tbpo_ray.models.attention import choose_attention
from tbpo_ray.models.load import add_lora
from tbpo_ray.models.preflight import ModelFacts
from tbpo_ray.objectives import build_state_baseline
from tbpo_ray.training.batch import PairBatch
from tbpo_ray.training.partitioned import block_weights
from tbpo_ray.training.run_plan import RunPlan
from tbpo_ray.training.scorer import PairScorer
from tbpo_ray.training.step import PreferenceStep


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one forward and backward pass, without ZeRO."""

    weights: int
    trained: int
    """Bytes of the trained weights, in the dtype of the forward pass."""
    parameters: int
    trained_parameters: int
    largest_layer: int
    """Bytes of the largest module that ZeRO stage 3 gathers at once."""
    reference: int
    head: int
    """Bytes of a learned state baseline with its gradients and its AdamW state."""
    activations: int
    """What is alive at the peak beside weights, gradients and the reference; 0 if it could not be traced."""
    failure: str | None = None
    """Why the step could not be traced."""
    reference_outside: int = 0
    """Bytes of the reference outside of its blocks, which ZeRO stage 3 leaves whole."""
    reference_block: int = 0
    """Bytes of its largest block."""


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count tensors that existed before; operations return views of them."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def trace_step(plan: RunPlan, facts: ModelFacts, batch: Callable[[], PairBatch]) -> StepMemory:
    """Run one micro-batch of a plan on fake tensors.

    Args:
        batch: collates the micro-batch; called under the fake mode.

    Returns:
        The bytes, and why a step cannot be computed without values, if that is so.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        network = _network(plan.config, facts, plan.dtype)
        weights = {id(p): p.numel() * p.element_size() for p in network.parameters()}
        trained = [p for p in network.parameters() if p.requires_grad]
        scorer = PairScorer(network).train()
        reference: Any = None
        reference_bytes, blocks = 0, [0]
        if plan.reference_mode == "live":
            reference = "adapter_off"
            if not plan.adapter_off_reference:
                other = _with_fake_weights(_build(facts, plan.config, plan.dtype))
                reference = PairScorer(other.requires_grad_(False)).eval()
                reference_bytes = sum(p.numel() * p.element_size() for p in other.parameters())
                blocks = _block_bytes(other)
        head = build_head(plan, scorer)
        step = PreferenceStep(plan.objective, head, reference)
        head_weights = list(head.parameters()) if head is not None else []
        for p in (*trained, *head_weights):
            p.grad = torch.zeros_like(p)
        failure = None
        counter = StorageCounter()
        existing = [*network.parameters(), *network.buffers(), *head_weights]
        if isinstance(reference, PairScorer):
            existing += list(reference.parameters())
        counter.ignore(existing + [p.grad for p in existing if p.grad is not None])
        with counter:
            try:
                loss, _ = step(scorer, batch())
                loss.backward()  # type: ignore[no-untyped-call]
            # Architectures fail in their own ways on tensors without values: experts that are chosen by them.
            except Exception as error:
                failure = f"{type(error).__name__}: {first_line(error)}"
    return StepMemory(
        weights=sum(weights.values()),
        trained=sum(weights[id(p)] for p in trained),
        parameters=sum(p.numel() for p in network.parameters()),
        trained_parameters=sum(p.numel() for p in trained),
        largest_layer=_largest_layer(network),
        reference=reference_bytes,
        head=4 * sum(p.numel() * p.element_size() for p in head_weights),
        activations=0 if failure else counter.peak,
        failure=failure,
        reference_outside=reference_bytes - sum(blocks),
        reference_block=max(blocks),
    )


def _build(facts: ModelFacts, config: Config, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    attention = choose_attention(facts.config, config.model.attention).implementation
    # FlashAttention's kernels need a GPU; SDPA's take as much memory.
    attention = "sdpa" if attention == "flash_attention_2" else attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                facts.config, trust_remote_code=False, attn_implementation=attention
            )
    finally:
        torch.set_default_dtype(before)


def _network(config: Config, facts: ModelFacts, dtype: torch.dtype) -> Any:
    network = _build(facts, config, dtype)
    if config.training.recomputes:
        network.gradient_checkpointing_enable({"use_reentrant": False})
        if config.model.lora is not None:
            network.enable_input_require_grads()
    if config.model.lora is not None:
        with torch.device("meta"):
            network = add_lora(network, config.model.lora)
    return _with_fake_weights(network)


def _with_fake_weights(network: Any) -> Any:
    """Replace weights on the meta device by fake ones on the CPU. Tied weights stay tied."""
    replaced: dict[int, Tensor] = {}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in replaced:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                replaced[id(weight)] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            module.register_parameter(name, replaced[id(weight)])
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return network


def build_head(plan: RunPlan, scorer: PairScorer) -> nn.Module | None:
    """The learned state baseline of a plan, if its objective has one."""
    if not plan.objective.learned_baseline:
        return None
    settings, layer = plan.config.objective, scorer.output_layer
    section = settings.state_baseline.model_dump(exclude_none=True) | {"kind": settings.baseline_kind}
    weight: Any = getattr(layer, "base_layer", layer).weight
    return build_state_baseline(section, int(weight.shape[-1]))


def _block_bytes(network: nn.Module) -> list[int]:
    """Bytes of each block of a model."""
    weights = dict(network.named_parameters())
    return [
        sum(weights[name].numel() * weights[name].element_size() for name in names)
        for names in block_weights(network).values()
    ] or [0]


def _largest_layer(network: nn.Module) -> int:
    """Bytes of the largest module whose direct children are not modules with weights of their own."""
    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in network.modules()
    )
