"""Load tokenizers and causal models, from safetensors and without remote code."""

from __future__ import annotations

import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tbpo_ray.config.schema import LoraConfig, ModelConfig
from tbpo_ray.errors import InputError, first_line
from tbpo_ray.models.attention import choose_attention, stateful_layers
from tbpo_ray.models.hidden_modules import hide_modules
from tbpo_ray.models.template_checks import check_templates
from tbpo_ray.models.tiny import build_tiny
from tbpo_ray.models.weight_files import check_weight_files
from tbpo_ray.progress import log_progress

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILTIN = "builtin:"
_HUB_REVISION = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<revision>[\w./-]+)")


def resolve_model(name: str, cache_dir: str | Path, *, seed: int = 0, key: str = "model.name_or_path") -> str:
    """A name that transformers and vLLM can load: an absolute folder, or a hub name unchanged.

    Raises:
        InputError: for a folder that is not a model, and for an unknown built-in model.
    """
    if name.startswith(BUILTIN):
        if name != "builtin:tiny":
            raise InputError(f"{key}={name}: unknown built-in model; the only one is builtin:tiny")
        return str(build_tiny(Path(cache_dir).absolute() / f"builtin-tiny-{seed}", seed))
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, name, key)
        return str(folder.absolute())
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"{key}={name}: no such model folder; must be a folder with config.json, or a hub name"
        )
    return name


def split_revision(
    name: str, revision: str | None = None, key: str = "model.name_or_path"
) -> tuple[str, str | None]:
    """The hub name and the revision in `OWNER/NAME@REVISION`; other names and folders as they are.

    Args:
        revision: a revision that is configured in addition.

    Raises:
        InputError: the name has another revision than the one in addition.
    """
    found = _HUB_REVISION.fullmatch(name)
    if found is None or Path(name).expanduser().exists():
        return name, revision
    if revision not in (None, found["revision"]):
        raise InputError(f"{key}={name}: the name has another revision than {revision}; remove either")
    return found["name"], found["revision"]


def _check_folder(folder: Path, name: str, key: str) -> None:
    if any(folder.glob("*.gguf")):
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"{key}={name}: not a model folder, it has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{key}={name}: config.json is not JSON ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(
            f"{key}={name}: config.json has no model_type; must be the folder of a transformers model"
        )
    if config.get("auto_map") and "transformers_version" not in config:
        raise InputError(f"{key}={name}: requires custom code (auto_map), which is never executed")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{key}={name}: it contains no *.safetensors; convert the weights to safetensors")
    check_weight_files(folder, f"{key}={name}")
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{key}={name}: it contains no tokenizer; save the tokenizer in the same folder")


def check_same_tokenizer(policy: str, other: str, key: str) -> None:
    """Check that two models share their token ids; otherwise one cannot score the tokens of the other.

    Raises:
        InputError: naming `key`, if the vocabularies differ.
    """
    if policy == other:
        return
    expected = load_tokenizer(policy, check_template=False).get_vocab()
    vocabulary = load_tokenizer(other, check_template=False).get_vocab()
    if vocabulary != expected:
        raise InputError(
            f"{key}={other}: its vocabulary ({len(vocabulary)} tokens) differs from that of {policy} "
            f"({len(expected)} tokens); must be a model of the same family"
        )


def load_tokenizer(
    path: str,
    *,
    chat_template: str | None = None,
    check_template: bool = True,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase:
    """A tokenizer with the chat template that a run uses.

    Args:
        path: a folder or a hub name.
        chat_template: a Jinja file that replaces the tokenizer's own template, or `none` to remove it.
        check_template: refuse a template that cannot be used; false where none is run.

    Raises:
        InputError: when the tokenizer or the template does not exist, the template cannot be used, or the
            tokenizer has no EOS token.
    """
    from transformers import AutoTokenizer

    extra: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    path, revision = split_revision(path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False, **extra)
    # The files come from elsewhere, and the Rust library raises bare exceptions about them.
    except Exception as error:
        raise InputError(
            f"model.name_or_path={path}: no tokenizer could be loaded "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if chat_template == "none":
        tokenizer.chat_template = None
    elif chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise InputError(
                f"model.chat_template={chat_template}: no such file; must be a Jinja template file or `none`"
            )
        try:
            # Editors put a byte order mark in front, which the template would write into every prompt.
            tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"model.chat_template={chat_template}: not UTF-8 ({error}); must be a Jinja template file"
            ) from error
        if not tokenizer.chat_template.strip():
            raise InputError(
                f"model.chat_template={chat_template}: the file is empty; must be a Jinja template file, or "
                "`none` for plain text"
            )
    if check_template:
        check_templates(tokenizer.chat_template, path=path, chat_template=chat_template)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model.name_or_path={path}: its tokenizer has no EOS token, so answers cannot end")
    return tokenizer


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    gguf_file: str | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """A causal model in `dtype` and eval mode.

    Args:
        attention: the requested implementation; `eager` replaces it where it would drop a feature.
        device: where each weight goes as soon as it is read, so that the host never holds the whole model;
            default: the CPU, where weights of the same dtype are mapped from the files until they change.

    Raises:
        InputError: the folder cannot be loaded, or lacks some of the model's weights.
    """
    from safetensors import SafetensorError

    with hide_modules("sklearn"):
        from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    if device is not None and device.type == "cuda":
        extra["device_map"] = {"": device}
    config = model_config(path, ModelConfig(gguf_file=gguf_file))
    try:
        # `output_loading_info` turns the result into a tuple, which transformers' annotation does not say.
        model, info = cast(
            "tuple[PreTrainedModel, dict[str, Any]]",
            AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=choose_attention(config, attention).implementation,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            ),
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model.name_or_path={path}: no model could be loaded ({first_line(error)})"
        ) from error
    # Transformers fills missing weights with random numbers, and says so in a warning only.
    missing = sorted(info["missing_keys"])
    if missing and gguf_file is None:
        raise InputError(
            f"model.name_or_path={path}: the safetensors lack {len(missing)} weights of the model "
            f"({', '.join(missing[:3])}, ...); must be a complete checkpoint of {config.model_type}"
        )
    # It drops what the architecture has no place for, with a warning that workers do not show.
    unused = sorted(info["unexpected_keys"])
    if unused:
        log_progress(
            f"model.name_or_path={path}: {len(unused)} weights of the safetensors are not used by "
            f"{type(model).__name__} ({', '.join(unused[:3])}, ...); check that config.json belongs to them"
        )
    model.config.use_cache = False
    model.eval()  # type: ignore[no-untyped-call]
    return model


def empty_model(path: str, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The modules that `load_model` returns, with weights and buffers that have no values (device `meta`)."""
    import torch

    with hide_modules("sklearn"):
        from transformers import AutoModelForCausalLM

    config = model_config(path, ModelConfig())
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config,
            dtype=dtype,
            attn_implementation=choose_attention(config, attention).implementation,
            trust_remote_code=False,
        )
    model.config.use_cache = False
    model.eval()  # type: ignore[no-untyped-call]
    return model


def add_lora(model: PreTrainedModel, lora: LoraConfig) -> nn.Module:
    """Wrap `model` with a trainable low-rank adapter (LoRA, arXiv 2106.09685) and freeze everything else."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    peft = PeftConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora_targets(model, lora.target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, peft)
    except ValueError as error:  # a module that has no low-rank form
        raise InputError(
            f"model.lora.target_modules={lora.target_modules}: {first_line(error)}; must be linear layers"
        ) from error


def lora_targets(model: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """`model.lora.target_modules` in the form in which peft finds the modules.

    A string may be `all-linear`, the name of a module, or a regular expression that matches whole paths.

    Raises:
        InputError: naming each entry that matches no module, or one that has no low-rank form.
    """
    paths = [path for path, _ in model.named_modules() if path]
    if targets == "all-linear":
        return targets
    names = [targets] if isinstance(targets, str) else targets
    absent = [name for name in names if not any(f".{path}".endswith(f".{name}") for path in paths)]
    if not absent and names:
        found = [path for path in paths if any(f".{path}".endswith(f".{name}") for name in names)]
        _check_adaptable(model, found, targets)
        return names
    matching = _matching(targets, paths) if isinstance(targets, str) else []
    if isinstance(targets, str) and matching:
        _check_adaptable(model, matching, targets)
        return targets
    raise InputError(
        f"model.lora.target_modules={targets}: no module of the model is named {', '.join(absent) or 'so'}; "
        f"{_suggest_modules(model, absent)}"
    )


def _suggest_modules(model: nn.Module, absent: list[str]) -> str:
    """What `model.lora.target_modules` may be, the names that resemble the absent ones first."""
    linear = {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if _is_linear(module)}
    known = ["all-linear", *sorted(linear)]
    close = {match: None for name in absent for match in get_close_matches(name, known, n=1)}
    hint = f"did you mean {', '.join(close)}? " if close else ""
    return f"{hint}Accepted are all-linear, and names among {', '.join(known[1:])}"


def _matching(pattern: str, paths: list[str]) -> list[str]:
    try:
        return [path for path in paths if re.fullmatch(pattern, path)]
    except re.error:
        return []


def _check_adaptable(model: nn.Module, paths: list[str], targets: str | list[str]) -> None:
    """Refuse modules that have no low-rank form, such as a whole block or a norm."""
    from torch import nn

    for path in paths:
        module = model.get_submodule(path)
        if not (_is_linear(module) or isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d)):
            raise InputError(
                f"model.lora.target_modules={targets}: {path} is a {type(module).__name__}, which has no "
                f"low-rank form; must be linear layers. {_suggest_modules(model, [])}"
            )


def _is_linear(module: nn.Module) -> bool:
    # GPT-2 has linear layers of a class of its own, Conv1D.
    return type(module).__name__ in ("Linear", "Conv1D")


def model_config(path: str, model: ModelConfig) -> Any:
    """The transformers configuration of a model, without loading its weights."""
    from transformers import AutoConfig

    extra: dict[str, Any] = {"gguf_file": model.gguf_file} if model.gguf_file else {}
    path, revision = split_revision(path, model.revision)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False, **extra)
    # A configuration is data from elsewhere, and each architecture reads it in its own way.
    except Exception as error:
        if model.gguf_file and not isinstance(error, OSError | ValueError):
            raise  # about the GGUF file, which the caller names
        raise InputError(
            f"model.name_or_path={path}: no model configuration ({type(error).__name__}: {first_line(error)})"
        ) from error


def non_attention_layers(folder: str) -> str | None:
    """The kind of layers other than attention that carry state from one position to later ones, if any.

    Raises:
        InputError: when the configuration in the folder cannot be read.
    """
    return stateful_layers(model_config(folder, ModelConfig()))


def training_dtype(precision: str) -> torch.dtype:
    """The dtype of weights in training, reference scores and exports, from `training.precision`."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def inference_dtype(device: str) -> torch.dtype:
    """The dtype of a model that only evaluates: float32 on a CPU, bfloat16 on an accelerator."""
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16


def quiet_transformers() -> None:
    """Switch off the progress bars and advisory warnings of transformers, for use in workers."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
