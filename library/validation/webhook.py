"""Previews posted to webhooks, as SimpleTuner posts them: raw (JSON) and discord (a form with a file).

An address is a secret: no message here holds one, and so none holds an exception's own words.
"""

import base64
import concurrent.futures
import contextlib
import functools
import json
import ssl
import time
import urllib.error
import urllib.request
import uuid

from tqdm import tqdm

TIMEOUT = 5      # seconds until an answer
PATIENCE = 30    # seconds that a validation waits at its end for what is not sent yet
_WAITS = 3       # how often a post that comes too soon is sent again


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A post that is sent elsewhere would arrive there as a question without its content."""

    def redirect_request(self, *_):
        return None


def request_of(hook: dict, event: dict, png: bytes, name: str, project: str) -> urllib.request.Request:
    """The request by which a webhook, one of `config_files.read_webhooks`, is told of an event with one image.

    name: of the image. project: stands before the message where the webhook has no prefix of its own.
    """
    headers = {"User-Agent": "stable-diffusion-trainer", **({"X-API-Key": hook["token"]} if hook["token"] else {})}
    if hook["type"] == "raw":
        body, kind = json.dumps({**event, "images": [base64.b64encode(png).decode()]}).encode(), "application/json"
    else:
        prefix, border = project if hook["prefix"] is None else hook["prefix"], uuid.uuid4().hex
        fields = [('name="content"', f"`({prefix})` {event['message']}".encode()),
                  (f'name="file0"; filename="{name}"\r\nContent-Type: image/png', png)]
        body = b"".join(b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (border.encode(), head.encode(), content)
                        for head, content in fields) + f"--{border}--\r\n".encode()
        kind = f"multipart/form-data; boundary={border}"
    return urllib.request.Request(hook["url"], body, {"Content-Type": kind, **headers}, method="POST")


def send(request: urllib.request.Request, verify: bool = True) -> str | None:
    """Post it; why it was not taken, in words without its address. verify: the server's certificate is to be good.

    A server that asks for patience (429) is heard, `_WAITS` times.
    """
    context = None if verify else ssl._create_unverified_context()
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=context))
    for attempt in range(_WAITS + 1):
        try:
            with opener.open(request, timeout=TIMEOUT):
                return None
        except urllib.error.HTTPError as error:
            if error.code != 429 or attempt == _WAITS:
                return f"the server answers {error.code}"
            with contextlib.closing(error):
                time.sleep(_seconds(error.headers.get("Retry-After")))
        except Exception as error:    # whatever happens on the way, training goes on
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                return f"no answer in {TIMEOUT} seconds"
            known = isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError)
            return (known and cause.strerror) or type(cause).__name__


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        seconds = -1
    return min(seconds, TIMEOUT) if seconds >= 0 else 1


@contextlib.contextmanager
def posting(hooks: list[dict], project: str, where: str):
    """Within: `post(event, png, name)`, which returns at once; a thread sends in order, and the end waits for it, not for ever.

    A webhook that fails is left out until the next validation, and that is said once. where: names the webhooks to the user.
    """
    failed = set()

    def deliver(event: dict, png: bytes, name: str) -> None:
        for number, hook in enumerate(hooks, 1):
            if not hook["told"] or number in failed:
                continue
            if why := send(request_of(hook, event, png, name, project), hook["verify"]):
                failed.add(number)
                say_once(f"webhook {number} in {where} has not taken a preview: {why}. Previews stay files, training goes on, "
                         "and the next validation tries again")

    pool, sent = concurrent.futures.ThreadPoolExecutor(1, "webhook"), []
    try:
        yield lambda *given: sent.append(pool.submit(deliver, *given))
        if concurrent.futures.wait(sent, timeout=PATIENCE).not_done:
            say_once(f"the webhooks in {where} are slow: {PATIENCE} seconds after a validation, previews are left that were not "
                     "sent. They stay files; a higher --validation_preview_steps makes fewer")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@functools.cache
def say_once(text: str) -> None:
    """One line for the user; the same one is not said again."""
    tqdm.write(text)
