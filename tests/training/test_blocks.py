"""Blocks that wait in main memory, are compiled or are kept in fewer bits: the same loss and gradients, and what needs a GPU says so."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lora_studio import preflight, runs
from lora_studio.errors import BaseModelError, MachineError, SpecError
from lora_studio.spec import parse
from lora_studio.training import blocks, image, latents, methods, order
from lora_studio.training.image_families import FAMILIES
from tests import tiny_image
from tests.training.test_job import adapter_bytes, train

KINDS = ["sd15", "lumina2", "z_image", "flux", "wan"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each tiny pipeline as a folder, made when it is asked for."""
    made, place = {}, tmp_path_factory.mktemp("pipelines")
    return lambda kind: made.setdefault(kind, None) or made.update({kind: tiny_image.write_pipeline(place / kind, kind)}) or made[kind]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pictures", count=4)


def tree(base, rows, **compute):
    return {
        "base": {"id": str(base)}, "data": [{"path": str(rows)}], "validation": {"size": 0}, "schedule": {"steps": 3, "batch_size": 2}, "optim": {"lr": 1e-2},
        "task": {"kind": "image", "resolution": 64, "bucket_step": 32, "sample_steps": 2}, "method": {"rank": 2, "alpha": 4},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": True, **compute},
    }  # fmt: skip


def task_of(workspace, base, rows, *, swap: int = 0, **compute):
    """A task with a fresh adapter whose B is not zero, so that every gradient is something."""
    run = runs.create(workspace, parse(tree(base, rows, **compute)))
    task = image.ImageTask(runs.spec_of(run), device="cpu", note=lambda _: None, folder=run)
    model = task.load()
    if swap:
        task.swap = blocks.Swap(model, swap, CPU, "tiny")
    model = methods.METHODS["lora"].attach(model, task.spec, task.parts(model))
    with torch.no_grad():
        for number, (name, value) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    task.prepare(model)
    return task, model.train()


def gradients(task, model):
    """The loss of one batch and the gradient of every adapter weight."""
    loss = task.loss(model, task.collate(order.Stream(task.show.plan()).step(0)[0]))
    loss.backward()
    return loss.item(), {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


class Watch:
    """How many blocks have a copy on the device at once."""

    def __init__(self, swap):
        self.swap, self.copies, self.most = swap, {}, 0
        for block in swap.blocks:
            block.register_forward_pre_hook(self.look)

    def look(self, block, _given):
        self.copies[block] = [StorageWeakRef(tensor.untyped_storage()) for tensor, _ in self.swap.held[block]]
        self.most = max(self.most, sum(not all(copy.expired() for copy in copies) for copies in self.copies.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_in_main_memory_give_the_same_loss_and_gradients_to_the_bit_one_at_a_time(workspace, folders, rows, kind):
    plain = gradients(*task_of(workspace, folders(kind), rows))
    for every in (False, True):
        count = len(blocks.blocks_of(task_of(workspace, folders(kind), rows)[1].get_base_model())) if every else 1
        task, model = task_of(workspace, folders(kind), rows, swap=count)
        watch = Watch(task.swap)
        for _ in range(2):
            model.zero_grad()
            loss, found = gradients(task, model)
            assert loss == plain[0] and found.keys() == plain[1].keys()
            assert all(torch.equal(value, plain[1][name]) for name, value in found.items())
        assert watch.most <= 2, "one whose turn it is, and one that autograd has not let go of"
        assert task.swap.moves >= count, "each came at least once"
        task.swap.leave()
        assert all(tensor.data_ptr() == kept.data_ptr() for held in task.swap.held.values() for tensor, kept in held)


def test_the_last_block_stays_for_the_backward_pass_and_each_other_comes_twice_a_step(workspace, folders, rows):
    task, model = task_of(workspace, folders("lumina2"), rows, swap=2)
    gradients(task, model)
    assert task.swap.moves == 3, "both for the forward pass, and the first of them again"


def test_without_checkpointing_nothing_would_be_saved_and_so_it_is_refused(workspace, folders, rows):
    task, model = task_of(workspace, folders("sd15"), rows, checkpointing=False, swap=4)
    watch = Watch(task.swap)
    gradients(task, model)
    assert watch.most == 4
    with pytest.raises(SpecError, match=r"compute\.block_swap has no effect without"):
        parse(tree("x", rows, checkpointing=False, block_swap=2))


def test_more_blocks_than_there_are_is_a_sentence(workspace, folders, rows, monkeypatch):
    with pytest.raises(BaseModelError, match="has 4 blocks, and compute.block_swap is 5"):
        task_of(workspace, folders("sd15"), rows, swap=5)
    monkeypatch.setattr(preflight.devices, "resolve", lambda _: "cuda:0")
    told = preflight.preflight(workspace, parse(tree(folders("sd15"), rows, device="cuda:0", block_swap=5)))
    assert [problem.path for problem in told.problems if problem.level == "error"] == ["compute.block_swap"]
    memory = [preflight.preflight(workspace, parse(tree(folders("sd15"), rows, device="cuda:0", **more))).facts["memory"] for more in ({}, {"block_swap": 4}, {"quantize": "4bit"})]
    assert memory[0] > memory[1] and memory[0] > memory[2]


def test_a_base_too_large_for_the_card_is_said_with_the_way_out_but_not_where_blocks_are_swapped(workspace, rows, monkeypatch):
    monkeypatch.setattr(preflight.devices, "resolve", lambda _: "cuda:0")
    monkeypatch.setattr(preflight.checks, "free_memory", lambda _: 12 * 10**9)
    for compute, said in (({}, True), ({"quantize": "8bit"}, True), ({"quantize": "4bit"}, False), ({"block_swap": 40}, False)):
        told = preflight.preflight(workspace, parse(tree("black-forest-labs/FLUX.1-dev", rows, device="cuda:0", **compute)))
        assert any("or set compute.quantize or compute.block_swap." in problem.sentence for problem in told.problems) == said, compute


@pytest.mark.parametrize("kind", tiny_image.PIPELINES)
def test_preflight_counts_the_blocks_that_there_are(kind):
    pipeline = tiny_image.PIPELINES[kind]()
    part = getattr(pipeline, FAMILIES[type(pipeline).__name__].component)
    linears = [(name, *layer.weight.shape) for name, layer in part.named_modules() if isinstance(layer, torch.nn.Linear)]
    counted = preflight.blocks_of(linears)
    real = {name: block for name, block in part.named_modules() if block in blocks.blocks_of(part)}
    assert set(counted) == set(real) and real
    assert all(counted[name] == sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, torch.nn.Linear)) for name, block in real.items())


@pytest.mark.parametrize("change", [{"quantize": "4bit"}, {"quantize": "8bit"}, {"encoders": "4bit"}, {"block_swap": 1}])
def test_what_needs_a_gpu_says_so_before_start_and_again_in_the_run(workspace, folders, rows, change):
    spec = parse(tree(folders("sd15"), rows, **change))
    (field,) = (f"compute.{name}" for name in change)
    told = preflight.preflight(workspace, spec)
    assert not told.can_start and [(problem.path, "needs an NVIDIA GPU" in problem.sentence) for problem in told.problems if problem.level == "error"] == [(field, True)]
    with pytest.raises(MachineError, match=f"{field} needs an NVIDIA GPU, and this run is on cpu"):
        image.ImageTask(spec, device="cpu", note=lambda _: None, folder=workspace.root).load()


def test_encoders_on_the_processor_are_refused_where_all_is_there_anyway(workspace, folders, rows):
    told = preflight.preflight(workspace, parse(tree(folders("sd15"), rows, encoders="cpu")))
    assert [problem.path for problem in told.problems if problem.level == "error"] == ["compute.encoders"]


@pytest.mark.parametrize("change", [{"encoders": "4bit"}, {"encoders": "cpu"}, {"compile": True}, {"block_swap": 3, "checkpointing": True}])
def test_memory_settings_of_image_models_are_refused_on_language_models(change):
    with pytest.raises(SpecError, match="image models only"):
        parse({"data": [{"path": "x"}], "compute": change})


@pytest.mark.parametrize("change", [{"quantize": "8bit"}, {"compile": True}])
def test_settings_that_do_not_go_together_are_refused(rows, change):
    with pytest.raises(SpecError, match=r"does not go with compute\.quantize or compute\.compile"):
        parse(tree("x", rows, block_swap=1, **change))


def test_text_encoders_on_the_processor_never_see_the_device_and_make_the_same(folders, tmp_path):
    family = FAMILIES["StableDiffusionPipeline"]
    known = latents.Store(tmp_path / "a", folders("sd15"), "StableDiffusionPipeline", CPU).embeddings(family, ["a circle"])
    nowhere = latents.Store(tmp_path / "b", folders("sd15"), "StableDiffusionPipeline", torch.device("meta"), encoders="cpu").embeddings(family, ["a circle"])
    assert torch.equal(known["a circle"]["prompt"], nowhere["a circle"]["prompt"])
    with pytest.raises((NotImplementedError, RuntimeError)):
        latents.Store(tmp_path / "c", folders("sd15"), "StableDiffusionPipeline", torch.device("meta")).embeddings(family, ["a circle"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "wan"])
def test_compiled_blocks_give_the_same_loss_and_an_adapter_of_the_same_names(workspace, folders, rows, kind):
    from safetensors.torch import load

    found = []
    for compile in (False, True):
        run = runs.create(workspace, parse(tree(folders(kind), rows, compile=compile)))
        history = train(run)
        found.append(([event["loss"] for event in history if event["kind"] == "step"], load(adapter_bytes(run))))
    assert len(found[0][0]) == 3 and found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert found[0][1].keys() == found[1][1].keys() and not any("_orig_mod" in name for name in found[1][1])
    assert all(torch.allclose(found[1][1][name], value, atol=1e-3) for name, value in found[0][1].items())


def test_no_byte_of_vae_and_text_encoders_is_in_memory_during_a_step_not_even_after_a_sample(workspace, folders, rows, monkeypatch):
    import gc

    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    def encoders() -> list:
        return [thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKL | CLIPTextModel)]

    seen, real, others = [], image.ImageTask.loss, encoders()  # those that other tests of this process left

    def looking(self, model, batch):
        foreign = [thing for thing in encoders() if not any(thing is other for other in others)]
        seen.append(sum(value.nbytes for thing in foreign for value in thing.parameters()))
        return real(self, model, batch)

    monkeypatch.setattr(image.ImageTask, "loss", looking)
    more = {"output": {"sample_prompts": ["a circle"], "sample_every": 1}}
    train(runs.create(workspace, parse({**tree(folders("sd15"), rows), **more})))
    assert seen == [0] * 3


def test_running_out_of_memory_names_what_saves_it_on_pictures(workspace, folders, rows, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(image.ImageTask, "loss", full)
    with pytest.raises(MachineError, match=r"schedule\.batch_size to 1 .* lower task\.resolution \(now 64\), or set compute\.quantize or compute\.block_swap\."):
        train(runs.create(workspace, parse(tree(folders("sd15"), rows))))
