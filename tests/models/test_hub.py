"""Publication on the hub, against a local server that speaks its HTTP interface."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tbpo_ray.config.loading import load_config
from tbpo_ray.config.schema import ExportConfig
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.models.hub import check_hub, hub_card, push_to_hub, read_token

TOKENS = {"hf_writer": "write", "hf_reader": "read"}


class Hub:
    """The part of the hub that an upload uses: who a token is, repositories, large files, commits."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.address = ""
        self.refused = False
        """Whether creating repositories is forbidden."""

    def role(self, headers: Any) -> str | None:
        return TOKENS.get(headers.get("authorization", "").removeprefix("Bearer "))

    def answer(self, method: str, path: str, body: bytes, role: str | None) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return (200, {"name": "ada", "auth": {"accessToken": {"role": role}}}) if role else (401, {})
        if method == "PUT" and path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if role != "write" or self.refused:
            return 403, {"error": "You don't have the rights"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, self.batch(json.loads(body))
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            return 200, self.commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        return 404, {"error": path}

    def create(self, request: dict) -> tuple[int, Any]:
        name = f"{request['organization']}/{request['name']}"
        if name in self.repositories:
            return 409, {"error": "exists", "url": f"{self.address}/{name}"}
        self.repositories[name], self.private[name] = {}, request.get("visibility") == "private"
        if "private" in request:
            self.private[name] = request["private"]
        return 200, {"url": f"{self.address}/{name}", "name": name}

    def batch(self, request: dict) -> dict:
        def actions(item: dict) -> dict:
            if item["oid"] in self.large:
                return {}
            return {"actions": {"upload": {"href": f"{self.address}/large/{item['oid']}"}}}

        objects = [{"oid": o["oid"], "size": o["size"]} | actions(o) for o in request["objects"]]
        return {"transfer": "basic", "objects": objects}

    def commit(self, repository: str, body: bytes) -> dict:
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.repositories[repository][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.repositories[repository][value["path"]] = self.large[value["oid"]]
        url = f"{self.address}/{repository}/commit/0123"
        return {"commitUrl": url, "commitOid": "0123", "success": True}


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    made = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def body(self) -> bytes:
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_any(self) -> None:
            path = self.path.partition("?")[0]
            status, answer = made.answer(self.command, path, self.body(), made.role(self.headers))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    made.address = f"http://127.0.0.1:{running.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield made
    running.shutdown()


@pytest.fixture
def export(tmp_path) -> Path:
    folder = tmp_path / "run" / "export"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "README.md").write_text("# local")
    return folder


def settings(tmp_path: Path, token: str, **changes: Any) -> ExportConfig:
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    return ExportConfig(push_to_hub="ada/policy", token_file=str(file), **changes)


def test_an_export_is_uploaded_in_one_commit(hub, export, tmp_path):
    where = settings(tmp_path, "hf_writer")
    check_hub(where)
    address = push_to_hub(where, export, "---\nlicense: mit\n---\n# policy\n")
    assert address == f"{hub.address}/ada/policy" and hub.private == {"ada/policy": True}
    assert hub.repositories["ada/policy"] == {
        "config.json": b'{"model_type": "llama"}',
        "adapter/adapter_config.json": b"{}",
        "model.safetensors": (export / "model.safetensors").read_bytes(),
        "README.md": b"---\nlicense: mit\n---\n# policy\n",
    }
    (export / "config.json").write_text("{}")
    push_to_hub(where, export, "# again")
    assert hub.repositories["ada/policy"]["config.json"] == b"{}" and len(hub.large) == 1


@pytest.mark.parametrize(
    ("token", "words"), [("hf_reader", "may only read"), ("hf_nobody", "does not accept the token")]
)
def test_a_token_without_rights_is_refused_before_training(hub, tmp_path, token, words):
    with pytest.raises(InputError, match=rf"export\.push_to_hub=ada/policy: .*{words}") as caught:
        check_hub(settings(tmp_path, token))
    (fault,) = caught.value.faults
    assert token not in fault and "\n" not in fault and not hub.repositories


def test_an_upload_that_is_refused_leaves_nothing(hub, export, tmp_path):
    where = settings(tmp_path, "hf_writer")
    check_hub(where)
    hub.refused = True
    with pytest.raises(RunFailedError, match=r"export\.push_to_hub=ada/policy: .*403") as caught:
        push_to_hub(where, export, "# card")
    assert "hf_writer" not in str(caught.value) and "\n" not in str(caught.value)
    assert not hub.repositories and (export / "model.safetensors").is_file()


def test_nothing_is_asked_without_a_repository(hub):
    check_hub(ExportConfig())


@pytest.mark.parametrize("content", [None, "", "two words"])
def test_a_token_file_that_is_none(tmp_path, content):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=r"export\.token_file=.*must"):
        read_token(ExportConfig(token_file=str(file)))


@pytest.mark.parametrize("name", ["policy", "a/b/c", "/b", "a/", "a b/c"])
def test_a_name_that_is_not_one_of_a_repository(name):
    with pytest.raises(InputError, match=r"export\.push_to_hub.*OWNER/NAME"):
        load_config(None, {"export.push_to_hub": name})


def test_the_card_states_data_results_command_and_license():
    card = hub_card(
        {"name": "mine", "base model": "meta/llama@v1", "objective": "tbpo_q"},
        license_name="llama3",
        result="| policy | win rate |\n|---|---|\n| tbpo_q | 60 % |",
        command="python jobs/train.py --config a.yaml",
        datasets=["hf:org/pairs:train", "pairs.jsonl"],
    )
    header = card.split("---\n")[1]
    assert "license: llama3" in header and "base_model: meta/llama\n" in header
    assert "datasets:\n- org/pairs\n" in header and "pairs.jsonl" not in header
    assert "| data | hf:org/pairs:train, pairs.jsonl |" in card
    assert "## Results\n\n| policy | win rate |" in card and "python jobs/train.py --config a.yaml" in card
    facts = {"name": "x", "base model": "./models/a"}
    local = hub_card(facts, license_name=None, result="", command="", datasets=[])
    assert "base_model" not in local and "that of the base model" in local
