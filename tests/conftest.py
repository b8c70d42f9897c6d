"""What all tests share: a home of their own, no network, and tiny real models built from configs."""

import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import pytest

from tests import tiny


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A studio home of its own for every test."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LORA_STUDIO_HOME", str(folder))
    return folder


@pytest.fixture
def with_bench(home):
    """The bench that a test may start ends with it."""
    yield
    from lora_studio.jobs import bench

    bench.stop()


@pytest.fixture
def workspace(home):
    """The local workspace of the test's home."""
    from lora_studio.workspace import local

    return local()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny Llama with a tokenizer and a marked chat template."""
    return tiny.write_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory):
    """A JSONL file of 60 short conversations."""
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "chat.jsonl", count=60)


@pytest.fixture
def free_port():
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
