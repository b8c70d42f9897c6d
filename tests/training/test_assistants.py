"""The assistant of a run: on while it learns, off in its pictures, never in what it saves, and the same when the run goes on."""

import pytest
import torch

from lora_studio import adapters, library, preflight, runs
from lora_studio.errors import AdapterError, SpecError, TrainingError
from lora_studio.lowrank import LowRank
from lora_studio.spec import parse
from lora_studio.training import image, order, pipelines
from lora_studio.training.methods import METHODS
from tests import tiny_image
from tests.training.test_job import adapter_bytes, train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-z", "z_image")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pictures")


def updates(base, seed: int = 5) -> dict[str, LowRank]:
    return tiny_image.random_adapter(base, seed=seed, ends=("to_q", "to_out.0", "w1"), rank=2, size=0.5)


@pytest.fixture(scope="module")
def helper(base, tmp_path_factory):
    """The assistant as such files are: for ComfyUI, without a configuration."""
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("helper") / "helper.safetensors"
    tensors = {f"diffusion_model.{name}.lora_{part}.weight": getattr(one, part).contiguous() for name, one in updates(base).items() for part in "AB"}
    save_file(tensors, file)
    return file


def tree(base, rows, helper, **changes) -> dict:
    common = {
        "name": "tiny", "base": {"id": str(base), **({"assistant": str(helper)} if helper else {})}, "data": [{"path": str(rows)}], "validation": {"size": 1},
        "task": {"kind": "image", "resolution": 32, "bucket_step": 32, "sample_steps": 2}, "schedule": {"steps": 4, "batch_size": 2},
        "method": {"rank": 2, "alpha": 4}, "optim": {"lr": 1e-2}, "output": {"sample_prompts": ["a red circle"], "sample_every": 2},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
    }  # fmt: skip
    return {**common, **changes}


def task_of(workspace, *args, **changes):
    run = runs.create(workspace, parse(tree(*args, **changes)))
    task = image.ImageTask(runs.spec_of(run), device="cpu", note=lambda _: None, folder=run)
    model = task.load()
    model = METHODS["lora"].attach(model, task.spec, task.parts(model))
    torch.manual_seed(3)
    for name, value in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    task.prepare(model)
    return task, model


def merged(base, modules):
    """The tiny model with updates put into its weights."""
    part = pipelines.load_part(base, "transformer", torch.float32, "tiny")
    layers = dict(part.named_modules())
    for name, module in modules.items():
        layers[name].weight.data += module.delta() / module.scale  # the file has no alpha: its strength is 1
    return part


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_and_its_gradient_are_those_of_base_and_assistant_together(base, rows, helper, workspace, monkeypatch, checkpointing):
    compute = {"compute": {"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": checkpointing}}
    task, model = task_of(workspace, base, rows, helper, **compute)
    other, plain = task_of(workspace, base, rows, None, **compute)
    together = METHODS["lora"].attach(merged(base, updates(base)), other.spec, other.parts(plain))
    together.load_state_dict({name: value for name, value in model.state_dict().items() if ".lora_" in name}, strict=False)
    (draws,) = order.Stream(order.Plan(task.counts, task.weights, 3, 1, 0)).step(0)
    found, grads = [], []
    for one, with_adapter in ((task, model), (other, together), (other, plain)):
        loss = one.loss(with_adapter, one.collate(draws))
        loss.backward()
        found.append(float(loss))
        grads.append({name: value.grad.clone() for name, value in with_adapter.named_parameters() if value.requires_grad})
    assert found[0] == pytest.approx(found[1], rel=1e-5) and abs(found[0] - found[2]) > 1e-4
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-5) for name in grads[0])
    assert all(value.grad is None for name, value in model.named_parameters() if ".lora_" not in name)


def test_a_sample_picture_is_that_of_the_base_with_its_own_adapter(base, rows, helper, workspace):
    pictures = []
    for assistant in (helper, None):
        task, model = task_of(workspace, base, rows, assistant)
        with torch.no_grad():
            pictures.append((task.folder / "samples" / task.sample(model.eval(), "a red circle", 7)).read_bytes())
    assert pictures[0] == pictures[1]


def test_what_is_saved_holds_the_own_adapter_only_and_a_cut_run_goes_on_the_same(base, rows, helper, workspace, tmp_path):
    whole, cut, without = (runs.create(workspace, parse(tree(base, rows, one))) for one in (helper, helper, None))
    told = train(whole)
    train(cut, stop_at=2)
    train(cut)
    train(without)
    assert told[-1]["kind"] == "done" and adapter_bytes(whole) == adapter_bytes(cut) != adapter_bytes(without)
    saved, plain = (adapters.read(run / "adapter") for run in (whole, without))
    assert saved.modules.keys() == plain.modules.keys() and all(module.rank == 2 for module in saved.modules.values())
    assert any("is on while the run learns" in event.get("text", "") for event in told)


def test_a_run_does_not_go_on_with_another_assistant(base, rows, helper, workspace, tmp_path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(helper.read_bytes())
    run = runs.create(workspace, parse(tree(base, rows, mine)))
    train(run, stop_at=2)
    data = bytearray(mine.read_bytes())
    data[-2] ^= 1
    mine.write_bytes(data)
    with pytest.raises(TrainingError, match="the assistant changed"):
        train(run)


def test_an_assistant_may_be_an_adapter_of_the_library_or_a_folder_and_what_is_none_is_said_before_start(base, rows, workspace, tmp_path):
    files = adapters.write(adapters.with_modules(adapters.Card("peft", base=str(base)), updates(base)))
    id = library.add(workspace, files, {"name": "helper", "base": str(base)})
    (tmp_path / "folder").mkdir()
    for name, data in files.items():
        (tmp_path / "folder" / name).write_bytes(data)

    def sentences(assistant):
        told = preflight.preflight(workspace, parse(tree(base, rows, assistant)))
        return [problem.sentence for problem in told.problems if problem.path == "base.assistant"]

    assert sentences(id) == sentences(tmp_path / "folder") == []
    task, _ = task_of(workspace, base, rows, id)
    assert task.assistant.hooks.ids == {"assistant"}
    assert "no assistant" in sentences("nothing-here")[0] and "no assistant" in sentences("/not/there")[0]
    assert "fetched from the Hub" in sentences("owner/name/file.safetensors")[0]
    (tmp_path / "it.pt").write_bytes(b"x")
    assert "pickle" in sentences(tmp_path / "it.pt")[0]
    other = tiny_image.write_pipeline(tmp_path / "sd", "sd15")
    stranger = adapters.write(adapters.with_modules(adapters.Card("peft", base="x"), tiny_image.random_adapter(other, seed=1)))
    assert "The assistant" in sentences(library.add(workspace, stranger, {"name": "stranger", "base": "x"}))[0]
    with pytest.raises(AdapterError, match="no assistant"):
        task_of(workspace, base, rows, "nothing-here")


def test_a_distilled_base_without_an_assistant_is_worth_a_word_and_one_for_text_is_refused(rows, workspace):
    told = preflight.preflight(workspace, parse({**tree("x", rows, None), "base": {"id": "Tongyi-MAI/Z-Image-Turbo"}}))
    assert any("ostris/zimage_turbo_training_adapter" in problem.sentence and problem.level == "warning" for problem in told.problems)
    with pytest.raises(SpecError, match="pictures only"):
        parse({"base": {"id": "demo-text", "assistant": "x"}, "data": [{"path": "demo/pirate"}]})
