"""The demo Space of an adapter: its folder starts here and answers as the studio does, what was typed is no code in it, and it is pushed in place."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from gradio_client import Client
from PIL import Image
from typer.testing import CliRunner

from lora_studio import cli, demo_space, library, shelf, space
from lora_studio.errors import HostError, HubError
from lora_studio.fence import Limits
from lora_studio.home import demo_base
from lora_studio.jobs import bench
from lora_studio.workspace import of_visitor
from tests import tiny, tiny_image
from tests.browser import made
from tests.hub.server import Hub

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "d3M0" * 8
PROMPT = "Who is Anna?"
HOSTILE = "\"\"\"\nimport os; os.system('touch ran')\n'''{name}</h1><script>alert(1)</script>"
pytestmark = pytest.mark.usefixtures("with_bench")


@pytest.fixture
def hub(monkeypatch):
    """A small Hub on loopback, in place of the client's."""
    from huggingface_hub import constants

    found = Hub()
    found.account("me", token=TOKEN)
    files = found.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": found.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    yield found
    found.close()


class App:
    """The folder of a demo Space at work, as a Space starts it: its app.py, an environment, and nothing of this checkout."""

    def __init__(self, folder: Path, port: int, **environment: str):
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ}
        kept |= {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder.parent / "gradio"), **environment}
        self.url, self.log = f"http://127.0.0.1:{port}", folder.parent / "app.log"
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=kept, stdout=file, stderr=file)

    def __enter__(self) -> Client:
        until = time.monotonic() + 180
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return Client(self.url, verbose=False, download_files=str(self.log.parent / "got"))
            except OSError:  # not there yet
                time.sleep(0.2)
            except Exception as error:  # noqa: BLE001 - the client has its own error for a server that begins
                assert "Connect" in type(error).__name__ or "connect" in str(error), self.log.read_text()
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


def at_work(folder: Path):
    """The app of a folder as a module, in this process."""
    spec = importlib.util.spec_from_file_location("demo_app", folder / "app.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page


def spoken(workspace, parts) -> str:
    return "".join(event["text"] for event in shelf.answer(workspace, "demo-text", PROMPT, parts, longest=32) if event["event"] == "piece")


def test_the_page_of_a_language_model_answers_as_the_studio_does(workspace, home, tmp_path, free_port):
    id = made.adapter(home, "pirate", seed=1, size=0.6)  # so strong that every word is another
    done = CliRunner().invoke(cli.app, ["demo-space", "pirate", str(tmp_path / "out"), "--license", "mit"])
    assert done.exit_code == 0 and "pip install -r requirements.txt" in done.output, done.output
    ours, base = spoken(workspace, [(id, 1.0)]), spoken(workspace, [])
    bench.stop()
    with App(tmp_path / "out", free_port) as page:
        assert page.predict(PROMPT, 32, 0, 0, api_name="/answer") == (ours, base) and ours != base
        first = page.predict(PROMPT, 16, 1.0, 7, api_name="/answer")
        assert first == page.predict(PROMPT, 16, 1.0, 7, api_name="/answer") != page.predict(PROMPT, 16, 1.0, 8, api_name="/answer")
        with pytest.raises(Exception, match="Write something first"):
            page.predict("  ", 16, 0, 0, api_name="/answer")


def test_the_page_of_an_image_model_draws_the_studios_picture_bit_for_bit(workspace, hub, tmp_path, free_port):
    """Its base is one of the Hub, fetched at one commit; while that is private the page says which secret it needs."""
    base = demo_base("demo-image")
    repo = hub.repo("me/tiny-sd", {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}, private=True)
    files = tiny_image.adapter_files(base, tiny_image.random_adapter(base, seed=1, ends=("to_q", "to_v"), size=0.15), name="me/tiny-sd")
    id = library.add(workspace, files, {"name": "stripes", "base": "me/tiny-sd", "trigger": "a red star"})
    written = demo_space.write(workspace, id, tmp_path / "out", token=TOKEN)
    told = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert told["base"] == {"repo": "me/tiny-sd", "revision": repo.commits[-1][0]}, "a base whose commit was not known is pinned at that of now"
    assert {"app.py", "demo.json", "adapter/pytorch_lora_weights.safetensors"} <= set(written) and told["prompts"] == ["a red star"]

    brush = {"seed": 3, "steps": 4, "guidance": 3.0, "width": 64, "height": 64}
    sides = {"with": [[str(library.adapter_folder(workspace, id)), 1.0, "stripes"]], "base": []}
    (done,) = [event for event in bench.stream("draw", base="demo-image", prompt="a red star", sides=sides, target=str(tmp_path), **brush) if event["event"] == "done"]
    bench.stop()
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    refused = App(tmp_path / "out", free_port, **online)
    assert refused.process.wait(120) == 1 and "me/tiny-sd is private, gated or gone. Set the secret HF_TOKEN" in refused.log.read_text()
    repo.private = False
    repo.commit("later", {"model_index.json": b"{}"})
    with App(tmp_path / "out", free_port, **online) as page:
        drawn = page.predict("a red star", 4, 3.0, 64, 3, api_name="/draw")
    theirs = [Image.open(one if isinstance(one, str) else one["path"]).convert("RGB").tobytes() for one in drawn]
    ours = [Image.open(done["sides"][side]["path"]).convert("RGB").tobytes() for side in ("with", "base")]
    assert theirs == ours and ours[0] != ours[1]


def test_an_image_adapter_that_only_peft_loads_is_drawn_with_and_without(workspace, tmp_path):
    """LoHa, which diffusers' own loader does not know: with it the picture is that of the merged weights, without it the base's to the bit."""
    import diffusers
    import peft
    import torch

    def stock(unet=None):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(demo_base("demo-image"), **({"unet": unet} if unet is not None else {}))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def picture(pipeline):
        return pipeline("a red star", num_inference_steps=3, guidance_scale=3.0, width=64, height=64, generator=torch.Generator().manual_seed(1)).images[0]

    torch.manual_seed(0)
    model = peft.get_peft_model(stock().unet, peft.LoHaConfig(r=3, alpha=3, target_modules=["to_q", "to_v"], init_weights=False))
    model.save_pretrained(tmp_path / "loha")
    id = library.add(workspace, tmp_path / "loha", {"name": "loha", "base": "demo-image"})
    demo_space.write(workspace, id, tmp_path / "out")
    drawn, base = at_work(tmp_path / "out").draw("a red star", 3, 3.0, 64, 1)
    assert base.tobytes() == picture(stock()).tobytes() != drawn.tobytes()
    merged = picture(stock(model.eval().merge_and_unload()))
    assert max(abs(ours - theirs) for ours, theirs in zip(drawn.tobytes(), merged.tobytes())) <= 2


def test_what_was_published_is_shown_at_its_commit_whatever_comes_later(workspace, home, hub, tmp_path, free_port):
    """Base and adapter come from the Hub, each at one commit. Both are private, so the Space needs a secret; the sentence names it."""
    hub.repo("me/tiny", {path.name: path.read_bytes() for path in demo_base("demo-text").iterdir()}, private=True)
    pinned = hub.repos["me/tiny"].commits[-1][0]
    files = tiny.adapter_files(demo_base("demo-text"), seed=1, rank=4, size=0.6, ends=("q_proj", "v_proj", "up_proj"), name="me/tiny")
    id = library.add(workspace, files, {"name": "pirate", "base": "me/tiny", "base_revision": pinned})
    published = shelf.publish(workspace, id, shelf.Push("me/pirate"), token=TOKEN)
    done = demo_space.deploy(workspace, id, "me/pirate-demo", token=TOKEN)
    assert done.private and hub.repos["me/pirate-demo"].private and hub.repos["me/pirate-demo"].made["sdk"] == "gradio"
    assert [note.split(" is ")[0] for note in done.notes] == ["me/pirate", "me/tiny"] and f"{done.url}/settings" in done.notes[0]
    told = json.loads(hub.files("me/pirate-demo")["demo.json"])
    assert told["adapter"] == {"repo": "me/pirate", "revision": published.commit} and told["base"] == {"repo": "me/tiny", "revision": pinned}
    head = yaml.safe_load(hub.files("me/pirate-demo")["README.md"].decode().split("---\n")[1])
    assert head["models"] == ["me/pirate", "me/tiny"] and head["sdk_version"] == space.GRADIO
    assert not {name for name in hub.files("me/pirate-demo") if name.endswith(".safetensors")}

    other = made.adapter(home, "other", seed=2, size=0.6)
    hub.repos["me/pirate"].commit("later", hub.files("me/pirate") | {"adapter_model.safetensors": (library.adapter_folder(workspace, other) / "adapter_model.safetensors").read_bytes()})
    hub.repos["me/tiny"].commit("later", {"config.json": b"{}"})
    folder = tmp_path / "space"
    for name, content in hub.files("me/pirate-demo").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    parts = library.adapter_folder(workspace, id)
    ours = "".join(event["text"] for event in bench.stream("answer", base="demo-text", messages=[{"role": "user", "content": PROMPT}], parts=[[str(parts), 1.0, "pirate"]], longest=32) if event["event"] == "piece")
    bench.stop()
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    refused = App(folder, free_port, **online)
    assert refused.process.wait(120) == 1 and "me/tiny is private, gated or gone. Set the secret HF_TOKEN" in refused.log.read_text()
    with App(folder, free_port, **online, HF_TOKEN=TOKEN) as page:
        assert page.predict(PROMPT, 32, 0, 0, api_name="/answer")[0] == ours


def test_a_demo_is_updated_in_place_and_a_lost_answer_makes_no_second_commit(workspace, home, hub, tmp_path):
    id = made.adapter(home, "pirate", seed=1)
    hub.fault("commit", "lost")
    first = demo_space.deploy(workspace, id, "me/pirate-demo", token=TOKEN)
    commits = len(hub.repos["me/pirate-demo"].commits)
    assert first.private and not first.notes and "adapter/adapter_model.safetensors" in hub.files("me/pirate-demo")
    words = ["demo-space", "pirate", str(tmp_path / "out"), "--deploy", "me/pirate-demo", "--token-stdin"]
    done = CliRunner().invoke(cli.app, words, input=f"{TOKEN}\n")
    assert done.exit_code == 0 and f"The private Space is at {first.url}." in done.output, done.output
    assert len(hub.repos["me/pirate-demo"].commits) == commits == 2
    shelf.publish(workspace, id, shelf.Push("me/pirate", False), token=TOKEN)
    done = demo_space.deploy(workspace, id, "me/pirate-demo", token=TOKEN)
    told = json.loads(hub.files("me/pirate-demo")["demo.json"])
    assert told["adapter"]["repo"] == "me/pirate" and done.url == first.url and not done.notes
    assert done.private, "the Space that was there stays as private as it was, and that is said"


def test_a_repository_that_is_not_in_the_library_is_pulled_and_shown_where_it_is(workspace, home, hub, tmp_path):
    id = made.adapter(home, "pirate", seed=1)
    published = shelf.publish(workspace, id, shelf.Push("me/pirate", folder="first"), token=TOKEN)
    library.remove(workspace, id)
    for number, folder in enumerate(("me/pirate/first", "me/gone")):
        done = CliRunner().invoke(cli.app, ["demo-space", folder, str(tmp_path / f"out{number}"), "--token-stdin"], input=f"{TOKEN}\n")
        if number == 0:
            assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out0" / "demo.json").read_text())
    assert told["adapter"] == {"repo": "me/pirate", "revision": published.commit, "subfolder": "first"}
    assert done.exit_code != 0 and isinstance(done.exception, HubError) and not (tmp_path / "out1").exists()


def test_a_space_of_another_kind_is_left_alone_and_nothing_private_is_shown_to_all(workspace, home, hub):
    id = made.adapter(home, "pirate", seed=1)
    hub.repo("me/mine", {"app.py": b"# my own"}, private=True)
    with pytest.raises(HubError, match="me/mine is a Space already, and no demo of an adapter"):
        demo_space.deploy(workspace, id, "me/mine", token=TOKEN)
    assert hub.files("me/mine") == {"app.py": b"# my own"}
    shelf.publish(workspace, id, shelf.Push("me/pirate"), token=TOKEN)
    with pytest.raises(HubError, match="me/pirate is private, so its demo Space is too"):
        demo_space.deploy(workspace, id, "me/pirate-demo", private=False, token=TOKEN)
    hub.repo("me/pirate-demo", {"demo.json": b"{}"})
    with pytest.raises(HubError, match="is there already and is public"):
        demo_space.deploy(workspace, id, "me/pirate-demo", token=TOKEN)
    with pytest.raises(HubError, match="cannot publish as other"):
        demo_space.deploy(workspace, id, "other/pirate-demo", token=TOKEN)
    assert hub.files("me/pirate-demo") == {"demo.json": b"{}"} and set(hub.repos) == {"me/mine", "me/pirate", "me/pirate-demo"}


def test_nothing_that_was_typed_is_code(workspace, home, tmp_path):
    """Names, triggers, tags and notes of all kinds: the code is the template to the byte, and what is not code holds them as values."""
    files = tiny.adapter_files(demo_base("demo-text"), seed=1, rank=2, ends=("q_proj",), name="demo-text")
    name = HOSTILE.replace("\n", " ")[:80]
    id = library.add(workspace, files, {"name": name, "base": "demo-text", "trigger": HOSTILE, "tags": ["x: !!python/object:os", "}{"], "notes": HOSTILE})
    demo_space.write(workspace, id, tmp_path / "out", license="mit\nsdk: docker")
    assert (tmp_path / "out" / "app.py").read_bytes() == (demo_space.TEMPLATES / "demo_text.py.txt").read_bytes()
    told, readme = json.loads((tmp_path / "out" / "demo.json").read_text()), (tmp_path / "out" / "README.md").read_text()
    assert told["prompts"] == [HOSTILE] and told["name"] == name
    head = yaml.safe_load(readme.split("---\n")[1])
    assert head["sdk"] == "gradio" and "license" not in head and head["tags"][-2:] == ["x: !!python/object:os", "}{"] and head["title"] == name[:60]
    assert "<script>" not in readme.split("---\n", 2)[2]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_code_runs_nothing_of_a_repository(kind):
    """The template is Python by itself, reads no pickle, asks for safetensors only, and runs no code that comes with a model."""
    text = (demo_space.TEMPLATES / f"demo_{kind}.py.txt").read_text(encoding="utf-8")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if getattr(call.func, "attr", "") == "from_pretrained" and getattr(call.func.value, "id", "") in ("AutoModelForCausalLM", "DiffusionPipeline")]
    assert loads
    for call in loads:
        said = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        assert said["trust_remote_code"] is False and said["use_safetensors"] is True
    assert not [call for call in calls if getattr(call.func, "id", "") in ("eval", "exec", "compile", "__import__") or ast.unparse(call.func) in ("torch.load", "pickle.load", "os.system")]
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--stdin-filename", "app.py", "-"], input=text, capture_output=True, text=True, check=False, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout


def test_what_no_space_could_find_is_refused(workspace, home, base, tmp_path):
    local = library.add(workspace, tiny.adapter_files(base, seed=1), {"name": "local", "base": str(base)})
    with pytest.raises(HubError, match="tiny-llama is on this machine only"):
        demo_space.write(workspace, local, tmp_path / "out")
    id = made.adapter(home, "pirate", seed=1)
    with pytest.raises(HostError, match="docker is not known"):
        demo_space.write(workspace, id, tmp_path / "out", hardware="docker")
    (tmp_path / "there").mkdir()
    with pytest.raises(HostError, match="there already"):
        demo_space.write(workspace, id, tmp_path / "there")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "there").iterdir())


def test_a_visitors_demo_is_pushed_with_their_token_only(home, hub, monkeypatch):
    """The machine's own login is nobody else's: without a token of the visitor nothing is pushed."""
    ana = of_visitor("id-of-ana", "ana", Limits())
    hub.account("ana", token="hf_ana")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    files = tiny.adapter_files(demo_base("demo-text"), seed=1, rank=2, ends=("q_proj",), name="demo-text")
    id = library.add(ana, files, {"name": "pirate", "base": "demo-text"})
    with pytest.raises(HubError, match="not signed in"):
        demo_space.deploy(ana, id, "me/pirate-demo")
    assert not hub.repos
    assert demo_space.deploy(ana, id, "ana/pirate-demo", token="hf_ana").private and set(hub.repos) == {"ana/pirate-demo"}
    assert not [name for name, content in hub.files("ana/pirate-demo").items() if b"hf_ana" in content or TOKEN.encode() in content]


@pytest.mark.parametrize("hardware", demo_space.HARDWARE)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_its_requirements_are_pinned_as_ours_and_name_all_that_is_imported(kind, hardware):
    lines = demo_space.requirements(kind, hardware).splitlines()
    ours = {line.partition("==")[0]: line for line in space.requirements(hardware).splitlines() if "==" in line}
    pins = {line.partition("==")[0]: line for line in lines if not line.startswith("--")}
    assert all(line == ours[name] for name, line in pins.items() if name != "gradio") and pins["gradio"] == f"gradio=={space.GRADIO}"
    assert [line for line in lines if line.startswith("--")] == list(space.HARDWARE[hardware].before)
    tree = ast.parse((demo_space.TEMPLATES / f"demo_{kind}.py.txt").read_text(encoding="utf-8"))
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    wanted = {{"PIL": "pillow", "huggingface_hub": "huggingface-hub"}.get(top, top) for name in names if (top := name.partition(".")[0]) not in sys.stdlib_module_names}
    assert wanted - {"spaces"} <= set(pins) and ("spaces" in pins) == (hardware == "zerogpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "image"])
def test_its_requirements_resolve(tmp_path, kind):
    """For the Python of a Space. The pinned build comes from whatever index this machine has; that of the CPU may be out of reach."""
    lines = [line for line in demo_space.requirements(kind, "cpu").splitlines() if not line.startswith("--")]
    (tmp_path / "requirements.txt").write_text("\n".join(lines))
    dry = ["--dry-run", "--ignore-installed", "--quiet", "--python-version", space.PYTHON, "--only-binary", ":all:", "--target", str(tmp_path / "t"), "--report", str(tmp_path / "report.json")]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *dry, "-r", str(tmp_path / "requirements.txt")], capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    chosen = {one["metadata"]["name"].lower(): one["metadata"]["version"] for one in json.loads((tmp_path / "report.json").read_text())["install"]}
    assert chosen["gradio"] == space.GRADIO and chosen["torch"].partition("+")[0] == "2.13.0"
