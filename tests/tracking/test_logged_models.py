"""Logged models and registered versions, read back by MLflow's own API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbpo_ray.cluster.session import free_port
from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import TrackingConfig
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.evaluation.prompts import resolve_policy
from tbpo_ray.tracking import logged_models
from tbpo_ray.tracking.mlflow_model import ModelDescription, license_text, prompt_template
from tbpo_ray.tracking.tracker import Tracker

PROMPTS = ["copy: red green blue", "reverse: {a} b"]
TOKENS = 12

READER = textwrap.dedent(
    """
    import json, sys
    sys.modules["tbpo_ray"] = None  # importing it raises ImportError
    import mlflow
    prompts, tokens = json.loads(sys.argv[1]), int(sys.argv[2])
    pipe = mlflow.transformers.load_model("models:/policy@champion")
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = [pipe(chat, do_sample=False, max_new_tokens=tokens) for chat in chats]
    served = mlflow.pyfunc.load_model("models:/policy@champion")
    info = mlflow.models.get_model_info("models:/policy@champion")
    print(json.dumps({
        "transformers": [answer[0]["generated_text"][-1]["content"] for answer in answers],
        "pyfunc": served.predict(prompts),
        "shorter": served.predict(prompts, params={"max_new_tokens": 2}),
        "example": served.predict(served.input_example),
        "inputs": info.signature.inputs.to_dict(),
    }))
    """
)


@pytest.fixture(scope="module")
def export(tmp_path_factory, small_model) -> Path:
    """A policy whose greedy answers are varied: weights that are far from their initialization."""
    folder = tmp_path_factory.mktemp("run") / "export"
    model = AutoModelForCausalLM.from_pretrained(small_model)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_model).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# policy\n")
    return folder


def greedy(folder: Path, prompt: str) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def start(store: Path, name: str = "run", uri: str | None = None) -> Tracker:
    return Tracker.start(TrackingConfig(uri=uri), store, name=name, kind="train")


def describe(name: str = "policy", **changes) -> ModelDescription:
    values: dict[str, Any] = {
        "params": {"objective.name": "tbpo_q"},
        "example": PROMPTS[0],
        "max_tokens": TOKENS,
    } | changes
    return ModelDescription(name, **values)


@pytest.fixture(scope="module")
def champion(tmp_path_factory, export) -> Path:
    """A local store with `models:/policy@champion`."""
    store = tmp_path_factory.mktemp("store")
    with start(store) as tracker:
        tracker.log_model(export, describe())
        assert tracker.register_model(export, "policy", "champion") == "1"
    return store


def read_champion(uri: str, folder: Path) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(PROMPTS), str(TOKENS)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_champion_answers_as_greedy_generation_in_a_process_without_this_package(
    champion, export, tmp_path
):
    found = read_champion(f"sqlite:///{champion}/mlflow.db", tmp_path)
    expected = [greedy(export, prompt) for prompt in PROMPTS]
    assert len(set(expected)) == 2 and min(map(len, expected)) > 10
    assert found["transformers"] == expected
    assert found["pyfunc"] == [text.strip() for text in expected]
    assert all(
        len(short) < len(text) and text.startswith(short)
        for short, text in zip(found["shorter"], found["pyfunc"], strict=True)
    )
    assert found["example"] == found["pyfunc"][:1]
    assert found["inputs"] == [{"type": "string", "required": True}]


def test_a_local_store_does_not_copy_weights(champion, export):
    weights = list((champion / "mlartifacts").rglob("*.safetensors"))
    assert [file.samefile(export / "model.safetensors") for file in weights] == [True]
    folder = weights[0].parent.parent
    assert (folder / "requirements.txt").read_text().splitlines()[0].startswith("mlflow==")
    assert "declares the license mit" in (folder / "LICENSE.txt").read_text()
    assert json.loads((folder / "input_example.json").read_text()) == [PROMPTS[0]]


def test_an_export_is_logged_once_and_linked_to_its_run(tmp_path, export):
    with start(tmp_path) as tracker:
        model = tracker.log_model(export, describe("a.b:c", step=7))
        assert tracker.log_model(export, describe()).model_id == model.model_id
        tracker.log_metrics({"eval/loss": 0.5}, step=7)
        tracker.flush()
        tracker.log_model_metrics(model, {"eval/loss": 0.5}, dataset=("eval", "d" * 64), step=7)
    client: Any = tracker._client
    found = client.get_logged_model(model.model_id)
    assert (found.name, found.source_run_id, found.model_type) == ("a-b-c", tracker.run_id, "policy")
    assert found.params == {"objective.name": "tbpo_q"} and str(found.status) == "READY"
    metric = found.metrics[0]
    assert (metric.key, metric.value, metric.step) == ("eval/loss", 0.5, 7)
    assert (metric.dataset_name, metric.dataset_digest) == ("eval", "d" * 36)
    assert len(client.get_metric_history(tracker.run_id, "eval/loss")) == 1
    outputs = client.get_run(tracker.run_id).outputs.model_outputs
    assert {(output.model_id, output.step) for output in outputs} == {(model.model_id, 7)}


def test_a_model_without_files_gets_them_when_it_is_promoted(tmp_path, export):
    with start(tmp_path) as tracker:
        model = tracker.log_model(export, describe(), with_files=False)
        assert logged_models.is_external(model)
        assert not list(tmp_path.rglob("*.safetensors"))
        assert tracker.register_model(export, "late", "champion") == "1"
        found = tracker.find_model(export)
    assert found is not None and found.model_id == model.model_id
    assert not logged_models.is_external(found)
    assert json.loads(found.tags["mlflow.modelVersions"]) == [{"name": "late", "version": "1"}]
    version = tracker._client.get_model_version_by_alias("late", "champion")
    assert version.source == model.artifact_location and list(tmp_path.rglob("*.safetensors"))


def test_a_replaced_export_leaves_the_registered_weights(tmp_path, export):
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    for file in export.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with start(tmp_path) as tracker:
        tracker.register_model(folder, "kept", "champion")
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"other weights")
    config = load_config(None, [f"run.output_dir={tmp_path}"])
    champion = Path(resolve_policy("a", "models:/kept@champion", config).model)
    assert (champion / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("form", ["alias", "version", "model", "run", "artifact"])
def test_an_evaluation_reads_models_by_their_address(champion, form):
    config = load_config(None, [f"run.output_dir={champion}"])
    client: Any = MlflowClient(f"sqlite:///{champion}/mlflow.db")
    version = client.get_model_version_by_alias("policy", "champion")
    (model,) = client.search_logged_models([client.get_experiment_by_name("tbpo").experiment_id])
    if form == "artifact":
        root = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://"))
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "own").exists():
            (root / "own").symlink_to(resolve_policy("a", "models:/policy/1", config).model)
    address = {
        "alias": "models:/policy@champion",
        "version": "models:/policy/1",
        "model": f"models:/{model.model_id}",
        "run": f"runs:/{version.run_id}",
        "artifact": f"runs:/{version.run_id}/own",
    }[form]
    policy = resolve_policy("a", address, config)
    assert policy.adapter is None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in Path(policy.model).iterdir()
    }


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("models:/policy@challenger", "aliases of policy: champion"),
        ("models:/nobody@champion", "registered models: policy"),
        ("models:/policy/7", "models:/NAME/VERSION"),
        ("models:/", "names no model; must be models:/NAME@ALIAS"),
        ("runs:/" + "0" * 32, "runs:/RUN_ID"),
        ("models:/m-" + "0" * 32, "models:/MODEL_ID"),
    ],
)
def test_an_address_without_a_model_is_one_sentence(champion, address, expected):
    config = load_config(None, [f"run.output_dir={champion}"])
    with pytest.raises(InputError) as caught:
        resolve_policy("a", address, config)
    assert len(caught.value.faults) == 1 and "\n" not in caught.value.faults[0]
    assert f"evaluation.policies.a={address}" in caught.value.faults[0]
    assert expected in caught.value.faults[0]


def test_a_refused_alias_leaves_nothing_registered(tmp_path, export):
    with start(tmp_path) as tracker:
        with pytest.raises(InputError, match="alias 'latest'"):
            tracker.register_model(export, "fresh", "latest")
        with pytest.raises(MlflowException, match="not found"):
            tracker._client.get_registered_model("fresh")
        tracker.register_model(export, "fresh", "champion")
        with pytest.raises(InputError, match="alias 'latest'"):
            tracker.register_model(export, "fresh", "latest")
        assert len(tracker._client.search_model_versions("name = 'fresh'")) == 1


def test_a_store_without_room_for_artifacts_keeps_no_half_of_a_model(tmp_path, export):
    store = tmp_path / "store"
    with start(store) as tracker:
        (store / "mlartifacts").mkdir(exist_ok=True)
        (store / "mlartifacts" / "models").write_text("a file where a folder must be")
        with pytest.raises(RunFailedError, match=r"tracking\.log_models=metadata") as caught:
            tracker.log_model(export, describe())
        assert "\n" not in str(caught.value)
        assert not tracker._client.search_logged_models([tracker.experiment_id])


def test_a_registered_name_with_a_slash_is_refused_with_the_configuration():
    with pytest.raises(InputError, match=r"compare\.promote\.model_name.*a/b"):
        load_config(None, ["compare.promote.model_name=a/b"])


def test_the_chat_template_becomes_a_prompt_template(export, tmp_path):
    assert prompt_template(export, {}) == "<s><|user|>{prompt}<|assistant|>"
    tokenizer = AutoTokenizer.from_pretrained(export)
    tokenizer.chat_template = "{{ '{x}' }}{{ messages[0]['content'] }}{{ mode }}"
    tokenizer.save_pretrained(tmp_path)
    assert prompt_template(tmp_path, {"mode": "!"}) == "{{x}}{prompt}!"
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    assert prompt_template(tmp_path, {}) is None
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    assert prompt_template(tmp_path / "plain", {}) is None


def test_the_license_is_that_of_the_folder(tmp_path):
    assert "declares no license" in license_text(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: llama3\nbase_model: a/b\n---\n")
    assert license_text(tmp_path) == "The model card declares the license llama3, that of a/b.\n"
    (tmp_path / "LICENSE").write_text("All of it.")
    assert license_text(tmp_path) == "All of it."


@pytest.mark.e2e
def test_the_champion_is_served(champion, export, tmp_path):
    port = free_port()
    command = [str(Path(sys.executable).with_name("mlflow")), "models", "serve"]
    command += ["-m", "models:/policy@champion", "--env-manager", "local", "-p", str(port), "-w", "1"]
    # MLflow starts uvicorn by its name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{champion}/mlflow.db", "PATH": path}
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/ping", server, log)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": PROMPTS}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.loads(response.read())
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
    assert answer == {"predictions": [greedy(export, prompt).strip() for prompt in PROMPTS]}


def wait_until_up(url: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("config.json", "no architecture"),
        ("model.safetensors", "no safetensors"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
    ],
)
def test_an_incomplete_export_is_one_sentence_and_leaves_nothing(tmp_path, export, file, words):
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    for name in {"config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json"} - {file}:
        (folder / name).symlink_to(export / name)
    if file == "config.json":
        (folder / file).write_text("{}")
    with start(tmp_path) as tracker:
        with pytest.raises(InputError, match=words):
            tracker.register_model(folder, "partial", "champion")
        assert not tracker._client.search_registered_models()
        assert not tracker._client.search_logged_models([tracker.experiment_id])
