"""Models in one file: their parts are the tensors that went in, the shipped sizes fit the real layouts, and a whole run goes from such a base."""

import json

import diffusers
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_studio import adapters, bases, library, preflight, runs, shelf, single_files
from lora_studio.errors import BaseModelError
from lora_studio.inference.draw import Brush, Easel
from lora_studio.spec import Base, parse
from lora_studio.training import pipelines, single_file
from tests import ldm, tiny_image
from tests.training.test_job import adapter_bytes, train

PARTS = {"sd1": ("unet", "vae", "text_encoder"), "sd2": ("unet", "vae", "text_encoder"), "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2")}
TINY = {"sd1": lambda: tiny_image.sd(), "sd2": lambda: tiny_image.sd("v_prediction"), "sdxl": lambda: tiny_image.sdxl()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each tiny model as one file, and as a folder."""
    place, made = tmp_path_factory.mktemp("bases"), {}

    def get(kind, **how):
        key = (kind, *how.items())
        if key not in made:
            top = place / f"{kind}-{len(made)}"
            pipeline = TINY[kind]()
            made[key] = ldm.write(top / f"tiny-{kind}.safetensors", pipeline, kind, **how)
            pipeline.save_pretrained(top / "folder")
        return made[key]

    return get


def same(found: torch.nn.Module, wanted: torch.nn.Module) -> bool:
    left, right = found.state_dict(), wanted.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("ema", [False, True], ids=["plain", "with EMA"])
@pytest.mark.parametrize("kind", PARTS)
def test_every_part_of_one_file_is_the_part_that_went_in(files, kind, ema):
    file, pipeline = files(kind, ema=ema), TINY[kind]()
    for part in PARTS[kind]:
        assert same(pipelines.load_part(file, part, torch.float32, "tiny"), getattr(pipeline, part)), part


def test_a_file_of_the_first_days_without_text_model_in_its_names_is_read_too(tmp_path):
    file = ldm.write(tmp_path / "old.safetensors", TINY["sd1"](), "sd1")
    save_file({name.replace(".text_model.", "."): value for name, value in load_file(file).items()}, file)
    assert same(pipelines.load_part(file, "text_encoder", torch.float32, "tiny"), TINY["sd1"]().text_encoder)
    assert any(name.startswith("text_encoder.encoder.layers.0.") for name in adapters.base_shapes(file))


def test_a_file_in_fp16_is_widened_to_what_was_asked_for(files):
    part = pipelines.load_part(files("sd1", dtype=torch.float16), "unet", torch.float32, "tiny")
    assert {value.dtype for value in part.parameters()} == {torch.float32}
    assert torch.equal(part.conv_in.weight, TINY["sd1"]().unet.conv_in.weight.half().float())


@pytest.mark.parametrize("kind", PARTS)
def test_the_header_alone_tells_what_the_folder_tells(files, kind):
    file = files(kind)
    folder = file.parent / "folder"
    one, other = (bases.inspect(Base(id=str(place))) for place in (file, folder))
    assert one.pipeline == other.pipeline and one.parameters == other.parameters
    assert sorted(one.linears) == sorted(other.linears) and one.targets("auto") == other.targets("auto")
    assert adapters.base_shapes(file) == adapters.base_shapes(folder)
    assert bases.sample_edge(one) == bases.sample_edge(other) == shelf.picture_edge(str(file))


@pytest.mark.parametrize("kind", PARTS)
def test_a_bench_draws_from_one_file_the_picture_of_the_folder(files, kind, tmp_path):
    file = files(kind)
    drawn = []
    for base in (file, file.parent / "folder"):
        easel = Easel(Base(id=str(base)))
        easel.put("it", tiny_image.random_adapter(file.parent / "folder", seed=1))
        drawn.append(easel.draw("a red circle", Brush(steps=2, width=32, height=32), tmp_path / base.name, weights={"it": 1.0}, step=lambda _: None))
    pictures = [Image.open(path).tobytes() for path in drawn]
    assert pictures[0] == pictures[1] and len(set(pictures[0])) > 4


def tree(base, rows) -> dict:
    return {
        "name": "tiny", "base": {"id": str(base)}, "data": [{"path": str(rows)}], "task": {"kind": "image", "resolution": 32, "bucket_step": 8, "sample_steps": 2},
        "schedule": {"steps": 3, "batch_size": 3}, "method": {"rank": 2, "alpha": 4}, "optim": {"lr": 1e-2}, "validation": {"size": 1},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1}, "output": {"sample_prompts": ["a red circle"]},
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_a_run_from_one_file_ends_with_the_adapter_of_the_same_run_from_the_folder(files, kind, workspace, tmp_path):
    rows, made = tiny_image.write_pictures(tmp_path / "rows"), []
    file = files(kind)
    for base in (file, file.parent / "folder"):
        spec = preflight.pinned(parse(tree(base, rows)))
        assert not [problem for problem in preflight.preflight(workspace, spec).problems if problem.level == "error"]
        run = runs.create(workspace, spec)
        told = train(run)
        assert told[-1]["kind"] == "done" and [event for event in told if event["kind"] == "sample"]
        made.append(adapter_bytes(run))
    assert made[0] == made[1]
    first = next(item for item in library.find(workspace) if item.base == str(file))
    card = shelf.draft(workspace, first.id, shelf.Push("someone/tiny")).readme
    assert f'{first_pipeline(file)}.from_single_file("tiny-{kind}.safetensors")' in card and str(file.parent) not in card


def first_pipeline(file) -> str:
    return bases.inspect(Base(id=str(file))).pipeline


# ---- the shipped sizes, at real widths, without memory


def of_meta(part: str, name: str):
    folder = single_files.HERE / name
    index = json.loads((folder / "model_index.json").read_text())
    library_, kind = index[part]
    with torch.device("meta"):
        if library_ == "diffusers":
            found = getattr(diffusers, kind)
            return found.from_config(found.load_config(folder / part))
        found = getattr(transformers, kind)
        return found(transformers.CLIPTextConfig.from_pretrained(folder / part))


def layout(name: str) -> dict[str, list[int]]:
    """The header of a real file: every name and its shape."""
    pipeline = type("Parts", (), {part: of_meta(part, name) for part in PARTS[name]})()
    return {key: list(value.shape) for key, value in ldm.tensors(pipeline, name).items()}


@pytest.fixture(scope="module", params=PARTS)
def real(request):
    return request.param, layout(request.param)


def write_header(path, shapes, **metadata):
    """A safetensors file whose tensors are holes: the header is whole, the disk holds nothing."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt", **metadata}, **entries}).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return path


FACTS = {"sd1": ("StableDiffusionPipeline", 859_520_964, 512), "sd2": ("StableDiffusionPipeline", 865_910_724, 768), "sdxl": ("StableDiffusionXLPipeline", 2_567_463_684, 1024)}


def test_a_real_layout_is_known_and_each_of_its_layers_is_one_of_diffusers(real, tmp_path):
    name, shapes = real
    file = write_header(tmp_path / f"{name}.safetensors", shapes)
    info = bases.inspect(Base(id=str(file)))
    assert (info.pipeline, info.parameters, bases.sample_edge(info)) == FACTS[name]
    single = single_files.recognise("it", file)
    assert single.sizes == single_files.HERE / name
    found = single_files.shapes_of("it", single, "unet")
    assert found == {key: list(value.shape) for key, value in of_meta("unet", name).state_dict().items()}, "a bijection, shapes and all"
    for part in PARTS[name][2:]:
        matrices = {key.removeprefix("text_model."): list(value.shape) for key, value in of_meta(part, name).state_dict().items() if "layers." in key and value.ndim == 2}
        found = single_files.shapes_of("it", single, part)
        assert {key: shape for key, shape in found.items() if "layers." in key} == matrices


def test_names_of_a_real_layout_are_those_that_files_have(real):
    name, shapes = real
    known = {
        "sd1": {"model.diffusion_model.output_blocks.11.0.skip_connection.weight": [320, 640, 1, 1], "model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320, 1, 1],
                "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": [3072, 768], "first_stage_model.decoder.up.3.upsample.conv.weight": [512, 512, 3, 3]},
        "sd2": {"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": [320, 1024], "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": [3072, 1024]},
        "sdxl": {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": [1280], "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": [3840, 1280],
                 "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": [1280, 2048], "model.diffusion_model.label_emb.0.0.weight": [1280, 2816],
                 "model.diffusion_model.output_blocks.2.2.conv.weight": [1280, 1280, 3, 3], "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": [49408, 768]},
    }  # fmt: skip
    assert {key: shapes.get(key) for key in known[name]} == known[name]


def test_clips_own_tokenizer_is_made_from_the_merges_that_ship():
    words = single_file.clip_tokenizer(transformers.CLIPTokenizer, pad="<|endoftext|>")
    assert words("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407] and words("Hello world!").input_ids[1:-1] == [3306, 1002, 256]
    assert len(words) == 49408 and words("cat", padding="max_length").input_ids[-1] == 49407
    assert single_file.clip_tokenizer(transformers.CLIPTokenizer, pad="!")("cat", padding="max_length").input_ids[3:] == [0] * 74
    assert "MIT License" in (single_files.HERE / "clip" / "LICENSE").read_text()


def test_the_stock_pipeline_is_put_together_around_a_real_file(real, tmp_path):
    name, shapes = real
    file = write_header(tmp_path / f"{name}.safetensors", shapes)
    given = {part: of_meta(part, name) for part in PARTS[name]}
    made = pipelines.load_pipeline(file, bases.inspect(Base(id=str(file))).pipeline, given, without=())
    assert type(made).__name__ == FACTS[name][0] and made.unet is given["unet"]
    assert made.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert made.tokenizer.pad_token == ("!" if name == "sd2" else "<|endoftext|>") and made.scheduler.config.num_train_timesteps == 1000
    if name == "sdxl":
        assert made.tokenizer_2.pad_token == "!" and made.config.force_zeros_for_empty_prompt


# ---- what it says of its answer


@pytest.mark.parametrize(
    ("kind", "more", "metadata", "beside", "wanted", "edge"),
    [
        ("sd1", {}, {}, "", "epsilon", 512),
        ("sd1", {}, {"modelspec.prediction_type": "v"}, "", "v_prediction", 512),
        ("sd2", {}, {}, "", "v_prediction", 768),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "", "epsilon", 512),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "", "epsilon", 512),
        ("sd2", {}, {}, "model:\n  params:\n    parameterization: eps\n", "epsilon", 512),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, 'model:\n  params:\n    parameterization: "v"\n', "v_prediction", 768),
        ("sdxl", {"v_pred": [], "ztsnr": []}, {}, "", "v_prediction", 1024),
    ],
)
def test_noise_or_velocity_is_what_the_file_says_and_a_guess_is_said(kind, more, metadata, beside, wanted, edge, tmp_path):
    file = write_header(tmp_path / "it.safetensors", layout(kind) | more, **metadata)
    if beside:
        file.with_suffix(".yaml").write_text(beside)
    info = bases.inspect(Base(id=str(file)))
    scheduler = pipelines.load_scheduler(file)
    assert scheduler.config.prediction_type == wanted and bases.sample_edge(info) == edge
    assert ("parameterization: eps" in info.note) == (kind == "sd2" and not metadata and not beside)
    assert bool(scheduler.config.get("rescale_betas_zero_snr")) == bool(more)


# ---- what is no such base


def without(shapes, start):
    return {name: shape for name, shape in shapes.items() if not name.startswith(start)}


REFUSED = {
    "an adapter": (lambda _: {"lora_unet_down_blocks_0.lora_down.weight": [4, 8]}, "is an adapter"),
    "PEFT's adapter": (lambda _: {"base_model.model.mid.lora_A.weight": [4, 8]}, "is an adapter"),
    "a VAE": (lambda shapes: {name.removeprefix("first_stage_model."): shape for name, shape in shapes.items() if name.startswith("first_stage")}, "a VAE alone"),
    "a text encoder": (lambda shapes: {name: shape for name, shape in shapes.items() if name.startswith("cond_stage")}, "a text encoder alone"),
    "a UNet": (lambda shapes: without(shapes, ("cond_stage", "first_stage")), "it has no text encoder"),
    "no VAE": (lambda shapes: without(shapes, "first_stage"), "it has no VAE"),
    "inpainting": (lambda shapes: shapes | {single_files.FIRST: [320, 9, 3, 3]}, "an inpainting model"),
    "pix2pix": (lambda shapes: shapes | {single_files.FIRST: [320, 8, 3, 3]}, "InstructPix2Pix"),
    "a refiner": (lambda shapes: without(shapes, "cond_stage") | {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": [1280]}, "the refiner of Stable Diffusion XL"),
    "FLUX": (lambda _: {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": [8, 8]}, "a FLUX"),
    "SD3": (lambda _: {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": [8, 8]}, "a Stable Diffusion 3 model"),
    "a part": (lambda _: {"down_blocks.0.resnets.0.conv1.weight": [8, 8, 3, 3]}, "one part of a pipeline"),
    "a small relative": (lambda shapes: without(shapes, "model.diffusion_model.middle_block.2"), "a relative of Stable Diffusion 1 with"),
    "nothing known": (lambda _: {"x": [1]}, "no image model that is known"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_whole_model_is_refused_by_name(case, tmp_path):
    make, words = REFUSED[case]
    file = write_header(tmp_path / "it.safetensors", make(layout("sd1")))
    with pytest.raises(BaseModelError, match=words):
        bases.inspect(Base(id=str(file)))


def test_a_file_that_is_cut_off_or_pickled_or_not_there_is_a_sentence(files, tmp_path, monkeypatch):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files("sd1").read_bytes()[:-5])
    for name, words in (("cut.safetensors", "cut off"), ("it.ckpt", "is a pickle"), ("it.gguf", "a .gguf file"), ("not-there/it.safetensors", "no file"), ("nowhere.pt", "no file")):
        if name.startswith("it"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(BaseModelError, match=words):
            bases.inspect(Base(id=str(tmp_path / name)))
    monkeypatch.chdir(files("sd1").parent)
    monkeypatch.setenv("HOME", str(files("sd1").parent))
    for id in ("tiny-sd1.safetensors", "./tiny-sd1.safetensors", "~/tiny-sd1.safetensors"):
        assert bases.inspect(Base(id=id)).pipeline == "StableDiffusionPipeline"
        assert preflight.pinned(parse(tree(id, "x"))).base.id == str(files("sd1"))


def test_a_part_with_a_hole_in_it_is_refused(files, tmp_path):
    pipeline = TINY["sd1"]()
    file = ldm.write(tmp_path / "hole.safetensors", pipeline, "sd1")
    save_file({name: value for name, value in load_file(file).items() if not name.endswith("layers.1.mlp.fc1.bias")}, file)
    with pytest.raises(BaseModelError, match="tensors of its text_encoder are missing"):
        pipelines.load_part(file, "text_encoder", torch.float32, "it")
