"""Child process of the benchmark: TRL's DPOTrainer over given token ids, timed step by step.

Runs in a separate environment, where trl is installed and tbpo_ray is not: `python trl_loop.py JSON`, with
`model` (folder), `pairs` (JSON file: prompt_ids, chosen_ids, rejected_ids, in the order of training),
`pairs_per_step`, `learning_rate`, `precompute`, `folder` (scratch).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"


def resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    import torch
    from datasets import Dataset, concatenate_datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows: list[dict[str, list[int]]] = json.loads(Path(job["pairs"]).read_text())
    shortest = min(rows, key=lambda row: sum(map(len, row.values())))
    # The first step is a warm-up on copies of the shortest pair; it creates the optimizer state.
    data = Dataset.from_list([shortest] * job["pairs_per_step"] + rows)
    marks: list[tuple[float, float]] = []
    found: dict[str, Any] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not marks:
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                found["baseline"] = resident_bytes("VmRSS")
                try:
                    Path("/proc/self/clear_refs").write_text("5")
                    found["reset"] = True
                except OSError:
                    found["reset"] = False
            marks.append((time.perf_counter(), time.process_time()))

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # it already has token ids

        def _precompute_ref_logps(self, *args: Any) -> Any:
            dataset, first = args[0], job["pairs_per_step"]
            warm = super()._precompute_ref_logps(dataset.select(range(first)), *args[1:])
            began, cpu = time.perf_counter(), time.process_time()
            scored = super()._precompute_ref_logps(dataset.select(range(first, len(dataset))), *args[1:])
            found["reference_seconds"] = time.perf_counter() - began
            found["reference_cpu_seconds"] = time.process_time() - cpu
            return concatenate_datasets([warm, scored])

    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=data,
        callbacks=[Clock()],
        args=DPOConfig(
            output_dir=job["folder"],
            per_device_train_batch_size=job["pairs_per_step"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            optim="rmsprop",
            max_grad_norm=1.0,
            num_train_epochs=1,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            precompute_ref_log_probs=job["precompute"],
            train_sampling_strategy="sequential",
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    peak = (
        resident_bytes("VmHWM")
        if found["reset"]
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    seconds, cpu_seconds = (marks[-1][i] - marks[0][i] for i in (0, 1))
    steps = [later[0] - earlier[0] for earlier, later in pairwise(marks)]
    out = {
        "pairs_per_second": len(rows) / seconds,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak - found["baseline"],
        "step_seconds": steps,
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
    }
    out |= {key: found[key] for key in ("reference_seconds", "reference_cpu_seconds") if key in found}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
