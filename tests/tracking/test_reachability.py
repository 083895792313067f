"""An MLflow server that does not answer is reported early; MLflow's environment variables."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tbpo_ray.cluster.session import free_port
from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import TrackingConfig
from tbpo_ray.errors import InputError
from tbpo_ray.tracking import reachability
from tbpo_ray.tracking.environment import with_environment
from tbpo_ray.tracking.reachability import check_reachable
from tbpo_ray.tracking.store import store_uri


@contextmanager
def server(reply: Callable[[Any], None]) -> Iterator[str]:
    """Serve `reply(handler)` to every POST request. Yields the address, with credentials."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            reply(self)

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://user:hunter2@127.0.0.1:{running.server_address[1]}"
    running.shutdown()


def answer(status: int, body: bytes = b"{}") -> Callable[[Any], None]:
    def reply(handler: Any) -> None:
        handler.send_response(status)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def trickle(handler: Any) -> None:
    """An answer of which a byte arrives every now and then, so that no read ever times out."""
    handler.send_response(200)
    handler.send_header("content-length", "100000")
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        time.sleep(0.1)


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(reachability, "DEADLINE_SECONDS", 3.0)
    monkeypatch.setattr(reachability, "_REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(reachability, "_PAUSE_SECONDS", 0.2)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (answer(500), "answered 500"),
        (answer(404), "answered 404"),
        (answer(401), "MLFLOW_TRACKING_USERNAME"),
        (answer(200, b"<html>sign in</html>"), "not an MLflow server"),
        (lambda handler: time.sleep(30), "cannot be reached"),
        (trickle, "did not answer within 3 s"),
    ],
)
def test_a_server_that_does_not_answer_is_named_without_its_password(impatient, reply, words):
    began = time.monotonic()
    with server(reply) as address, pytest.raises(InputError, match=words) as caught:
        check_reachable(address)
    assert time.monotonic() - began < 15
    (fault,) = caught.value.faults
    assert fault.startswith("tracking.uri=http://127.0.0.1:") and "hunter2" not in fault


def test_nothing_listens(impatient):
    with pytest.raises(InputError, match="Connection refused"):
        check_reachable(f"http://127.0.0.1:{free_port()}")


def test_the_deadline_leaves_room_within_half_a_minute():
    assert reachability.DEADLINE_SECONDS <= 15  # imports on a busy machine need the rest


def test_a_server_that_answers_is_asked_once_and_may_need_a_second_attempt(impatient):
    asked = []

    def reply(handler):
        asked.append(handler.path)
        answer(503 if len(asked) == 1 else 200)(handler)

    with server(reply) as address:
        check_reachable(address)
        check_reachable(address)
    assert asked == ["/api/2.0/mlflow/experiments/search"] * 2
    check_reachable("sqlite:///nowhere.db")


def test_the_environment_counts_where_the_configuration_is_silent(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@tracking:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    silent = with_environment(load_config(None, [])).tracking
    assert (silent.uri, silent.experiment) == ("http://user:hunter2@tracking:5000", "theirs")
    said = capsys.readouterr().err
    assert "MLFLOW_TRACKING_URI" in said and "MLFLOW_EXPERIMENT_NAME" in said and "hunter2" not in said
    chosen = load_config(None, ["tracking.uri=http://ours:1", "tracking.experiment=tbpo"])
    assert with_environment(chosen) is chosen
    assert store_uri(TrackingConfig(), tmp_path) == silent.uri
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert store_uri(TrackingConfig(), tmp_path).startswith("sqlite:///")
