"""Adapters of image models by other programs: every layer is found, its strength is theirs, and it comes into the library as one of ours."""

import diffusers
import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import save, save_file

from lora_studio import adapters, library, shelf
from lora_studio.adapters import images
from lora_studio.errors import AdapterError
from lora_studio.jobs import bench
from tests import ldm, tiny_image
from tests.browser import made
from tests.training.test_single_file import of_meta

TARGETS = {"unet": ["to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in"], "text": ["q_proj", "out_proj", "fc1"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_image.write_pipeline(tmp_path_factory.mktemp("bases") / "tiny-sdxl", "sdxl")


def with_adapter(pipeline, **how):
    """A pipeline whose UNet and text encoders have random adapters, as diffusers' own scripts put them there."""
    torch.manual_seed(1)
    for part, targets in (("unet", "unet"), ("text_encoder", "text"), ("text_encoder_2", "text")):
        model = getattr(pipeline, part, None)
        if model is not None:
            model.add_adapter(peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=TARGETS[targets], init_lora_weights=False, **how), "default")
    return pipeline


def parts(pipeline):
    return {part: getattr(pipeline, part) for part in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, part, None) is not None}


def updates(pipeline) -> dict[str, torch.Tensor]:
    """What PEFT adds to each layer's weight, by the names that we have for the layers."""
    found = {}
    for part, model in parts(pipeline).items():
        for name, layer in model.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                own = name if part == "unet" else f"{part}.{name.removeprefix('text_model.')}"
                found[own] = layer.get_delta_weight(next(iter(layer.lora_A))).detach()
    return found


def same(modules, wanted) -> bool:
    return modules.keys() == wanted.keys() and all(torch.allclose(modules[name].delta(), wanted[name], atol=1e-5) for name in wanted)


def layers_and(pipeline):
    return {f"{part}_lora_layers": peft.get_peft_model_state_dict(model, adapter_name="default") for part, model in parts(pipeline).items()}


@pytest.mark.parametrize("how", [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 5.0}}], ids=["plain", "rank-stabilised", "patterns"])
@pytest.mark.parametrize("told", [True, False], ids=["with settings", "without"])
def test_a_file_of_diffusers_is_what_the_stock_pipeline_makes_of_it(how, told, base, tmp_path):
    pipeline = with_adapter(diffusers.StableDiffusionXLPipeline.from_pretrained(base), **how)
    metadata = {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict() for part, model in parts(pipeline).items()} if told else {}
    diffusers.StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers_and(pipeline), **metadata)
    fresh = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    fresh.load_lora_weights(tmp_path)
    found = adapters.read(tmp_path / "pytorch_lora_weights.safetensors")
    assert found.card.format == "diffusers" and same(found.modules, updates(fresh))
    if told:
        assert same(found.modules, updates(pipeline))
    assert not adapters.check(found.card, adapters.base_shapes(base))


def kohya(pipeline, alpha: float) -> dict[str, torch.Tensor]:
    """The file that kohya's scripts would write."""
    found = {}
    starts = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    for part, model in parts(pipeline).items():
        for name, value in peft.get_peft_model_state_dict(model, adapter_name="default").items():
            layer, _, end = name.removesuffix(".weight").rpartition(".lora_")
            layer = layer if part == "unet" or layer.startswith("text_model.") else f"text_model.{layer}"
            flat = f"{starts[part]}_{layer.replace('.', '_')}"
            found[f"{flat}.lora_{'down' if end == 'A' else 'up'}.weight"] = value.contiguous()
            found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found


def test_a_file_of_kohya_is_what_the_stock_pipeline_makes_of_it_and_draws_the_same(base, home, workspace, tmp_path):
    pipeline = with_adapter(diffusers.StableDiffusionXLPipeline.from_pretrained(base))
    file = tmp_path / "style.safetensors"
    save_file(kohya(pipeline, 1.5), file, {"ss_base_model_version": "sdxl_base_v1-0"})
    fresh = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    fresh.load_lora_weights(file)
    wanted = updates(fresh)
    found = adapters.read(file)
    assert found.card.format == "kohya" and same(found.modules, wanted) and any(name.startswith("text_encoder_2.") for name in wanted)
    with made.at(home):
        try:
            id = shelf.import_adapter(workspace, str(file), base=str(base), name="style")
            folder = library.adapter_folder(workspace, id)
            assert same(adapters.read(folder).modules, wanted) and library.card(workspace, id)["base"] == str(base)
            again = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
            again.load_lora_weights(shelf.export_adapter(workspace, id, tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors")
            assert all(torch.allclose(updates(again)[name], wanted[name], atol=1e-5) for name in wanted)
            events = list(shelf.draw(workspace, str(base), "a red circle", {"on": [(id, 1.0)], "off": []}, steps=2, width=32, height=32, seed=1))
            assert events[-1]["sides"]["on"]["path"] != events[-1]["sides"]["off"]["path"]
            other, _ = shelf.blend(workspace, [(id, 0.5)], name="half")
            assert all(torch.allclose(module.delta(), 0.5 * wanted[name], atol=1e-5) for name, module in adapters.read(library.adapter_folder(workspace, other)).modules.items())
        finally:
            bench.stop()


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_every_layer_of_a_real_unet_is_found_by_all_of_its_names(name):
    model = of_meta("unet", name)
    up = tuple("CrossAttn" in kind for kind in model.config.up_block_types)
    layers = [layer for layer, module in model.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert len(layers) > 200
    for layer in layers:
        old = ldm.unet_name(f"{layer}.weight", 2, up).removesuffix(".weight")
        for stem in (f"lora_unet_{layer.replace('.', '_')}", f"lora_unet_{old.replace('.', '_')}", f"unet.{layer}"):
            assert images.layers_of(stem) == (layer,), stem
    for part in ("text_encoder", *(["text_encoder_2"] if name == "sdxl" else [])):
        flat = {"text_encoder": "lora_te1_" if name == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}[part]
        for layer, module in of_meta(part, name).named_modules():
            if isinstance(module, torch.nn.Linear) and "layers" in layer:
                own = layer.removeprefix("text_model.")
                assert images.layers_of(f"{flat}text_model_{own.replace('.', '_')}") == images.layers_of(f"{part}.text_model.{own}") == (f"{part}.{own}",)


def flux_file(width: int = 16, hidden: int = 64) -> dict[str, torch.Tensor]:
    shapes = {
        "double_blocks_0_img_attn_qkv": (3 * width, width), "double_blocks_0_txt_attn_qkv": (3 * width, width), "double_blocks_0_img_attn_proj": (width, width),
        "double_blocks_0_txt_attn_proj": (width, width), "double_blocks_0_img_mlp_0": (hidden, width), "double_blocks_0_img_mlp_2": (width, hidden),
        "double_blocks_0_txt_mlp_0": (hidden, width), "double_blocks_0_txt_mlp_2": (width, hidden), "double_blocks_0_img_mod_lin": (6 * width, width),
        "double_blocks_0_txt_mod_lin": (6 * width, width), "single_blocks_0_linear1": (3 * width + hidden, width), "single_blocks_0_linear2": (width, width + hidden),
        "single_blocks_0_modulation_lin": (3 * width, width),
    }  # fmt: skip
    draw = torch.Generator().manual_seed(2)
    found = {}
    for name, (rows, columns) in shapes.items():
        found |= {f"lora_unet_{name}.lora_down.weight": torch.randn(2, columns, generator=draw), f"lora_unet_{name}.lora_up.weight": torch.randn(rows, 2, generator=draw)}
        found[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
    return found


def test_flux_by_kohya_is_taken_apart_as_diffusers_takes_it_apart(tmp_path, monkeypatch):
    wide = flux_file(3072, 12288)
    save_file(wide, tmp_path / "flux.safetensors")
    found = adapters.read(tmp_path / "flux.safetensors")
    theirs = _convert_kohya_flux_lora_to_diffusers({name: value.clone() for name, value in wide.items()})
    layers = {name.removeprefix("transformer.").removesuffix(".lora_A.weight") for name in theirs if name.endswith(".lora_A.weight")}
    assert found.modules.keys() == layers and found.card.config["auto_mapping"]["base_model_class"] == "FluxTransformer2DModel"
    x = torch.randn(3072, generator=torch.Generator().manual_seed(1))
    for name, module in found.modules.items():
        A, B = (theirs[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        given = x if A.shape[1] == 3072 else torch.ones(A.shape[1])
        assert torch.allclose(module.scale * (module.B @ (module.A @ given)), B @ (A @ given), rtol=1e-3, atol=1e-2), name


def test_flux_by_its_makers_names_is_the_same(tmp_path):
    native = {}
    for name, value in flux_file().items():
        if name.endswith("alpha"):
            continue
        layer = images._words(name.removeprefix("lora_unet_").partition(".")[0])
        native[f"diffusion_model.{layer}.lora_{'A' if 'down' in name else 'B'}.weight"] = value
    save_file(native, tmp_path / "native.safetensors")
    save_file(flux_file(), tmp_path / "kohya.safetensors")
    one, other = (adapters.read(tmp_path / f"{name}.safetensors") for name in ("native", "kohya"))
    assert one.card.format == "native" and all(torch.allclose(one.modules[name].delta() / 2, other.modules[name].delta()) for name in other.modules)


def test_flux_by_onetrainers_names_is_the_same_and_its_embeddings_are_refused_by_name(tmp_path):
    one = adapters.read({adapters.WEIGHTS: save(flux_file())})
    tensors = {}
    for name, module in one.modules.items():
        stem = f"lora_transformer_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": module.A, f"{stem}.lora_up.weight": module.B.contiguous(), f"{stem}.alpha": torch.tensor(module.scale * module.rank)}
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, tmp_path / "onetrainer.safetensors")
    other = adapters.read(tmp_path / "onetrainer.safetensors")
    assert one.modules.keys() == other.modules.keys() and len(one.modules) > 10
    assert all(torch.equal(one.modules[name].delta(), other.modules[name].delta()) for name in one.modules)
    save_file({**{name: value.contiguous().clone() for name, value in tensors.items()}, "bundle_emb.word.t5": torch.ones(1, 4)}, tmp_path / "bundle.safetensors")
    with pytest.raises(AdapterError, match=r"bundle_emb\.word"):
        adapters.read(tmp_path / "bundle.safetensors")


def test_z_image_for_comfy_keeps_its_names_and_a_fused_layer_becomes_three(tmp_path):
    draw = {"layers.0.attention.to_q": (4, 4), "layers.0.feed_forward.w1": (8, 4), "noise_refiner.0.attention.qkv": (12, 4), "layers.0.attention.out": (4, 4)}
    tensors = {f"diffusion_model.{name}.lora_{part}.weight": torch.randn(*((2, shape[1]) if part == "A" else (shape[0], 2))) for name, shape in draw.items() for part in "AB"}
    save_file(tensors, tmp_path / "z.safetensors")
    found = adapters.read(tmp_path / "z.safetensors")
    assert found.card.family == "Z-Image"
    assert sorted(found.modules) == sorted(["layers.0.attention.to_q", "layers.0.feed_forward.w1", "layers.0.attention.to_out.0", *(f"noise_refiner.0.attention.to_{one}" for one in "qkv")])
    whole = tensors["diffusion_model.noise_refiner.0.attention.qkv.lora_B.weight"] @ tensors["diffusion_model.noise_refiner.0.attention.qkv.lora_A.weight"]
    assert torch.allclose(torch.cat([found.modules[f"noise_refiner.0.attention.to_{one}"].delta() for one in "qkv"]), whole, atol=1e-6)


@pytest.mark.parametrize(
    "names",
    [["lora_unet_mid_block_attentions_0_proj_in.oft_blocks"], ["unet.mid_block.attentions.0.proj_in.lora_A.weight", "unet.mid_block.attentions.0.proj_in.lora_B.weight", "unet.conv_in.dora_scale"],
     ["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_B.weight"]],
    ids=["OFT", "DoRA", "Stable Diffusion 3 by its makers' names"],
)  # fmt: skip
def test_what_holds_more_than_lora_is_refused_and_the_tensor_named(names):
    data = save({name: torch.ones(2, 2) for name in names})
    with pytest.raises(AdapterError, match="is not known here"):
        adapters.read({adapters.WEIGHTS: data})
