"""Resolve every model that a configuration can name to a folder of safetensors.

A hub name becomes a snapshot, and a GGUF file is dequantized once; both are stored in the cache that all
nodes share. Trainers, scorers and vLLM then load the same folder.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.models.load import load_model, load_tokenizer, quiet_transformers, resolve_model, split_revision
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import atomic_folder, file_lock
from tbpo_ray.storage.paths import cache_dir

_PATTERNS = (
    "*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt",
    "README.md", "LICENSE*",
)  # fmt: skip
"""The files of a hub repository that are downloaded; they exclude pickled weights and code."""


def local_model(
    name: str,
    cache: Path,
    *,
    seed: int = 0,
    key: str = "model.name_or_path",
    revision: str | None = None,
    gguf_file: str | None = None,
) -> str:
    """The folder of a built-in model, a local one, one from the hub, or one dequantized from a GGUF file.

    Args:
        cache: the folder for dequantized models, and for snapshots unless `HF_HUB_CACHE` or `HF_HOME` is set.
        key: the configuration key that names the model, for messages.
        revision: revision of a hub name, which may also be written `OWNER/NAME@REVISION`.
        gguf_file: name of a GGUF file inside the model folder.

    Raises:
        InputError: when it is not a model, cannot be downloaded, or has no safetensors.
    """
    hub_name, revision = split_revision(name, revision, key)
    folder = resolve_model(hub_name, cache, seed=seed, key=key)
    if not Path(folder).is_dir():
        folder = _download(folder, cache, key, revision)
    elif revision is not None:
        log_progress(f"{key}={name}: a folder has no revisions; revision {revision} has no effect")
    if gguf_file is not None:
        folder = _dequantize(Path(folder), gguf_file, cache, key)
    return folder


def policy_folder(config: Config) -> str:
    """The folder of the model that training starts from; see :func:`local_model`."""
    model = config.model
    return local_model(
        model.name_or_path,
        cache_dir(config),
        seed=config.run.seed,
        revision=model.revision,
        gguf_file=model.gguf_file,
    )


def _download(name: str, cache: Path, key: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    user_cache = {"HF_HUB_CACHE", "HF_HOME"} & set(os.environ)
    hub_cache = None if user_cache else cache / "hub"
    log_progress(f"{key}={name}: downloading missing files to {hub_cache or 'the hub cache'}")
    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=hub_cache, allow_patterns=[*_PATTERNS], library_name="tbpo_ray"
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"{key}={name}: neither a local folder nor on the hub{at} ({type(error).__name__}: "
            f"{first_line(error)}); must be a folder, or a hub name that HF_TOKEN can read"
        ) from error
    # The same checks as for a local folder: safetensors, a tokenizer, no custom code.
    return resolve_model(folder, cache, key=key)


def _dequantize(folder: Path, gguf_file: str, cache: Path, key: str) -> str:
    """Convert `folder/gguf_file` to float32 safetensors, once for all nodes that share the cache."""
    import torch

    file = folder / gguf_file
    if not file.is_file():
        found = ", ".join(sorted(f.name for f in folder.glob("*.gguf"))) or "none"
        raise InputError(
            f"model.gguf_file={gguf_file}: no such file in {key}={folder}; GGUF files there: {found}"
        )
    stat = file.stat()
    identity = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    target = cache / f"gguf-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    with file_lock(cache / f".{target.name}.lock"):
        if not (target / "config.json").is_file():
            log_progress(f"{key}={folder}: dequantizing {gguf_file} to {target}")
            quiet_transformers()
            try:
                model = load_model(str(folder), dtype=torch.float32, gguf_file=gguf_file)
            except (ImportError, struct.error, LookupError) as error:
                raise InputError(
                    f"model.gguf_file={gguf_file}: cannot be read ({type(error).__name__}: {error}); "
                    "must be a complete GGUF file of an architecture that transformers supports, with gguf "
                    "and accelerate installed"
                ) from error
            with atomic_folder(target, replace=True) as partial:
                _without_gguf_origin(model).save_pretrained(partial, safe_serialization=True)
                tokenizer = load_tokenizer(str(folder), check_template=False, gguf_file=gguf_file)
                tokenizer.save_pretrained(partial)
    return str(target.absolute())


def _without_gguf_origin(model: Any) -> Any:
    """The same weights in a new model, since transformers refuses to save a model loaded from GGUF."""
    from transformers import AutoModelForCausalLM

    weights, config = model.state_dict(), model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = True
    auto: Any = AutoModelForCausalLM
    plain = auto.from_config(config, dtype=model.dtype, trust_remote_code=False)
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return plain
