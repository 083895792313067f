"""Requests to an OpenAI-compatible chat endpoint that may misbehave.

Whatever the endpoint sends, an attempt ends within `timeout_s`, headers and body included, and reads at most
:data:`MAX_REPLY_BYTES`; a request becomes a :class:`Reply` with either a text or a problem. Only an endpoint
that cannot be reached, refuses the caller, or answers nothing usable at all stops the evaluation.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from tbpo_ray.errors import RunFailedError
from tbpo_ray.redaction import redact_text, strip_credentials

MAX_REPLY_BYTES = 4 * 2**20
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
_REJECTED = (400, 413, 422)
"""Statuses that concern one request, such as a prompt longer than the judge's context."""
_GIVE_UP = 20
"""Requests that fail in a row, without a usable reply between them, before the endpoint is given up."""


@dataclass(frozen=True)
class Reply:
    """What an endpoint returned for one request."""

    text: str = ""
    """The assistant's message; empty where there is none."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""
    """Why there is no text: `timeouts`, `malformed`, `rejected` or `errors`."""


class ChatEndpoint:
    """One endpoint, and how often requests to it failed.

    Args:
        url: base URL, such as `http://127.0.0.1:8000/v1`.
        timeout_s: limit of one attempt, from the connection to the last byte.
        retries: further attempts after a timeout, a transient error or a malformed reply.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int):
        self.address = f"{url}/chat/completions"
        self.timeout_s, self.retries = timeout_s, retries
        self.counts: Counter[str] = Counter()
        """Retries, and requests without a usable reply by their problem."""
        self.last_problem = ""
        """The most recent reason why a request failed, redacted."""
        self._failed_in_a_row = 0

    @property
    def name(self) -> str:
        """The address without credentials."""
        return strip_credentials(self.address)

    async def ask(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> Reply:
        """Send one request, with retries.

        Raises:
            RunFailedError: the endpoint is unreachable, refuses the caller, or keeps failing.
        """
        problem = detail = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self.counts["retries"] += 1
                await asyncio.sleep(min(2.0 ** (attempt - 1), 30.0))
            try:
                async with asyncio.timeout(self.timeout_s):
                    status, data = await self._post(client, body)
            except (TimeoutError, httpx.TimeoutException):
                problem, detail = "timeouts", f"no complete reply within {self.timeout_s:g} s"
                continue
            except httpx.ConnectError as error:
                problem, detail = "unreachable", f"{type(error).__name__}: {error}"
                continue
            except (httpx.RequestError, httpx.StreamError) as error:  # broken encodings and streams too
                problem, detail = "errors", f"{type(error).__name__}: {error}"
                continue
            except _TooLargeError:
                problem, detail = "malformed", f"a reply of more than {MAX_REPLY_BYTES:,} bytes"
                continue
            if status == 200:
                reply = parse_reply(data)
                if not reply.problem:
                    self._failed_in_a_row = 0
                    return reply
                problem, detail = reply.problem, f"not a chat completion: {_excerpt(data)}"
            elif status in _TRANSIENT:
                problem, detail = "errors", f"status {status}"
            elif status in _REJECTED:
                problem, detail = "rejected", f"status {status}: {_excerpt(data)}"
                break
            else:
                raise RunFailedError(f"the judge at {self.name} returned status {status}: {_excerpt(data)}")
        if problem == "unreachable":
            raise RunFailedError(
                f"the judge at {self.name} did not reply in {self.retries + 1} attempts "
                f"({redact_text(detail)})"
            )
        return self._failed(problem, detail)

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and body of one attempt."""
        async with client.stream("POST", self.address, json=body) as response:
            return response.status_code, await _read(response.aiter_bytes())

    def _failed(self, problem: str, detail: str) -> Reply:
        self.counts[problem] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _GIVE_UP:
            raise RunFailedError(
                f"the judge at {self.name} gave no usable reply to {_GIVE_UP} requests in a row; the last "
                f"problem: {redact_text(detail)}"
            )
        self.last_problem = redact_text(detail)
        return Reply(problem=problem)


def parse_reply(data: bytes) -> Reply:
    """The text and the token counts in a body; a body of another form is `malformed`.

    Lone surrogates, which no file and no request can hold, become question marks.
    """
    try:
        tree = json.loads(data)
        content = tree["choices"][0]["message"]["content"]
        if isinstance(content, list):  # content parts
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        usage = tree.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Reply(problem="malformed")
    if content is not None and not isinstance(content, str):
        return Reply(problem="malformed")
    counts = usage if isinstance(usage, dict) else {}
    return Reply(
        clean_text(content or ""),
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
    )


def clean_text(text: str) -> str:
    """A text without lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _TooLargeError(Exception):
    """A body larger than :data:`MAX_REPLY_BYTES`."""


async def _read(chunks: AsyncIterator[bytes]) -> bytes:
    data = bytearray()
    async for chunk in chunks:
        data += chunk
        if len(data) > MAX_REPLY_BYTES:
            raise _TooLargeError
    return bytes(data)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _excerpt(data: bytes) -> str:
    return redact_text(data[:300].decode("utf-8", "replace"))
