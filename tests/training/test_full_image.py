"""Full and partial fine-tuning of an image base: the part that draws learns, a cut run goes on to the same bytes, and the model that is left is
one for diffusers."""

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_studio import adapters, bases, library, preflight, runs
from lora_studio.errors import BaseModelError
from lora_studio.spec import parse
from lora_studio.training import full
from tests import tiny_image
from tests.training import test_image, test_methods
from tests.training.test_job import train

base, folder = test_image.base, test_image.folder
kept = test_methods.kept
VARIANTS = {
    "all": {"kind": "full"},
    "some layers": {"kind": "full", "layers": ["up_blocks", "conv_out"]},
    "as a LoRA": {"kind": "full", "save": "lora", "rank": 64},
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch):
    """What is kept of a trainer are no logits of a language model."""
    monkeypatch.setattr(test_methods.Keeping, "_before", test_methods.loop.Trainer._before)


def made(workspace, base, folder, name, **changes):
    return runs.create(workspace, parse(tree(base, folder, name, **changes)))


def tree(base, folder, name, **changes):
    return test_image.tree(base, folder, **{"method": VARIANTS[name], "optim": {"lr": 2e-3}, "validation": {"size": 2, "keep_best": False}, **changes})


def result(run):
    """The bytes of what a run left."""
    (file,) = [*run.glob(f"model/{WEIGHTS}"), *run.glob("adapter/adapter_model.safetensors")]
    return file.read_bytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_cut_run_goes_on_to_the_identical_result(workspace, base, folder, name):
    whole, cut = (made(workspace, base, folder, name) for _ in range(2))
    told = train(whole)
    assert told[-1]["kind"] == "done"
    train(cut, stop_at=3)
    retold = train(cut)

    def progress(events):
        return [(event["step"], event.get("loss"), event.get("answer")) for event in events if event["kind"] in ("step", "eval", "sample")]

    assert progress(retold) == progress(told) and result(cut) == result(whole)


@pytest.mark.parametrize("name", ["all", "some layers"])
def test_the_model_is_one_for_diffusers_and_draws_the_last_sample(workspace, base, folder, kept, name):
    run = made(workspace, base, folder, name)
    told = train(run)
    model, trained = run / "model", kept["trainer"].parameters
    assert any(str(model) in event.get("text", "") for event in told if event["kind"] == "note") and not library.find(workspace)
    before, after = load_file(base / WEIGHTS), load_file(model / WEIGHTS)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and changed == set(trained)
    assert all(torch.equal(after[key], value.detach()) for key, value in trained.items())
    assert name == "all" or all(key.startswith(("up_blocks.", "conv_out.")) for key in changed)
    rest = [file.relative_to(base) for file in base.rglob("*") if file.is_file() and str(file.relative_to(base)) != WEIGHTS]
    assert rest and all((model / file).read_bytes() == (base / file).read_bytes() for file in rest)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    sample = [event for event in told if event["kind"] == "sample"][-1]
    shown = Image.open(run / "samples" / sample["answer"])
    task = kept["trainer"].task
    seed = test_image.order.key(task.spec.compute.seed, "sample", 0)
    asked = {"num_inference_steps": task.spec.task.sample_steps, "width": shown.width, "height": shown.height, "guidance_scale": task.guidance}
    drawn = pipeline(sample["prompt"], generator=torch.Generator().manual_seed(seed), **asked).images[0]
    off = torch.tensor(list(drawn.convert("RGB").tobytes())).sub(torch.tensor(list(shown.convert("RGB").tobytes()))).abs().max()
    assert int(off) <= 1


def test_what_is_left_is_a_base_to_train_on(workspace, base, folder):
    run = made(workspace, base, folder, "some layers")
    train(run)
    again = runs.create(workspace, parse(test_image.tree(run / "model", folder, schedule={"steps": 1, "batch_size": 2})))
    assert train(again)[-1]["kind"] == "done"
    assert bases.inspect(parse(tree(run / "model", folder, "all")).base).pipeline == "StableDiffusionPipeline"


def test_as_a_lora_of_full_rank_nothing_is_lost(workspace, base, folder, kept):
    run = made(workspace, base, folder, "as a LoRA")
    told = train(run)
    trained, before = kept["trainer"].parameters, load_file(base / WEIGHTS)
    modules = adapters.read(run / "adapter").modules
    assert trained.keys() == {f"{layer}.weight" for layer in modules} and len(modules) > 5
    for layer, module in modules.items():
        learnt = (trained[f"{layer}.weight"] - before[f"{layer}.weight"]).detach()
        assert float(learnt.abs().max()) > 1e-4 and torch.allclose(module.delta(), learnt, atol=1e-6), layer
    assert any("lacks 0.0%" in event.get("text", "") for event in told)
    card = adapters.inspect(run / "adapter")
    assert card.config["auto_mapping"]["base_model_class"] == "UNet2DConditionModel"
    assert not [problem for problem in adapters.check(card, adapters.base_shapes(base)) if problem.level == "error"]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_learns_is_counted_before_start(workspace, base, folder, kept, name):
    spec = parse(tree(base, folder, name, schedule={"steps": 1, "batch_size": 2}))
    report = preflight.preflight(workspace, spec)
    train(runs.create(workspace, spec))
    count = sum(value.numel() for value in kept["trainer"].parameters.values())
    assert report.can_start and report.facts["trainable"] == count
    parts = report.facts["memory_parts"]
    assert (parts["adapter"], parts["gradients"], parts["optimizer"]) == (0, 4 * count, 8 * count)


def test_layers_that_are_not_there_and_a_model_in_one_file_are_refused(workspace, base, folder, tmp_path):
    spec = parse(tree(base, folder, "all", method={"kind": "full", "layers": ["no_blocks"]}))
    report = preflight.preflight(workspace, spec)
    assert [problem.path for problem in report.problems if problem.level == "error"] == ["method.layers"]
    one = tiny_image.sd().unet
    file = tmp_path / "one.safetensors"
    file.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full.bases, "fetch", lambda base: file)
        with pytest.raises(BaseModelError, match="in one file"):
            full.attach(one, parse(tree(base, folder, "all")), [])


@pytest.mark.parametrize("kind", [name if name in ("sdxl", "flux") else pytest.param(name, marks=pytest.mark.slow) for name in tiny_image.PIPELINES if name != "sd15"])
def test_every_kind_of_pipeline_is_left_whole_with_only_its_part_changed(workspace, folder, tmp_path, kept, kind):
    other = tiny_image.write_pipeline(tmp_path / kind, kind)
    tree = {
        "name": "t", "base": {"id": str(other)}, "data": [{"path": str(folder)}], "validation": {"size": 0}, "optim": {"lr": 1e-3},
        "task": {"kind": "image", "resolution": 32, "bucket_step": 32, "sample_steps": 2}, "method": {"kind": "full"},
        "schedule": {"steps": 1, "batch_size": 2}, "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
    }  # fmt: skip
    run = runs.create(workspace, parse(tree))
    assert train(run)[-1]["kind"] == "done"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(run / "model", use_safetensors=True, local_files_only=True)
    part = getattr(pipeline, bases.weights_folder(other).name)
    for name, value in kept["trainer"].parameters.items():
        assert torch.equal(part.get_parameter(name), value.detach()), name
    changed = {file.relative_to(other).parts[0] for file in other.rglob("*") if file.is_file() and (run / "model" / file.relative_to(other)).read_bytes() != file.read_bytes()}
    assert changed == {bases.weights_folder(other).name}


def test_checkpointing_changes_no_step(workspace, base, folder):
    told = []
    for checkpointing in (False, True):
        run = made(workspace, base, folder, "all", compute={"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": checkpointing})
        told.append([event["loss"] for event in train(run) if event["kind"] in ("step", "eval")])
    assert told[0] == pytest.approx(told[1], rel=1e-5)
