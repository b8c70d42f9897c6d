"""Exports: every form is what the adapter is, by its own loader, and the report says how near and what is not carried."""

import json
from pathlib import Path

import diffusers
import gguf
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_studio import adapters, bases, blend, formats, library
from lora_studio.adapters.files import LINEAGE, read_metadata
from lora_studio.errors import AdapterError, StudioError
from lora_studio.inference import exporting, flux_files
from lora_studio.jobs import bench
from lora_studio.lowrank import LowRank
from tests import tiny, tiny_image
from tests.test_adapter_images import updates
from tests.test_cli import command

pytestmark = pytest.mark.usefixtures("with_bench")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipeline(request, tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / request.param, request.param)


def of_image(base, ends=("to_q", "to_out.0", "conv1", "proj_in", "q_proj", "out_proj", "fc1")) -> dict[str, bytes]:
    """An adapter with several ranks and strengths, for the UNet and the text encoders."""
    modules = {name: LowRank(m.A[: 1 + number % 3], m.B[:, : 1 + number % 3], 0.3 + number % 4, m.kind) for number, (name, m) in enumerate(tiny_image.random_adapter(base, seed=1, ends=ends).items())}
    return tiny_image.adapter_files(base, modules)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize(("dtype", "limit"), [(None, 1e-6), ("float16", 2e-3), ("bfloat16", 1e-2)])
def test_the_file_of_an_image_adapter_is_the_adapter_in_a_stock_pipeline(pipeline, form, dtype, limit, workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ask", asked_here)
    id = library.add(workspace, of_image(pipeline), {"name": "style", "base": str(pipeline)})
    told = formats.export_as(workspace, id, tmp_path / "out", form=form, dtype=dtype)
    assert told["target"] == str(tmp_path / "out.safetensors") and told["modules"] == told["layers"] and told["worst"] < limit
    assert told["by"].startswith("diffusers' StableDiffusion") and told["lost"]
    fresh = diffusers.DiffusionPipeline.from_pretrained(pipeline)
    fresh.load_lora_weights(told["target"])
    got, meant = updates(fresh), adapters.read(library.adapter_folder(workspace, id)).modules
    assert got.keys() == meant.keys() and any(name.startswith("text_encoder.") for name in got)
    assert all((got[name] - meant[name].delta()).norm() < limit * meant[name].delta().norm() for name in meant)
    said = json.loads(read_metadata(Path(told["target"]).read_bytes())[LINEAGE])
    assert (said["made"], said["form"], said["parents"][0]["sha256"]) == ("export", form, library.card(workspace, id)["sha256"])
    if form == "kohya":
        with safe_open(told["target"], "pt") as file:
            names = set(file.keys())
            alphas = {float(file.get_tensor(name)) for name in names if name.endswith(".alpha")}
        start = "lora_te1_" if pipeline.name == "sdxl" else "lora_te_"
        assert alphas == {3.0} and any(name.startswith(start) for name in names) and all(name.startswith(("lora_unet_", "lora_te")) for name in names)
        assert all(name.count(".") == 2 or name.endswith(".alpha") for name in names), "dots end a layer's name"


def asked_here(verb, *, seconds=0, **request):
    """The bench's verb in this process."""

    class Job:
        doing = ""

        def check(self):
            pass

    return exporting.export(None, Job(), {"verb": verb, **request})[1]


def test_without_its_base_the_studio_reads_it_itself_and_says_so(pipeline, workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ask", asked_here)
    id = library.add(workspace, of_image(pipeline, ends=("to_q",)), {"name": "style", "base": "somebody/elsewhere"})
    for form in ("diffusers", "kohya"):
        told = formats.export_as(workspace, id, tmp_path / form, form=form)
        assert told["by"].startswith("this studio only") and told["worst"] < 1e-6


FLUX = {"auto_mapping": {"base_model_class": "FluxTransformer2DModel", "parent_library": "diffusers.models.transformers.transformer_flux"}}


def test_flux_goes_out_as_diffusers_and_as_kohya_where_diffusers_can_read_it(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ask", asked_here)
    base = tiny_image.write_pipeline(tmp_path / "flux", "flux")
    modules = tiny_image.random_adapter(base, seed=2, ends=("to_q", "proj_mlp", "ff.net.2"))
    card = adapters.Card("peft", base=str(base), config=FLUX)
    id = library.add(workspace, adapters.write(adapters.with_modules(card, modules)), {"name": "flux", "base": str(base)})
    told = formats.export_as(workspace, id, tmp_path / "flux.safetensors", form="diffusers")
    assert told["modules"] == len(modules) and told["worst"] < 1e-6 and told["by"] == "diffusers' FluxPipeline"
    with pytest.raises(AdapterError, match="cannot read this adapter in that form"):  # its converter knows single blocks of one width only
        formats.export_as(workspace, id, tmp_path / "kohya", form="kohya")
    with pytest.raises(AdapterError, match="kohya's form is written for Stable Diffusion"):
        formats.export_as(workspace, id, tmp_path / "kohya", form="kohya", base="somebody/elsewhere")
    double = {name: module for name, module in modules.items() if name.startswith("transformer_blocks")}
    id = library.add(workspace, adapters.write(adapters.with_modules(card, double)), {"name": "double", "base": str(base)})
    told = formats.export_as(workspace, id, tmp_path / "double", form="kohya")
    assert told["modules"] == len(double) and told["worst"] < 1e-6 and told["by"] == "diffusers' FluxPipeline"
    odd = {"x_embedder": LowRank(torch.ones(1, 4), torch.ones(16, 1))}
    id = library.add(workspace, adapters.write(adapters.with_modules(card, odd)), {"name": "odd", "base": str(base)})
    with pytest.raises(AdapterError, match="x_embedder has no name in kohya's form"):
        formats.export_as(workspace, id, tmp_path / "odd", form="kohya")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("home", "flux", "flux.safetensors", "double.safetensors")]


@pytest.mark.parametrize("missing", [(), ("proj_mlp", "to_k", "add_v_proj")], ids=["all", "some"])
def test_flux_of_its_real_width_by_kohya_is_the_adapter_in_diffusers_own_model(missing, tmp_path):
    base, draw = tiny_image.write_pipeline(tmp_path / "flux", "flux"), torch.Generator().manual_seed(4)
    real = {**json.loads((base / "transformer" / "config.json").read_text()), "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128}
    (base / "transformer" / "config.json").write_text(json.dumps({**real, "axes_dims_rope": [16, 56, 56]}))
    modules = {}
    for blocks, end in flux_files.PLACES:
        wide = {"ff.net.2": (3072, 12288), "ff_context.net.2": (3072, 12288), "proj_out": (3072, 15360), "ff.net.0.proj": (12288, 3072), "ff_context.net.0.proj": (12288, 3072)}
        rows, columns = wide.get(end) or ({"proj_mlp": 12288, "norm.linear": 9216, "norm1.linear": 18432, "norm1_context.linear": 18432}.get(end, 3072), 3072)
        if not end.endswith(missing or "-"):
            rank = 1 + len(modules) % 3
            modules[f"{blocks}.0.{end}"] = LowRank(torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw), 0.5 + rank)
    file = tmp_path / "flux.safetensors"
    save_file(flux_files.tensors(modules, torch.float32), file)
    info = bases.BaseInfo("flux", base, pipeline="FluxPipeline")
    told = exporting._compared(adapters.Adapter(modules, {}, None), exporting._by_pipeline(file, info), "float32")
    assert told["modules"] == len(modules) == len(flux_files.PLACES) - (len(missing) + 1 if missing else 0) and told["worst"] < 1e-6
    assert blend.difference(adapters.read(file).modules, modules).overall < 1e-6, "and this studio reads it alike"


def test_what_differs_when_it_is_read_back_is_not_kept(pipeline, workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ask", asked_here)
    id = library.add(workspace, of_image(pipeline), {"name": "style", "base": str(pipeline)})
    honest = exporting._by_pipeline

    def wrong(file, info):
        found = honest(file, info)
        name = next(iter(found))
        return found | {name: LowRank(found[name].A, found[name].B, 2.0, found[name].kind)}

    monkeypatch.setattr(exporting, "_by_pipeline", wrong)
    with pytest.raises(AdapterError, match="What its own loader read back is not the adapter"):
        formats.export_as(workspace, id, tmp_path / "out", form="kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_what_its_own_loader_cannot_read_is_not_kept(pipeline, workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ask", asked_here)
    id = library.add(workspace, of_image(pipeline, ends=("to_q", "q_proj")), {"name": "style", "base": str(pipeline)})
    with pytest.raises(AdapterError, match="Pipeline cannot read this adapter in that form .Could not automatically"):
        formats.export_as(workspace, id, tmp_path / "out", form="kohya")
    assert formats.export_as(workspace, id, tmp_path / "out", form="diffusers")["worst"] < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out.safetensors"]


def test_a_language_adapter_goes_out_as_peft_and_gguf_on_the_command_line(workspace, base, tmp_path):
    id = library.add(workspace, tiny.adapter_files(base, seed=1), {"name": "mine", "base": str(base)})
    told = json.loads(command("export", "mine", tmp_path / "mine", "--as", "gguf", "--dtype", "float16", "--json").stdout)
    assert told["target"] == str(tmp_path / "mine.gguf") and told["modules"] == told["layers"] == 4 and 0 < told["worst"] < 2e-3 and told["by"] == "gguf"
    own = json.loads(gguf.GGUFReader(tmp_path / "mine.gguf").get_field("lora_studio.lineage").contents())
    assert (own["made"], own["form"], own["parents"][0]["sha256"]) == ("export", "gguf", library.card(workspace, id)["sha256"])
    said = command("export", "mine", tmp_path / "half", "--dtype", "bfloat16").stdout
    assert "4 of 4 layers matched, read by PEFT" in said
    assert peft.utils.load_peft_weights(str(tmp_path / "half"), device="cpu").popitem()[1].dtype == torch.bfloat16
    command("export", "mine", tmp_path / "plain")
    assert library.identify(tmp_path / "plain") == id
    for words, sentence in (
        (["mine", tmp_path / "x", "--as", "kohya"], "is for a language model"),
        (["mine", tmp_path / "x", "--as", "onnx"], "onnx is no form"),
        (["mine", tmp_path / "mine.gguf", "--as", "gguf"], "is there already"),
        (["mine", tmp_path / "x", "--as", "gguf", "--dtype", "bfloat16"], "dtype is 'bfloat16'"),
        (["mine", tmp_path / "x", "--dtype", "int3"], "dtype is 'int3'"),
    ):
        assert sentence in command("export", *words, code=1).stderr
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("x*"))


def test_gguf_needs_a_base(base):
    with pytest.raises(StudioError, match="does not say which base"):
        exporting._checked_base("", "gguf")


def test_lycoris_own_modules_compute_what_a_kohya_file_means(pipeline, workspace, tmp_path, monkeypatch):
    """Their forward, layer by layer, on the very layers of the pipeline: a loader that shares no code with diffusers."""
    from lycoris.modules.locon import LoConModule

    monkeypatch.setattr(bench, "ask", asked_here)
    id = library.add(workspace, of_image(pipeline), {"name": "style", "base": str(pipeline)})
    told = formats.export_as(workspace, id, tmp_path / "out", form="kohya")
    tensors = load_file(told["target"])
    plain, meant = diffusers.DiffusionPipeline.from_pretrained(pipeline), adapters.read(library.adapter_folder(workspace, id)).modules
    starts = {"text_encoder": "lora_te1_" if pipeline.name == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}
    seen, draw = 0, torch.Generator().manual_seed(3)
    for name, update in meant.items():
        part, _, rest = name.partition(".")
        part, rest = (part, rest) if part in starts else ("unet", name)
        owner = getattr(plain, part)
        layer = dict(owner.named_modules()).get(rest) or dict(owner.named_modules())[f"text_model.{rest}"]
        stems = [f"{starts.get(part, 'lora_unet_')}{text}{rest}".replace(".", "_") for text in ("", "text_model.")]
        (stem,) = [stem for stem in stems if f"{stem}.lora_up.weight" in tensors]
        up, down, alpha = (tensors.pop(f"{stem}.{word}") for word in ("lora_up.weight", "lora_down.weight", "alpha"))
        theirs = LoConModule.make_module_from_state_dict(stem, layer, up, down, None, alpha, None).eval()
        size = (2, layer.in_features) if isinstance(layer, torch.nn.Linear) else (2, layer.in_channels, 6, 6)
        given = torch.randn(size, generator=draw)
        wanted = torch.nn.functional.linear(given, layer.weight + update.delta(), layer.bias) if isinstance(layer, torch.nn.Linear) else None
        if wanted is None:
            how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            wanted = torch.nn.functional.conv2d(given, layer.weight + update.delta(), layer.bias, **how)
        with torch.no_grad():
            theirs.apply_to()
            got = layer(given)
            theirs.restore()
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4), name
        seen += 1
    assert seen == len(meant) and not tensors
