"""A server of its own for each file of tests, and Chromium; no page may ask anything of the outside."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.browser import made
from tests.hub.server import Hub

# Widths and colour schemes in which pages are looked at: each of both in the suite, every pair among the slow tests.
LAYOUTS = [(1280, "light"), (390, "dark"), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1280, "dark"), (390, "light")))]

TOKEN = "hf_" + "c4N4" * 8
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
ROOT = Path(__file__).parent.parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


# Twenty frames in a row in which no script was loaded.
AT_REST = """async () => {
  const scripts = () => performance.getEntriesByType("resource").filter(one => one.name.includes("/assets/")).length;
  for (let before = scripts(), frames = 0; frames < 20; frames++) {
    await new Promise(requestAnimationFrame);
    if (scripts() !== before) [before, frames] = [scripts(), 0];
  }
}"""


def unfold(label) -> None:
    """Open a part of a page by its label, and wait until it is drawn. Gradio 6.31 loads the components of such a part when it is opened, and
    gives them their first values once more a frame later (`render_previously_invisible_children`): whatever is typed before that is lost."""
    label.click()
    label.page.evaluate(AT_REST)


def comes_to_rest(page, *, seconds: float = 3.0, within: float = 60.0) -> None:
    """Wait until the page has asked its server nothing for some seconds. It has to come to rest by itself."""
    asked = []

    def note(request) -> None:
        if request.method == "POST" and ("/queue/join" in request.url or "/run/predict" in request.url):
            asked.append(json.loads(request.post_data)["fn_index"])

    page.on("request", note)
    before, until = -1, time.monotonic() + within
    while len(asked) > before:
        assert time.monotonic() < until, f"The page goes on asking: {len(asked)} times, the last of event {asked[-12:]}."
        before = len(asked)
        page.wait_for_timeout(seconds * 1000)
    page.remove_listener("request", note)


class Server:
    """`python app.py` with a home and a port of its own, started and killed as a person or an accident would."""

    def __init__(self, home: Path, **environment: str):
        self.environment = environment
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.home, self.url, self.process = home, f"http://127.0.0.1:{self.port}", None

    def start(self) -> float:
        """Start it; seconds until it answered."""
        environment = {**os.environ, "LORA_STUDIO_HOME": str(self.home), "GRADIO_SERVER_PORT": str(self.port), "GRADIO_TEMP_DIR": str(self.home.parent / "gradio"), "HF_HUB_OFFLINE": "1", **self.environment}
        self.log = open(self.home.parent / "server.log", "ab")
        began = time.monotonic()
        self.process = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=environment, stdout=self.log, stderr=self.log, cwd=self.home.parent)
        while time.monotonic() - began < 90:
            assert self.process.poll() is None, (self.home.parent / "server.log").read_text()
            try:
                urllib.request.urlopen(self.url + "/studio/health", timeout=1)
                return time.monotonic() - began
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not answer within 90 s")

    def kill(self) -> None:
        """SIGKILL, as an accident would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def end(self) -> None:
        """End it as Ctrl-C would, and the bench it may have started."""
        self.process.terminate()
        self.process.wait(20)
        with made.at(self.home) as bench:
            bench.stop()

    def memory(self) -> int:
        """Its resident size in bytes."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss

    def has_torch(self) -> bool:
        """Whether it has loaded torch's library."""
        return "libtorch" in Path(f"/proc/{self.process.pid}/maps").read_text()


@pytest.fixture(scope="session")
def chromium():
    if CHROMIUM is None:
        sentence = "There is no Chromium on this machine, so the browser tests do not run (Debian: apt-get install chromium)."
        if os.environ.get("LORA_STUDIO_REQUIRE_BROWSER") == "1":
            pytest.fail(sentence)
        pytest.skip(sentence)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=30_000)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(chromium, tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("served") / "home")
    found.started_in = found.start()
    yield found
    found.end()


@pytest.fixture(scope="module")
def hub():
    """A small Hub on loopback with two people."""
    found = Hub()
    found.account("me", token=TOKEN)
    found.account("other", token="hf_" + "Z9y8" * 8)
    yield found
    found.close()


def hub_environment(hub, home: Path) -> dict[str, str]:
    """What makes the real client speak to that Hub, without a login of its own."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home.parent / "hf"), "HF_TOKEN": ""}


@pytest.fixture
def open_page(chromium, server):
    """A function that opens a page; what it asked of others and its script errors fail the test."""
    with pages(chromium) as opened:
        yield lambda path="/", **options: opened(server, path, **options)


@contextlib.contextmanager
def pages(chromium):
    """A function that opens a page of a server; what any asked of others and their script errors fail the test."""
    contexts, errors, external = [], [], []

    def opened(server, path="/", **options):
        context = chromium.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: external.append(request.url) if not request.url.startswith((server.url, "data:", "blob:")) else None)
        page.goto(server.url + path)
        page.get_by_role("tab", name="Train").wait_for()
        return page

    try:
        yield opened
    finally:
        for context in contexts:
            context.close()
    assert not errors, errors
    assert not external, external
