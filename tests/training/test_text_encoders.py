"""Text encoders that are trained beside the part: their adapter learns, is saved, drawn with, blended and published with the rest."""

import json

import diffusers
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lora_studio import adapters, bases, blend, families, library, preflight, runs, shelf
from lora_studio.adapters import steps
from lora_studio.adapters.pipeline_files import NAME
from lora_studio.errors import SpecError
from lora_studio.inference.blends import Reader
from lora_studio.inference.draw import Brush, Easel
from lora_studio.spec import Base, parse
from lora_studio.training import image, optim, text_encoders
from tests import tiny_image
from tests.training.test_image_families import adapted_layers, nothing_said
from tests.training.test_job import adapter_bytes, train

KINDS = {"sd15": ("unet", ["text_encoder"]), "sdxl": ("unet", ["text_encoder", "text_encoder_2"]), "flux": ("transformer", ["text_encoder"])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made, place = {}, tmp_path_factory.mktemp("pipelines")
    return lambda kind: made[kind] if kind in made else made.setdefault(kind, tiny_image.write_pipeline(place / kind, kind))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pictures")


def tree(base, rows, **changes) -> dict:
    task = {"kind": "image", "resolution": 32, "bucket_step": 32, "sample_steps": 2, "caption_dropout": 0.2, "text_encoder": True}
    common = {
        "name": "tiny", "base": {"id": str(base)}, "data": [{"path": str(rows)}], "task": task, "validation": {"size": 1},
        "schedule": {"steps": 4, "batch_size": 2}, "method": {"rank": 2, "alpha": 4},
        "optim": {"lr": 1e-2, "lora_plus_ratio": 4, "text_encoder_lr": 5e-3},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1}, "output": {"sample_prompts": ["a red circle"], "sample_every": 2},
    }  # fmt: skip
    return {**common, **changes}


def made(workspace, *args, **changes):
    return runs.create(workspace, parse(tree(*args, **changes)))


def test_a_cut_run_goes_on_to_the_identical_adapter_with_every_text_encoder_in_it(kind, folders, rows, workspace):
    component, encoders = KINDS[kind]
    checkpointing = {"compute": {"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": True}} if kind == "sd15" else {}
    whole, cut = (made(workspace, folders(kind), rows, **checkpointing) for _ in range(2))
    told = train(whole)
    train(cut, stop_at=2)
    train(cut)
    assert told[-1]["kind"] == "done" and adapter_bytes(cut) == adapter_bytes(whole)
    modules = adapters.read(whole / "adapter").modules
    for encoder in encoders:
        own = {name: module for name, module in modules.items() if name.startswith(f"{encoder}.")}
        assert len(own) == 2 * len(text_encoders.TARGETS)
        unread = ".layers.1." if (kind, encoder) == ("sdxl", "text_encoder") else "none"  # SDXL reads its first encoder one layer early
        assert all(bool(module.B.any()) == (unread not in name) for name, module in own.items()), "every layer that is read has learnt"
    assert [name for name in modules if not name.startswith("text_encoder")]
    last = max(steps.steps(whole))
    assert adapters.read(steps.adapter_of(whole, last)).modules.keys() == modules.keys()
    rates = [event for event in told if event["kind"] == "step"][1]
    facts = preflight.preflight(workspace, parse(tree(folders(kind), rows))).facts
    assert facts["trainable"] == next(event for event in told if event["kind"] == "started")["trainable"]
    assert rates["lr_text_A"] == pytest.approx(rates["lr_A"] / 2) and rates["lr_text_B"] == pytest.approx(4 * rates["lr_text_A"])
    found = adapters.inspect(whole / "adapter")
    assert not adapters.check(found, adapters.base_shapes(folders(kind)))


def drawn(pipeline, kind) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline("a red circle", num_inference_steps=3, guidance_scale=3.0, width=32, height=32, generator=torch.Generator().manual_seed(3), output_type="np")
    return torch.from_numpy(found.images[0])


def test_the_published_file_draws_in_a_fresh_stock_pipeline_what_the_bench_draws(kind, folders, rows, workspace, tmp_path):
    component, encoders = KINDS[kind]
    base = folders(kind)
    train(made(workspace, base, rows, output={"sample_prompts": []}, optim={"lr": 0.1}))
    (item,) = library.find(workspace)
    place = shelf.export_adapter(workspace, item.id, tmp_path / "out")
    with safe_open(place / NAME, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in said} == {component, *encoders} and said["text_encoder.r"] == 2 and said["text_encoder.lora_alpha"] == 4
    name = json.loads((base / "model_index.json").read_text())["_class_name"]
    bare = drawn(getattr(diffusers, name).from_pretrained(base), kind)
    stock = getattr(diffusers, name).from_pretrained(base)
    with nothing_said():
        stock.load_lora_weights(place, weight_name=NAME, adapter_name="it")
    assert stock.get_list_adapters() == {part: ["it"] for part in (component, *encoders)}
    modules = adapters.read(place / "adapter_model.safetensors").modules
    for part in encoders:
        assert adapted_layers(getattr(stock, part)) == sum(key.startswith(f"{part}.") for key in modules)
    wanted = drawn(stock, kind)
    easel = Easel(Base(id=str(base)))
    easel.put("it", modules)
    brush = Brush(seed=3, steps=3, guidance=3.0, width=32, height=32)
    file = easel.draw("a red circle", brush, tmp_path / "drawn", weights={"it": 1.0}, step=lambda _: None)
    found = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).float().reshape(wanted.shape) / 255
    assert float((found - wanted).abs().max()) < 2.5 / 255 and float((wanted - bare).abs().max()) > 0.02
    easel.put("main", {key: module for key, module in modules.items() if not key.startswith("text_encoder")})
    other = easel.draw("a red circle", brush, tmp_path / "drawn", weights={"main": 1.0}, step=lambda _: None)
    assert Image.open(other).tobytes() != Image.open(file).tobytes(), "the text encoder's part shows"


def test_the_published_file_draws_the_very_picture_that_the_run_drew_last(kind, folders, rows, workspace, tmp_path):
    base = folders(kind)
    compute = {"device": "cpu", "precision": "fp32", "threads": 1, "fused": False}  # the stock pipeline's own layers
    run = made(workspace, base, rows, optim={"lr": 0.1}, compute=compute, validation={"size": 0})
    told = train(run)
    sample = Image.open(run / "samples" / [event for event in told if event["kind"] == "sample"][-1]["answer"])
    asked = json.loads(sample.text["lora-studio"])
    (item,) = library.find(workspace)
    place = shelf.export_adapter(workspace, item.id, tmp_path / "out")
    stock = getattr(diffusers, json.loads((base / "model_index.json").read_text())["_class_name"]).from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    how = {"num_inference_steps": asked["steps"], "guidance_scale": asked["guidance"], "width": 32, "height": 32}
    bare = stock(asked["prompt"], **how, generator=torch.Generator().manual_seed(asked["seed"])).images[0]
    stock.load_lora_weights(place, weight_name=NAME, adapter_name="it")
    again = stock(asked["prompt"], **how, generator=torch.Generator().manual_seed(asked["seed"])).images[0]
    assert again.tobytes() == sample.tobytes() != bare.tobytes()


def test_what_the_part_is_told_changes_with_the_text_encoder_and_has_its_graph(folders, rows, workspace):
    run = made(workspace, folders("flux"), rows)
    task = image.ImageTask(runs.spec_of(run), device="cpu", note=lambda _: None, folder=run)
    model = task.load()
    from lora_studio.training.methods import METHODS

    model = METHODS["lora"].attach(model, task.spec, task.parts(model))
    (found,) = task.texts.embed(model, ["a red circle"], task.embedded)
    assert found["pooled"].requires_grad and not found["prompt"].requires_grad, "T5 stays frozen, and comes from the cache"
    assert torch.allclose(found["pooled"], task.embedded["a red circle"]["pooled"], atol=1e-5), "a fresh adapter changes nothing"
    assert torch.equal(found["prompt"], task.embedded["a red circle"]["prompt"])
    roles = {group["role"] for group in optim.groups(model.named_parameters(), task.spec.optim)}
    assert roles == {"A", "B", "text_A", "text_B"}
    frozen = [name for name, value in model.named_parameters() if value.requires_grad and ".lora_" not in name]
    assert not frozen


def test_text_encoders_blend_with_the_rest_even_where_only_one_has_them(folders, rows, workspace, tmp_path):
    base, found = folders("sd15"), []
    for on in (True, False):
        changes = {} if on else {"task": {**tree(base, rows)["task"], "text_encoder": False}, "optim": {"lr": 1e-2}}
        run = made(workspace, base, rows, output={"sample_prompts": []}, **changes)
        train(run)
        found.append(run / "adapter")

    class Job:
        def check(self):
            """Nobody stops this."""

    answer = Reader().blend(Job(), {"parts": [[str(found[0]), 0.7], [str(found[1]), -0.4]], "target": str(tmp_path / "blend")})[1]
    assert answer["loss"] < 1e-6
    one, other, both = (adapters.read(place).modules for place in (*found, tmp_path / "blend"))
    assert both.keys() == one.keys() | other.keys() and any(name.startswith("text_encoder.") for name in both)
    name = next(name for name in both if name.startswith("text_encoder."))
    assert torch.allclose(both[name].delta(), 0.7 * one[name].delta(), atol=1e-6)
    exact = blend.stack([one, other], [0.7, -0.4])
    assert blend.difference(both, exact).overall < 1e-6
    stock = diffusers.StableDiffusionPipeline.from_pretrained(base)
    (tmp_path / NAME).write_bytes(shelf._pipeline_file(tmp_path / "blend")[NAME])
    with nothing_said():
        stock.load_lora_weights(tmp_path, weight_name=NAME, adapter_name="it")
    loaded = sum(adapted_layers(getattr(stock, part)) for part in ("unet", "text_encoder"))
    assert loaded == len(both)


def test_layers_of_text_encoders_are_missed_only_in_an_adapter_that_has_some(folders, tmp_path):
    base = folders("sd15")
    shapes = adapters.base_shapes(base)
    modules = tiny_image.random_adapter(base, seed=1, ends=("to_q", "q_proj"))
    for chosen, told in ((modules, 0), ({name: one for name, one in modules.items() if "text" not in name}, 0), ({name: one for name, one in modules.items() if ".layers.1." not in name}, 1)):
        files = adapters.write(adapters.with_modules(adapters.Card("peft", base=str(base)), chosen))
        config = json.loads(files[adapters.CONFIG]) | {"target_modules": ["to_q", "q_proj"]}
        card = adapters.inspect({**files, adapters.CONFIG: json.dumps(config).encode()})
        assert len([problem for problem in adapters.check(card, shapes) if problem.level == "warning"]) == told


def test_a_family_without_such_encoders_says_so_before_start(folders, rows, workspace):
    spec = parse(tree(folders("sd15"), rows))
    for family in families.IMAGE_FAMILIES:
        sentences = [str(error) for path, error in families.misfits(family.pipeline, spec) if path == "task.text_encoder"]
        assert bool(sentences) == (not family.text_encoders) and all("get no adapter here" in one for one in sentences)
    assert preflight.preflight(workspace, spec).can_start
    assert bases.inspect(Base(id=str(folders("sd15")))).targets("auto")


def test_a_rate_for_text_encoders_that_are_not_trained_is_refused(rows):
    with pytest.raises(SpecError, match="no effect without task.text_encoder"):
        parse(tree("demo-image", rows, task={"kind": "image"}))
