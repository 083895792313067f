"""Write an exported policy as an MLflow model, which `mlflow.transformers` and `mlflow.pyfunc` load."""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbpo_ray.errors import InputError, first_line
from tbpo_ray.progress import log_progress
from tbpo_ray.storage.json_lines import read_object

BINARY = "model"
"""Folder of the weights and the tokenizer in an MLflow model of transformers."""
COMPONENTS = "components"
WEIGHTS = ".safetensors"
LICENSE_FILE = "LICENSE.txt"
EXAMPLE = "What can you do?"
"""The input example where an evaluation has no prompt to offer."""
_SENTINEL = "\ue000"
"""A private character that stands for the prompt while a chat template is rendered."""
_LIBRARIES = ("mlflow", "torch", "transformers", "accelerate")
_QUIET = ("mlflow.transformers", "mlflow.models.model", "mlflow.models.signature", "mlflow.types.utils")


@dataclass(frozen=True)
class ModelDescription:
    """What an MLflow model says about a policy, apart from the files of its folder."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the logged model, such as the configuration of its training."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Written into the file `MLmodel`."""
    example: str = EXAMPLE
    """The input example: the text of a prompt."""
    max_tokens: int = 256
    """Default for the maximum number of tokens of an answer of the `pyfunc` model."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    step: int = 0
    """The optimizer step whose weights the model has."""
    model_type: str = "policy"


def write_mlflow_model(export: Path, target: Path, description: ModelDescription, model_id: str) -> None:
    """Write the MLflow model of `export` to the empty or missing folder `target`.

    The weights are hard links where `target` is on the same file system, so that they take no space and
    stay what they were when `export` is replaced; otherwise they are copied.

    Args:
        export: folder with `config.json`, safetensors and a tokenizer.

    Raises:
        InputError: `export` is not a model that MLflow can describe.
        OSError: `target` cannot be written.
    """
    import mlflow.transformers
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    export = export.resolve()
    _check_export(export)
    template = prompt_template(export, description.template_kwargs)
    model = Model(artifact_path=str(target), model_uuid=model_id, model_id=model_id)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        # MLflow copies the folder that it is given: it gets all of it but the weights.
        light = Path(folder) / "light"
        _copy_light_files(export, light)
        try:
            mlflow.transformers.save_model(
                str(light),
                path=str(target),
                task="text-generation",
                mlflow_model=model,
                model_card=_model_card(export),
                signature=_signature(description),
                input_example=[description.example],
                prompt_template=template,
                model_config=_generation_defaults(template),
                pip_requirements=requirements(),
                metadata=dict(description.metadata) or None,
            )
        except MlflowException as error:
            raise InputError(f"{export}: cannot be saved as an MLflow model: {error.message}") from error
    _link_weights(export, target / BINARY)
    shutil.rmtree(target / "__pycache__", ignore_errors=True)
    (target / LICENSE_FILE).write_text(license_text(export), encoding="utf-8")
    _correct_description(target, export)


def _check_export(export: Path) -> None:
    """Check that the folder has what a pipeline needs: an architecture, weights and a tokenizer."""
    config = read_object(export / "config.json", "export the model again")
    if not config.get("architectures"):
        raise InputError(f"{export}: not an exported model (config.json names no architecture)")
    if not any(export.glob(f"*{WEIGHTS}")):
        raise InputError(f"{export}: not an exported model (it has no safetensors)")
    if not (export / "tokenizer_config.json").is_file():
        raise InputError(f"{export}: not an exported model (tokenizer_config.json is missing)")


def requirements() -> list[str]:
    """Pinned packages that loading and serving the model needs; without the local part of a version."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _LIBRARIES]


def prompt_template(export: Path, template_kwargs: Mapping[str, Any]) -> str | None:
    """The chat template as MLflow's prompt template: `{prompt}` stands for the text of one user turn.

    Returns:
        None if the tokenizer has no chat template, or one that changes the user's text.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(str(export), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{export}: its tokenizer cannot be loaded ({first_line(error)})") from error
    if not tokenizer.chat_template:
        return None
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SENTINEL}],
        tokenize=False,
        add_generation_prompt=True,
        **template_kwargs,
    )
    if text.count(_SENTINEL) != 1:
        log_progress(f"{export}: its chat template changes the user's text; the pyfunc model takes raw text")
        return None
    return text.replace("{", "{{").replace("}", "}}").replace(_SENTINEL, "{prompt}")


def license_text(export: Path) -> str:
    """The licence file of the exported folder, else what its model card declares."""
    for file in sorted(export.glob("LICENSE*")):
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    data = _model_card(export).data
    declared = getattr(data, "license", None)
    base = getattr(data, "base_model", None) or "its base model"
    if declared:
        return f"The model card declares the license {declared}, that of {base}.\n"
    return f"The model card declares no license; the terms of {base} apply to these weights.\n"


def _model_card(export: Path) -> Any:
    from huggingface_hub import ModelCard

    file = export / "README.md"
    return ModelCard(file.read_text(encoding="utf-8") if file.is_file() else "---\n{}\n---\n")


def _signature(description: ModelDescription) -> Any:
    """A list of texts in, a list of texts out, and the parameters of generation with greedy defaults."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec(DataType.string)])
    params = ParamSchema(
        [
            ParamSpec("max_new_tokens", DataType.long, description.max_tokens),
            ParamSpec("do_sample", DataType.boolean, False),
            ParamSpec("temperature", DataType.double, 1.0),
            ParamSpec("top_p", DataType.double, 1.0),
        ]
    )
    return ModelSignature(text, text, params)


def _generation_defaults(template: str | None) -> dict[str, Any]:
    """Arguments of the pipeline that are not parameters of a request."""
    defaults: dict[str, Any] = {"return_full_text": False}
    if template is not None:
        defaults["add_special_tokens"] = False  # the template writes them
    return defaults


def _copy_light_files(export: Path, target: Path) -> None:
    """Copy the folder without the weights, the adapter and the learned baseline."""
    target.mkdir()
    for file in export.iterdir():
        if file.is_file() and file.suffix != WEIGHTS:
            shutil.copy2(file, target / file.name)


def _link_weights(export: Path, target: Path) -> None:
    """Hard link the weights into `target`; copy them where the file system cannot."""
    for file in sorted(export.glob(f"*{WEIGHTS}")):
        source = file.resolve()  # snapshots of the hub are symbolic links
        try:
            os.link(source, target / file.name)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            log_progress(f"copying {file.name} to {target}, which is on another file system")
            shutil.copy2(source, target / file.name)


def _correct_description(target: Path, export: Path) -> None:
    """State the size with the weights, and the export as the source instead of a temporary folder."""
    from mlflow.models import Model

    model = Model.load(str(target))
    model.model_size_bytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    model.flavors["transformers"]["source_model_name"] = export.parent.name
    model.save(str(target / "MLmodel"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence MLflow's advice about inputs that are given here explicitly."""
    loggers = [logging.getLogger(name) for name in _QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
