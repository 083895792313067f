"""Measure the platform against its alternatives: `--only data,training:memory --json OUT.json`."""

import argparse
import os
import sys
from pathlib import Path

# The benchmarks are not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.runner import PARTS, run_parts
from tbpo_ray.cli import run_job
from tbpo_ray.config.schema import Config


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        default="objectives,data",
        help=f"comma-separated parts, each with an optional :CASE: {' '.join(PARTS)}",
    )
    parser.add_argument(
        "--trl-python", metavar="PYTHON", help="Python of an environment with trl (or set TBPO_TRL_PYTHON)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--into",
        metavar="FILE.md",
        type=Path,
        help="write each table into this file, between `<!-- PART -->` and `<!-- end -->`",
    )
    parser.add_argument("--quick", action="store_true", help="use small sizes, to check that it runs")


def work(config: Config, arguments: argparse.Namespace) -> None:
    if arguments.trl_python:
        os.environ["TBPO_TRL_PYTHON"] = arguments.trl_python
    run_parts(
        config,
        arguments.only.split(","),
        quick=arguments.quick,
        figures=arguments.json,
        page=arguments.into,
    )


if __name__ == "__main__":
    sys.exit(run_job(work, description=__doc__, options=options))
