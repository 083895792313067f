"""Measure the platform against its alternatives, in turns, as ratios: `--only data,training:memory`."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

# The benchmarks are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.page import check_markers, replace_table
from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError

PARTS = (
    "objectives",
    "data",
    "methods",
    "training",
    "overhead",
    "scaling",
    "reference",
    "growth",
    "generation",
    "search",
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="objectives,data", help=f"parts, with commas: {' '.join(PARTS)}")
    parser.add_argument(
        "--trl-python", metavar="PYTHON", help="an environment with trl, for `training` (or TBPO_TRL_PYTHON)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--into", metavar="FILE.md", help="write each table there, between `<!-- PART -->` and `<!-- end -->`"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes, to see that it runs")


def work(config: Config, arguments: argparse.Namespace) -> None:
    parts = arguments.only.split(",")
    unknown = [part for part in parts if part.partition(":")[0] not in PARTS]
    if unknown:
        raise InputError(f"--only {arguments.only}: {unknown[0]} is no part; use {' '.join(PARTS)}")
    page = Path(arguments.into) if arguments.into else None
    if page is not None:
        check_markers(page, parts)
    if arguments.trl_python:
        os.environ["TBPO_TRL_PYTHON"] = arguments.trl_python
    results = {}
    for part in parts:
        name, _, case = part.partition(":")
        module = importlib.import_module(f"benchmarks.{name}")
        result = module.run(config, quick=arguments.quick, **({"only": case} if case else {}))
        results[part] = result
        text = module.markdown(result)
        print(text, flush=True)
        if page is not None:
            replace_table(page, part, text)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, options=options))
