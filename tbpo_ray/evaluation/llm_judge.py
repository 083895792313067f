"""A language model as judge: pairwise, both orders, at an OpenAI-compatible endpoint or by a pool of engines.

The endpoint may be a hosted one or `vllm serve FOLDER`; a pool (`pool_judge`) runs on this cluster. Each pair
is asked twice with the answers swapped; two verdicts for the same answer make a win, contradicting ones a
tie. What cannot be parsed is counted and gives no verdict.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.evaluation.judge import Judge
from tbpo_ray.generation.samples import Sample
from tbpo_ray.progress import log_progress
from tbpo_ray.redaction import redact_text, strip_credentials

_VERDICT = re.compile(r"\[\[\s*(A|B|C|TIE)\s*\]\]", re.IGNORECASE)
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_FIELDS = ("{prompt}", "{answer_a}", "{answer_b}")


class LlmSettings(BaseModel):
    """What `evaluation.judge` may say with `kind: llm`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str | None = None
    """Base address of the endpoint, `http://host:8000/v1`."""
    model: str | None = None
    """The judge's name at the endpoint."""
    pool: str | None = None
    """Instead of `url` and `model`: a model folder or hub name, asked by vLLM engines on this cluster."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never written anywhere."""
    prompt_file: str | None = None
    """A text file with {prompt}, {answer_a} and {answer_b}; the default asks for [[A]], [[B]] or [[TIE]]."""
    both_orders: bool = True
    """Ask twice, with the answers swapped."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens of a verdict."""
    temperature: float = Field(0.0, ge=0)
    """0: the judge's most likely verdict."""
    concurrency: int = Field(16, ge=1)
    """Requests under way at a time."""
    retries: int = Field(4, ge=0)
    """How often a request is repeated after a timeout or a busy endpoint, with growing pauses."""
    timeout_s: float = Field(120, gt=0)
    """Seconds for one request."""
    price_input: float = Field(0.0, ge=0)
    """Price of a million prompt tokens, for the cost in the verdict."""
    price_output: float = Field(0.0, ge=0)
    """The same for completion tokens."""

    @field_validator("url")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("give an http(s) address such as http://127.0.0.1:8000/v1")
        return value and value.rstrip("/")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.pool is None and (self.url is None or self.model is None):
            raise ValueError("give `url` and `model` of an endpoint, or `pool`, a model folder")
        if self.pool is not None and (self.url is not None or self.model is not None):
            raise ValueError("`pool` is asked on this cluster; leave out `url` and `model`")
        return self


class LlmJudge(Judge):
    """Pairwise verdicts from a chat model (see the module's text)."""

    kind = "llm"

    def __init__(self, settings: LlmSettings, cache: Path):
        self.settings = settings
        self.template = _template(settings)
        self._cache_file = cache
        self._cache: dict[str, str] = _read_cache(cache)
        self._lock = threading.Lock()
        self.counts: dict[str, float] = {
            "calls": 0,
            "cached": 0,
            "retries": 0,
            "unparsable": 0,
            "contradicting": 0,
            "ties": 0,
            "verdicts": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], cache: Path) -> LlmJudge:
        """Raises InputError, naming the dotted key, for settings that cannot be."""
        try:
            return cls(LlmSettings(**settings), cache)
        except ValidationError as error:
            raise InputError(
                *(
                    ".".join(["evaluation.judge", *map(str, item["loc"])])
                    + ": "
                    + item["msg"].removeprefix("Value error, ")
                    for item in error.errors()
                )
            ) from error

    def preferences(self, candidate: Sequence[Sample], baseline: Sequence[Sample]) -> list[float | None]:
        """Raises RunFailed when the endpoint stays away; verdicts reached so far are kept in the cache."""
        pairs = list(zip(candidate, baseline, strict=True))
        orders = (1, -1) if self.settings.both_orders else (1,)
        replies = self.ask(
            [
                fill(self.template, pair[0].prompt_text, *(sample.answer for sample in pair[::order]))
                for pair in pairs
                for order in orders
            ]
        )
        return [
            self._combine([parse_verdict(reply) for reply in replies[i : i + len(orders)]])
            for i in range(0, len(replies), len(orders))
        ]

    def ask(self, questions: Sequence[str]) -> list[str]:
        """The judge's replies, in order."""
        with (
            httpx.Client(timeout=self.settings.timeout_s, headers=self._headers()) as client,
            ThreadPoolExecutor(self.settings.concurrency) as pool,
        ):
            futures = [pool.submit(self._ask, client, question) for question in questions]
            replies: list[str] = []
            try:
                for done, future in enumerate(futures, start=1):
                    replies.append(future.result())
                    if done % 200 == 0:
                        log_progress(f"judged {done} of {len(questions)} questions")
            except RunFailedError:
                for future in futures:
                    future.cancel()
                raise
        return replies

    def report(self) -> dict[str, Any]:
        s = self.settings
        cost = (
            self.counts["prompt_tokens"] * s.price_input + self.counts["completion_tokens"] * s.price_output
        ) / 1e6
        where = {"pool": s.pool} if s.url is None else {"model": s.model, "url": strip_credentials(s.url)}
        return {"kind": self.kind, **where, **self.counts, "cost": round(cost, 6)}

    def _combine(self, verdicts: Sequence[float | None]) -> float | None:
        """One preference from the verdicts of both orders, each as seen by the first-named answer."""
        known = [v if i == 0 else 1 - v for i, v in enumerate(verdicts) if v is not None]
        self.counts["unparsable"] += len(verdicts) - len(known)
        if not known:
            return None
        preference = sum(known) / len(known)
        self.counts["contradicting"] += len(known) == 2 and abs(known[0] - known[1]) == 1
        self.counts["ties"] += preference == 0.5
        self.counts["verdicts"] += 1
        return preference

    def _ask(self, client: httpx.Client, question: str) -> str:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
        }
        key = hashlib.sha256(json.dumps([self.settings.url, body], sort_keys=True).encode()).hexdigest()
        with self._lock:
            if key in self._cache:
                self.counts["cached"] += 1
                return self._cache[key]
        reply, usage = self._request(client, body)
        with self._lock:
            self.counts["calls"] += 1
            self.counts["prompt_tokens"] += usage.get("prompt_tokens") or 0
            self.counts["completion_tokens"] += usage.get("completion_tokens") or 0
            self._cache[key] = reply
            with self._cache_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")
        return reply

    def _request(self, client: httpx.Client, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        assert self.settings.url is not None
        address, problem = f"{self.settings.url}/chat/completions", ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                with self._lock:
                    self.counts["retries"] += 1
                time.sleep(min(2.0 ** (attempt - 1), 30.0))
            try:
                response = client.post(address, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in _RETRIED:
                problem = f"status {response.status_code}"
                continue
            if response.status_code != 200:
                words = redact_text(response.text[:300])
                raise RunFailedError(
                    f"the judge at {strip_credentials(address)} refused ({response.status_code}): {words}"
                )
            return _reply(response, strip_credentials(address))
        raise RunFailedError(
            f"the judge at {strip_credentials(address)} gave no answer in {self.settings.retries + 1} tries "
            f"({redact_text(problem)}); verdicts so far are kept in {self._cache_file}, run again to go on"
        )

    def _headers(self) -> dict[str, str]:
        name = self.settings.api_key_env
        if name is None:
            return {}
        if not os.environ.get(name):
            raise InputError(f"evaluation.judge.api_key_env={name}: this environment variable is not set")
        return {"Authorization": f"Bearer {os.environ[name]}"}


def parse_verdict(reply: str) -> float | None:
    """1 for `[[A]]`, 0 for `[[B]]`, 0.5 for `[[C]]` or `[[TIE]]`, the last one counting; else None."""
    found = _VERDICT.findall(reply)
    return {"A": 1.0, "B": 0.0}.get(found[-1].upper(), 0.5) if found else None


def fill(template: str, prompt: str, answer_a: str, answer_b: str) -> str:
    """Put the texts into the template; braces inside the texts stay as they are."""
    values = {"{prompt}": prompt, "{answer_a}": answer_a, "{answer_b}": answer_b}
    return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], template)


def _reply(response: httpx.Response, address: str) -> tuple[str, dict[str, Any]]:
    try:
        tree = response.json()
        return tree["choices"][0]["message"]["content"] or "", tree.get("usage") or {}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RunFailedError(f"{address} does not answer like an OpenAI-compatible endpoint") from error


def _template(settings: LlmSettings) -> str:
    if settings.prompt_file is None:
        return resources.files("tbpo_ray.evaluation").joinpath("judge_prompt.txt").read_text(encoding="utf-8")
    file = Path(settings.prompt_file)
    if not file.is_file():
        raise InputError(f"evaluation.judge.prompt_file={file}: no such file")
    text = file.read_text(encoding="utf-8")
    missing = [name for name in _FIELDS if name not in text]
    if missing:
        raise InputError(f"evaluation.judge.prompt_file={file}: {', '.join(missing)} must stand in it")
    return text


def _read_cache(file: Path) -> dict[str, str]:
    """Replies by key; the last line may be cut off by a crash."""
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        file.write_text("\n".join(lines[:-1]) + ("\n" if lines[:-1] else ""), encoding="utf-8")
    return {row["key"]: row["reply"] for row in map(json.loads, filter(None, lines[:-1]))}
