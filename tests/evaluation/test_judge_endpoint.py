"""A judge's endpoint that misbehaves: every reply ends in time, and none becomes a vote that nobody cast."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tbpo_ray.errors import RunFailedError
from tbpo_ray.evaluation import judge_endpoint
from tbpo_ray.evaluation.judge_endpoint import Reply, parse_reply
from tbpo_ray.evaluation.llm_judge import LlmJudge

Respond = Callable[[socket.socket, str], None]


class RawServer:
    """A server that hands each connection and the judged text to `respond`, which writes any bytes."""

    def __init__(self, respond: Respond):
        self.respond, self.asked = respond, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self.closed.is_set():
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            size = int(
                next(line for line in head.split(b"\r\n") if b"ontent-" in line and b"ength" in line)[15:]
            )
            while len(body) < size:
                body += connection.recv(65536)
            self.asked += 1
            with contextlib.suppress(OSError):  # the judge closed the connection
                self.respond(connection, json.loads(body)["messages"][0]["content"])

    def close(self) -> None:
        self.closed.set()
        self.socket.close()


def http(body: bytes, status: int = 200, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(content: Any, usage: Any = None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()


@pytest.fixture
def serve() -> Iterator[Callable[[Respond], RawServer]]:
    servers: list[RawServer] = []

    def start(respond: Respond) -> RawServer:
        servers.append(RawServer(respond))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge_at(url: str, folder: Path, **settings: Any) -> LlmJudge:
    settings = {"url": url, "model": "m", "retries": 0, "timeout_s": 5, **settings}
    return LlmJudge.from_settings(settings, folder / "cache.jsonl")


def first_word_wins(text: str) -> str:
    return "[[A]]" if text.split("=== ANSWER A ===\n")[1].startswith("good") else "[[B]]"


BODIES: dict[str, tuple[bytes, str]] = {
    "not json": (http(b"<html>busy</html>"), "malformed"),
    "no choices": (http(b'{"choices": []}'), "malformed"),
    "another tree": (http(b"[1, 2]"), "malformed"),
    "a number as content": (http(completion(7)), "malformed"),
    "a mapping as content": (http(completion({"text": "[[A]]"})), "malformed"),
    "parts without text": (http(completion([{"type": "text"}])), "malformed"),
    "a message that is a text": (http(b'{"choices": [{"message": "[[A]]"}]}'), "malformed"),
    "not utf-8": (http(b'{"choices": [{"message": {"content": "\xff [[A]]"}}]}'), "malformed"),
    "deep": (http(b"[" * 200_000), "malformed"),
    "many digits": (http(b'{"choices": ' + b"1" * 6000 + b"}"), "malformed"),
    "broken gzip": (http(b"not gzip", 200, "Content-Encoding: gzip"), "errors"),
    "cut": (b"HTTP/1.1 200 X\r\nContent-Length: 900\r\n\r\n{", "errors"),
    "no http": (b"hello\r\n\r\n", "errors"),
    "nothing": (b"", "errors"),
    "too long a prompt": (http(b"context length exceeded", 400), "rejected"),
    "server error": (http(b"", 500), "errors"),
}


@pytest.mark.parametrize("name", BODIES)
def test_an_unusable_reply_is_counted_and_gives_no_verdict(name, serve, make_sample, tmp_path):
    body, problem = BODIES[name]
    server = serve(
        lambda connection, text: connection.sendall(
            body if "BAD" in text else http(completion(first_word_wins(text)))
        )
    )
    judge = judge_at(server.url, tmp_path)
    candidate = [make_sample(0, "good"), make_sample(1, "good BAD")]
    baseline = [make_sample(0, "poor"), make_sample(1, "poor")]
    assert judge.preferences(candidate, baseline) == [1.0, None]
    report = judge.report()
    assert (report[problem], report["unparsable"], report["verdicts"], report["calls"]) == (2, 2, 1, 4)
    rows = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()]
    assert [row["reply"] for row in rows] == ["[[A]]", "[[B]]"] or [row["reply"] for row in rows] == [
        "[[B]]",
        "[[A]]",
    ]
    with pytest.raises(RunFailedError, match="no usable reply to 2 requests"):
        judge.preferences(candidate[1:], baseline[1:])


def test_one_order_alone_is_not_a_verdict(serve, make_sample, tmp_path):
    """A judge that always prefers the first answer, and of which one reply cannot be parsed."""

    def respond(connection, text):
        shown_first = text.split("=== ANSWER A ===\n")[1]
        connection.sendall(http(completion("[[A]]" if shown_first.startswith("good") else "I cannot say.")))

    judge = judge_at(serve(respond).url, tmp_path)
    assert judge.preferences([make_sample(0, "good")], [make_sample(0, "poor")]) == [None]
    report = judge.report()
    assert (report["unparsable"], report["incomplete"], report["verdicts"]) == (1, 1, 0)
    assert report["first_preferred"] is None


def test_usage_of_another_form_is_not_counted(serve, make_sample, tmp_path):
    usages = iter(["many", {"prompt_tokens": "ten", "completion_tokens": True}, {"prompt_tokens": 3}, [1]])
    server = serve(lambda connection, text: connection.sendall(http(completion("[[A]]", next(usages)))))
    judge = judge_at(server.url, tmp_path, concurrency=1)
    judge.preferences([make_sample(0, "a"), make_sample(1, "c")], [make_sample(0, "b"), make_sample(1, "d")])
    report = judge.report()
    assert (report["prompt_tokens"], report["completion_tokens"], report["verdicts"]) == (3, 0, 2)


def test_lone_surrogates_are_sent_and_kept_as_question_marks(serve, make_sample, tmp_path):
    server = serve(lambda connection, text: connection.sendall(http(completion("\ud800 [[A]]"))))
    judge = judge_at(server.url, tmp_path)
    assert judge.preferences([make_sample(0, "a\udfff")], [make_sample(0, "b")]) == [0.5]
    assert "? [[A]]" in (tmp_path / "cache.jsonl").read_text(encoding="utf-8")
    assert judge_at(server.url, tmp_path).preferences([make_sample(0, "a\udfff")], [make_sample(0, "b")]) == [
        0.5
    ]
    assert server.asked == 2


@pytest.mark.parametrize("where", ["head", "body"])
def test_a_reply_that_drips_times_out(where, serve, make_sample, tmp_path):
    def respond(connection, text):
        data = http(completion("[[A]]"))
        start = 0 if where == "head" else data.index(b"{")
        connection.sendall(data[:start])
        for at in range(start, len(data)):
            connection.sendall(data[at : at + 1])
            time.sleep(0.5)

    judge = judge_at(serve(respond).url, tmp_path, timeout_s=1.2)
    begin = time.monotonic()
    with pytest.raises(RunFailedError, match=r"no complete reply within 1\.2 s"):
        judge.preferences([make_sample(0, "a")], [make_sample(0, "b")])
    assert time.monotonic() - begin < 4 and judge.report()["timeouts"] == 2


def test_a_reply_of_gigabytes_is_cut_off(serve, make_sample, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_endpoint, "MAX_REPLY_BYTES", 100_000)
    bomb = gzip.compress(b" " * 50_000_000)
    server = serve(lambda connection, text: connection.sendall(http(bomb, 200, "Content-Encoding: gzip")))
    judge = judge_at(server.url, tmp_path)
    with pytest.raises(RunFailedError, match="more than 100,000 bytes"):
        judge.preferences([make_sample(0, "a")], [make_sample(0, "b")])
    assert judge.report()["malformed"] == 2


def test_an_endpoint_that_never_replies_usably_is_given_up(serve, make_sample, tmp_path):
    server = serve(lambda connection, text: connection.sendall(http(b"busy")))
    judge = judge_at(server.url, tmp_path, concurrency=4)
    samples = [make_sample(i, f"a{i}") for i in range(100)], [make_sample(i, f"b{i}") for i in range(100)]
    with pytest.raises(RunFailedError, match="no usable reply to 20 requests in a row"):
        judge.preferences(*samples)
    assert server.asked < 40


def test_malformed_replies_are_retried(serve, make_sample, tmp_path):
    bodies = iter([b"busy", completion("[[A]]"), completion("[[B]]")])
    server = serve(lambda connection, text: connection.sendall(http(next(bodies))))
    judge = judge_at(server.url, tmp_path, concurrency=1, retries=1)
    assert judge.preferences([make_sample(0, "a")], [make_sample(0, "b")]) == [1.0]
    assert (judge.report()["retries"], judge.report()["malformed"]) == (1, 0)


def test_a_damaged_cache_is_judged_again(serve, make_sample, tmp_path):
    server = serve(lambda connection, text: connection.sendall(http(completion(first_word_wins(text)))))
    pair = [make_sample(0, "good")], [make_sample(0, "poor")]
    judge_at(server.url, tmp_path).preferences(*pair)
    file = tmp_path / "cache.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    lines = ["{", "[]", '{"key": 1, "reply": "[[A]]"}', json.dumps({"key": rows[0]["key"], "reply": ""})]
    file.write_bytes(b"\xff\xfe\n" + "".join(line + "\n" for line in [*lines, json.dumps(rows[1])]).encode())
    judge = judge_at(server.url, tmp_path)
    assert judge.preferences(*pair) == [1.0]
    report = judge.report()
    assert (report["damaged_cache_lines"], report["cached"], report["calls"]) == (4, 1, 1)


def test_position_bias_is_measured(serve, make_sample, tmp_path):
    """8 of 10 pairs are decided by the position, the others by the answer."""

    def respond(connection, text):
        fair = "=== ANSWER A ===\ngood8" in text or "=== ANSWER A ===\ngood9" in text
        fair_second = "=== ANSWER B ===\ngood8" in text or "=== ANSWER B ===\ngood9" in text
        connection.sendall(http(completion("[[B]]" if fair_second and not fair else "[[A]]")))

    judge = judge_at(serve(respond).url, tmp_path)
    ours = [make_sample(i, f"good{i}") for i in range(10)]
    theirs = [make_sample(i, f"poor{i}") for i in range(10)]
    assert judge.preferences(ours, theirs) == [0.5] * 8 + [1.0] * 2
    report = judge.report()
    bias = report["first_preferred"]
    assert (bias["value"], bias["pairs"], report["contradicting"]) == (0.9, 10, 8)
    assert 0.5 < bias["low"] < 0.9 < bias["high"] <= 1
    once = judge_at(serve(respond).url, tmp_path, both_orders=False)
    once.preferences(ours, theirs)
    assert once.report()["first_preferred"] is None


def test_judging_works_inside_a_running_loop(serve, make_sample, tmp_path):
    server = serve(lambda connection, text: connection.sendall(http(completion(first_word_wins(text)))))

    async def notebook() -> list[float | None]:
        return judge_at(server.url, tmp_path).preferences([make_sample(0, "good")], [make_sample(0, "poor")])

    assert asyncio.run(notebook()) == [1.0]


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (completion("[[A]]", {"prompt_tokens": 3, "completion_tokens": 2}), Reply("[[A]]", 3, 2)),
        (completion(None), Reply("")),
        (completion([{"type": "text", "text": "x "}, {"type": "text", "text": "[[B]]"}]), Reply("x [[B]]")),
        (completion("x", {"prompt_tokens": -1, "completion_tokens": 1e400}), Reply("x")),
        (completion(True), Reply(problem="malformed")),
        (b"", Reply(problem="malformed")),
    ],
)
def test_parsing_a_body(body, reply):
    assert parse_reply(body) == reply
