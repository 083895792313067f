"""A language model as judge of pairs of answers, at an OpenAI-compatible endpoint.

The endpoint may be a hosted service or `vllm serve FOLDER`; `pool_judge` runs the judge on this cluster
instead. Each pair is judged twice, with the answers swapped: two verdicts for the same answer are a win,
contradicting verdicts a tie. A reply that cannot be parsed is counted and gives no verdict.
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
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tbpo_ray.config.validation import validate_section
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.evaluation.judge import Judge
from tbpo_ray.generation.samples import Sample
from tbpo_ray.progress import log_progress
from tbpo_ray.redaction import redact_text, strip_credentials
from tbpo_ray.storage.files import write_atomic

_VERDICT = re.compile(r"\[\[\s*(A|B|C|TIE)\s*\]\]", re.IGNORECASE)
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
_PLACEHOLDERS = ("{prompt}", "{answer_a}", "{answer_b}")


class LlmSettings(BaseModel):
    """The keys of `evaluation.judge` with `kind: llm`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str | None = None
    """Base URL of the endpoint, `http://host:8000/v1`."""
    model: str | None = None
    """Name of the model at the endpoint."""
    pool: str | None = None
    """Instead of `url` and `model`: a model folder or hub name, which vLLM engines on this cluster serve."""
    api_key_env: str | None = None
    """Name of the environment variable with the API key; the key itself is never written to a file."""
    prompt_file: str | None = None
    """A text file with the placeholders {prompt}, {answer_a} and {answer_b} that asks for [[A]], [[B]] or
    [[TIE]]; default: a built-in prompt."""
    both_orders: bool = True
    """Judge each pair twice, with the answers swapped."""
    max_tokens: int = Field(512, ge=1)
    """Maximum number of tokens of a reply."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0: greedy decoding."""
    concurrency: int = Field(16, ge=1)
    """Maximum number of concurrent requests."""
    retries: int = Field(4, ge=0)
    """Number of retries of a request after a timeout or a transient error, with exponential backoff."""
    timeout_s: float = Field(120, gt=0)
    """Timeout of one request, in seconds."""
    price_input: float = Field(0.0, ge=0)
    """Price of a million prompt tokens, for the cost reported in the verdict."""
    price_output: float = Field(0.0, ge=0)
    """Price of a million completion tokens."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must be an http(s) URL such as http://127.0.0.1:8000/v1")
        return value and value.rstrip("/")

    @model_validator(mode="after")
    def _check_endpoint_or_pool(self) -> Self:
        if self.pool is None and (self.url is None or self.model is None):
            raise ValueError(
                "evaluation.judge: give `url` and `model` of an endpoint, or `pool`, a model folder"
            )
        if self.pool is not None and (self.url is not None or self.model is not None):
            raise ValueError("evaluation.judge: `pool` excludes `url` and `model`; remove either")
        return self


class LlmJudge(Judge):
    """Pairwise verdicts from a chat model (see the module's docstring)."""

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
        """Validate `evaluation.judge` without `kind` and build the judge.

        Args:
            cache: file that keeps replies, so that judging resumes after an error.

        Raises:
            InputError: invalid settings, each named by its dotted key.
        """
        return cls(validate_section(LlmSettings, dict(settings), "evaluation.judge"), cache)

    def preferences(self, candidate: Sequence[Sample], baseline: Sequence[Sample]) -> list[float | None]:
        """Judge pairs of answers.

        Raises:
            RunFailedError: the endpoint is unreachable; replies received so far are kept in the cache.
        """
        pairs = list(zip(candidate, baseline, strict=True))
        orders = (1, -1) if self.settings.both_orders else (1,)
        replies = self.complete(
            [
                fill_template(
                    self.template, pair[0].prompt_text, *(sample.answer for sample in pair[::order])
                )
                for pair in pairs
                for order in orders
            ]
        )
        return [
            self._combine([parse_verdict(reply) for reply in replies[i : i + len(orders)]])
            for i in range(0, len(replies), len(orders))
        ]

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """Send the filled-in prompts and return the replies, in the same order."""
        with (
            httpx.Client(timeout=self.settings.timeout_s, headers=self._headers()) as client,
            ThreadPoolExecutor(self.settings.concurrency) as pool,
        ):
            futures = [pool.submit(self._complete, client, prompt) for prompt in prompts]
            replies: list[str] = []
            try:
                for done, future in enumerate(futures, start=1):
                    replies.append(future.result())
                    if done % 200 == 0:
                        log_progress(f"judge: {done} of {len(prompts)} replies")
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
        judge = {"pool": s.pool} if s.url is None else {"model": s.model, "url": strip_credentials(s.url)}
        return {"kind": self.kind, **judge, **self.counts, "cost": round(cost, 6)}

    def _combine(self, verdicts: Sequence[float | None]) -> float | None:
        """Combine the verdicts of both orders; each verdict is about the answer that came first."""
        known = [v if i == 0 else 1 - v for i, v in enumerate(verdicts) if v is not None]
        self.counts["unparsable"] += len(verdicts) - len(known)
        if not known:
            return None
        preference = sum(known) / len(known)
        self.counts["contradicting"] += len(known) == 2 and abs(known[0] - known[1]) == 1
        self.counts["ties"] += preference == 0.5
        self.counts["verdicts"] += 1
        return preference

    def _complete(self, client: httpx.Client, prompt: str) -> str:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}],
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
            if response.status_code in _TRANSIENT:
                problem = f"status {response.status_code}"
                continue
            if response.status_code != 200:
                raise RunFailedError(
                    f"the judge at {strip_credentials(address)} returned status {response.status_code}: "
                    f"{redact_text(response.text[:300])}"
                )
            return _reply(response, strip_credentials(address))
        raise RunFailedError(
            f"the judge at {strip_credentials(address)} did not reply in {self.settings.retries + 1} "
            f"attempts ({redact_text(problem)}); the replies so far are in {self._cache_file}, run the "
            "command again to resume"
        )

    def _headers(self) -> dict[str, str]:
        name = self.settings.api_key_env
        if name is None:
            return {}
        if not os.environ.get(name):
            raise InputError(f"evaluation.judge.api_key_env={name}: this environment variable is not set")
        return {"Authorization": f"Bearer {os.environ[name]}"}


def parse_verdict(reply: str) -> float | None:
    """Return 1 for `[[A]]`, 0 for `[[B]]`, 0.5 for `[[C]]` or `[[TIE]]`; the last one counts; else None."""
    found = _VERDICT.findall(reply)
    return {"A": 1.0, "B": 0.0}.get(found[-1].upper(), 0.5) if found else None


def fill_template(template: str, prompt: str, answer_a: str, answer_b: str) -> str:
    """Fill in the template's placeholders; braces inside the texts are kept."""
    values = {"{prompt}": prompt, "{answer_a}": answer_a, "{answer_b}": answer_b}
    return re.sub("|".join(map(re.escape, values)), lambda match: values[match[0]], template)


def _reply(response: httpx.Response, address: str) -> tuple[str, dict[str, Any]]:
    try:
        tree = response.json()
        return tree["choices"][0]["message"]["content"] or "", tree.get("usage") or {}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise RunFailedError(f"{address}: the reply is not that of an OpenAI-compatible endpoint") from error


def _template(settings: LlmSettings) -> str:
    if settings.prompt_file is None:
        return resources.files("tbpo_ray.evaluation").joinpath("judge_prompt.txt").read_text(encoding="utf-8")
    file = Path(settings.prompt_file)
    if not file.is_file():
        raise InputError(f"evaluation.judge.prompt_file={file}: no such file")
    text = file.read_text(encoding="utf-8")
    missing = [name for name in _PLACEHOLDERS if name not in text]
    if missing:
        raise InputError(f"evaluation.judge.prompt_file={file}: must contain {', '.join(missing)}")
    return text


def _read_cache(file: Path) -> dict[str, str]:
    """Read the replies by key, and remove a last line that a crash left incomplete."""
    if not file.is_file():
        return {}
    *lines, incomplete = file.read_text(encoding="utf-8").split("\n")
    if incomplete:
        # Otherwise the next reply would be appended to the incomplete line, and be lost too.
        write_atomic(file, "".join(f"{line}\n" for line in lines))
    return {row["key"]: row["reply"] for row in map(json.loads, filter(None, lines))}
