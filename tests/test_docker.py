"""The Docker image without a Docker engine: its instructions are linted, and replayed in a fresh virtual environment that is then started."""

import fnmatch
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_studio import durable, runs
from lora_studio.workspace import Workspace

ROOT = Path(__file__).parent.parent
KNOWN = {"FROM", "RUN", "USER", "ENV", "WORKDIR", "ARG", "COPY", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "CMD"}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile: its word and the rest, in one line."""

    word: str
    rest: str

    @property
    def pairs(self) -> dict[str, str]:
        """The NAME=value pairs of an ENV or ARG."""
        return dict(pair.split("=", 1) for pair in shlex.split(self.rest))


def instructions(path: Path = ROOT / "Dockerfile") -> list[Instruction]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Instruction(*line.split(None, 1)) for line in whole.splitlines() if line.strip()]


def of(word: str) -> list[Instruction]:
    return [one for one in instructions() if one.word == word]


def place_of(word: str, text: str) -> int:
    """Where the instruction with that text stands; there is one."""
    (found,) = [number for number, one in enumerate(instructions()) if one.word == word and text in one.rest]
    return found


def environment() -> dict[str, str]:
    return {name: value for one in of("ENV") for name, value in one.pairs.items()}


# ---- the lint


def test_every_instruction_is_known():
    assert {one.word for one in instructions()} <= KNOWN


def test_the_base_is_named_with_its_version():
    (base,) = of("FROM")
    assert re.fullmatch(r"python:3\.12(\.\d+)?-slim(-\w+)?", base.rest)


def test_what_changes_rarely_comes_first():
    """A change of the code rebuilds what comes after it: nothing that is installed."""
    torch, listed, installed, code = (
        place_of("RUN", '"$TORCH"'),
        place_of("COPY", "requirements.txt"),
        place_of("RUN", "-r requirements.txt"),
        place_of("COPY", " . ./"),
    )
    assert torch < listed < installed < code
    assert not [one for one in instructions()[code + 1 :] if one.word in ("RUN", "COPY")]


def test_torch_is_the_one_that_was_proven():
    (pin,) = [one.pairs["TORCH"] for one in of("ARG") if "TORCH=" in one.rest and "INDEX" not in one.rest]
    assert pin in (ROOT / "requirements.txt").read_text().splitlines()


def test_everything_runs_as_user_1000_and_the_volume_is_its_own():
    made = place_of("RUN", "useradd")
    assert "--uid 1000 user" in instructions()[made].rest and made < place_of("USER", "user")
    (volume,) = of("VOLUME")
    assert f"mkdir {volume.rest} && chown user:user {volume.rest}" in instructions()[made].rest
    assert [one.rest for one in of("USER")] == ["user"] and all("--chown=user" in one.rest for one in of("COPY"))
    assert not [one for one in of("RUN")[1:] if "sudo" in one.rest or "chmod" in one.rest]


def test_what_lasts_is_in_the_volume_and_the_server_is_reached_from_outside():
    said, (volume,) = environment(), of("VOLUME")
    assert all(said[name].startswith(f"{volume.rest}/") for name in ("LORA_STUDIO_HOME", "HF_HOME"))
    assert said["GRADIO_SERVER_NAME"] == "0.0.0.0" and said["LORA_STUDIO_CONTAINER"] == "1"
    assert [one.rest for one in of("EXPOSE")] == [said["GRADIO_SERVER_PORT"]] == ["7860"]


def test_it_has_a_health_check_and_ends_by_the_signal_that_saves():
    (health,), (end,), (start,) = of("HEALTHCHECK"), of("STOPSIGNAL"), of("CMD")
    assert health_command()[0] == "python" and "/studio/health" in health.rest and "--start-period=" in health.rest
    # A shell in between would keep the signal to itself.
    assert end.rest == "SIGTERM" and json.loads(start.rest) == ["python", "app.py"]


def test_no_secret_is_in_it():
    names = [*environment(), *(name for one in of("ARG") for name in one.pairs)]
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", name)]
    assert not re.search(r"hf_[A-Za-z0-9]{10}|://[^/\s]+:[^/\s]+@", (ROOT / "Dockerfile").read_text())


def health_command() -> list[str]:
    return json.loads(of("HEALTHCHECK")[0].rest.partition(" CMD ")[2])


# ---- what COPY . takes


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a path out: the last pattern that fits it, or a folder above it, decides."""
    above = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 2)]
    out = False
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        anywhere, plain = plain.startswith("**/"), plain.removeprefix("**/")
        if any(fits(one, plain) or (anywhere and fits(one.rpartition("/")[2], plain)) for one in above):
            out = not pattern.startswith("!")
    return out


def fits(path: str, pattern: str) -> bool:
    return path.count("/") == pattern.count("/") and fnmatch.fnmatchcase(path, pattern)


def context(root: Path) -> list[str]:
    """The files of a folder that `COPY . ./` takes."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    return [name for path in sorted(root.rglob("*")) if path.is_file() and not ignored(name := path.relative_to(root).as_posix(), patterns)]


def test_nothing_private_goes_in(tmp_path):
    """Whatever lies about in a checkout."""
    private = [
        ".git/config", ".env", ".env.local", "token", "secrets.yaml", "key.pem", ".venv/bin/python", "home/runs/x/spec.yaml", "tests/tiny.py", "my-data/rows.jsonl", "adapter.safetensors",
        ".cache/huggingface/token", "notes.md", "lora_studio/__pycache__/x.pyc", "lora_studio/ui/__pycache__/y.cpython-312.pyc", ".ci/run", ".ssh/id_rsa", "shared/x", "requirements.txt.bak",
    ]  # fmt: skip
    wanted = [
        "app.py",
        "lora_studio/errors.py",
        "lora_studio/ui/__init__.py",
        "lora_studio/demo/text/model.safetensors",
        "presets/demo/x.yaml",
        "requirements.txt",
        "LICENSE",
    ]
    for name in private + wanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert context(tmp_path) == sorted(wanted)


def test_all_that_the_code_needs_goes_in():
    tracked = subprocess.run(
        ["git", "ls-files", "app.py", "lora_studio", "presets", "requirements.txt"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    found = set(context(ROOT))
    assert tracked and {name for name in tracked if (ROOT / name).is_file()} <= found
    assert {name.split("/")[0] for name in found} == {"app.py", "lora_studio", "presets", "requirements.txt", "LICENSE"}


# ---- the replay


@dataclass
class Image:
    """What the instructions made: the folder of the code, the environment, and the folder in the place of the volume."""

    app: Path
    environment: dict[str, str]
    data: Path
    steps: list[str]

    def command(self, words: list[str]) -> list[str]:
        return [str(Path(self.environment["VIRTUAL_ENV"]) / "bin" / words[0]), *words[1:]]

    def run(self, *words: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(list(words)),
            cwd=self.app,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **options,
        )


def replay(place: Path, port: int) -> Image:
    """Carry the Dockerfile out in a fresh virtual environment: /data and /home/user are folders here, packages come from this machine's index."""
    subprocess.run([sys.executable, "-m", "venv", place / "venv"], check=True)
    said = {
        "VIRTUAL_ENV": str(place / "venv"),
        "PATH": f"{place / 'venv' / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    said |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "LANG"))}
    image, given = Image(place, said, place / "data", []), {}

    def here(text: str) -> str:
        text = text.replace("/home/user", str(place / "user")).replace("7860", str(port))
        return re.sub(r"(^|=)/data(?=/|$)", rf"\g<1>{place / 'data'}", text)

    for one in instructions():
        if one.word == "ENV":
            said |= {name: here(value) for name, value in one.pairs.items() if name != "PATH"}
        elif one.word == "ARG":
            given |= one.pairs
        elif one.word == "WORKDIR":
            image.app = Path(here(one.rest))
            image.app.mkdir(parents=True)
        elif one.word == "COPY":
            source = next(word for word in one.rest.split() if not word.startswith("--"))
            for name in context(ROOT) if source == "." else [source]:
                (image.app / name).parent.mkdir(parents=True, exist_ok=True)
                (image.app / name).write_bytes((ROOT / name).read_bytes())
        elif one.word == "RUN" and one.rest.startswith("pip install"):
            words = [given[word.removeprefix("$")] if word.startswith("$") else word for word in shlex.split(one.rest) if word != "--user"]
            if "--index-url" in words:  # CUDA's builds are not wanted here
                del words[words.index("--index-url") : words.index("--index-url") + 2]
            done = subprocess.run(
                image.command(["python", "-m", *words]), cwd=image.app, env=said, capture_output=True, text=True, timeout=3000, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
            image.steps.append(" ".join(words))
        elif one.word == "RUN":
            assert one.rest.startswith("useradd")
            image.data.mkdir()
            (place / "user").mkdir()
    return image


def started(image: Image, log: Path) -> subprocess.Popen:
    """The image's own command, running, once its own health check is content."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            image.command(json.loads(of("CMD")[0].rest)), cwd=image.app, env=image.environment, stdout=file, stderr=file
        )
    port, until = image.environment["GRADIO_SERVER_PORT"], time.monotonic() + 180
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        if image.run(*(word.replace("7860", port) for word in health_command())).returncode == 0:
            return process
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_the_image_is_built_starts_and_stops_with_its_runs_saved(tmp_path, free_port):
    image, log = replay(tmp_path, free_port), tmp_path / "log.txt"
    assert len(image.steps) == 2 and "torch==" in image.steps[0] and "requirements.txt" in image.steps[1]
    health = [word.replace("7860", str(free_port)) for word in health_command()]
    assert image.run(*health).returncode != 0, "it is said to be well before it was started"
    process = started(image, log)
    made = image.run(
        "python", "-m", "lora_studio", "train", "--preset", "demo/pirate", "--schedule.steps", "4000", "--compute.device", "cpu", "--detach"
    )
    assert made.returncode == 0, made.stdout + made.stderr
    place = Workspace(image.data / "studio")
    (folder,) = place.run_folders()
    until = time.monotonic() + 120
    while runs.status(folder).step < 3 and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    stopped = runs.status(folder)
    assert stopped.state == "stopped" and 3 <= stopped.step < 4000, (stopped, log.read_text())
    assert "1 run was saved." in log.read_text()
    saved = folder / "checkpoints" / f"step-{stopped.step:06d}"
    assert durable.damage(saved) is None
    process = started(image, log)
    try:
        assert image.run("python", "-m", "lora_studio", "resume", folder.name, "--detach").returncode == 0
        until = time.monotonic() + 120
        while runs.status(folder).step <= stopped.step and time.monotonic() < until:
            time.sleep(0.1)
        (resumed,) = [event for event in runs.read_all(folder) if event["kind"] == "resumed"]
        assert resumed["step"] == stopped.step
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    everything = list(tmp_path.iterdir())
    assert {path.name for path in everything} <= {"venv", "user", "data", "log.txt", "home"}, everything
