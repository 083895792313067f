"""The machines of the cluster files run the locked CUDA and hold the shipped configurations."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from benchmarks.balance import pair_lengths
from tbpo_ray.cluster.hardware import (
    CUDA_DRIVERS,
    GKE_ACCELERATORS,
    IMAGE_DRIVERS,
    MACHINES,
    GpuMachine,
)
from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import Config
from tbpo_ray.models.preflight import ModelFacts
from tbpo_ray.training.memory_plan import CUDA_CONTEXT, GIB, kv_cache_bytes, plan_memory
from tbpo_ray.training.run_plan import resolve_run
from tests.cluster.test_cluster_files import RAYJOB, ROOT, documents, ray_cluster

LLAMA = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
MISTRAL = MistralConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32_768, sliding_window=4096,
)  # fmt: skip
SHIPPED = {"llama3_8b": LLAMA, "mistral_7b": MISTRAL, "hh_rlhf": LLAMA}
VLLM_SHARE = 0.9
"""vLLM's default `gpu_memory_utilization`."""


def locked_cuda() -> str:
    """The CUDA runtime of the lock file, major and minor version."""
    lock = (ROOT / "requirements.lock").read_text()
    found = re.search(r"^nvidia-cuda-runtime==(\d+\.\d+)", lock, re.MULTILINE)
    assert found is not None
    return found[1]


def ec2_machines() -> dict[str, tuple[dict[str, Any], GpuMachine]]:
    kinds = ray_cluster()["available_node_types"]
    return {
        name: (kind, MACHINES[kind["node_config"]["InstanceType"]])
        for name, kind in kinds.items()
        if kind["resources"].get("GPU")
    }


def gke_machines() -> dict[str, tuple[dict[str, Any], GpuMachine]]:
    found = {}
    for group in documents(RAYJOB)[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        limits = spec["containers"][0]["resources"]["limits"]
        if "nvidia.com/gpu" in limits:
            accelerator = spec["nodeSelector"]["cloud.google.com/gke-accelerator"]
            found[group["groupName"]] = (limits, GKE_ACCELERATORS[accelerator])
    return found


def test_every_node_has_a_driver_for_the_locked_cuda():
    needed = CUDA_DRIVERS[locked_cuda()]
    for kind in ray_cluster()["available_node_types"].values():
        family = kind["node_config"]["ImageId"].split("/")[-3]
        assert IMAGE_DRIVERS[family] >= needed
    assert f"({needed[0]} or later)" in RAYJOB.read_text()


def test_the_locked_cuda_is_the_only_one():
    lock = (ROOT / "requirements.lock").read_text()
    major = locked_cuda().split(".")[0]
    assert set(re.findall(r"^nvidia-[a-z]+-cu(\d+)==", lock, re.MULTILINE)) == {major}
    text = "".join(f.read_text() for f in (ROOT / "cluster.yaml", RAYJOB.parent / "Dockerfile"))
    tags = re.findall(r"rayproject/ray:([\w.-]+)", text)
    assert len(tags) == 2 and all(tag.endswith("-cpu") for tag in tags)
    # Without these, the NVIDIA runtime gives such an image no GPU.
    assert text.count("NVIDIA_VISIBLE_DEVICES=all") == 2 and text.count("=compute,utility") == 2
    assert ray_cluster()["docker"]["image"] in text
    assert not any("docker" in kind for kind in ray_cluster()["available_node_types"].values())


def test_nodes_have_the_gpus_and_cores_of_their_machines():
    for kind, machine in ec2_machines().values():
        assert kind["resources"] == {"CPU": machine.cpus, "GPU": machine.gpus}
    for limits, machine in gke_machines().values():
        assert int(limits["nvidia.com/gpu"]) == machine.gpus and int(limits["cpu"]) <= machine.cpus
        assert int(limits["memory"].removesuffix("Gi")) <= machine.host_gib
    assert set(ec2_machines()) == set(gke_machines()) == {"train", "generate"}


@pytest.mark.parametrize("name", ["llama3_8b", "mistral_7b"])
def test_the_authors_recipes_are_theirs(name):
    config = load_config(ROOT / "jobs" / "configs" / f"{name}.yaml")
    training, baseline = config.training, config.objective.state_baseline
    assert (training.pairs_per_step, training.learning_rate, training.optimizer) == (32, 5e-7, "rmsprop")
    assert (training.scheduler, training.warmup_ratio, training.max_grad_norm) == ("cosine", 0.05, 10.0)
    assert (config.objective.name, config.objective.beta, training.epochs) == ("tbpo_q", 0.1, 1)
    assert (config.objective.bregman.generator, config.objective.bregman.scale) == ("sba", 4.0)
    assert (baseline.hidden, baseline.lr, baseline.center, baseline.clip) == (1024, 1e-3, True, 10.0)
    lora = config.model.lora
    assert lora is not None and (lora.r, lora.alpha, lora.dropout) == (32, 64, 0.05)


def shipped(name: str, folder: Any) -> tuple[Config, ModelFacts]:
    """A shipped configuration, and its model's shape, without the download."""
    SHIPPED[name].save_pretrained(folder)
    config = load_config(ROOT / "jobs" / "configs" / f"{name}.yaml", ["cluster.use_gpu=true"])
    return config, ModelFacts(str(folder))


@pytest.mark.heavy
@pytest.mark.parametrize("name", SHIPPED)
def test_workers_of_the_shipped_configurations_fit(name, tmp_path):
    config, facts = shipped(name, tmp_path)
    kind = "hh_rlhf" if name == "hh_rlhf" else "ultrafeedback"
    memory = plan_memory(resolve_run(config), facts, pair_lengths(kind, 2048))
    for machines in (ec2_machines(), gke_machines()):
        _, machine = machines["train"]
        assert config.cluster.max_workers <= machine.gpus
        assert memory.total + CUDA_CONTEXT <= machine.gib_per_gpu * GIB
        assert config.cluster.max_workers * sum(memory.host.values()) <= machine.host_gib * GIB
    assert memory.tokens <= 8192


@pytest.mark.parametrize("name", ["llama3_8b", "mistral_7b"])
def test_an_engine_of_the_shipped_configurations_fits(name, tmp_path):
    config, facts = shipped(name, tmp_path)
    longest = config.generation.max_model_len
    assert longest is not None
    weights = 2 * sum(p.numel() for p in facts.skeleton.parameters())
    needed = weights + kv_cache_bytes(config, facts.config, longest)
    for machines in (ec2_machines(), gke_machines()):
        _, machine = machines["generate"]
        assert needed < VLLM_SHARE * machine.gib_per_gpu * GIB
