"""Any model a configuration can name, as a folder of safetensors that trainers, scorers and vLLM read.

A hub name becomes a snapshot, a GGUF file is dequantised once; both lie in the cache that all nodes share.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import load_model, load_tokenizer, quiet_transformers, resolve_model
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.files import file_lock
from tbpo_ray.storage.paths import cache_dir

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
"""What of a hub repository is fetched: no pickled weights, no code."""


def local_model(
    name: str,
    cache: Path,
    *,
    seed: int = 0,
    key: str = "model.name_or_path",
    revision: str | None = None,
    gguf_file: str | None = None,
) -> str:
    """The folder of a model: built-in, local, from the hub, or out of a GGUF file.

    Args:
        cache: where snapshots (unless `HF_HUB_CACHE` or `HF_HOME` names a place) and dequantised models go.
        key: the configuration key that named it.
        revision: of a hub name.
        gguf_file: its name inside the folder.

    Raises:
        InputError: it is no model, cannot be fetched, or has no safetensors.
    """
    found = resolve_model(name, cache, seed=seed, key=key)
    if not Path(found).is_dir():
        found = _snapshot(found, cache, key, revision)
    if gguf_file is not None:
        found = _dequantised(Path(found), gguf_file, cache, key)
    return found


def policy_folder(config: Config) -> str:
    """The folder of the model that training starts from (see :func:`local_model`)."""
    model = config.model
    return local_model(
        model.name_or_path,
        cache_dir(config),
        seed=config.run.seed,
        revision=model.revision,
        gguf_file=model.gguf_file,
    )


def _snapshot(name: str, cache: Path, key: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    own = {"HF_HUB_CACHE", "HF_HOME"} & set(os.environ)
    place = None if own else cache / "hub"
    log_progress(f"{key}={name}: fetching it into {place or 'the hub cache'} where it is not there yet")
    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=place, allow_patterns=[*_PATTERNS], library_name="tbpo_ray"
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InputError(
            f"{key}={name}: neither a local folder nor on the hub{at} ({type(error).__name__}: {first}); "
            "give a folder, or a hub name that HF_TOKEN may read"
        ) from error
    # Checked like a folder that was given: safetensors, a tokenizer, no code of its own.
    return resolve_model(folder, cache, key=key)


def _dequantised(folder: Path, gguf_file: str, cache: Path, key: str) -> str:
    """`folder/gguf_file` in float32, made once: GGUF is a format to start from, not one to train in."""
    import torch

    file = folder / gguf_file
    if not file.is_file():
        found = ", ".join(sorted(f.name for f in folder.glob("*.gguf"))) or "none"
        raise InputError(f"model.gguf_file={gguf_file}: no such file in {key}={folder}; GGUF there: {found}")
    facts = file.stat()
    mark = hashlib.sha256(f"{file.resolve()}:{facts.st_size}:{facts.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache / f"gguf-{mark}"
    with file_lock(cache / f".{target.name}.lock"):
        if not (target / "config.json").is_file():
            log_progress(f"{key}={folder}: dequantising {gguf_file} into {target}")
            quiet_transformers()
            try:
                model = load_model(str(folder), dtype=torch.float32, gguf_file=gguf_file)
            except (ImportError, struct.error, LookupError) as error:
                raise InputError(
                    f"model.gguf_file={gguf_file}: cannot be read ({type(error).__name__}: {error}); give "
                    "a whole GGUF file of a kind that transformers knows, with gguf and accelerate installed"
                ) from error
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
            _plain(model).save_pretrained(partial, safe_serialization=True)
            load_tokenizer(str(folder), gguf_file=gguf_file).save_pretrained(partial)
            partial.chmod(0o755)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
    return str(target.absolute())


def _plain(model: Any) -> Any:
    """The same weights in a model that does not remember where they came from: transformers saves no model
    that it read from GGUF."""
    from transformers import AutoModelForCausalLM

    weights, config = model.state_dict(), model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = True
    plain = AutoModelForCausalLM.from_config(config, dtype=model.dtype, trust_remote_code=False)
    plain.load_state_dict(weights)
    plain.generation_config = model.generation_config
    return plain
