"""Section `peer` of `gpu_check`: TRL's DPOTrainer at the shape and on the lengths of section `training`.

The trainer gets what makes it fast: weights in bf16, no activation checkpointing, pairs in order of length,
reference scores computed beforehand (their time does not count, as it does not for this project's), and a
sweep of micro-batches, with and without Liger's kernels, and PyTorch's own attention instead of cuDNN's,
which builds a plan for every new shape. Its defaults are shown as well.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_parts import ONE_BILLION, TINY, Budget, Machine, Row, Shape, llama
from benchmarks.gpu_speed import PAIRS_PER_STEP, above, gib, step_lengths


@dataclass(frozen=True)
class Setting:
    """How the trainer is run."""

    divisor: int = 1
    """Pairs of a step over pairs of a micro-batch."""
    precomputed: bool = True
    liger: bool = False
    defaults: bool = False
    """Random order, activation checkpointing and a live reference, as its configuration has them."""

    def describe(self, pairs: int) -> str:
        size = f"micro-batches of {pairs // self.divisor}"
        if self.defaults:
            return f"defaults, {size}"
        reference = "precomputed reference" if self.precomputed else "live reference"
        return f"{size}, {reference}" + (", Liger's layers" if self.liger else "")


SWEEP = (
    Setting(2),
    Setting(4),
    Setting(8),
    Setting(2, liger=True),
    Setting(4, liger=True),
    Setting(4, precomputed=False),
    Setting(8, defaults=True),
)


def peer(machine: Machine, budget: Budget) -> Iterator[Row]:
    """Pairs per second and peak memory of TRL's DPOTrainer."""
    try:
        import datasets  # noqa: F401
        import trl
    except Exception as error:  # a carried package can fail in its own ways
        yield {"case": "TRL's DPOTrainer", "result": f"not run: {type(error).__name__}: {error}"}
        return
    for kind in PAIRS_PER_STEP:
        steps = step_lengths(kind, quick=machine.quick)
        pairs = len(steps[0])
        for setting in SWEEP[:2] if machine.quick else SWEEP:
            row: Row = {"case": f"{kind}: TRL {trl.__version__} DPO, {setting.describe(pairs)}"}
            if budget.is_spent:
                yield row | {"result": "skipped: the section's time is up"}
                continue
            try:
                row |= _measure(machine, steps, setting)
            except torch.OutOfMemoryError:
                row["result"] = "out of memory"
            except Exception as error:  # the other settings are still worth running
                row["result"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
            machine.reset_peak()
            yield row


def _measure(machine: Machine, steps: list[np.ndarray], setting: Setting) -> Row:
    """Two steps that warm up, the first on the longest pairs, then a round of section `training`."""
    shape = TINY if machine.quick else ONE_BILLION
    # The trainer's own sampler groups pairs of like length over many steps; here within each step, as ours.
    batches = steps
    if not setting.defaults:
        batches = [batch[np.argsort(batch.sum(axis=1), kind="stable")] for batch in steps]
    lengths = np.concatenate(steps)
    size = len(steps[0]) // setting.divisor
    longest = np.tile(lengths[lengths.sum(axis=1).argsort()[-size:]], (setting.divisor, 1))
    batches = [longest, batches[0], *batches]
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(machine, shape, batches, setting, folder, marks)
        before = machine.allocated_bytes()
        torch.backends.cuda.enable_cudnn_sdp(setting.defaults)
        trainer.train()
    elapsed = marks[-1] - marks[1]
    counted = sum(len(lengths) for lengths in batches[2:])
    return {
        "pairs_per_second": counted / elapsed,
        "seconds_per_step": elapsed / (len(batches) - 2),
        "steps": len(batches) - 2,
        "steps_gib": gib(above(machine.peak_bytes(), before)),
    }


def _trainer(
    machine: Machine,
    shape: Shape,
    batches: list[np.ndarray],
    setting: Setting,
    folder: str,
    marks: list[float],
) -> Any:
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            machine.synchronize()
            if not marks:
                machine.reset_peak(keep_cache=True)
            marks.append(time.perf_counter())

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # it already has token ids

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            for name in ("ref_chosen_logps", "ref_rejected_logps"):
                dataset = dataset.add_column(name, [-50.0] * len(dataset))
            return dataset

    # The name of a cache that is not written; hashing the weights would take longer than all steps.
    dpo_trainer.hash_module = lambda *_: "unused"
    live = setting.defaults or not setting.precomputed
    size = len(batches[0]) // setting.divisor
    return Trainer(
        model=llama(shape, machine.device, torch.bfloat16),
        ref_model=llama(shape, machine.device, torch.bfloat16, seed=1) if live else None,
        processing_class=_tokenizer(),
        train_dataset=_dataset(batches, shape.vocabulary),
        callbacks=[Clock()],
        args=DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=setting.divisor,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            optim="rmsprop",
            max_grad_norm=1.0,
            num_train_epochs=1,
            max_length=None,
            bf16=setting.defaults and machine.is_cuda,
            gradient_checkpointing=setting.defaults,
            precompute_ref_log_probs=not live,
            use_liger_kernel=setting.liger,
            train_sampling_strategy="sequential",
            use_cpu=not machine.is_cuda,
            dataloader_pin_memory=machine.is_cuda,
            dataloader_num_workers=2 if machine.is_cuda else 0,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        ),
    )


def _dataset(batches: list[np.ndarray], vocabulary: int) -> Any:
    from datasets import Dataset

    rng = np.random.default_rng(0)
    rows = [
        {
            f"{name}_ids": rng.integers(2, vocabulary, count).tolist()
            for name, count in zip(("prompt", "chosen", "rejected"), lengths, strict=True)
        }
        for lengths in np.concatenate(batches)
    ]
    return Dataset.from_list(rows)


def _tokenizer() -> Any:
    """The trainer wants one; nothing is tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
