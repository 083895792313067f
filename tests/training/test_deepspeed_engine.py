"""DeepSpeed engines on the CPU: stages agree, and a checkpoint of one layout resumes in another."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.e2e

PAIRS, STEPS = 8, 4


def _rank(rank, world, port, work, arguments, results):
    """One rank of a process group: call `work` and write what it returns to a file."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    Path(f"{results}-{rank}").write_text(json.dumps(work(rank, world, *arguments)), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def in_group(tmp_path, world, work, *arguments):
    """Run `work` on `world` ranks in a new process group. Returns what each of them returned."""
    from tbpo_ray.cluster.session import free_port

    port = free_port()
    context = multiprocessing.get_context("spawn")
    results = str(tmp_path / "result")
    ranks = [
        context.Process(target=_rank, args=(r, world, port, work, arguments, results)) for r in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(400)
    assert [process.exitcode for process in ranks] == [0] * world
    return [json.loads(Path(f"{results}-{r}").read_text(encoding="utf-8")) for r in range(world)]


@dataclass(frozen=True)
class Case:
    """One training run of a few steps."""

    stage: int
    offload: dict | None = None
    optimizer: str = "rmsprop"
    out: str | None = None
    """Where to save the fragments at the end."""
    load: str | None = None
    """Where to load fragments from at the start."""
    first: int = 0
    """The first step, earlier ones being skipped."""
    precision: str = "fp32"
    kind: str = "tied"


def train(rank, world, cases):
    """The losses of each case."""
    return [train_case(rank, world, Case(**case)) for case in cases]


def train_case(rank, world, case):
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from tbpo_ray.config.loading import load_config
    from tbpo_ray.config.schema import LoraConfig
    from tbpo_ray.models.load import add_lora
    from tbpo_ray.objectives import build_objective
    from tbpo_ray.training.batch import collate
    from tbpo_ray.training.deepspeed_engine import Engine
    from tbpo_ray.training.scorer import PairScorer
    from tbpo_ray.training.state import fragment_tensors, load_fragments
    from tbpo_ray.training.step import PreferenceStep

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=case.kind == "tied", max_position_embeddings=64,
    )  # fmt: skip
    policy: Any = LlamaForCausalLM(shape)
    reference = LlamaForCausalLM(shape)
    reference.load_state_dict(policy.state_dict())
    zero_settings = json.dumps({"stage": case.stage, **(case.offload or {})})
    config = load_config(
        None,
        [
            f"training.deepspeed={{zero_optimization: {zero_settings}}}",
            f"training.optimizer={case.optimizer}",
            f"training.precision={case.precision}",
        ],
    )
    frozen: Any = PairScorer(reference).eval().requires_grad_(False)
    baseline = "k3"
    if case.kind == "lora":
        policy = add_lora(policy, LoraConfig(r=4, dropout=0, target_modules=["q_proj", "lm_head"]))
        frozen, baseline = "adapter_off", "exact_kl"
    scorer = PairScorer(policy).train()
    engine = Engine(scorer, config, torch.device("cpu"))
    if case.offload:
        zero = engine.optimizer
        assert zero.offload_optimizer if case.stage == 3 else zero.cpu_offload
    step = PreferenceStep(
        build_objective({"name": "tbpo_a", "state_baseline": {"kind": baseline}}), None, frozen
    )
    if case.load:
        load_fragments(engine, sorted(Path(case.load).glob("optimizer-*.safetensors")))
    rng = np.random.default_rng(0)
    losses = []
    for index in range(case.first + STEPS):
        prompts = [rng.integers(0, 97, rng.integers(3, 9)) for _ in range(PAIRS)]
        answers = [[rng.integers(0, 97, rng.integers(2, 9)) for _ in range(PAIRS)] for _ in range(2)]
        if index < case.first:
            continue
        mine = list(range(rank, PAIRS, world))
        total = torch.zeros(1)
        # Micro-batches of different size: a pair has the same weight in each.
        cuts = [mine[:1], mine[1:]]
        for k, rows in enumerate(cuts):
            batch = collate(
                [prompts[i] for i in rows],
                [[side[i] for i in rows] for side in answers],
                pad_id=0,
                shared=True,
                truncate_to_shorter=True,
            )
            loss, _ = step(engine, batch)
            engine.backward(loss * world / PAIRS, last=k == len(cuts) - 1)
            total += loss.detach().float()
        engine.step(1e-3)
        dist.all_reduce(total)
        losses.append(total.item() / PAIRS)
    if case.out:
        Path(case.out).mkdir(parents=True, exist_ok=True)
        save_file(
            {k: v.clone() for k, v in fragment_tensors(engine).items()},
            Path(case.out) / f"optimizer-{rank:04d}.safetensors",
        )
    return losses


def test_stages_agree_and_a_checkpoint_resumes_in_another_layout(tmp_path):
    """One worker without ZeRO is the reference; AdamW has more state than RMSprop."""
    at = {stage: str(tmp_path / str(stage)) for stage in range(4)}
    adamw = {"optimizer": "adamw"}
    alone = [
        {"stage": 0, "out": at[0], **adamw},
        {"stage": 0, "load": at[0], "first": STEPS, **adamw},
    ]
    ((whole, rest),) = in_group(tmp_path, 1, train, alone)
    together = [{"stage": stage, "out": at[stage], **adamw} for stage in (1, 2, 3)]
    together.append({"stage": 3, "load": at[1], "first": STEPS, **adamw})
    *stages, resumed = in_group(tmp_path, 2, train, together)[0]
    assert len(stages) == 3
    for losses in stages:
        assert losses == pytest.approx(whole, abs=1e-5)
    assert resumed == pytest.approx(rest, abs=1e-5)
    back = [{"stage": 1, "load": at[3], "first": STEPS, **adamw}]
    assert in_group(tmp_path, 1, train, back)[0][0] == pytest.approx(rest, abs=1e-5)


def test_offload_to_the_cpu_changes_nothing(tmp_path):
    """Neither the losses nor what a checkpoint holds: one of either kind resumes in the other."""
    offload = {"offload_optimizer": {"device": "cpu"}}
    pinned = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    at = {name: str(tmp_path / name) for name in ("plain", "two", "three")}
    adamw = {"optimizer": "adamw"}
    go_on = {"first": STEPS, **adamw}
    cases = [
        {"stage": 2, "out": at["plain"], **adamw},
        {"stage": 2, "load": at["plain"], **go_on},
        {"stage": 2, "offload": offload, "out": at["two"], **adamw},
        {"stage": 3, "offload": pinned | {"offload_param": {"device": "cpu"}}, "out": at["three"], **adamw},
        {"stage": 2, "offload": pinned, "load": at["plain"], **go_on},
        {"stage": 2, "load": at["three"], **go_on},
        {"stage": 3, "offload": offload, "load": at["two"], **go_on},
    ]
    first, later, two, three, *resumed = in_group(tmp_path, 2, train, cases)[0]
    assert len(set(first)) == STEPS
    for losses in (two, three):
        assert losses == pytest.approx(first, abs=1e-5)
    assert len(resumed) == 3
    for losses in resumed:
        assert losses == pytest.approx(later, abs=1e-5)


def test_bf16_trains_with_fp32_master_weights(tmp_path):
    cases = [
        {"stage": 1, "out": str(tmp_path / "b"), "precision": "bf16"},
        {"stage": 0, "precision": "bf16"},
    ]
    ((whole, undivided),) = in_group(tmp_path, 1, train, cases)
    assert whole[0] == pytest.approx(0.25, abs=1e-2)
    assert len(set(whole)) == STEPS
    assert undivided == pytest.approx(whole, abs=1e-3)
    from safetensors.torch import load_file

    master = [
        v
        for k, v in load_file(tmp_path / "b" / "optimizer-0000.safetensors").items()
        if k.endswith("@master")
    ]
    assert {str(v.dtype) for v in master} == {"torch.float32"}
    assert any((v.bfloat16().float() != v).any() for v in master)


def test_stage_3_sees_a_partitioned_output_layer_and_adapters(tmp_path):
    """An output layer of its own, and LoRA (on the output layer too) with the adapter-off reference."""
    kinds = ("untied", "lora")
    at = {(kind, stage): str(tmp_path / f"{kind}-{stage}") for kind in kinds for stage in (0, 2, 3)}
    go_on = {"first": STEPS}
    alone = [{"kind": k, "stage": 0, "out": at[k, 0]} for k in kinds]
    alone += [{"kind": k, "stage": 0, "load": at[k, 0], **go_on} for k in kinds]
    whole = dict(
        zip([*kinds, "untied, later", "lora, later"], in_group(tmp_path, 1, train, alone)[0], strict=True)
    )
    together = [{"kind": k, "stage": s, "out": at[k, s]} for k in kinds for s in (2, 3)]
    together += [{"kind": k, "stage": 3, "load": at[k, 2], **go_on} for k in kinds]
    found = in_group(tmp_path, 2, train, together)[0]
    names = ["untied", "untied", "lora", "lora", "untied, later", "lora, later"]
    for name, losses in zip(names, found, strict=True):
        assert len(set(losses)) == STEPS
        assert losses == pytest.approx(whole[name], abs=1e-5), name


POISON = {"nan": float("nan"), "inf": float("inf"), "overflow": 3e38, "loss": 1.0}


def poisoned(rank, world):
    """Every case on fresh engines; rank 1's gradient or loss is the bad one."""
    import torch

    from tbpo_ray.config.loading import load_config
    from tbpo_ray.training.deepspeed_engine import Engine
    from tbpo_ray.training.optim import NonFiniteGradientError
    from tbpo_ray.training.readback import Readback
    from tbpo_ray.training.state import fragment_tensors

    found = {}
    for what, stage, policy in product(POISON, (1, 2, 3), ("stop", "skip")):
        torch.manual_seed(0)
        settings = [f"training.deepspeed={{stage: {stage}}}", f"training.on_nonfinite={policy}"]
        engine = Engine(torch.nn.Linear(8, 8), load_config(None, settings), torch.device("cpu"))
        before = {key: value.clone() for key, value in fragment_tensors(engine).items()}
        out = engine(torch.ones(4, 8, dtype=torch.bfloat16)).float()
        engine.backward(out.square().sum() * (POISON[what] if rank else 1.0), last=True)
        stopped = False
        try:
            readback = Readback(torch.device("cpu"))
            readback.add("loss", float("nan") if what == "loss" and rank else 1.0, guarded=True)
            engine.step(1.0, readback)
        except NonFiniteGradientError:
            stopped = True
        after = fragment_tensors(engine)
        moved = any(not torch.equal(after[k], v) for k, v in before.items() if k.endswith("master"))
        found[f"{what} {stage} {policy}"] = [stopped, engine.skipped, moved]
    return found


def test_a_non_finite_step_of_one_rank_moves_no_weight_on_any(tmp_path):
    for found in in_group(tmp_path, 2, poisoned):
        assert len(found) == 3 * 2 * len(POISON)
        for case, outcome in found.items():
            assert outcome == [case.endswith("stop"), int(case.endswith("skip")), False], case


@pytest.mark.parametrize(
    ("given", "world", "precision", "stage"),
    [
        ({"stage": 2}, 1, "fp32", 0),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}, 1, "fp32", 0),
        ({"stage": 2}, 2, "fp32", 2),
        ({"stage": 2}, 1, "bf16", 2),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, 1, "fp32", 2),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, 1, "fp32", 0),
    ],
)
def test_one_worker_uses_stage_0(given, world, precision, stage):
    from tbpo_ray.config.loading import load_config
    from tbpo_ray.training.deepspeed_engine import deepspeed_config, without_partitions

    settings = [f"training.deepspeed={json.dumps(given)}", f"training.precision={precision}"]
    config = without_partitions(load_config(None, settings), world)
    assert deepspeed_config(config)["zero_optimization"]["stage"] == stage
