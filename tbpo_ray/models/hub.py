"""Publish an exported policy on the Hugging Face hub, with a model card that says how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tbpo_ray.config.schema import ExportConfig
from tbpo_ray.errors import InputError, RunFailedError, first_line
from tbpo_ray.redaction import redact_text

_KEY = "export.push_to_hub"
_SKIPPED = ("README.md",)
"""Files of the export that the hub gets in another form."""


def read_token(export: ExportConfig) -> str | None:
    """The access token in `export.token_file`; None without one, so that the hub's own settings count.

    Raises:
        InputError: the file does not exist, is empty, or holds more than one word.
    """
    if export.token_file is None:
        return None
    file = Path(export.token_file).expanduser()
    try:
        words = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"export.token_file={export.token_file}: cannot be read ({type(error).__name__}); must be a text "
            "file with an access token of the hub"
        ) from error
    if len(words) != 1:
        raise InputError(
            f"export.token_file={export.token_file}: has {len(words)} words; must hold one access token"
        )
    return words[0]


def check_hub(export: ExportConfig) -> None:
    """Check that the hub answers and that the token may write; nothing without `export.push_to_hub`.

    Raises:
        InputError: naming the key, and never the token.
    """
    if export.push_to_hub is None:
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    token = read_token(export)
    try:
        user: dict[str, Any] = HfApi(token=token).whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx.HTTPError, OSError) as error:
        raise InputError(
            f"{_KEY}={export.push_to_hub}: the hub does not accept the token ({_reason(error)}); set "
            "export.token_file to a file with a token that may write, or HF_TOKEN"
        ) from error
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise InputError(
            f"{_KEY}={export.push_to_hub}: the token of {user.get('name')} may only read; use one with the "
            "role write"
        )


def push_to_hub(export: ExportConfig, folder: Path, card: str) -> str:
    """Upload the files of `folder` in one commit, with `card` as the repository's README.md.

    The repository is created if it does not exist. Files that the hub has already are not sent again.

    Returns:
        The address of the repository.

    Raises:
        RunFailedError: the hub refuses it; nothing is committed then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    assert export.push_to_hub is not None
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in _SKIPPED)
    additions = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
    additions.append(CommitOperationAdd("README.md", card.encode("utf-8")))
    api = HfApi(token=read_token(export), library_name="tbpo_ray")
    try:
        address = api.create_repo(export.push_to_hub, private=export.private, exist_ok=True)
        api.create_commit(export.push_to_hub, additions, commit_message=f"Upload {folder.parent.name}")
    except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        # ValueError: an answer that is not the hub's; RuntimeError: an upload that has failed.
        raise RunFailedError(
            f"{_KEY}={export.push_to_hub}: {folder} could not be uploaded ({_reason(error)}); it is complete "
            "there, and the same command uploads it again"
        ) from error
    return str(address)


def hub_card(
    facts: Mapping[str, Any], *, license_name: str | None, result: str, command: str, datasets: list[str]
) -> str:
    """The model card of a repository.

    Args:
        facts: name to value, the first table.
        license_name: the hub's identifier of the license.
        result: a Markdown table; may be empty.
        command: what made the model; may be empty.
        datasets: where the preference data come from.
    """
    import yaml

    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if license_name:
        header["license"] = license_name
    base = str(facts.get("base model", ""))
    if base.count("/") == 1 and not base.startswith((".", "/")):
        header["base_model"] = base.partition("@")[0]
    hub_sets = [name.removeprefix("hf:").partition(":")[0] for name in datasets if name.startswith("hf:")]
    if hub_sets:
        header["datasets"] = hub_sets
    header["tags"] = ["tbpo", "preference-optimization"]
    lines = ["---", yaml.safe_dump(header, sort_keys=False).rstrip(), "---", "", f"# {facts.get('name')}", ""]
    lines += ["Aligned with token-level preference optimization by `tbpo_ray`.", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    lines += [
        f"| data | {', '.join(datasets)} |",
        f"| license | {license_name or 'that of the base model'} |",
    ]
    if result:
        lines += ["", "## Results", "", result]
    if command:
        lines += ["", "## Training", "", "```bash", command, "```"]
    return "\n".join(lines) + "\n"


def _reason(error: BaseException) -> str:
    """What went wrong, without a token; the cause where the hub's client wraps it."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    status = f"{response.status_code} " if response is not None else ""
    return redact_text(f"{status}{type(cause).__name__}: {first_line(cause)}")
