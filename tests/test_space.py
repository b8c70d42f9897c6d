"""The folder of a Space: whole for every kind of hardware, with the front matter the Hub wants, and it starts and answers as it lies there."""

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lora_studio import cli, space
from lora_studio.errors import HostError, HubError
from lora_studio.ui import publish
from tests.hosted.issuer import Issuer
from tests.hub.server import Hub

ROOT = Path(__file__).parent.parent
VARIANTS = sorted(space.HARDWARE)
TOKEN = "hf_" + "s4P4" * 8


@pytest.mark.parametrize("hardware", VARIANTS)
def test_the_folder_is_whole(tmp_path, hardware):
    """Every file of the code is in it, and nothing that is no code."""
    answer = CliRunner().invoke(cli.app, ["space", str(tmp_path / "out"), "--hardware", hardware])
    assert answer.exit_code == 0, answer.output
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    left = {"__pycache__", ".ruff_cache"}
    for top in ("lora_studio", "presets"):
        wanted = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / top).rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".pyi") and not left & set(path.parts)
        }
        assert {name for name in found if name.startswith(f"{top}/")} == wanted
    others = {"app.py", "requirements.txt", "README.md", "LICENSE", "pyproject.toml"} | (
        {"Dockerfile", ".dockerignore"} if hardware == "docker" else set()
    )
    assert {name for name in found if "/" not in name} == others
    assert (tmp_path / "out" / "app.py").read_bytes() == (ROOT / "app.py").read_bytes()


@pytest.mark.parametrize("hardware", VARIANTS)
def test_the_front_matter_is_what_the_hub_wants(hardware):
    """https://huggingface.co/docs/hub/spaces-config-reference"""
    _, top, text = space.readme(hardware).split("---\n", 2)
    said = yaml.safe_load(top)
    assert said == space.front_matter(hardware, open_to="owner", title="LoRA Studio")
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert said["sdk"] in ("gradio", "docker") and {said["colorFrom"], said["colorTo"]} <= colors and len(said["short_description"]) <= 60
    assert said["hf_oauth"] is True and said["hf_oauth_expiration_minutes"] <= 43200
    assert set(said["hf_oauth_scopes"]) <= {
        "email",
        "read-repos",
        "gated-repos",
        "contribute-repos",
        "write-repos",
        "manage-repos",
        "inference-api",
        "jobs",
        "write-discussions",
        "read-collections",
        "write-collections",
    }
    assert "write-repos" not in said["hf_oauth_scopes"] and "manage-repos" not in said["hf_oauth_scopes"], (
        "only what is made here may be touched"
    )
    if said["sdk"] == "docker":
        assert (
            said["app_port"] == int(re.search(r"^EXPOSE (\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1])
            and "app_file" not in said
        )
    else:
        assert re.fullmatch(r"3\.\d+", said["python_version"]) and isinstance(said["python_version"], str)
        assert f"gradio[oauth]=={said['sdk_version']}" in space.requirements(hardware).splitlines() and said["app_file"] == "app.py"
    assert text.startswith("# LoRA Studio")


def test_a_space_asks_for_a_scope_for_everything_that_its_pages_offer():
    """Otherwise each who wants it would have to paste a token of their own."""
    for what, scopes in publish.NEEDED:
        assert set(scopes) & set(space.SCOPES), what


def test_our_own_readme_begins_with_the_front_matter_of_a_space():
    assert yaml.safe_load((ROOT / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1]) == space.front_matter(
        "cpu", open_to="owner", title="LoRA Studio"
    )


@pytest.mark.parametrize("hardware", VARIANTS)
def test_everything_is_pinned_and_torch_is_that_of_the_hardware(hardware):
    lines = [line for line in space.requirements(hardware).splitlines() if not line.startswith("--")]
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.+]+", line) for line in lines), lines
    assert [line for line in lines if line.startswith("torch==")] == [space.HARDWARE[hardware].torch]
    own = {line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith(("#", "torch=="))}
    assert own <= set(lines)
    assert ("spaces==" in space.requirements(hardware)) == (hardware == "zerogpu")


def test_a_space_in_docker_works_on_its_own_disk():
    """The image's home is the volume; on a Space that place is a bucket, or nothing at all."""
    text = space.dockerfile()
    assert "LORA_STUDIO_HOME=/home/user/studio" in text and "HF_HOME=/home/user/huggingface" in text and "=/data" not in text


def test_what_is_there_is_never_written_over(tmp_path):
    with pytest.raises(HostError, match="there already"):
        space.write(tmp_path)
    for said in ({"hardware": "tpu"}, {"open_to": "everybody"}):
        with pytest.raises(HostError, match="tpu|everybody"):
            space.write(tmp_path / "out", **said)
    assert not list(tmp_path.iterdir())


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def issuer():
    found = Issuer()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("hardware", "open_to"),
    [
        ("cpu", "owner"),
        pytest.param("gpu", "visitors", marks=pytest.mark.slow),
        ("zerogpu", "visitors"),
        pytest.param("docker", "owner", marks=pytest.mark.slow),
    ],
)
def test_the_folder_starts_and_answers(tmp_path, issuer, free_port, hardware, open_to):
    """As a Space starts it: the file, its environment, and nothing of this checkout. (With SYSTEM=spaces Gradio wants the `spaces` package, which
    a Space has, for its own reloading.)"""
    out = tmp_path / "out"
    space.write(out, hardware=hardware, open_to=open_to)
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "LORA_STUDIO_HOME": str(tmp_path / "home"), "LORA_STUDIO_OPEN": open_to}
    environment |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(free_port), **issuer.environment(f"127.0.0.1:{free_port}")}
    log = tmp_path / "log.txt"
    assert (
        str(out)
        in subprocess.run(
            [sys.executable, "-c", "import lora_studio; print(lora_studio.__file__)"],
            cwd=out,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    with open(log, "wb") as file:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=out, env=environment, stdout=file, stderr=file)
    try:
        until, told = time.monotonic() + 120, (0, "")
        while told[0] != 200 and time.monotonic() < until:
            assert process.poll() is None, log.read_text()
            try:
                told = get(f"http://127.0.0.1:{free_port}/studio/health")
            except OSError:
                time.sleep(0.1)
        assert told == (200, '{"state":"ok"}'), log.read_text()
        status, page = get(f"http://127.0.0.1:{free_port}/")
        assert status in (200, 401) and "Sign in with Hugging Face" in page and "gradio" not in page.lower()
        assert get(f"http://127.0.0.1:{free_port}/config")[0] == 401
    finally:
        process.terminate()
        process.wait(40)
    assert "Traceback" not in log.read_text() and process.returncode == 0, log.read_text()


@pytest.fixture
def hub(monkeypatch):
    """A small Hub on loopback, in place of the client's."""
    from huggingface_hub import constants

    found = Hub()
    found.account("me", token=TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield found
    found.close()


def test_a_space_is_pushed_whole_and_pushed_again(tmp_path, hub):
    """The real client pushes what was written; the Space is made private, of the right kind, and open to whom it was said."""
    space.write(tmp_path / "out", hardware="zerogpu", open_to="visitors")
    local = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    address = space.deploy(tmp_path / "out", "me/studio", hardware="zerogpu", open_to="visitors", token=TOKEN)
    assert address.endswith("/spaces/me/studio") and hub.files("me/studio") == local
    made = hub.repos["me/studio"].made
    assert (made["type"], made["sdk"], hub.repos["me/studio"].private) == ("space", "gradio", True)
    assert {one["key"]: one["value"] for one in made["variables"]} == {"LORA_STUDIO_OPEN": "visitors"}
    (tmp_path / "out" / "app.py").write_text("# new")
    space.deploy(tmp_path / "out", "me/studio", hardware="zerogpu", open_to="visitors", token=TOKEN)
    assert hub.files("me/studio") == {**local, "app.py": b"# new"}


def test_a_space_of_somebody_else_is_refused_before_anything_is_sent(tmp_path, hub):
    (tmp_path / "out").mkdir()
    with pytest.raises(HubError):
        space.deploy(tmp_path / "out", "other/studio", hardware="cpu", open_to="owner", token=TOKEN)
    assert not hub.repos and {one.route for one in hub.seen} == {"whoami"}


@pytest.mark.slow
@pytest.mark.parametrize("hardware", VARIANTS)
def test_its_requirements_resolve(tmp_path, hardware):
    """For the Python of a Space. The pinned build comes from whatever index this machine has; that of the CPU may be out of reach."""
    lines = [line for line in space.requirements(hardware).splitlines() if not line.startswith("--extra-index-url")]
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--python-version",
        space.PYTHON,
        "--only-binary",
        ":all:",
    ]
    done = subprocess.run(
        [*command, "--target", str(tmp_path / "t"), "--report", str(tmp_path / "report.json"), "-r", str(tmp_path / "requirements.txt")],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    chosen = {
        one["metadata"]["name"].lower(): one["metadata"]["version"]
        for one in yaml.safe_load((tmp_path / "report.json").read_text())["install"]
    }
    assert chosen["torch"].partition("+")[0] == space.HARDWARE[hardware].torch.partition("==")[2] and chosen["gradio"] == space.GRADIO
