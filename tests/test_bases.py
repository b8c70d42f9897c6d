"""Base models: what their headers say, and a sentence for every way the Hub can refuse one."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lora_studio import bases
from lora_studio.errors import BaseModelError
from lora_studio.spec import Base
from tests import tiny

CODE = """
import sys
from lora_studio import bases
from lora_studio.errors import BaseModelError
from lora_studio.spec import Base
try:
    print(bases.fetch(Base(id=sys.argv[1])))
except BaseModelError as error:
    print(error.key, error)
"""


class Hub(BaseHTTPRequestHandler):
    """A Hub that refuses everything, each name in its own way."""

    def do_GET(self):
        name = next((name for name in REFUSALS if name in self.path), None)
        status, code = REFUSALS.get(name, (404, "RepoNotFound"))
        if self.headers.get("authorization") == "Bearer hf_wrong":
            status, code = 401, None
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        body = b"<html>proxy</html>" if name == "proxy" else b'{"error": "no"}'
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


REFUSALS = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "down": (503, None), "proxy": (502, None)}


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def unreachable(hub, tmp_path_factory):
    """What is said of Hubs that the client tries again and again, 23 s long: all are asked at the same time."""
    asked = {"someone/down": hub, "someone/proxy": hub, "someone/x": "http://127.0.0.1:9"}
    with ThreadPoolExecutor() as pool:
        return dict(zip(asked, pool.map(lambda id: fetched(asked[id], tmp_path_factory.mktemp("hf"), id), asked)))


def fetched(hub, tmp_path, id, token=None) -> str:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    found = subprocess.run([sys.executable, "-c", CODE, id], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(
    ("id", "token", "key", "words"),
    [
        ("someone/gated", None, "base.gated", "accept its terms"),
        ("someone/missing", None, "base.not_found", "hf auth login"),
        ("someone/anything", "hf_wrong", "base.bad_token", "refused your token"),
    ],
)
def test_every_refusal_of_the_hub_is_a_sentence_with_the_way_out(hub, tmp_path, id, token, key, words):
    said = fetched(hub, tmp_path, id, token)
    assert said.startswith(key + " ") and words in said and "hf_wrong" not in said, said


@pytest.mark.parametrize("id", ["someone/down", "someone/proxy", "someone/x"])
def test_a_hub_that_is_down_behind_a_proxy_or_not_there_is_a_sentence(unreachable, id):
    assert unreachable[id].startswith("base.offline ") and "cannot be reached" in unreachable[id]


def test_headers_tell_size_shapes_and_targets(base):
    info = bases.inspect(Base(id=str(base)))
    model = tiny.model()
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert info.targets("auto") == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert info.targets(["q_proj", "nope"]) == ["q_proj"] and info.layers == 2


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 4 + b"\0" * 100, (9).to_bytes(8, "little") + b"not json!", (2).to_bytes(8, "little") + b"[]"])
def test_a_broken_weight_file_is_named(tmp_path, content):
    folder = tiny.write_base(tmp_path / "base")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"model.safetensors"):
        bases.inspect(Base(id=str(folder)))


@pytest.mark.parametrize("id", ["nope", "a/b/c", "../x/y", "x y/z", "-bad/na--me"])
def test_what_is_no_base_is_said(id):
    with pytest.raises(BaseModelError, match="There is no base model"):
        bases.locate(Base(id=id))
