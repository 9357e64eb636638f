"""Base models by name: folders, files, and hub ids, against a hub that this test serves."""

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from library.errors import UserError
from library.models.locate import find_model, fingerprint

SHA = "0123456789" * 4
ROOT = Path(__file__).parents[2]


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download needs."""

    def __init__(self, files: dict[str, bytes], asked: list[str], *args):
        self.files, self.asked = files, asked
        super().__init__(*args)

    def do_GET(self):
        if "/resolve/" in self.path:
            name = self.path.split(f"/resolve/{SHA}/")[1].split("?")[0]
            self.asked.append(name)
            return self.answer(self.files[name], name)
        siblings = [{"rfilename": name} for name in self.files]
        entries = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                   for name, data in self.files.items()]
        answer = entries if "/tree/" in self.path else {"id": "someone/model", "sha": SHA, "siblings": siblings}
        return self.answer(json.dumps(answer).encode(), None)

    do_HEAD = do_GET

    def answer(self, data: bytes, name: str | None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/octet-stream" if name else "application/json")
        if name:
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    names = ["model_index.json", "README.md", "sd_xl_base_1.0.safetensors", "vae/config.json", "tokenizer/vocab.json",
             "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json",
             "unet/diffusion_pytorch_model.bin", "unet/model.onnx_data", "vae/diffusion_pytorch_model.safetensors",
             "config.json", "diffusion_pytorch_model.safetensors"]
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, {name: name.encode() for name in names}, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def fetched(endpoint: str, home: Path, call: str) -> tuple[str, set[str]]:
    """Run `find_model` in a process that believes in our hub -> (what it printed, files it fetched)."""
    code = f"from library.models.locate import find_model\nprint({call})"
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    folder = Path(run.stdout.strip().splitlines()[-1])
    return str(folder), {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_hub_id_fetches_the_parts_in_one_kind_of_weights(hub, tmp_path):
    _, files = fetched(hub[0], tmp_path, "find_model('someone/model', '--m', ('unet', 'vae', 'tokenizer'))")
    assert files == {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
                     "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"}


def test_a_variant_fetches_its_own_weights(hub, tmp_path):
    _, files = fetched(hub[0], tmp_path, "find_model('someone/model', '--m', ('unet',), None, 'fp16')")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files


def test_a_vae_of_its_own_is_fetched_from_the_root(hub, tmp_path):
    _, files = fetched(hub[0], tmp_path, "find_model('someone/vae', '--vae', (), None, None, "
                                         "('config.json', 'diffusion_pytorch_model*', 'vae/*'))")
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= files
    assert "sd_xl_base_1.0.safetensors" not in files


def test_what_is_not_there_is_named_with_its_flag(tmp_path):
    with pytest.raises(UserError, match="--model_flag.*no file or folder /nowhere/at/all"):
        find_model("/nowhere/at/all", "--model_flag", ("unet",))
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="lacks vae, scheduler"):
        find_model(str(tmp_path), "--m", ("unet", "vae", "scheduler"))
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="neither .safetensors nor .ckpt"):
        find_model(str(tmp_path / "model.bin"), "--m", ("unet",))


def test_the_fingerprint_follows_content_alone(tmp_path):
    folder, memo = tmp_path / "vae", tmp_path / "memo.json"
    folder.mkdir()
    (folder / "weights").write_bytes(b"one")
    first = fingerprint([folder], memo)
    os.utime(folder / "weights")
    assert fingerprint([folder], memo) == first
    status = (folder / "weights").stat()
    (folder / "weights").write_bytes(b"two")
    os.utime(folder / "weights", ns=(status.st_atime_ns, status.st_mtime_ns))    # same size, same mtime
    assert fingerprint([folder], memo) != first
    (folder / "weights").write_bytes(b"one")
    memo.write_text("{damaged")
    assert fingerprint([folder], memo) == first
