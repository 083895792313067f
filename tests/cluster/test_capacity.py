"""The capacity that a cluster can grow to, and plans that exceed it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbpo_ray.cluster import fit
from tbpo_ray.cluster.capacity import Capacity, NodeKind, possible, quantity, read_cluster_file
from tbpo_ray.config.loading import load_config
from tbpo_ray.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
LABELS = "cluster.labels={train: {pool: train}, generate: {pool: generate}}"


@pytest.mark.parametrize(
    ("bundle", "labels", "fits"),
    [
        ({"CPU": 1}, {}, 4 * 8 + 2 * 32),
        ({"CPU": 4, "GPU": 1}, {}, 4 * 2),  # eight CPUs hold two workers of four, though there are four GPUs
        ({"CPU": 4, "GPU": 1}, {"pool": "cpu"}, 0),
        ({"CPU": 33}, {}, 0),  # never split over two nodes
        ({"CPU": 0.5, "GPU": 0.5}, {"pool": "gpu"}, 4 * 8),
    ],
)
def test_a_bundle_is_not_split_over_nodes(bundle, labels, fits):
    kinds = [
        NodeKind("gpu", {"CPU": 8, "GPU": 4}, 4, {"pool": "gpu"}),
        NodeKind("cpu", {"CPU": 32}, 2, {"pool": "cpu"}),
    ]
    assert Capacity(kinds).fits(bundle, labels) == fits


def test_the_limit_of_all_kinds_together_is_spent_on_the_largest_nodes_first():
    kinds = [NodeKind("small", {"CPU": 2}, 5), NodeKind("large", {"CPU": 8}, 2)]
    assert Capacity(kinds, most_nodes=3).fits({"CPU": 1}) == 2 * 8 + 2


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("64Gi", 64 * 2**30), (8, 8), ("2k", 2000), ("1.5", 1.5)]
)
def test_kubernetes_quantities(text, value):
    assert quantity(text) == pytest.approx(value)


@pytest.mark.parametrize("name", ["cluster.yaml", "jobs/kuberay/rayjob.yaml"])
def test_both_cluster_files_offer_the_same_pools(name):
    size = read_cluster_file(ROOT / name)
    pools = {k.name: k for k in size.kinds if k.name != "head"}
    assert set(pools) == {"prepare", "train", "generate"}
    assert all(kind.labels == {"pool": kind.name} and kind.most == 4 for kind in pools.values())
    assert (pools["prepare"].resources.get("GPU", 0), pools["train"].resources["GPU"]) == (0, 8)
    head = next(k for k in size.kinds if k.name == "head")
    assert (head.resources["CPU"], head.most) == (0, 1)
    assert size.fits({"CPU": 4, "GPU": 1}, {"pool": "train"}) == 32
    assert not size.has("GPU", {"pool": "prepare"}) and size.has("GPU", {"pool": "train"})


@pytest.fixture
def from_zero(monkeypatch):
    """A head without CPUs, of a cluster that can grow to the capacity in cluster.yaml."""
    head = Capacity([NodeKind("head", {"CPU": 0.0, "memory": 1e9})])
    monkeypatch.setattr(fit, "present", lambda: head)
    monkeypatch.delenv("TBPO_PRIVATE_CLUSTER", raising=False)
    return f"cluster.node_types={ROOT / 'cluster.yaml'}"


def test_from_zero_nodes_the_plan_fits_what_can_be_started(from_zero):
    config = fit.fit_to_cluster(load_config(None, [from_zero, LABELS, "cluster.num_workers=[1, 64]"]))
    assert (config.cluster.use_gpu, config.cluster.num_workers) == (True, [1, 32])


def test_more_than_the_pool_can_hold_is_refused_with_the_calculation(from_zero):
    with pytest.raises(InputError) as caught:
        fit.fit_to_cluster(load_config(None, [from_zero, LABELS, "cluster.num_workers=33"]))
    words = ("cluster.num_workers=33", "33 x (4 CPU, 1 GPU)", "4 x train (96 CPU, 8 GPU)", "at most 32")
    assert all(word in caught.value.faults[0] for word in words), caught.value.faults


def test_engines_that_never_fit_are_refused(from_zero):
    config = load_config(None, [from_zero, LABELS, "generation.tensor_parallel=8"])
    with pytest.raises(InputError, match=r"generation.engines=auto: 1 x \(1 CPU, 8 GPU\).*at most 0 engine"):
        fit.fit_engines(config, 1, {"CPU": 1.0, "GPU": 8.0})


def test_without_a_cluster_file_only_what_is_up_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert possible() is None
    (tmp_path / "ray_bootstrap_config.yaml").write_text((ROOT / "cluster.yaml").read_text())
    found = possible()
    assert found is not None and found.most_nodes == 13


@pytest.mark.parametrize("text", ["a: 1", "- 1", "", "{", "spec: {}"])
def test_a_file_that_does_not_describe_a_cluster_is_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=r"cluster\.node_types="):
        read_cluster_file(tmp_path / "x.yaml")


@pytest.mark.parametrize("label", ["!train", "in(a,b)", "", "a b"])
def test_a_label_is_a_plain_value(label):
    with pytest.raises(InputError, match=r"cluster\.labels\.train"):
        load_config(None, [f"cluster.labels.train.pool='{label}'"])


@pytest.mark.parametrize(
    "text",
    [
        "available_node_types: 5",
        "available_node_types: {a: 5}",
        "available_node_types: {a: {resources: 5}}",
        "available_node_types: {a: {max_workers: many}}",
        "spec: [1]",
        "spec: {workerGroupSpecs: 5}",
        "spec: {workerGroupSpecs: [5]}",
        "spec: {workerGroupSpecs: [{template: {spec: 7}}]}",
        "when: 2026-02-30",
        "a: " + "[" * 3000,
        "a: &a [*a",
    ],
)
def test_malformed_cluster_files_are_refused_by_their_key(tmp_path, text):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"cluster\.node_types={file}"):
        read_cluster_file(file)
