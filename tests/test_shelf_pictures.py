"""Image adapters on the shelf: they blend exactly, convolutions too, and leave as the file that diffusers reads, with card and pictures."""

import json
import os
import zipfile

import diffusers
import pytest
import torch
import yaml

from lora_studio import adapters, library, runs, shelf
from lora_studio.adapters.pipeline_files import NAME
from lora_studio.spec import parse
from tests import tiny_image

pytestmark = pytest.mark.usefixtures("with_bench")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sd")


def add(workspace, base, name, **how) -> str:
    return library.add(workspace, tiny_image.adapter_files(base, tiny_image.random_adapter(base, **how)), {"name": name, "base": str(base)})


def picture(base, prepare=lambda pipeline: None) -> torch.Tensor:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline)
    found = pipeline("a red circle", num_inference_steps=2, guidance_scale=3.0, width=32, height=32, generator=torch.Generator().manual_seed(0), output_type="np")
    return torch.from_numpy(found.images)


def test_a_download_holds_the_file_diffusers_reads_and_comes_back_as_the_same_adapter(workspace, base, tmp_path):
    id = add(workspace, base, "style", seed=1)
    archive = shelf.archive(workspace, id, tmp_path)
    assert sorted(name.rpartition("/")[2] for name in zipfile.ZipFile(archive).namelist()) == ["adapter_config.json", "adapter_model.safetensors", NAME]
    shelf.export_adapter(workspace, id, tmp_path / "out")

    def load(pipeline):
        pipeline.load_lora_weights(tmp_path / "out", weight_name=NAME, adapter_name="it")
        assert pipeline.get_list_adapters() == {"unet": ["it"]}

    def merge(pipeline):
        modules = adapters.read(library.adapter_folder(workspace, id)).modules
        state = pipeline.unet.state_dict()
        for name, module in modules.items():
            state[f"{name}.weight"] += module.delta()

    assert torch.allclose(picture(base, load), picture(base, merge), atol=1e-5) and not torch.allclose(picture(base), picture(base, load), atol=1e-3)
    library.remove(workspace, id)
    assert shelf.import_files(workspace, [archive]) == id


def test_image_adapters_with_different_targets_blend_exactly_and_keep_what_they_are_for(workspace, base, tmp_path):
    one, two = add(workspace, base, "one", seed=1), add(workspace, base, "two", seed=2, ends=("to_v", "conv1", "proj_out"), rank=2)
    id, done = shelf.blend(workspace, [(one, 1.0), (two, -0.5)], name="both")
    assert done["loss"] < 1e-6
    parts = [adapters.read(library.adapter_folder(workspace, part)).modules for part in (one, two)]
    both = adapters.read(library.adapter_folder(workspace, id)).modules
    assert both.keys() == parts[0].keys() | parts[1].keys()
    for name, module in both.items():
        meant = sum(weight * part[name].delta().double() for part, weight in zip(parts, (1.0, -0.5)) if name in part)
        assert torch.allclose(module.delta().double(), meant, rtol=0, atol=1e-6 * float(meant.abs().max()))
    shelf.export_adapter(workspace, id, tmp_path / "both")
    assert (tmp_path / "both" / NAME).is_file()


def test_the_card_of_an_image_adapter_is_one_the_hub_shows_pictures_of(workspace, base, home):
    from PIL import Image

    run = runs.create(workspace, parse({"name": "style", "base": {"id": str(base)}, "task": {"kind": "image", "trigger": "sks"}, "data": [{"path": "x"}]}))
    Image.new("RGB", (8, 8), "red").save(run / "samples" / "abc.png")
    with runs.Events(run) as events:
        events.emit("sample", step=0, prompt="a red circle", answer="base.png")
        events.emit("sample", step=5, prompt="a red circle", answer="abc.png")
    files = tiny_image.adapter_files(base, tiny_image.random_adapter(base, seed=1), name="runwayml/stable-diffusion-v1-5")
    facts = {"name": "style", "base": "runwayml/stable-diffusion-v1-5", "run": run.name, "trigger": "sks"}
    id = library.add(workspace, files, facts)
    draft = shelf.draft(workspace, id, shelf.Push("me/style", license="openrail"))
    assert {name for name, _ in draft.files} == {"README.md", "adapter_config.json", "adapter_model.safetensors", NAME, "sample-0.png"}
    head = yaml.safe_load(draft.readme.split("---")[1])
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-image" and head["instance_prompt"] == "sks"
    assert head["widget"] == [{"text": "a red circle", "output": {"url": "sample-0.png"}}]
    assert f'load_lora_weights("me/style", weight_name="{NAME}")' in draft.readme and "PeftModel" not in draft.readme
    assert not draft.findings and os.fspath(home) not in draft.readme
    config = json.loads((library.adapter_folder(workspace, id) / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == "UNet2DConditionModel"
