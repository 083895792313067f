"""The command line of every job: arguments, exit codes and error messages."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tbpo_ray.cluster.session import stop_ray
from tbpo_ray.config.loading import load_config, to_yaml
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, TbpoError
from tbpo_ray.progress import close_bar
from tbpo_ray.signals import interruptible
from tbpo_ray.tracking.environment import with_environment


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
        work: the job; called with the configuration and, if `options` is given, the parsed arguments.
        plan: returns the text that `--dry-run` prints after the resolved configuration.
        options: adds arguments that only this job has.
        prepare: changes the configuration before it is shown or used.

    Returns:
        The exit status: 0 success, 2 invalid configuration or input (one line per fault on stderr), 1 any
        other failure; 130 after Ctrl-C and 143 after SIGTERM.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE.yaml", help="configuration of the run")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and plan, then exit")
    if options is not None:
        options(parser)
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="override keys of the file")
    arguments = parser.parse_intermixed_args(argv)
    with interruptible() as received:
        try:
            return _run(arguments, Job(work, plan, options is not None, prepare))
        except (KeyboardInterrupt, SystemExit) as end:
            # While Ray starts, a handler of its own raises SystemExit(SIGTERM).
            if isinstance(end, SystemExit) and end.code != signal.SIGTERM:
                raise
            received.number = received.number or (signal.SIGTERM if isinstance(end, SystemExit) else None)
            stop_ray()  # first: what it prints must not follow the last line
            print(received.last_words, file=sys.stderr, flush=True)
            return received.exit_status


@dataclass(frozen=True)
class Job:
    """The functions of one job, as `run_job` takes them."""

    work: Callable[..., Any]
    plan: Callable[[Config], str] | None
    takes_arguments: bool
    """Whether `work` is called with the parsed arguments too."""
    prepare: Callable[[Config, argparse.Namespace], Config] | None


def _run(arguments: argparse.Namespace, job: Job) -> int:
    """Run the job; turn its errors into an exit status."""
    try:
        config = with_environment(load_config(arguments.config, arguments.overrides))
        if job.prepare is not None:
            config = job.prepare(config, arguments)
        if arguments.dry_run:
            print(to_yaml(config), end="")
            if job.plan is not None:
                print(job.plan(config), end="")
            return 0
        if job.takes_arguments:
            job.work(config, arguments)
        else:
            job.work(config)
        return 0
    except InputError as error:
        close_bar()
        for fault in error.faults:
            print(f"error: {one_line(fault)}", file=sys.stderr)
        return 2
    except TbpoError as error:
        close_bar()
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of stdout has exited, e.g. `| head`. Without this redirection the interpreter reports
        # another error when it flushes stdout on exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        # Anything else is a bug, which is found by its traceback.
        close_bar()
        traceback.print_exc()
        return 1
    finally:
        close_bar()


def one_line(text: str) -> str:
    """Replace every run of whitespace by one space."""
    return " ".join(text.split())
