"""One short request to an MLflow server before a job does anything that takes time.

MLflow's own client tries for several minutes to reach a server that does not answer.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from tbpo_ray.errors import InputError, first_line
from tbpo_ray.redaction import redact_text

SERVER_SCHEMES = ("http", "https")
DEADLINE_SECONDS = 14.0
"""For all attempts together; names that do not resolve and answers that trickle in included."""
_REQUEST_SECONDS, _PAUSE_SECONDS = 10.0, 1.0
_SEARCH = "/api/2.0/mlflow/experiments/search"
_UNAUTHORIZED = (401, 403)


def is_server(uri: str) -> bool:
    """Whether the address is that of an MLflow server, and not of a database or a folder."""
    return urlsplit(uri).scheme in SERVER_SCHEMES


@functools.lru_cache
def check_reachable(uri: str) -> None:
    """Check that an MLflow server answers at `uri`; once per process, and only for an HTTP address.

    Raises:
        InputError: naming `tracking.uri` without credentials, and what the server answered.
    """
    if not is_server(uri):
        return
    import mlflow.utils.rest_utils  # noqa: F401  (takes seconds, which must not count against the server)

    faults = [f"did not answer within {DEADLINE_SECONDS:.0f} s"]
    # In a thread of its own, because no timeout of a request bounds its name resolution or its duration.
    probe = threading.Thread(target=_attempt, args=(uri, faults), daemon=True)
    probe.start()
    probe.join(DEADLINE_SECONDS)
    if faults[-1]:
        raise InputError(
            f"tracking.uri={redact_text(uri)}: {redact_text(faults[-1])}; start the MLflow server, or give "
            "the address of another one; without tracking.uri, runs are logged to a local database"
        )


def _attempt(uri: str, faults: list[str]) -> None:
    """Append what is wrong with the server, empty if nothing is; one that is restarting gets some seconds."""
    end = time.monotonic() + DEADLINE_SECONDS - _REQUEST_SECONDS
    while True:
        fault, is_final = _request(uri)
        faults.append(fault)
        if is_final or time.monotonic() + _PAUSE_SECONDS > end:
            return
        time.sleep(_PAUSE_SECONDS)


def _request(uri: str) -> tuple[str, bool]:
    """What is wrong with the server, and whether another attempt is pointless."""
    from mlflow.utils import credentials, rest_utils

    creds: Any = credentials.get_default_host_creds
    request: Any = rest_utils.http_request
    try:
        response = request(
            creds(uri),
            _SEARCH,
            "POST",
            json={"max_results": 1},
            timeout=_REQUEST_SECONDS,
            max_retries=0,
            raise_on_status=False,
        )
    except Exception as error:  # requests, urllib3 and MLflow each have their own errors for this
        return f"the MLflow server cannot be reached ({_reason(error)})", False
    if response.status_code in _UNAUTHORIZED:
        return (
            f"the MLflow server answered {response.status_code}: set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
            True,
        )
    if response.status_code != 200:
        return f"the MLflow server answered {response.status_code}", response.status_code < 500
    try:
        is_mlflow = isinstance(response.json(), dict)
    except ValueError:
        is_mlflow = False
    return ("", True) if is_mlflow else ("the server is not an MLflow server", True)


def _reason(error: BaseException) -> str:
    """The innermost cause, which the HTTP libraries wrap several times."""
    seen = {id(error)}
    while (inner := error.__cause__ or error.__context__) is not None and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    return f"{type(error).__name__}: {first_line(error)}"
