"""Every family of image models: what we train towards is what the stock pipeline goes by, and what we save is what it loads."""

import contextlib
import dataclasses
import inspect
import json
import logging
import shutil
import warnings

import diffusers
import peft
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import safe_open
from safetensors.torch import load_file

from lora_studio import adapters, bases, families, library, preflight, runs
from lora_studio.adapters.pipeline_files import NAME, to_pipeline_file
from lora_studio.errors import BaseModelError
from lora_studio.spec import Base, parse
from lora_studio.training import latents, methods, objectives, pipelines
from lora_studio.training.image_families import FAMILIES, drawn, patches
from tests import tiny_image
from tests.training.test_job import train

SIZE = (64, 32)  # width and height, so that taking one for the other shows
KINDS = list(tiny_image.PIPELINES)
TARGETS = [(kind, ends) for kind in KINDS for ends in ("auto", *((["to_k", "conv1", "proj_in"],) if kind in ("sd15", "sd2", "sdxl") else ()))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each tiny pipeline as a folder, made when it is asked for."""
    made = {}
    place = tmp_path_factory.mktemp("pipelines")
    return lambda kind: made.setdefault(kind, tiny_image.write_pipeline(place / kind, kind)) if kind not in made else made[kind]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, folders):
    return folders(kind)


def family_of(folder):
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return name, FAMILIES[name]


def embedded(folder, captions):
    name, family = family_of(folder)
    encoders = pipelines.load_pipeline(folder, name, {}, without=("vae", family.component))
    with torch.no_grad():
        return family.embed(encoders, captions)


def random_latents(folder, count: int = 1, seed: int = 3):
    """Random latents as those of a picture of SIZE."""
    _, family = family_of(folder)
    with torch.no_grad():
        mean, _ = family.encode(pipelines.load_part(folder, "vae", torch.float32, "tiny"), torch.zeros(1, 3, SIZE[1], SIZE[0]))
    return torch.randn(count, *mean.shape[1:], generator=torch.Generator().manual_seed(seed))


class Oracle:
    """Stands in for a part inside the stock pipeline and answers what our objective would have it say for one known picture.

    It knows no family: what the pipeline says is translated into our terms, and our answer back, by running the family's own `predict`
    backwards (which only reorders and turns round). `apart` is the largest difference between what the real part says to the pipeline
    and what it says to our `predict`, with the same noise at the same time."""

    def __init__(self, part, family, objective, x, conditions):
        self.part, self.family, self.objective, self.x, self.conditions = part, family, objective, x, conditions
        self.real, self.names = part.forward, inspect.signature(part.forward)
        self.apart, self.calls, self.given = 0.0, 0, None
        self.probe = None
        part.forward = self.answer

    def ask(self, noisy, times, probe):
        """Our predict, the part answering with `probe`; what the part was told is in `given` afterwards."""
        self.probe = probe
        try:
            return self.family.predict(self.part, noisy, times, self.conditions, SIZE)
        finally:
            self.probe = None

    def time(self, told):
        """What the part is told as a time, in our terms."""
        ends = []
        for value in (0.0, 1000.0):
            self.ask(self.x, torch.tensor([value]), lambda **_: self.raw)
            ends.append(float(self.given["time"]))
        return (float(told.reshape(-1)[0]) - ends[0]) / (ends[1] - ends[0]) * 1000

    def target(self, noisy, time):
        """What our objective wants of the known picture with that much noise."""
        if isinstance(self.objective, objectives.Flow):
            table = self.scheduler.sigmas
            amount = float(table[(table - time / 1000).abs().argmin()])  # some solvers tell the part a rounded time
            assert abs(amount - time / 1000) <= 1e-3
            noise = (noisy - (1 - amount) * self.x) / amount
            return self.objective.mix(self.x, noise, torch.zeros(1)).target
        signal = self.objective.signal[round(time)]
        noise = (noisy - signal.sqrt() * self.x) / (1 - signal).sqrt()
        return self.objective.mix(self.x, noise, torch.tensor([(round(time) + 0.5) / len(self.objective.signal)])).target

    def answer(self, *args, **more):
        told = self.names.bind(*args, **more).arguments
        first, time = next(iter(told.values())), told.get("timestep", told.get("t"))
        self.given = {"first": flat(first), "time": torch.as_tensor(time)}
        if self.probe:
            return Transformer2DModelOutput(sample=self.probe(**told))
        with torch.no_grad():
            self.raw = self.real(*args, **more)[0]
        with torch.enable_grad():
            time = self.time(torch.as_tensor(time, dtype=torch.float32))
            leaf = torch.zeros_like(self.x).requires_grad_()
            self.ask(leaf, torch.tensor([time]), lambda **_: self.raw)
            (noisy,) = torch.autograd.grad(self.given["first"], leaf, flat(first))
            listed = isinstance(self.raw, list)
            raw = (self.raw[0] if listed else self.raw).clone().requires_grad_()
            said = self.ask(noisy, torch.tensor([time]), lambda **_: [raw] if listed else raw)
            (back,) = torch.autograd.grad(said, raw, self.target(noisy, time))
        with torch.no_grad():
            ours = self.ask(noisy, torch.tensor([time]), lambda **told: self.real(**told)[0] if "return_dict" in told else self.real(**told).sample)
        self.apart = max(self.apart, float((ours - said).abs().max()))
        self.calls += 1
        return Transformer2DModelOutput(sample=[back] if listed else back)


def flat(value):
    """Z-Image's part is told lists, the others tensors."""
    return torch.stack(list(value)) if isinstance(value, list) else value


UNPACKED = {
    "FluxPipeline": lambda found, _: diffusers.FluxPipeline._unpack_latents(found, SIZE[1], SIZE[0], 2),
    "QwenImagePipeline": lambda found, _: diffusers.QwenImagePipeline._unpack_latents(found, SIZE[1], SIZE[0], 4),
    "Flux2KleinPipeline": lambda found, vae: (diffusers.Flux2KleinPipeline._patchify_latents(found) - vae.bn.running_mean.view(1, -1, 1, 1))
    / (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt(),
}
MORE = {"PixArtSigmaPipeline": {"clean_caption": False}, "QwenImagePipeline": {"negative_prompt": ""}}


def test_the_stock_pipeline_reproduces_a_picture_from_what_we_train_towards(folder):
    name, family = family_of(folder)
    part = pipelines.load_part(folder, family.component, torch.float32, "tiny").eval()
    objective, x = family.objective(pipelines.load_scheduler(folder)), random_latents(folder)
    oracle = Oracle(part, family, objective, x, family.batch(embedded(folder, ["a red circle"])))
    pipeline = getattr(diffusers, name).from_pretrained(folder, **{family.component: part})
    pipeline.set_progress_bar_config(disable=True)
    if "set_alpha_to_one" in pipeline.scheduler.config:  # DDIM as SD is shipped leaves the noise of the first step in its pictures
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    oracle.scheduler = pipeline.scheduler
    asked = family.guide(1.0) | MORE.get(name, {}) | {"output_type": "latent"}
    found = pipeline(prompt="a red circle", num_inference_steps=6, width=SIZE[0], height=SIZE[1], generator=torch.Generator().manual_seed(0), **asked)
    found = found.images if hasattr(found, "images") else found.frames
    found = UNPACKED.get(name, lambda found, _: found)(found, pipeline.vae)
    assert oracle.calls >= 6 and oracle.apart < 1e-5, "the part is told what the stock pipeline tells it"
    assert float((found.reshape(x.shape) - x).abs().max()) < 1e-5 * max(1.0, float(x.abs().max()))


def test_texts_of_several_lengths_say_in_one_batch_what_each_says_alone(folder):
    _, family = family_of(folder)
    part = pipelines.load_part(folder, family.component, torch.float32, "tiny").eval()
    known = embedded(folder, ["a red circle on a blue square", "", "star"])
    x = random_latents(folder, 3)
    times = family.objective(pipelines.load_scheduler(folder)).mix(x, x, torch.tensor([0.2, 0.5, 0.8])).times
    with torch.no_grad():
        together = family.predict(part, x, times, family.batch(known), SIZE)
        alone = [family.predict(part, x[n : n + 1], times[n : n + 1], family.batch([known[n]]), SIZE) for n in range(3)]
    assert together.shape == x.shape and torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_a_part_in_bf16_says_about_what_it_says_in_fp32(folder):
    _, family = family_of(folder)
    known, x = family.batch(embedded(folder, ["a red circle", "star"])), random_latents(folder, 2)
    times = family.objective(pipelines.load_scheduler(folder)).mix(x, x, torch.tensor([0.3, 0.7])).times
    said = {}
    for dtype in (torch.float32, torch.bfloat16):
        part = pipelines.load_part(folder, family.component, dtype, "tiny").eval()
        there = {name: value.to(dtype) if value.is_floating_point() else value for name, value in known.items()}
        with torch.no_grad():
            said[dtype] = family.predict(part, x.to(dtype), times, there, SIZE)
    assert said[torch.bfloat16].dtype == torch.bfloat16
    apart = (said[torch.bfloat16].float() - said[torch.float32]).norm() / said[torch.float32].norm()
    assert float(apart) < 0.1


def picture(folder, prepared=None, part=None, prompt="a red circle", **asked):
    """What a fresh stock pipeline draws, after `prepared` has done something to it."""
    name, family = family_of(folder)
    pipeline = getattr(diffusers, name).from_pretrained(folder, **({family.component: part} if part is not None else {}))
    pipeline.set_progress_bar_config(disable=True)
    if prepared:
        prepared(pipeline)
    asked = family.guide(3.0) | (MORE.get(name, {}) | {"prompt": prompt} if prompt else asked) | {"output_type": "np"}
    return torch.from_numpy(drawn(pipeline(num_inference_steps=3, width=SIZE[0], height=SIZE[1], generator=torch.Generator().manual_seed(0), **asked)))


def test_embeddings_draw_the_picture_that_the_prompt_draws(folder):
    _, family = family_of(folder)
    asked = family.ask(*embedded(folder, ["a red circle", ""]))
    wanted = picture(folder)
    assert wanted.shape == (32, 64, 3) and bool(wanted.isfinite().all())
    assert torch.allclose(picture(folder, prompt="", **asked), wanted, atol=1e-5)


@contextlib.contextmanager
def nothing_said():
    """No warning, neither Python's nor of the libraries' loggers."""
    told, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.WARNING)
        one.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            yield
    finally:
        for one, level in zip(loggers, levels):
            one.removeHandler(handler)
            one.setLevel(level)
    # diffusers says of every file without an adapter for the text encoder that it has none, and that this is safe to ignore.
    assert not [sentence for sentence in told if not sentence.startswith("No LoRA keys associated to CLIPTextModel")]


def adapted_layers(model) -> int:
    return sum(1 for layer in model.modules() if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer))


def load(pipeline, folder, component):
    """The saved file in a stock pipeline: by its own loader, or for the one without by PEFT's."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder, weight_name=NAME, adapter_name="it")
        assert pipeline.get_list_adapters() == {component: ["it"]}
        return
    with safe_open(folder / NAME, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = {name.removeprefix(f"{component}."): tensor for name, tensor in load_file(folder / NAME).items()}
    config = peft.LoraConfig(**{key.removeprefix(f"{component}."): value for key, value in config.items() if "peft_type" not in key and value is not None})
    part = peft.inject_adapter_in_model(config, getattr(pipeline, component), "it")
    found = peft.set_peft_model_state_dict(part, tensors, "it")
    assert not found.unexpected_keys and not [name for name in found.missing_keys if "lora_" in name]
    part.peft_config = {"it": config}


@pytest.mark.parametrize("kind,ends", TARGETS, ids=lambda value: value if isinstance(value, str) else "convolutions")
def test_a_step_changes_the_adapter_only_and_its_file_draws_the_same_picture_in_a_fresh_pipeline(kind, ends, folders, tmp_path):
    folder = folders(kind)
    _, family = family_of(folder)
    part = pipelines.load_part(folder, family.component, torch.float32, "tiny")
    before = {name: value.clone() for name, value in part.state_dict().items()}
    spec = parse({"task": {"kind": "image"}, "data": [{"path": "x"}], "method": {"rank": 3, "alpha": 6.0}, "base": {"id": str(folder)}})
    model = methods.attach_peft(part, spec, bases.inspect(Base(id=str(folder))).targets(ends))
    objective = family.objective(pipelines.load_scheduler(folder))
    conditions = family.batch(embedded(folder, ["a blue star", ""]))
    x, noise = random_latents(folder, 2), random_latents(folder, 2, seed=4)
    mixed = objective.mix(x, noise, torch.tensor([0.3, 0.8]))
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    for _ in range(2):
        said = family.predict(model, mixed.noisy, mixed.times, conditions, SIZE)
        (said - mixed.target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trained and all(".lora_" in name for name in trained)
    after = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items() if ".lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    files = methods.finish_peft(model, spec)
    (tmp_path / NAME).write_bytes(to_pipeline_file(files["adapter_model.safetensors"], json.loads(files["adapter_config.json"]), family.component))
    model.eval()
    wanted, bare = picture(folder, part=model.get_base_model()), picture(folder)

    def put(pipeline):
        load(pipeline, tmp_path, family.component)
        fresh = getattr(pipeline, family.component)
        assert (fresh.peft_config["it"].r, fresh.peft_config["it"].lora_alpha) == (3, 6.0)
        assert adapted_layers(fresh) == adapted_layers(model)
        found = {name.replace(".it.", "."): value for name, value in fresh.state_dict().items() if ".lora_" in name}
        ours = {name.replace(".default.", "."): value for name, value in model.get_base_model().state_dict().items() if ".lora_" in name}
        assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)

    with nothing_said():
        found = picture(folder, prepared=put)
    # The same numbers; where they lie in memory decides the last bit of a convolution.
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6 if ends != "auto" or kind == "sana" else 0) and float((wanted - bare).abs().max()) > 1e-3


def tree(folder, rows, **task) -> dict:
    return {
        "name": "tiny", "base": {"id": str(folder)}, "data": [{"path": str(rows)}],
        "task": {"kind": "image", "resolution": 32, "bucket_step": 32, "sample_steps": 2, "caption_dropout": 0.3, **task},
        "schedule": {"steps": 3, "batch_size": 3}, "method": {"rank": 2, "alpha": 4}, "optim": {"lr": 1e-2}, "validation": {"size": 1},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1, "checkpointing": True}, "output": {"sample_prompts": ["a red circle"]},
    }  # fmt: skip


def test_a_whole_run_of_every_family_ends_with_an_adapter_and_pictures(kind, folder, workspace, tmp_path):
    rows = tiny_image.write_pictures(tmp_path / "rows")
    spec = parse(tree(folder, rows))
    assert not [problem for problem in preflight.preflight(workspace, spec).problems if problem.level == "error"]
    run = runs.create(workspace, spec)
    told = train(run)
    assert told[-1]["kind"] == "done"
    losses = [event["loss"] for event in told if event["kind"] in ("step", "eval")]
    assert len(losses) >= 4 and all(0 < loss < 100 for loss in losses)
    samples = [event["answer"] for event in told if event["kind"] == "sample"]
    assert len(samples) >= 2 and all((run / "samples" / name).stat().st_size > 100 for name in samples)
    assert samples[0] != samples[-1], "training has changed the picture"
    (item,) = library.find(workspace)
    found = adapters.read(library.adapter_folder(workspace, item.id))
    assert found.modules and not [problem for problem in adapters.check(found.card, adapters.base_shapes(folder)) if problem.level == "error"]


def test_the_two_tables_of_families_agree_and_every_default_target_is_there(kind, folder):
    name, family = family_of(folder)
    row = families.of_pipeline(name)
    assert {one.pipeline for one in families.IMAGE_FAMILIES} == set(FAMILIES)
    assert row.component == family.component and row.flow == (family.objective is objectives.flow_of_scheduler)
    assert set(bases.inspect(Base(id=str(folder))).targets("auto")) == set(row.targets)


@pytest.mark.parametrize("kind", ["flux", "sd15"])
def test_settings_that_a_family_has_no_use_for_are_refused_with_a_sentence(folder, kind, workspace, tmp_path):
    rows = tiny_image.write_pictures(tmp_path / "rows", count=3)
    sentences = [str(problem.sentence) for problem in preflight.preflight(workspace, parse(tree(folder, rows, weighting="min_snr", bucket_step=8))).problems]
    assert any("FLUX.1 learns by flow matching" in sentence for sentence in sentences) == (kind == "flux")
    assert any("multiples of 16, and task.bucket_step is 8" in sentence for sentence in sentences) == (kind == "flux")
    if kind == "flux":
        with pytest.raises(BaseModelError, match="flow matching"):
            raise families.misfits("FluxPipeline", parse(tree(folder, rows, weighting="debiased")))[0][1]


def test_two_families_with_the_same_encoder_keep_what_they_make_of_it_apart(folders, tmp_path):
    wanted = {}
    for kind in ("sana", "lumina2"):
        name, family = family_of(folders(kind))
        store = latents.Store(tmp_path, folders(kind), name, torch.device("cpu"))
        (wanted[kind],) = embedded(folders(kind), ["a red circle"])
        assert torch.allclose(store.embeddings(family, ["a red circle"])["a red circle"]["prompt"], wanted[kind]["prompt"], atol=1e-6)
    assert latents.print_of(folders("sana"), ("text_encoder",)) == latents.print_of(folders("lumina2"), ("text_encoder",))
    assert wanted["sana"]["prompt"].shape != wanted["lumina2"]["prompt"].shape


def test_large_text_encoders_are_loaded_in_bf16_and_cached_in_fp32(folders, tmp_path, monkeypatch):
    name, family = family_of(folders("z_image"))
    store = latents.Store(tmp_path, folders("z_image"), name, torch.device("cpu"))
    monkeypatch.setattr(latents, "HEAVY", 1000)
    seen = []
    watched = dataclasses.replace(family, embed=lambda pipeline, captions: seen.append(pipeline.text_encoder.dtype) or family.embed(pipeline, captions))
    found = store.embeddings(watched, ["a red circle"])["a red circle"]["prompt"]
    (wanted,) = embedded(folders("z_image"), ["a red circle"])
    assert seen == [torch.bfloat16] and found.dtype == torch.float32
    assert float((found - wanted["prompt"]).norm() / wanted["prompt"].norm()) < 0.05


def test_a_model_of_two_transformers_is_refused_by_name(folders, tmp_path):
    shutil.copytree(folders("wan"), tmp_path / "wan")
    index = json.loads((tmp_path / "wan" / "model_index.json").read_text())
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps(index | {"transformer_2": ["diffusers", "WanTransformer3DModel"]}))
    with pytest.raises(BaseModelError, match="transformer and transformer_2"):
        bases.inspect(Base(id=str(tmp_path / "wan")))


def test_patches_are_those_of_diffusers():
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(patches.pack(x), diffusers.FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(patches.fold(x), diffusers.Flux2KleinPipeline._patchify_latents(x))
    assert torch.equal(patches.unpack(patches.pack(x), 6, 8), x) and torch.equal(patches.unfold(patches.fold(x)), x)
