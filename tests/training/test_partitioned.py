"""ZeRO stage 3 divides a model while it is loaded: the training is the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.training.architectures import ARCHITECTURES
from tests.training.test_deepspeed_engine import in_group
from tests.training.test_self_check import write_pairs

pytestmark = pytest.mark.e2e

STEPS = 3
LLAMA, MIXTURE = "llama, tied", "mixtral, experts"
LENGTHS = [(20, 12, 9), (9, 5, 30), (11, 20, 15), (60, 40, 50), (17, 8, 8), (12, 9, 9)]


def save_model(folder: Path, tiny_model: str, name: str, **changes) -> str:
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    config = AutoConfig.for_model(architecture.model_type, **architecture.config | changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def settings_of(model: str, *overrides: str) -> list[str]:
    return [
        f"model.name_or_path={model}",
        "training.deepspeed={stage: 3}",
        "training.precision=fp32",
        "training.learning_rate=1e-3",
        *overrides,
    ]


def build(settings, prepared, *, divided, reference=None):
    """The components, loaded as now or as a plain loader would: all of the model on each rank."""
    from tbpo_ray.config.loading import load_config
    from tbpo_ray.training import components as module

    components: Any = module
    from tbpo_ray.training.run_paths import RunPaths
    from tbpo_ray.training.run_plan import resolve_run

    torch.manual_seed(7)
    plan = resolve_run(load_config(None, settings))
    paths = RunPaths(
        run_dir="", checkpoints="", model=plan.config.model.name_or_path, prepared=prepared,
        reference=reference,
    )  # fmt: skip
    decide = components.partitions_weights
    components.partitions_weights = decide if divided else lambda config: False
    try:
        return plan, components.build_components(plan, paths, torch.device("cpu"))
    finally:
        components.partitions_weights = decide


def trained(rank, world, settings, prepared, reference, divided):
    """Losses, gradient norms, and digests of this rank's weights and optimizer state."""
    import numpy as np
    import torch.distributed as dist

    from tbpo_ray.data.reader import PairReader
    from tbpo_ray.data.shards import TOKEN_COLUMNS, PreparedPairs
    from tbpo_ray.training.batch import collate_columns
    from tbpo_ray.training.deepspeed_engine import Engine
    from tbpo_ray.training.optim import HeadOptimizer
    from tbpo_ray.training.readback import Readback
    from tbpo_ray.training.state import fragment_tensors

    plan, found = build(settings, prepared, divided=divided, reference=reference)
    is_divided = [hasattr(p, "ds_id") for p in found.scorer.parameters()]
    assert all(is_divided) if divided else not any(is_divided)
    engine = Engine(found.scorer, plan.config, torch.device("cpu"))
    head = HeadOptimizer(found.head, 1e-3) if found.head is not None else None
    torch.manual_seed(rank)
    columns = PairReader(PreparedPairs.load(prepared)).fetch(np.arange(len(LENGTHS)))
    losses = []
    for step in range(STEPS):
        mine = [(step + rank + 2 * k) % len(LENGTHS) for k in range(2)]
        batch = collate_columns(
            {n: [columns[n][i].astype(np.int64) for i in mine] for n in TOKEN_COLUMNS}, found.layout
        )
        loss, _ = found.step(engine, batch, step)
        engine.backward(loss, last=True)
        readback = Readback(torch.device("cpu"))
        if head is not None:
            head.offer(readback)
        norm = engine.step(1e-3, readback)
        if head is not None:
            head.step(readback)
        losses.append([float(loss), norm])
    state = fragment_tensors(engine) | (head.state_dict() if head is not None else {})
    digests = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in state.items()}
    dist.barrier()
    return [losses, digests, list(found.sentences)]


def compare(rank, world, cases, prepared, reference):
    return [
        [trained(rank, world, settings, prepared, reference, divided) for divided in (False, True)]
        for settings in cases
    ]


def test_training_is_the_same_bit_for_bit(tmp_path, tiny_model):
    """As with all of the model on each rank: weights, optimizer state, losses, gradient norms, head."""
    prepared = write_pairs(tmp_path / "pairs", LENGTHS).path
    tied = save_model(tmp_path / "tied", tiny_model, LLAMA)
    untied = save_model(tmp_path / "untied", tiny_model, LLAMA, tie_word_embeddings=False)
    other = save_model(tmp_path / "other", tiny_model, LLAMA, rms_norm_eps=1e-4)
    moe = save_model(tmp_path / "moe", tiny_model, MIXTURE)
    live = ("objective.name=dpo", "training.reference_scores=live", f"model.reference={other}")
    exact = ("objective.name=tbpo_a", "objective.state_baseline.kind=exact_kl")
    lora = ("model.lora.r=4", "model.lora.target_modules=all-linear", *exact)
    cases = [
        settings_of(tied, *live),
        settings_of(untied, "training.precision=bf16", "training.activation_checkpointing=true", *exact),
        settings_of(untied, *lora),
        settings_of(untied, "training.reference_scores=live", "objective.name=tbpo_q"),
        settings_of(moe, *live),
    ]
    for rank_results in in_group(tmp_path, 2, compare, cases, prepared, other):
        assert len(rank_results) == len(cases)
        for settings, (whole, divided) in zip(cases, rank_results, strict=True):
            assert divided == whole, settings
            assert len({loss for loss, _ in divided[0]}) == STEPS
            assert not divided[2]


def digests(scorer) -> list[str]:
    """Of this rank's parts of the weights."""
    return [hashlib.sha256(p.ds_tensor.numpy().tobytes()).hexdigest() for p in scorer.parameters()]


def loaded_otherwise(rank, world, model, incomplete, prepared):
    """What a model looks like that is checked from the host's memory, or cannot be built without weights."""
    from tbpo_ray.errors import InputError
    from tbpo_ray.training import components as module

    components: Any = module

    settings = settings_of(model, "objective.name=dpo")
    _, usual = build(settings, prepared, divided=True)
    components.fits_whole = lambda model, device: False
    _, from_host = build(settings, prepared, divided=True)
    same = digests(usual.scorer) == digests(from_host.scorer) and not from_host.sentences
    components.fits_whole = lambda model, device: True
    components.build_empty = lambda build: "planted"
    _, whole = build(settings, prepared, divided=True)
    plain = AutoModelForCausalLM.from_pretrained(model)
    equal = [
        torch.equal(a, b) for a, b in zip(whole.scorer.model.parameters(), plain.parameters(), strict=True)
    ]
    try:
        build(settings_of(incomplete, "objective.name=dpo"), prepared, divided=True)
        refusal = ""
    except InputError as error:
        refusal = str(error)
    return [same, all(equal), list(whole.sentences), refusal]


def test_models_that_take_another_way_are_loaded_as_well(tmp_path, tiny_model):
    """From the host's memory, as a whole on each rank, and not at all, with the same error on every rank."""
    prepared = write_pairs(tmp_path / "pairs", LENGTHS).path
    model = save_model(tmp_path / "model", tiny_model, LLAMA)
    incomplete = Path(save_model(tmp_path / "incomplete", tiny_model, LLAMA))
    weights = load_file(incomplete / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, incomplete / "model.safetensors", {"format": "pt"})
    for same, equal, sentences, refusal in in_group(
        tmp_path, 2, loaded_otherwise, model, str(incomplete), prepared
    ):
        assert same and equal
        assert "model.name_or_path: cannot be built without its weights (planted)" in sentences[0]
        assert "lack 1 weights of the model (model.norm.weight" in refusal
