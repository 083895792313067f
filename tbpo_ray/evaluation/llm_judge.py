"""A language model as judge of pairs of answers, at an OpenAI-compatible endpoint.

The endpoint may be a hosted service or `vllm serve FOLDER`; `pool_judge` runs the judge on this cluster
instead. Each pair is judged twice, with the answers swapped: two verdicts for the same answer are a win,
contradicting verdicts a tie. A pair of which a reply is missing or cannot be parsed is counted and has no
verdict: the other order alone would count the judge's preference for a position as a win.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tbpo_ray.config.validation import validate_section
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.evaluation.judge import Judge
from tbpo_ray.evaluation.judge_endpoint import ChatEndpoint, clean_text
from tbpo_ray.evaluation.rubrics import DEFAULT_RUBRIC, load_rubric
from tbpo_ray.evaluation.win_rates import win_rate
from tbpo_ray.generation.samples import Sample
from tbpo_ray.progress import is_live, log_progress, show_bar
from tbpo_ray.redaction import strip_credentials
from tbpo_ray.storage.files import write_atomic

_VERDICT = re.compile(r"\[\[\s*(A|B|C|TIE)\s*\]\]", re.IGNORECASE)
_PLACEHOLDERS = ("{prompt}", "{answer_a}", "{answer_b}")
_RUBRIC = "{rubric}"


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
    """A text file with the placeholders {prompt}, {answer_a}, {answer_b} and, where the rubric goes,
    {rubric}, that asks for [[A]], [[B]] or [[TIE]]; default: a built-in prompt."""
    rubric: str | None = None
    """What makes an answer better: `general`, `helpful`, `harmless`, `summary` or a text file; default: the
    rubric of `evaluation.suite`, else `general`."""
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
    """Timeout of one attempt, from the connection to the last byte of the reply, in seconds."""
    price_input: float = Field(0.0, ge=0)
    """Price of a million prompt tokens, for the cost reported in the verdict."""
    price_output: float = Field(0.0, ge=0)
    """Price of a million completion tokens."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must be an http(s) URL such as http://127.0.0.1:8000/v1")
        try:
            httpx.URL(value or "http://x")
        except httpx.InvalidURL as error:
            raise ValueError(f"must be an http(s) URL such as http://127.0.0.1:8000/v1 ({error})") from error
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
        self.template, self._rubric = _template(settings)
        self._cache_file = cache
        self._cache, damaged = _read_cache(cache)
        self._endpoint = ChatEndpoint(
            settings.url or "", timeout_s=settings.timeout_s, retries=settings.retries
        )
        self._first_preferred: list[float] = []
        """For each pair with a verdict in both orders, the mean preference for the answer shown first."""
        self.counts: dict[str, float] = {
            "calls": 0,
            "cached": 0,
            "retries": 0,
            "timeouts": 0,
            "malformed": 0,
            "rejected": 0,
            "errors": 0,
            "unparsable": 0,
            "incomplete": 0,
            "contradicting": 0,
            "ties": 0,
            "verdicts": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
        }
        if damaged:
            self.counts["damaged_cache_lines"] = damaged
            log_progress(f"{cache}: {damaged} lines are not replies of a judge; those pairs are judged again")

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
        replies = self.complete([self._question(pair, order) for pair in pairs for order in orders])
        return [
            self._combine([parse_verdict(reply) for reply in replies[i : i + len(orders)]])
            for i in range(0, len(replies), len(orders))
        ]

    def rationale(self, candidate: Sample, baseline: Sample) -> str:
        """The judge's replies on this pair; empty if it gave no verdict."""
        replies = []
        for order, first in ((1, "candidate"), (-1, "baseline")):
            question = clean_text(self._question((candidate, baseline), order))
            reply = self._cache.get(self._request(question)[0])
            replies += [f"With the {first}'s answer as A: {reply}"] if reply else []
        return "\n\n".join(replies)

    def _question(self, pair: tuple[Sample, Sample], order: int) -> str:
        """What the judge is asked about a pair; with order -1, the baseline's answer comes first."""
        return fill_template(self.template, pair[0].prompt_text, *(sample.answer for sample in pair[::order]))

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """Send the filled-in prompts and return the replies, in the same order; empty where there is none.

        Raises:
            RunFailedError: the endpoint is unreachable, or gives no usable reply.
        """
        try:
            return _run(self._complete_all([clean_text(prompt) for prompt in prompts]))
        except RunFailedError as error:
            raise RunFailedError(
                f"{error}; the verdicts so far are in {self._cache_file}, run the command again to resume"
            ) from error
        finally:
            self.counts |= self._endpoint.counts

    def report(self) -> dict[str, Any]:
        s = self.settings
        cost = (
            self.counts["prompt_tokens"] * s.price_input + self.counts["completion_tokens"] * s.price_output
        ) / 1e6
        judge = {"pool": s.pool} if s.url is None else {"model": s.model, "url": strip_credentials(s.url)}
        report = {"kind": self.kind, **judge, "rubric": self._rubric, **self.counts}
        return report | {"cost": round(cost, 6), "first_preferred": self._position_bias()}

    def _position_bias(self) -> dict[str, float] | None:
        """How often the answer shown first was preferred, over pairs judged in both orders; 0.5: no bias."""
        if not self._first_preferred:
            return None
        rate = win_rate(self._first_preferred)
        return {"value": rate.rate, "low": rate.low, "high": rate.high, "pairs": rate.n}

    def _combine(self, verdicts: Sequence[float | None]) -> float | None:
        """Combine the verdicts of both orders; each verdict is about the answer that came first."""
        known = [verdict for verdict in verdicts if verdict is not None]
        self.counts["unparsable"] += len(verdicts) - len(known)
        if len(known) < len(verdicts):
            self.counts["incomplete"] += bool(known)
            return None
        if len(known) == 2:
            self._first_preferred.append(sum(known) / 2)
            self.counts["contradicting"] += abs(known[0] + known[1] - 1) == 1
        preference = sum(v if i == 0 else 1 - v for i, v in enumerate(known)) / len(known)
        self.counts["ties"] += preference == 0.5
        self.counts["verdicts"] += 1
        return preference

    async def _complete_all(self, prompts: Sequence[str]) -> list[str]:
        limit = self.settings.concurrency
        gate = asyncio.Semaphore(limit)
        async with httpx.AsyncClient(
            timeout=self.settings.timeout_s,
            headers=self._headers(),
            limits=httpx.Limits(max_connections=limit, max_keepalive_connections=limit),
        ) as client:
            tasks = [asyncio.create_task(self._complete(client, gate, prompt)) for prompt in prompts]
            replies: list[str] = []
            try:
                for done, task in enumerate(asyncio.as_completed(tasks), start=1):
                    await task  # in the order of their ends, so that the first failure stops the others
                    if is_live():
                        show_bar("judge", done, len(prompts))
                    elif done % 200 == 0:
                        log_progress(f"judge: {done} of {len(prompts)} replies")
                replies = [task.result() for task in tasks]
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        failed = sum(self._endpoint.counts[name] for name in ("timeouts", "malformed", "rejected", "errors"))
        if failed and not any(replies):
            raise RunFailedError(
                f"the judge at {self._endpoint.name} gave no usable reply to {len(prompts)} requests; the "
                f"last problem: {self._endpoint.last_problem}"
            )
        return replies

    def _request(self, prompt: str) -> tuple[str, dict[str, Any]]:
        """The body of a request, and its key in the cache."""
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
        }
        return hashlib.sha256(
            json.dumps([self.settings.url, body], sort_keys=True).encode()
        ).hexdigest(), body

    async def _complete(self, client: httpx.AsyncClient, gate: asyncio.Semaphore, prompt: str) -> str:
        key, body = self._request(prompt)
        async with gate:
            if key in self._cache:
                self.counts["cached"] += 1
                return self._cache[key]
            reply = await self._endpoint.ask(client, body)
        self.counts["calls"] += 1
        self.counts["prompt_tokens"] += reply.prompt_tokens
        self.counts["completion_tokens"] += reply.completion_tokens
        # A reply without a verdict is asked for again by a rerun, and not kept as if it were one.
        if parse_verdict(reply.text) is not None:
            self._cache[key] = reply.text
            with self._cache_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "reply": reply.text}, ensure_ascii=False) + "\n")
        return reply.text

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


def _run(work: Coroutine[Any, Any, list[str]]) -> list[str]:
    """Run a coroutine to its end, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _template(settings: LlmSettings) -> tuple[str, str | None]:
    """The prompt with the rubric filled in, and the name of that; None for a prompt file without its place.

    Raises:
        InputError: a file that does not exist or lacks a placeholder, or an unknown rubric.
    """
    name = settings.rubric or DEFAULT_RUBRIC
    rubric = load_rubric(name)
    if settings.prompt_file is None:
        text = resources.files("tbpo_ray.evaluation").joinpath("judge_prompt.txt").read_text(encoding="utf-8")
        return _insert_rubric(text, rubric), name
    file = Path(settings.prompt_file)
    if not file.is_file():
        raise InputError(f"evaluation.judge.prompt_file={file}: no such file")
    text = file.read_text(encoding="utf-8")
    missing = [name for name in _PLACEHOLDERS if name not in text]
    if settings.rubric is not None and _RUBRIC not in text:
        missing.append(f"{_RUBRIC} for evaluation.judge.rubric={settings.rubric}")
    if missing:
        raise InputError(f"evaluation.judge.prompt_file={file}: must contain {', '.join(missing)}")
    return _insert_rubric(text, rubric), name if _RUBRIC in text else None


def _insert_rubric(template: str, rubric: str) -> str:
    """Replace `{rubric}`; placeholders that the rubric itself spells are kept as text of the rubric."""
    hidden = re.sub(r"\{(prompt|answer_a|answer_b)\}", r"{ \1 }", rubric)
    return template.replace(_RUBRIC, hidden)


def _read_cache(file: Path) -> tuple[dict[str, str], int]:
    """The verdicts by key and the number of damaged lines; removes an incomplete last line of a crash."""
    if not file.is_file():
        return {}, 0
    *lines, incomplete = file.read_bytes().decode("utf-8", "replace").split("\n")
    if incomplete:
        # Otherwise the next reply would be appended to the incomplete line, and be lost too.
        write_atomic(file, "".join(f"{line}\n" for line in lines))
    replies: dict[str, str] = {}
    damaged = 0
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            key, reply = row["key"], row["reply"]
        except (ValueError, TypeError, LookupError, RecursionError):
            damaged += 1
            continue
        if not (isinstance(key, str) and isinstance(reply, str)):
            damaged += 1
        elif parse_verdict(reply) is not None:  # earlier versions kept replies without a verdict
            replies[key] = clean_text(reply)
    return replies, damaged
