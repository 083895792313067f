"""Ctrl-C and SIGTERM as one exception, whatever handlers the libraries install, and an end in any case."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

GRACE_SECONDS = 20.0
"""After a signal, how long cleaning up may take before the process exits without it."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Received:
    """The first signal that asked this process to end."""

    number: int | None = None

    @property
    def exit_status(self) -> int:
        """As shells report it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.number or signal.SIGINT)

    @property
    def last_words(self) -> str:
        """The sentence for the person who watches the job."""
        name = signal.Signals(self.number or signal.SIGINT).name
        return f"interrupted by {name}; run the same command again to resume from the latest checkpoint"


@contextlib.contextmanager
def interruptible() -> Iterator[Received]:
    """Raise KeyboardInterrupt at the first SIGINT or SIGTERM, and ignore later ones.

    It is not a subclass: Ray replaces what a handler raises during `ray.get` by a plain KeyboardInterrupt.
    """
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def handle(number: int, _: object) -> None:
        if received.number is not None:
            return
        received.number = number
        threading.Thread(target=_exit_in_any_case, args=(received, ended), daemon=True).start()
        raise KeyboardInterrupt

    ended = threading.Event()
    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield received
    finally:
        # After a signal, the process ends in the atexit handlers; until then it needs the guard.
        if received.number is None:
            ended.set()
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def keep_handlers() -> Iterator[None]:
    """Restore the handlers that the block replaces, as `ray.init` does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_in_any_case(received: Received, ended: threading.Event) -> None:
    """A store or a cluster that no longer answers must not keep the process alive."""
    if ended.wait(GRACE_SECONDS):
        return
    with contextlib.suppress(OSError, ValueError):
        print(received.last_words, file=sys.stderr, flush=True)
    os._exit(received.exit_status)
