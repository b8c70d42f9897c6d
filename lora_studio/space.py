"""The verbs of hosting: the folder of a Space for a kind of hardware, and pushing it to the Hub."""

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_studio import durable, hub
from lora_studio.errors import HostError
from lora_studio.home import PACKAGE

# What people who sign in allow: making repositories and touching those made here, reading gated bases, and what Publish offers beside
# that: pull requests and collections. (https://huggingface.co/docs/hub/spaces-oauth#scopes)
SCOPES = ["contribute-repos", "gated-repos", "jobs", "write-discussions", "write-collections"]
PYTHON, GRADIO = "3.12", "6.31.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CODE = ("app.py", "lora_studio", "presets", "requirements.txt", "LICENSE", "pyproject.toml")


@dataclass(frozen=True)
class Hardware:
    """A kind of Space: its sdk, what the Hub suggests to run it on, the torch it takes, and lines to put before the requirements."""

    sdk: str
    suggested: str
    torch: str = "torch==2.13.0"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


HARDWARE = {
    "cpu": Hardware("gradio", "cpu-basic", before=(f"--extra-index-url {CPU_INDEX}",)),
    "gpu": Hardware("gradio", "t4-small"),
    # ZeroGPU has its own torch, and lends a GPU to functions that `spaces` marks.
    "zerogpu": Hardware("gradio", "zero-a10g", torch="torch==2.11.0", after=("spaces==0.51.3",)),
    "docker": Hardware("docker", "t4-small"),
}
ABOUT = """# {title}

A studio to train, blend and publish LoRA adapters, for language and image models.

{open}

Settings of this Space (Settings → Variables and secrets): `LORA_STUDIO_OPEN` (owner or visitors), `LORA_STUDIO_OWNERS`, `LORA_STUDIO_BASES`
(which bases visitors may use, with commas between them), `LORA_STUDIO_DISK_GB`, `LORA_STUDIO_UPLOAD_GB`, `LORA_STUDIO_RUNS`,
`LORA_STUDIO_STEPS`, `LORA_STUDIO_ADAPTERS` (of one run), `LORA_STUDIO_HOURS`, `LORA_STUDIO_CACHE_GB` (how much of the models that were fetched is kept). {lasts}
"""
OPEN = {
    "owner": "It belongs to whoever this Space belongs to: the owner signs in, others may duplicate it.",
    "visitors": "Everybody who signs in has a workspace of their own: rows, runs, adapters, and a place in the queue.",
}
LASTS = "Attach a storage bucket at `/data` and set `LORA_STUDIO_STORAGE=/data`, and what was made outlives a restart. Without it, whoever signs in may keep their work in a private repository of theirs: **Keep my work** on the page."


def write(target: Path, *, hardware: str = "cpu", open_to: str = "owner", title: str = "LoRA Studio") -> list[str]:
    """Write everything a Space needs into a new folder, whole or not at all: the code, requirements that fit its hardware, and README.md with
    the front matter. Returns the names of its files. Raises HostError."""
    kind, target = _kind(hardware, open_to), Path(target).expanduser()
    if target.exists():
        raise HostError("host.target", path=target)
    root = PACKAGE.parent
    missing = [name for name in (*CODE, "Dockerfile", ".dockerignore") if not (root / name).exists()]
    if missing:
        raise HostError("host.no_code", path=root, missing=", ".join(missing))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=durable.TEMPORARY) as place:
        stage = Path(place) / "space"
        stage.mkdir()
        for name in CODE:
            if (root / name).is_dir():
                shutil.copytree(root / name, stage / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.pyi"))
            else:
                shutil.copy2(root / name, stage / name)
        (stage / "requirements.txt").write_text(requirements(hardware), encoding="utf-8")
        (stage / "README.md").write_text(readme(hardware, open_to=open_to, title=title), encoding="utf-8")
        if kind.sdk == "docker":
            shutil.copy2(root / ".dockerignore", stage / ".dockerignore")
            (stage / "Dockerfile").write_text(dockerfile(), encoding="utf-8")
        stage.rename(target)
    return sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())


def _kind(hardware: str, open_to: str) -> Hardware:
    if hardware not in HARDWARE:
        raise HostError("host.hardware", hardware=hardware[:40], known=", ".join(HARDWARE))
    if open_to not in OPEN:
        raise HostError("host.kind", kind=open_to[:40], known=", ".join(OPEN))
    return HARDWARE[hardware]


def requirements(hardware: str) -> str:
    """requirements.txt for that hardware: what was proven together, with the torch that runs there. A Docker image takes torch by itself."""
    kind = HARDWARE[hardware]
    lines = (PACKAGE.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [kind.torch if re.match(r"torch==", line) else line for line in lines if not line.startswith("#")]
    return "\n".join([*kind.before, *lines, *kind.after]) + "\n"


def dockerfile() -> str:
    """The Dockerfile of a Space. There /data is no volume of the machine's but a bucket, if anything, so work is done in the image's own home."""
    return (PACKAGE.parent / "Dockerfile").read_text(encoding="utf-8").replace("=/data/", "=/home/user/")


def front_matter(hardware: str, *, open_to: str, title: str) -> dict:
    """What README.md tells the Hub of a Space."""
    kind = HARDWARE[hardware]
    how = (
        {"sdk": "docker", "app_port": 7860}
        if kind.sdk == "docker"
        else {"sdk": "gradio", "sdk_version": GRADIO, "python_version": PYTHON, "app_file": "app.py"}
    )
    return {
        "title": title, "emoji": "🎛️", "colorFrom": "red", "colorTo": "yellow", **how, "pinned": False, "license": "apache-2.0",
        "short_description": "Train, blend and publish LoRA adapters", "suggested_hardware": kind.suggested, "startup_duration_timeout": "1h",
        "hf_oauth": True, "hf_oauth_expiration_minutes": 480, "hf_oauth_scopes": list(SCOPES), "tags": ["lora", "peft", "diffusers"],
    }  # fmt: skip


def readme(hardware: str, *, open_to: str = "owner", title: str = "LoRA Studio") -> str:
    """README.md of a Space."""
    top = yaml.safe_dump(front_matter(hardware, open_to=open_to, title=title), sort_keys=False, allow_unicode=True)
    return f"---\n{top}---\n{ABOUT.format(title=title, open=OPEN[open_to], lasts=LASTS)}"


def deploy(folder: Path, repo: str, *, hardware: str, open_to: str, private: bool = True, token: str | None = None, report=None) -> str:
    """Push the folder of a Space to the Hub, making it where it is not there, with LORA_STUDIO_OPEN set. Returns its address. Raises HubError."""
    variables = {"LORA_STUDIO_OPEN": open_to}
    return hub.deploy(folder, repo, sdk=HARDWARE[hardware].sdk, variables=variables, private=private, token=token, report=report).url
