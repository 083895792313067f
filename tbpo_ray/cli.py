"""Arguments, exit codes and error lines, the same for every job."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from tbpo_ray.config.loading import load_config, to_yaml
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, TbpoError


def run_job(
    work: Callable[..., Any],
    *,
    description: str,
    plan: Callable[[Config], str] | None = None,
    argv: Sequence[str] | None = None,
    options: Callable[[argparse.ArgumentParser], None] | None = None,
    prepare: Callable[[Config, argparse.Namespace], Config] | None = None,
) -> int:
    """Parse `--config FILE [dotted.key=value ...] [--dry-run]`, then call `work(config)`.

    Args:
        work: the job; gets the configuration, and the parsed arguments if it takes two.
        plan: what `--dry-run` prints behind the resolved configuration.
        options: adds a job's own arguments.
        prepare: changes the configuration before it is shown or used.

    Returns:
        0 done, 2 bad configuration or input (a line per fault on stderr), 1 any other failure.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="the run's configuration")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and plan, start nothing")
    if options is not None:
        options(parser)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="overrides of the file")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if prepare is not None:
            config = prepare(config, arguments)
        if arguments.dry_run:
            print(to_yaml(config), end="")
            if plan is not None:
                print(plan(config), end="")
            return 0
        if options is not None:
            work(config, arguments)
        else:
            work(config)
        return 0
    except InputError as error:
        for fault in error.faults:
            print(f"error: {one_line(fault)}", file=sys.stderr)
        return 2
    except TbpoError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has gone; leave quietly.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        # Anything else is a fault of the program: its traceback is what helps.
        traceback.print_exc()
        return 1


def one_line(text: str) -> str:
    return " ".join(text.split())
