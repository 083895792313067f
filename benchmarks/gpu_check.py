"""A check for a bare GPU machine: `python benchmarks/gpu_check.py`, at most eight minutes on an H100.

The machine needs torch, transformers and accelerate with their dependencies, and of this project a copy of
the checkout; no network, Ray, DeepSpeed or vLLM. Whatever else is needed can lie beside it, in a folder that
is put on `sys.path`. Prepared on a machine with a network, for the Python version of the GPU machine:

    pip install --target gpu_packages --python-version 3.12 --platform manylinux2014_x86_64 \\
        --only-binary=:all: pydantic

pydantic, without which no configuration can be read, is the only such package that every section needs. A
peer or an optional kernel, such as `trl`, `cut-cross-entropy`, `liger-kernel` or `deepspeed`, is measured if
it is there and reported as not run otherwise.

Every row is printed and saved, to `gpu_check.json` and `gpu_check.md`, as soon as it is measured: a check
that is interrupted keeps what it has. The exit status is 1 if a value is wrong or a section failed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "gpu_packages"
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
}
"""Dense bf16 matmul rate by name of the card, from the vendor's data sheets; the first match counts."""


@dataclass(frozen=True)
class Section:
    """One part of the check, in order of worth."""

    name: str
    title: str
    function: str
    seconds: float
    """Its share of the eight minutes. A measurement that has begun is finished."""


SECTIONS = (
    Section("values", "Values and gradients against the CPU", "gpu_values:values", 30),
    Section("syncs", "Waits for the device in a training step", "gpu_values:syncs", 15),
    Section("repeat", "The same steps twice", "gpu_values:repeat", 8),
    Section("training", "Training steps at a 1B shape", "gpu_speed:training", 140),
    Section("profile", "Where a training step's time goes", "gpu_profile:profile", 25),
    Section("memory", "Peak memory, foretold and measured", "gpu_speed:memory", 30),
    Section("attention", "Attention in shared rows", "gpu_kernels:attention", 45),
    Section("output", "The output layer", "gpu_kernels:output_layer", 25),
    Section("zero", "DeepSpeed ZeRO on one GPU", "gpu_kernels:zero", 20),
    Section("peer", "TRL's DPOTrainer at the same shape", "gpu_peer:peer", 120),
)


@dataclass
class Report:
    """Rows of all sections, saved whenever one is added."""

    folder: Path
    facts: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, section: Section, row: dict[str, Any]) -> None:
        self.rows.setdefault(section.name, []).append(row)
        print(f"[{section.name}] " + "  ".join(f"{k}={_cell(v)}" for k, v in row.items()), flush=True)
        self.save()

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"facts": self.facts, "seconds": self.seconds, "sections": self.rows}
        (self.folder / "gpu_check.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
        (self.folder / "gpu_check.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        lines = [", ".join(f"{name} {value}" for name, value in self.facts.items()), ""]
        for section in SECTIONS:
            rows = self.rows.get(section.name, [])
            if not rows:
                continue
            names = list(dict.fromkeys(name for row in rows for name in row))
            lines += [f"## {section.title}", "", "| " + " | ".join(names) + " |"]
            lines += ["|" + "---|" * len(names)]
            lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
            lines += [""]
        return "\n".join(lines)

    @property
    def is_good(self) -> bool:
        return all(row.get("ok") is not False for rows in self.rows.values() for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def run_section(section: Section, machine: Any, seconds: float) -> Iterator[dict[str, Any]]:
    """The section's rows; a failure is its last row."""
    from benchmarks.gpu_parts import Budget

    module, function = section.function.split(":")
    try:
        yield from getattr(importlib.import_module(f"benchmarks.{module}"), function)(
            machine, Budget(seconds)
        )
    except Exception as error:  # the sections after it are still worth running
        import traceback

        traceback.print_exc()
        yield {"case": "the section ended early", "result": f"{type(error).__name__}: {error}", "ok": False}


def check_imports() -> None:
    """Exit with a sentence if a package that every section needs is missing."""
    for name in ("torch", "numpy", "psutil", "transformers", "pydantic"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            sys.exit(
                f"gpu_check: {name} cannot be imported ({error}); put it into {PACKAGES} or the folder of "
                "--packages: the docstring of this script has the command"
            )


def machine_facts(device: Any) -> dict[str, Any]:
    """Card, versions and commit."""
    import torch
    import transformers

    try:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("GPU_CHECK_COMMIT", "unknown")
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {
        "device": card,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def peak_flops(card: str) -> float | None:
    """Floating-point operations per second of a card's dense bf16 products, if the card is known."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS.items() if name in card), None)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sections to run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check")))
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="folder of further packages")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; returns the exit status."""
    options = parse(arguments)
    # Behind what is installed: the machine's own torch must not be replaced by a carried dependency.
    sys.path.extend([str(options.packages), str(ROOT)])
    check_imports()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check: --device=cuda, but torch finds no GPU; --device cpu --quick tries the script")
    from benchmarks.gpu_parts import Machine

    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    facts = machine_facts(device)
    machine = Machine(device, options.quick, peak_flops(facts["device"]))
    report = Report(options.out, facts)
    for section in SECTIONS:
        if section.name not in options.only:
            continue
        began = time.monotonic()
        # Tiny sizes end by themselves, and every row is wanted.
        seconds = math.inf if options.quick else section.seconds
        for row in run_section(section, machine, seconds):
            report.add(section, row)
        report.seconds[section.name] = round(time.monotonic() - began, 1)
        report.save()
        gc.collect()  # models in cycles and tracebacks
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"saved to {options.out}", flush=True)
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
