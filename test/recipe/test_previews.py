"""--validation_preview in all four scripts, with webhooks of both kinds on this machine: written, posted, and the secret kept."""

import base64
import contextlib
import io
import json
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

import train_lora_sd3
import train_lora_sdxl
import train_sd3
import train_sdxl
from library import config_files
from library.errors import UserError
from library.models.encoders import Prompt
from library.validation import images, previews, webhook

SCRIPTS = {"train_sdxl": train_sdxl, "train_lora_sdxl": train_lora_sdxl, "train_sd3": train_sd3, "train_lora_sd3": train_lora_sd3}
SECRET, TOKEN = "the-secret-of-this-address", "the-secret-of-this-header"
PROMPT = "A red CAT, at 5 o'clock"
SHOWN = ("--validation_prompt", PROMPT, "--validation_num_inference_steps", 4, "--num_validation_images", 2,
         "--validation_preview", "--validation_preview_steps", 2)
NAMES = ["00-a-red-cat-at-5-o-clock-64x64-0-2of4.png", "00-a-red-cat-at-5-o-clock-64x64-0-4of4.png"]


def make_tiny(folder: Path, channels: int) -> Path:
    torch.manual_seed(channels)
    AutoencoderTiny(latent_channels=channels, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                    num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model):
    """{family: (base, tiny autoencoder, cache)}."""
    folder = tmp_path_factory.mktemp("models")
    return {"sdxl": (tiny_model, make_tiny(folder / "taesdxl", 4), folder / "cache_sdxl"),
            "sd3": (tiny.make_sd3(folder / "sd3"), make_tiny(folder / "taesd3", 16), folder / "cache_sd3")}


@pytest.fixture
def run(models, tiny_images, tmp_path, one_process, monkeypatch):
    """`run(name, *flags)`: a whole run of a script, with the report's text but not its plots -> its folder."""
    def run(name, *flags, output="out") -> Path:
        one_process()
        script, (base, decoder, cache) = SCRIPTS[name], models["sd3" if "sd3" in name else "sdxl"]
        usual = {"pretrained_model_name_or_path": base, "train_data_dir": tiny_images, "output_dir": tmp_path / output,
                 "embedding_cache_dir": cache, "resolution": 64, "train_batch_size": 2, "max_train_steps": 2, "seed": 1,
                 "report_to": "none", "logging_steps": 1, "lr_warmup_steps": 0, "validation_preview_model": decoder}
        argv = [*(f"--{key}={value}" for key, value in usual.items()), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        monkeypatch.setattr(script.report, "_charts", lambda metrics: "")
        monkeypatch.setattr(script.report, "write_loss_curve", lambda folder: folder)
        webhook.say_once.cache_clear()    # what is said once is so in a process
        script.main(script.parse_args(argv))
        return tmp_path / output
    return run


class Receiver(BaseHTTPRequestHandler):
    """Keeps what is posted; answers by `answers`, a list of (status, headers), the last of which stays."""

    got: list
    answers: list

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append(SimpleNamespace(path=self.path, headers=self.headers, body=body))
        status, headers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if status is None:    # no answer
            time.sleep(headers)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    kind = type("OneReceiver", (Receiver,), {"got": [], "answers": [(204, {})]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{SECRET}"
    yield SimpleNamespace(got=kind.got, answers=kind.answers, url=url, server=server)
    server.shutdown()
    server.server_close()


@pytest.fixture
def hooks(tmp_path):
    """`hooks(*hooks)`: the file of these webhooks."""
    def write(*given) -> Path:
        (tmp_path / "webhooks.json").write_text(json.dumps(list(given) if len(given) > 1 else given[0]))
        return tmp_path / "webhooks.json"
    return write


def raw(url: str) -> dict:
    return {"webhook_type": "raw", "callback_url": url, "auth_token": TOKEN}


def files_with(folder: Path, *texts: str) -> list:
    return [path for path in folder.rglob("*") if path.is_file() and any(text.encode() in path.read_bytes() for text in texts)]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# whole runs

@pytest.mark.parametrize("name", SCRIPTS)
def test_previews_are_written_and_posted(run, receiver, hooks, capfd, name):
    """To both kinds of webhooks, in order; no file and no line of the log knows their secrets."""
    file = hooks(raw(receiver.url), {"webhook_type": "discord", "webhook_url": receiver.url, "message_prefix": "mine"})
    out = run(name, *SHOWN, "--webhook_config", file, "--report_to", "tensorboard", "--checkpointing_steps", 1)
    folder = out / "validation" / "step-000002"
    assert sorted(path.name for path in (folder / "previews").iterdir()) == NAMES
    first, last = (pixels(folder / "previews" / each) for each in NAMES)
    assert first.shape == (64, 64, 3) and (first != last).any() and first.std() > 1
    told = [json.loads(post.body) for post in receiver.got if post.headers["Content-Type"] == "application/json"]
    assert [event["data"]["step"] for event in told] == [2, 4] and len(receiver.got) == 4
    for event, file_name in zip(told, NAMES, strict=True):
        done = event["data"]["step"]
        title = f"Validation (step {done}/4): {NAMES[0].removesuffix('-2of4.png')}"
        assert (event["type"], event["severity"], event["job_id"]) == ("validation.image", "info", None)
        assert event["title"] == event["message"] == title and event["body"] == event["data"]["prompt"] == PROMPT
        assert event["data"]["resolution"] == [64, 64] and event["data"]["step_label"] == f"{done}/4"
        assert event["data"]["training_step"] == 2 and isinstance(event["data"]["timestep"], float)
        (image,) = event["images"]
        assert base64.b64decode(image) == (folder / "previews" / file_name).read_bytes()
    for post, event, file_name in zip(receiver.got[1::2], told, NAMES, strict=True):
        form = message_from_bytes(b"Content-Type: " + post.headers["Content-Type"].encode() + b"\n\n" + post.body)
        content, image = form.get_payload()
        assert content.get_payload(decode=True).decode() == f"`(mine)` {event['title']}"
        assert content.get_param("name", header="Content-Disposition") == "content" and image.get_filename() == file_name
        assert image.get_payload(decode=True) == (folder / "previews" / file_name).read_bytes()
    assert [post.headers["X-API-Key"] for post in receiver.got] == [TOKEN, None] * 2
    assert not files_with(out, SECRET, TOKEN) and (out / "report.html").exists()
    spoken = capfd.readouterr()
    assert SECRET not in spoken.out + spoken.err and TOKEN not in spoken.out + spoken.err
    assert json.loads((out / "checkpoint-2/manifest.json").read_text())["flags"]["webhook_config"] == str(file)


@pytest.mark.parametrize("name", ["train_sdxl", "train_lora_sd3"])
def test_previews_change_nothing_of_what_is_drawn_and_trained(run, name, capsys):
    with_them = run(name, *SHOWN, "--mixed_precision", "bf16")
    assert "--validation_preview writes files alone; with --webhook_config FILE it posts them, too" in capsys.readouterr().err
    without = run(name, *SHOWN[:6], "--mixed_precision", "bf16", output="without")
    ours, theirs = ({path.name: path.read_bytes() for path in out.glob("validation/*/*.png")} for out in (with_them, without))
    assert ours == theirs and len(ours) == 2 and not list(without.rglob("previews"))
    for file in with_them.rglob("*.safetensors"):
        one, other = load_file(file), load_file(without / file.relative_to(with_them))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_webhook_that_is_not_there_stops_nothing_and_is_told_once(run, receiver, hooks, capfd):
    receiver.server.shutdown()
    receiver.server.server_close()
    out = run("train_sdxl", *SHOWN, "--validation_steps", 1, "--webhook_config", hooks(raw(receiver.url)))
    assert [len(list((out / f"validation/step-00000{step}/previews").iterdir())) for step in (1, 2)] == [2, 2]
    spoken = capfd.readouterr()
    assert spoken.out.count("has not taken a preview: Connection refused.") == 1 and SECRET not in spoken.out + spoken.err


def test_without_prompts_there_is_nothing_to_preview(run, hooks, receiver, capsys):
    """And no tiny autoencoder is asked for."""
    file = hooks(raw(receiver.url))
    out = run("train_sdxl", "--validation_preview", "--validation_preview_model", "none/such", "--webhook_config", file)
    assert "--validation_preview has no effect without --validation_prompt" in capsys.readouterr().err
    run("train_sdxl", *SHOWN[:6], "--webhook_config", file, "--validation_preview_steps", 2, output="more")
    said = capsys.readouterr().err
    assert all(f"--{name} has no effect without --validation_preview\n" in said
               for name in ("webhook_config", "validation_preview_steps", "validation_preview_model"))
    assert not receiver.got and not list(out.rglob("previews"))
    train_sdxl.parse_args(["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--validation_prompt=x",
                           "--validation_preview", "--validation_preview_steps=26", f"--webhook_config={file}"])
    said = capsys.readouterr().err
    assert "--validation_preview has no effect as --validation_preview_steps 26 is more than the 25 steps" in said


@pytest.mark.parametrize(("place", "words"), [
    ("/no/such", "no file or folder /no/such"), ("one.safetensors", "one.safetensors is one file"),
    ("sd3", "16 channels.*have 4"),
    ("vae", "of diffusers' class AutoencoderKL, not AutoencoderTiny"), ("empty", "has no config.json"),
    ("short", "damaged or cut short"), ("other", "tensors that its config.json calls for")])
def test_a_tiny_autoencoder_that_is_none(run, models, tmp_path, place, words):
    """Is refused before anything is made."""
    decoder = models["sdxl"][1]
    (tmp_path / "one.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("short", "other"):
        shutil.copytree(decoder, tmp_path / name)
    weights = tmp_path / "short/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((decoder / "config.json").read_text()) | {"num_decoder_blocks": [2, 1, 1, 1]}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    places = {"sd3": models["sd3"][1], "vae": models["sdxl"][0] / "vae", "/no/such": place}
    with pytest.raises(UserError, match=words) as error:
        run("train_sdxl", *SHOWN, "--validation_preview_model", places.get(place, tmp_path / place))
    if place != "other":
        assert "--validation_preview_model: " in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_usual_tiny_autoencoders():
    needed = ["--pretrained_model_name_or_path=m", "--train_data_dir=d"]
    for name, script in SCRIPTS.items():
        args = script.parse_args(needed)
        assert args.validation_preview_model == ("madebyollin/taesd3" if "sd3" in name else "madebyollin/taesdxl")
        assert (args.validation_preview, args.validation_preview_steps, args.webhook_config) == (False, 1, None)


# what a preview is

def test_a_preview_is_what_the_tiny_autoencoder_makes_of_the_latents(models, tmp_path):
    """Of the first image of each prompt and size, at the steps that are due; in float32, whatever the images are drawn in."""
    base, place, _ = models["sdxl"]
    pipeline, decoder = StableDiffusionXLPipeline.from_pretrained(base), AutoencoderTiny.from_pretrained(place)
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(["a red cat", ""], device="cpu", do_classifier_free_guidance=False)
    prompt, negative = (Prompt(text, hidden[row:row + 1], pooled[row:row + 1]) for row, text in enumerate(("a red cat", "")))
    posted = []
    shown = previews.Previews(decoder, 3, tmp_path, 7, lambda *given: posted.append(given))
    images.draw(pipeline, [prompt], negative, [(64, 64), (96, 64)], count=2, steps=7, guidance=5.0, seed=3,
                autocast=lambda: torch.autocast("cpu", torch.bfloat16), device="cpu", preview=shown)
    names = [f"00-a-red-cat-{size}-0-{done}of7.png" for size in ("64x64", "96x64") for done in (3, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names == [name for *_, name in posted]
    for size, made in (((64, 64), names[:2]), ((96, 64), names[2:])):
        latents = {}

        def keep(pipe, index, timestep, tensors, latents=latents):
            latents[index + 1] = tensors["latents"]
            return {}

        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            pipeline(prompt_embeds=prompt.hidden, pooled_prompt_embeds=prompt.pooled, negative_prompt_embeds=negative.hidden,
                     negative_pooled_prompt_embeds=negative.pooled, width=size[0], height=size[1], num_inference_steps=7,
                     num_images_per_prompt=2, guidance_scale=5.0, callback_on_step_end=keep,
                     generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)])
        for done, name in zip((3, 6), made, strict=True):
            with torch.no_grad():
                wanted = (decoder.decode(latents[done][:1].float()).sample[0] / 2 + 0.5).clamp(0, 1) * 255
            assert np.abs(pixels(tmp_path / name) - wanted.permute(1, 2, 0).numpy()).max() <= 0.51


def test_a_preview_that_is_nan_is_told(tmp_path, capsys):
    webhook.say_once.cache_clear()
    posted = []
    shown = previews.Previews(None, 1, tmp_path, 7, lambda *given: posted.append(given))
    for done in (1, 2):
        shown.keep(None, "00-cat", "cat", done, 2, 1.0)
    assert capsys.readouterr().out.count("previews of 00-cat are NaN") == 1 and not posted and not list(tmp_path.iterdir())


# webhooks

def png() -> bytes:
    file = io.BytesIO()
    tiny.picture(8, 8, 1).save(file, "PNG")
    return file.getvalue()


def send(url: str, verify: bool = True, **more) -> str | None:
    hook = {"type": "raw", "url": url, "prefix": None, "token": None, "verify": verify, "told": True} | more
    return webhook.send(webhook.request_of(hook, {"message": "m"}, png(), "a.png", "project"), hook["verify"])


def test_the_prefix_is_the_projects_name_unless_it_is_given(receiver):
    for given, prefix in ((None, "project"), ("", ""), ("Käse", "Käse")):
        assert send(receiver.url, type="discord", prefix=given) is None
        assert f"\r\n\r\n`({prefix})` m\r\n--".encode() in receiver.got[-1].body


@pytest.mark.parametrize(("answers", "why", "posts"), [
    ([(200, {})], None, 1), ([(204, {})], None, 1), ([(500, {})], "the server answers 500", 1),
    ([(404, {})], "the server answers 404", 1), ([(429, {"Retry-After": "0.01"}), (200, {})], None, 2),
    ([(429, {"Retry-After": "0"})], "the server answers 429", 4), ([(302, {"Location": "/"})], "the server answers 302", 1),
    ([(308, {"Location": "/"})], "the server answers 308", 1), ([(None, 0.5)], "no answer in 0.1 seconds", 1),
    ([(None, 0)], "RemoteDisconnected", 1)], ids=str)
def test_what_a_server_answers(receiver, monkeypatch, answers, why, posts):
    monkeypatch.setattr(webhook, "TIMEOUT", 0.1 if why and "no answer" in why else 5)
    receiver.answers[:] = answers
    assert send(receiver.url) == why and len(receiver.got) == posts


@pytest.mark.parametrize("text, seconds", [("0.5", 0.5), ("-1", 1), ("3600", 5), (None, 1), ("Wed, 21 Oct", 1), ("nan", 1)])
def test_how_long_a_server_is_waited_for(text, seconds):
    assert webhook._seconds(text) == seconds


@pytest.mark.parametrize("url, why", [
    ("http://127.0.0.1:9/x", "Connection refused"), ("http://no-such-host.invalid/x", ""), ("https://127.0.0.1:9/x", "refused")])
def test_a_server_that_is_not_reached(url, why):
    told = send(url)
    assert told and why in told and "127.0.0.1" not in told and "no-such-host" not in told


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_certificates(receiver, tmp_path):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout",
                    tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
    url = receiver.url.replace("http:", "https:")
    assert send(url) == "SSLCertVerificationError" and not receiver.got
    assert send(url, verify=False) is None and len(receiver.got) == 1


def test_a_slow_webhook_holds_nothing_up(receiver, monkeypatch, capsys):
    """Posts go on in a thread; the end waits for them only so long, and one that fails is left alone until the next time."""
    webhook.say_once.cache_clear()
    hook = {"type": "raw", "url": receiver.url, "prefix": None, "token": None, "verify": True, "told": True}
    receiver.answers[:] = [(None, 0.6)]
    monkeypatch.setattr(webhook, "PATIENCE", 0.2)
    begin = time.monotonic()
    with webhook.posting([hook], "project", "FILE") as post:
        for _ in range(50):
            post({"message": "m"}, png(), "a.png")
        assert time.monotonic() - begin < 0.5
    assert time.monotonic() - begin < 1.5
    assert capsys.readouterr().out.count("the webhooks in FILE are slow") == 1
    time.sleep(0.7)
    seen = len(receiver.got)
    assert seen <= 2    # what was in flight
    monkeypatch.setattr(webhook, "PATIENCE", 30)
    receiver.answers[:] = [(500, {})]
    quiet = hook | {"told": False}
    for _ in range(2):    # validations
        with webhook.posting([hook, quiet], "project", "FILE") as post:
            for _ in range(3):
                post({"message": "m"}, png(), "a.png")
    assert len(receiver.got) == seen + 2
    assert capsys.readouterr().out.count("webhook 1 in FILE has not taken a preview: the server answers 500") == 1


def test_an_error_while_drawing_is_not_held_up(receiver, monkeypatch):
    hook = {"type": "raw", "url": receiver.url, "prefix": None, "token": None, "verify": True, "told": True}
    receiver.answers[:] = [(None, 0.5)]
    begin = time.monotonic()
    with contextlib.suppress(ZeroDivisionError), webhook.posting([hook], "project", "FILE") as post:
        post({"message": "m"}, png(), "a.png")
        post({"message": "m"}, png(), "a.png")
        raise ZeroDivisionError
    assert time.monotonic() - begin < 0.4


# the file

GOOD = {"webhook_type": "raw", "webhook_url": f"https://example.org/{SECRET}"}


def test_the_keys_of_a_webhook(hooks):
    (one,) = config_files.read_webhooks(hooks(GOOD))
    assert one == {"type": "raw", "url": GOOD["webhook_url"], "prefix": None, "token": None, "verify": True, "told": True}
    more = {"webhook_type": "discord", "callback_url": "http://h:8/x", "message_prefix": "p", "log_level": "error",
            "ssl_no_verify": True, "auth_token": "t"}
    assert config_files.read_webhooks(hooks(GOOD, more)) == [one, {
        "type": "discord", "url": "http://h:8/x", "prefix": "p", "token": "t", "verify": False, "told": False}]


@pytest.mark.parametrize("change, words", [
    ({"webhook_type": "slack"}, "webhook_type must be raw or discord"), ({"webhook_url": SECRET}, "begins with https:// or http://"),
    ({"webhook_url": f"ftp://x/{SECRET}"}, "begins with https"), ({"webhook_url": f"https:///{SECRET}"}, "begins with https"),
    ({"webhook_url": f"https://x:y/{SECRET}"}, "begins with https"), ({"webhook_url": f"https://x/{SECRET} "}, "begins"),
    ({"webhook_url": f"https://x/\n{SECRET}"}, "begins with https"), ({"webhook_url": 3}, "webhook_url must be text"),
    ({"webhook_url": None}, "begins with https"), ({"webhook_ulr": SECRET}, "no key webhook_ulr; did you mean webhook_url?"),
    ({"zzz": SECRET}, "no key zzz; there are webhook_type"), ({"ssl_no_verify": "yes"}, "ssl_no_verify must be true or false"),
    ({"log_level": "loud"}, "log_level must be one of critical, error"), ({"log_level": "error"}, "must be info or debug"),
    ({"auth_token": f"{SECRET}\n"}, "auth_token must be one line")], ids=str)
def test_mistakes_in_a_webhook(hooks, capsys, change, words):
    """In one sentence with the file's name, and without the address."""
    file = hooks(GOOD | change)
    with pytest.raises(SystemExit):
        train_sdxl.parse_args(["--pretrained_model_name_or_path=m", "--train_data_dir=d", f"--webhook_config={file}"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said and str(file) in said and SECRET not in said
    with pytest.raises(SystemExit):
        train_sdxl.parse_args(["--pretrained_model_name_or_path=m", "--train_data_dir=d",
                               f"--webhook_config={hooks(GOOD, GOOD | change | {'webhook_type': 3})}"])
    assert "webhooks.json, webhook 2" in capsys.readouterr().err


@pytest.mark.parametrize("given", [GOOD["webhook_url"], json.dumps(GOOD), json.dumps([GOOD])], ids=["url", "object", "list"])
def test_a_secret_in_the_command_is_refused_and_not_repeated(capsys, tmp_path, given):
    """Nor in a config file, whose values are copied into reports as flags are."""
    inline = tmp_path / "config.json"
    inline.write_text(json.dumps({"webhook_config": given if given.startswith("https") else json.loads(given)}))
    for flag in (f"--webhook_config={given}", f"--config_file={inline}"):
        with pytest.raises(SystemExit):
            train_sdxl.parse_args(["--pretrained_model_name_or_path=m", "--train_data_dir=d", flag])
        said = capsys.readouterr().err
        assert "--webhook_config takes the name of a .json file" in said and said.count("\n") == 1 and SECRET not in said


@pytest.mark.parametrize("text, words", [(None, "cannot read"), ("{", "not valid JSON"), ("3", "must be an object such as")])
def test_files_that_hold_no_webhook(tmp_path, text, words):
    if text:
        (tmp_path / "webhooks.json").write_text(text)
    (fault,) = config_files.faults_of_webhooks(str(tmp_path / "webhooks.json"), None)
    assert words in fault and fault.startswith("--webhook_config: ")


def test_a_webhook_is_not_uploaded(hooks, tmp_path):
    file = str(hooks(GOOD))
    assert config_files.faults_of_webhooks(file, None) == config_files.faults_of_webhooks(file, str(tmp_path / "out")) == []
    (fault,) = config_files.faults_of_webhooks(file, str(tmp_path))
    assert re.search("lies in --output_dir, which --push_to_hub uploads", fault)
