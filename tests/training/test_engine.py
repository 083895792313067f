"""DeepSpeed engines on the CPU: stages agree, and a checkpoint of one layout resumes in another."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.e2e

PAIRS, STEPS = 8, 4


def _train(rank, world, stage, optimizer, port, out, load, first, results, precision, kind):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from tbpo_ray.config import LoraConfig
    from tbpo_ray.configuration import load_config
    from tbpo_ray.models.load import add_lora
    from tbpo_ray.objectives import build_objective
    from tbpo_ray.training.batch import collate
    from tbpo_ray.training.engine import Engine
    from tbpo_ray.training.scorer import PairScorer
    from tbpo_ray.training.state import copy_fragments, load_fragments
    from tbpo_ray.training.step import PreferenceStep

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=kind == "tied", max_position_embeddings=64,
    )  # fmt: skip
    policy, reference = LlamaForCausalLM(shape), LlamaForCausalLM(shape)
    reference.load_state_dict(policy.state_dict())
    config = load_config(
        None,
        [
            f"training.deepspeed={{stage: {stage}}}",
            f"training.optimizer={optimizer}",
            f"training.precision={precision}",
        ],
    )
    frozen, baseline = PairScorer(reference).eval().requires_grad_(False), "k3"
    if kind == "lora":
        policy = add_lora(policy, LoraConfig(r=4, dropout=0, target_modules=["q_proj", "lm_head"]))
        frozen, baseline = "adapter_off", "exact_kl"
    scorer = PairScorer(policy).train()
    engine = Engine(scorer, config, torch.device("cpu"))
    step = PreferenceStep(
        build_objective({"name": "tbpo_a", "state_baseline": {"kind": baseline}}), None, frozen
    )
    if load:
        load_fragments(engine, sorted(Path(load).glob("optimizer-*.safetensors")))
    rng = np.random.default_rng(0)
    losses = []
    for index in range(first + STEPS):
        prompts = [rng.integers(0, 97, rng.integers(3, 9)) for _ in range(PAIRS)]
        answers = [[rng.integers(0, 97, rng.integers(2, 9)) for _ in range(PAIRS)] for _ in range(2)]
        if index < first:
            continue
        mine = list(range(rank, PAIRS, world))
        total = torch.zeros(1)
        # Micro-batches of unlike size: a pair weighs the same wherever it lands.
        cuts = [mine[:1], mine[1:]]
        for k, rows in enumerate(cuts):
            batch = collate(
                [prompts[i] for i in rows],
                [[side[i] for i in rows] for side in answers],
                pad_id=0,
                shared=True,
                cut=True,
            )
            loss, _ = step(engine, batch)
            engine.backward(loss * world / PAIRS, last=k == len(cuts) - 1)
            total += loss.detach().float()
        engine.step(1e-3)
        dist.all_reduce(total)
        losses.append(total.item() / PAIRS)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file(copy_fragments(engine), Path(out) / f"optimizer-{rank:04d}.safetensors")
    if rank == 0:
        Path(results).write_text(json.dumps(losses), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def losses_of(tmp_path, world, stage, **more):
    case = {"optimizer": "rmsprop", "out": None, "load": None, "first": 0, "precision": "fp32"}
    case |= {"kind": "tied"} | more
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = tmp_path / "losses.json"
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(
            target=_train, args=(r, world, stage), kwargs={"port": port, "results": str(results), **case}
        )
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    assert [process.exitcode for process in ranks] == [0] * world
    return json.loads(results.read_text(encoding="utf-8"))


def test_stages_agree_and_a_checkpoint_resumes_in_another_layout(tmp_path):
    """One worker without ZeRO is the measure; AdamW has the more state."""
    whole = losses_of(tmp_path, 1, 0, optimizer="adamw", out=str(tmp_path / "0"))
    rest = losses_of(tmp_path, 1, 0, optimizer="adamw", load=str(tmp_path / "0"), first=STEPS)
    for stage in (1, 2, 3):
        out = str(tmp_path / str(stage))
        assert losses_of(tmp_path, 2, stage, optimizer="adamw", out=out) == pytest.approx(whole, abs=1e-5)
    resumed = losses_of(tmp_path, 2, 3, optimizer="adamw", load=str(tmp_path / "1"), first=STEPS)
    assert resumed == pytest.approx(rest, abs=1e-5)
    resumed = losses_of(tmp_path, 1, 1, optimizer="adamw", load=str(tmp_path / "3"), first=STEPS)
    assert resumed == pytest.approx(rest, abs=1e-5)


def test_bf16_trains_with_fp32_master_weights(tmp_path):
    whole = losses_of(tmp_path, 1, 1, out=str(tmp_path / "b"), precision="bf16")
    assert whole[0] == pytest.approx(0.25, abs=1e-2)
    from safetensors.torch import load_file

    master = [
        v
        for k, v in load_file(tmp_path / "b" / "optimizer-0000.safetensors").items()
        if k.endswith("@master")
    ]
    assert {str(v.dtype) for v in master} == {"torch.float32"}
    assert any((v.bfloat16().float() != v).any() for v in master)


@pytest.mark.parametrize("kind", ["untied", "lora"])
def test_stage_3_sees_a_partitioned_output_layer_and_adapters(tmp_path, kind):
    """An output layer of its own, and LoRA (on the output layer too) with the adapter-off reference."""
    whole = losses_of(tmp_path, 1, 0, kind=kind, out=str(tmp_path / "0"))
    assert len(set(whole)) == STEPS
    for stage in (2, 3):
        out = str(tmp_path / str(stage))
        assert losses_of(tmp_path, 2, stage, kind=kind, out=out) == pytest.approx(whole, abs=1e-5)
    rest = losses_of(tmp_path, 1, 0, kind=kind, load=str(tmp_path / "0"), first=STEPS)
    assert losses_of(tmp_path, 2, 3, kind=kind, load=str(tmp_path / "2"), first=STEPS) == pytest.approx(
        rest, abs=1e-5
    )


def _poisoned(rank, world, stage, port, what, on_nonfinite, results):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    from tbpo_ray.configuration import load_config
    from tbpo_ray.training.engine import Engine
    from tbpo_ray.training.optim import NonFiniteGradient
    from tbpo_ray.training.state import copy_fragments

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    settings = [f"training.deepspeed={{stage: {stage}}}", f"training.on_nonfinite={on_nonfinite}"]
    engine = Engine(torch.nn.Linear(8, 8), load_config(None, settings), torch.device("cpu"))
    before = copy_fragments(engine)
    factor = {"nan": float("nan"), "inf": float("inf"), "overflow": 3e38, "loss": 1.0}[what] if rank else 1.0
    loss = engine(torch.ones(4, 8, dtype=torch.bfloat16)).float().square().sum() * factor
    engine.backward(loss, last=True)
    stopped = False
    try:
        engine.step(1.0, float("nan") if what == "loss" and rank else 1.0)
    except NonFiniteGradient:
        stopped = True
    after = copy_fragments(engine)
    moved = any(not torch.equal(after[k], v) for k, v in before.items() if k.endswith("master"))
    Path(f"{results}-{rank}").write_text(json.dumps([stopped, engine.skipped, moved]), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("stage", "what"), [(1, "nan"), (1, "loss"), (2, "overflow"), (3, "inf")])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_non_finite_step_of_one_rank_moves_no_weight_on_any(tmp_path, stage, what, on_nonfinite):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = str(tmp_path / "result")
    arguments = (2, stage, port, what, on_nonfinite, results)
    ranks = [context.Process(target=_poisoned, args=(r, *arguments)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
    found = [json.loads(Path(f"{results}-{r}").read_text()) for r in range(2)]
    assert found == [[on_nonfinite == "stop", int(on_nonfinite == "skip"), False]] * 2
