"""--push_to_hub, --hub_model_id and --hub_token against a small hub on this machine."""

import base64
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from library.errors import UserError

TOKEN = "hf_the_secret_of_this_test"


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, and takes commits whose files come within the request ("regular")."""

    repositories: dict[str, dict[str, bytes]]
    tokens: list[str | None]
    refuse = False

    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(iter(self._chunk, b""))
        type(self).tokens.append(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            if self.refuse:
                return self._answer(403, {"error": "this token may not write"})
            name = f"me/{json.loads(body)['name']}"
            type(self).repositories[name] = {}
            return self._answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        kind, name = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", self.path).group(2, 1)
        if kind == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                type(self).repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/1", "commitOid": "1"})

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def _answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    kind = type("OneHub", (Hub,), {"repositories": {}, "tokens": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def typed(monkeypatch, train):
    """`typed(*flags)`: a run with these flags that also stand on the command line, where reports take it from."""

    def typed(*flags, **more):
        monkeypatch.setattr(sys, "argv", ["train_sdxl.py", *map(str, flags)])
        return train(*flags, plots=True, **more)

    return typed


def files_with(folder, text: str) -> list:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_the_finished_model_is_uploaded_and_nothing_else(hub, typed, capsys):
    """Its caches and logs lie in the folder, beside checkpoints and a model of an earlier step."""
    flags = ("--push_to_hub", "--hub_model_id", "own-cats", "--hub_token", TOKEN, "--report_to", "tensorboard", "--logging_dir",
             "events", "--use_ema", "--checkpointing_steps", 1, "--save_every_n_steps", 1, "--validation_prompt", "red cat",
             "--num_validation_images", 1, "--validation_num_inference_steps", 1)
    out = typed(*flags, without=["embedding_cache_dir"])
    assert list(hub.repositories) == ["me/own-cats"]
    uploaded = hub.repositories["me/own-cats"]
    here = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    assert {"checkpoint-1", "checkpoint-2", "cache", "events", "last-step00000001"} < {name.split("/")[0] for name in here}
    assert {name.split("/")[0] for name in uploaded} == {
        "model_index.json", "unet", "unet_raw", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
        "validation", "metrics.jsonl", "loss_curve.png", "report.html"}
    wanted = {name for name in here if name.split("/")[0] in {name.split("/")[0] for name in uploaded}}
    assert uploaded.keys() == wanted and all(uploaded[name] == here[name].read_bytes() for name in wanted)
    assert set(hub.tokens) == {f"Bearer {TOKEN}"} and "uploaded to me/own-cats" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--hub_token", TOKEN), (f"--hub_token={TOKEN}",), ("--huggingface_token", TOKEN)], ids=str)
def test_the_token_is_in_no_file(hub, typed, capfd, flags):
    out = typed("--push_to_hub", "--report_to", "tensorboard", *flags, "--learning_rate", 1.25e-5, "--max_train_steps", 1)
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    assert files_with(out, TOKEN) == []
    spoken = capfd.readouterr()
    assert TOKEN not in spoken.out + spoken.err
    report = (out / "report.html").read_text()
    assert "***" in report and "1.25e-05" in report    # the rest of the command is there
    manifest = (out / "checkpoint-1" / "manifest.json").read_text()
    assert "1.25e-05" in manifest and "hub_token" not in manifest


def test_without_a_name_the_folders_is_taken(hub, typed, tmp_path):
    typed("--push_to_hub", "--hub_token", TOKEN, "--output_dir", tmp_path / "my-dogs", "--max_train_steps", 1)
    assert list(hub.repositories) == ["me/my-dogs"] and "model_index.json" in hub.repositories["me/my-dogs"]


def test_without_push_to_hub_nobody_is_asked(hub, typed):
    typed("--hub_model_id", "own-cats", "--hub_token", TOKEN, "--max_train_steps", 1)
    assert not hub.repositories and not hub.tokens


def test_a_hub_that_refuses_leaves_the_model_here(hub, typed, tmp_path):
    hub.refuse = True
    with pytest.raises(UserError, match="--push_to_hub: .*403(.|\n)*The model is finished and lies in .*out") as refusal:
        typed("--push_to_hub", "--hub_token", TOKEN, "--max_train_steps", 1)
    assert TOKEN not in str(refusal.value) and (tmp_path / "out" / "model_index.json").exists()
