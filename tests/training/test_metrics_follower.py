"""What the driver prints and logs while it follows a run."""

from __future__ import annotations

import io
import json
import math
import random
from typing import Any

from tbpo_ray.training.metrics_follower import FALLING_TAG, FallingAlarm, Follower


def test_the_alarm_distinguishes_a_fall_from_noise():
    rng = random.Random(0)
    flat, falling = FallingAlarm(), FallingAlarm()
    assert not any(flat.falls(rng.gauss(0, 5)) for _ in range(2000))
    raised = [step for step in range(400) if falling.falls(-0.02 * step + rng.gauss(0, 0.1))]
    assert raised == [59]


def test_the_alarm_goes_off_again_after_a_recovery():
    alarm = FallingAlarm(window=2)
    fall = [-1.0 * step for step in range(6)]
    assert sum(alarm.falls(value) for value in [*fall, *[0.0] * 6, *fall]) == 2


class _Tracker:
    def __init__(self):
        self.metrics, self.tags = [], {}

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def set_tags(self, tags):
        self.tags |= tags


def test_a_falling_run_is_reported_and_tagged_once_and_rows_are_logged_once(tmp_path):
    tracker: Any = _Tracker()
    said = io.StringIO()
    rows = [{"step": s, "loss": 1 / s, "logps/chosen_drift": -0.1 * s} for s in range(1, 91)]
    with Follower(tmp_path, tracker, label="run", stream=said):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        # A resumed run writes its last steps again.
        (tmp_path / "metrics.jsonl").write_text(text + json.dumps(rows[-1]) + "\n")
    assert said.getvalue().count("ALARM") == 1
    assert "log-prob has been falling" in tracker.tags[FALLING_TAG]
    assert [step for step, _ in tracker.metrics] == list(range(1, 91))
    assert math.isclose(tracker.metrics[-1][1]["loss"], 1 / 90)
