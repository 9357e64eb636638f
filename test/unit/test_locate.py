"""Base models by name: folders, files, and hub ids, against a hub that this test serves."""

import contextlib
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
import tiny
from transformers import T5EncoderModel

import train_sd3
from library.errors import UserError
from library.models import sd3
from library.models.locate import find_model, fingerprint

SHA = "0123456789" * 4
ROOT = Path(__file__).parents[2]


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download needs."""

    def __init__(self, files: dict[str, bytes], *args):
        self.files = files
        super().__init__(*args)

    def do_GET(self):
        if "/resolve/" in self.path:
            name = self.path.split(f"/resolve/{SHA}/")[1].split("?")[0]
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


@contextlib.contextmanager
def serving(names: list[str], **contents: bytes):
    """A repository of files with these names -> its hub's address. contents: other than a file's own name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, {name: name.encode() for name in names} | contents))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub():
    names = ["model_index.json", "README.md", "sd_xl_base_1.0.safetensors", "vae/config.json", "tokenizer/vocab.json",
             "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/config.json",
             "unet/diffusion_pytorch_model.bin", "unet/model.onnx_data", "vae/diffusion_pytorch_model.safetensors",
             "config.json", "diffusion_pytorch_model.safetensors"]
    with serving(names) as address:
        yield address


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
    _, files = fetched(hub, tmp_path, "find_model('someone/model', '--m', ('unet', 'vae', 'tokenizer'))")
    assert files == {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
                     "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"}


def test_a_variant_fetches_its_own_weights(hub, tmp_path):
    _, files = fetched(hub, tmp_path, "find_model('someone/model', '--m', ('unet',), None, 'fp16')")
    assert {file for file in files if file.endswith(".safetensors")} == {"unet/diffusion_pytorch_model.fp16.safetensors"}


# stabilityai/stable-diffusion-3-medium-diffusers: all networks in both, T5 in shards; 3.5's transformers and VAE in one
SD3 = [*(f"{part}/model{kind}.safetensors" for part in ("text_encoder", "text_encoder_2") for kind in ("", ".fp16")),
       *(f"text_encoder_3/model{kind}-0000{n}-of-00002.safetensors" for kind in ("", ".fp16") for n in (1, 2)),
       "text_encoder_3/model.safetensors.index.json", "text_encoder_3/model.safetensors.index.fp16.json",
       *(f"{part}/diffusion_pytorch_model{kind}.safetensors" for part in ("vae", "transformer") for kind in ("", ".fp16"))]
SD35 = [*SD3[:10], "vae/diffusion_pytorch_model.safetensors", "transformer/diffusion_pytorch_model.safetensors.index.json",
        *(f"transformer/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2))]


@pytest.mark.parametrize(("there", "variant"), [(SD3, None), (SD35, "fp16")], ids=["3", "3.5 fp16"])
def test_sd3_is_fetched_once_sharded_or_not(tmp_path, there, variant):
    """Each network in the variant if it comes in that, else in the usual weights, and never in both."""
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    with serving([*there, "model_index.json", "sd3_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors",
                  "text_encoder_3/pytorch_model.fp16.bin", "transformer/model.non_ema-00001-of-00002.safetensors"]) as hub:
        _, files = fetched(hub, tmp_path, f"find_model('someone/sd3', '--m', {parts!r}, None, {variant!r})")
    weights = {file for file in files if file.endswith((".safetensors", ".bin"))}
    of_it = {file for file in there if file.endswith(".safetensors") and (".fp16" in file) == bool(variant)}
    wanted = of_it | {file for file in there if file.endswith(".safetensors") and file.split("/")[0] not in {
        name.split("/")[0] for name in of_it}}
    assert weights == wanted
    assert ("text_encoder_3/model.safetensors.index.fp16.json" in files) is bool(variant)


def test_a_network_that_comes_in_no_such_variant_is_read_from_its_usual_weights(tmp_path, capsys):
    model = tiny.make_sd3(tmp_path / "model")
    t5 = T5EncoderModel.from_pretrained(model / "text_encoder_3")
    t5.shared.weight.data.fill_(0.25)
    t5.save_pretrained(model / "text_encoder_3", variant="fp16", max_shard_size="30KB")
    assert len(list((model / "text_encoder_3").glob("model.fp16-0000?-of-*.safetensors"))) > 1
    flags = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(tmp_path)]
    base = sd3.find_base(train_sd3.parse_args([*flags, "--variant", "fp16"]))
    said = "--variant fp16: no such weights in transformer, vae, text_encoder, text_encoder_2: the usual ones are read\n"
    assert capsys.readouterr().out == said
    assert (sd3.load_part(base, "text_encoder_3", None).shared.weight == 0.25).all()
    assert sd3.load_part(base, "text_encoder", None) and sd3.load_part(base, "transformer", None)
    usual = sd3.find_base(train_sd3.parse_args(flags))
    assert not (sd3.load_part(usual, "text_encoder_3", None).shared.weight == 0.25).any()
    with pytest.raises(UserError, match="--variant fp8: no network in .*model has weights of that name; leave the flag out"):
        sd3.find_base(train_sd3.parse_args([*flags, "--variant", "fp8"]))


def test_a_vae_of_its_own_is_fetched_from_the_root(hub, tmp_path):
    _, files = fetched(hub, tmp_path, "find_model('someone/vae', '--vae', (), None, None, "
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


@pytest.mark.parametrize(("kind", "parts", "model"), [
    ("StableDiffusionXLPipeline", ("transformer",), "SD 3 or 3.5"), ("FluxPipeline", ("transformer",), "SD 3 or 3.5"),
    ("StableDiffusion3Pipeline", ("unet",), "SDXL"), ("StableDiffusionPipeline", ("unet",), "SDXL"),
    ("StableDiffusionXLInpaintPipeline", ("unet",), None), ("StableDiffusion3Pipeline", ("transformer",), None),
    ("SomebodysXLPipeline", ("unet",), None), (["odd"], ("unet",), None), ("FluxPipeline", (), None)])
def test_another_model_is_named(tmp_path, kind, parts, model):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    for part in parts:
        (tmp_path / part).mkdir()
    if model is None:
        assert find_model(str(tmp_path), "--m", parts) == tmp_path
    else:
        with pytest.raises(UserError, match=f"--m: .* is a {kind}, and {model} is asked for here"):
            find_model(str(tmp_path), "--m", parts)


def test_another_model_is_not_fetched(tmp_path):
    index = {"model_index.json": b'{"_class_name": "FluxPipeline"}'}
    with serving(["transformer/diffusion_pytorch_model.safetensors"], **index) as hub:
        code = "from library.models.locate import *\ntry: find_model('a/flux', '--m', ('transformer',))\n" \
               "except UserError as error: print(error)"
        environment = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert "a/flux is a FluxPipeline, and SD 3 or 3.5 is asked for here" in run.stdout, run.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


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
