"""Progress on a terminal is one live bar; in the log of a job it is lines."""

from __future__ import annotations

import io
import json

import pytest

from tbpo_ray import progress
from tbpo_ray.training.metrics_follower import Follower


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_bar_is_left():
    yield
    assert progress._bar is None


def rows(count: int) -> str:
    return "".join(
        json.dumps({"step": step, "total": count, "loss": 1 / step, "rewards/margin": 0.5}) + "\n"
        for step in range(1, count + 1)
    )


def follow(folder, stream) -> str:
    with Follower(folder, None, label="mine", stream=stream, every_seconds=0):
        (folder / "timings.jsonl").write_text('{"step": 4, "tokens_per_second": 1234.5}\n')
        (folder / "metrics.jsonl").write_text(rows(4).replace('"total": 4, ', '"total": 8, '))
    return stream.getvalue()


def test_a_terminal_gets_one_bar_with_loss_margin_speed_and_time_left(tmp_path):
    shown = follow(tmp_path, Terminal())
    last = shown.replace("\n", "\r").rstrip("\r").rpartition("\r")[2]
    assert last.startswith("mine:  50%") and "4/8" in last
    assert "loss 0.2500" in last and "margin 0.500" in last and "1,234 tok/s" in last
    assert shown.count("\n") == 1  # the bar is drawn over itself


def test_a_log_gets_lines(tmp_path):
    shown = follow(tmp_path, io.StringIO())
    assert "\r" not in shown
    assert shown.splitlines()[-1].startswith("mine step 4/8  loss 0.2500  margin 0.500  1,234 tok/s")


def test_lines_are_printed_above_the_bar():
    stream = Terminal()
    progress.show_bar("judge", 1, 3, stream=stream)
    progress.log_progress("a line")
    progress.show_bar("judge", 3, 3, stream=stream)
    shown = stream.getvalue()
    assert "a line\n" in shown and shown.index("a line") < shown.rindex("100%")


def test_a_new_stage_ends_the_bar_of_the_last_one():
    stream = Terminal()
    progress.show_bar("first", 1, 3, stream=stream)
    progress.show_bar("second", 1, 2, stream=stream)
    progress.close_bar()
    shown = stream.getvalue()
    assert shown.index("first") < shown.index("second") and shown.count("\n") == 2
