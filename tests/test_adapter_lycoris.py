"""LyCORIS' LoHa and LoKr come in exactly: every form against its dense definition in fp64; what is unclear is refused by name."""

import pytest
import torch
from safetensors.torch import save, save_file

from lora_studio import adapters, library, shelf
from lora_studio.errors import AdapterError
from lora_studio.jobs import bench
from tests import tiny_image
from tests.browser import made

XL, SD1 = {"ss_base_model_version": "sdxl_base_v1-0"}, {"ss_base_model_version": "sd_v1"}
TOP = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
HERE = "down_blocks.1.attentions.0.transformer_blocks.0"


class Draw:
    """Random fp64 matrices, one after the other."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def loha(draw, out: int, flat: int, rank: int = 2, core: tuple[int, ...] = ()) -> tuple[dict, torch.Tensor]:
    """The tensors of a LoHa and its ΔW without the scale, flat."""
    pairs, dense = {}, []
    for number in "12":
        if core:
            a, b, t = draw(rank, out), draw(rank, flat), draw(rank, rank, *core)
            pairs |= {f"hada_t{number}": t}
            dense.append(torch.einsum("ijkl,jr,ip->prkl", t, b, a).flatten(1))
        else:
            a, b = draw(out, rank), draw(rank, flat)
            dense.append(a @ b)
        pairs |= {f"hada_w{number}_a": a, f"hada_w{number}_b": b}
    return pairs, dense[0] * dense[1]


def lokr(draw, left: tuple[int, int], right: tuple[int, int], form: str, core: tuple[int, ...] = ()) -> tuple[dict, torch.Tensor]:
    """The tensors of a LoKr and its ΔW without the scale, flat. `form` says which sides are decomposed; the rank is 2."""
    (a, b), (c, d), tensors = left, right, {}
    if "1" in form:
        tensors |= {"lokr_w1_a": draw(a, 2), "lokr_w1_b": draw(2, b)}
        w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    else:
        tensors["lokr_w1"] = w1 = draw(a, b)
    if core and "2" in form:
        tensors |= {"lokr_t2": draw(2, 2, *core), "lokr_w2_a": draw(2, c), "lokr_w2_b": draw(2, d)}
        w2 = torch.einsum("ijkl,ip,jr->prkl", tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
    elif "2" in form:
        tensors |= {"lokr_w2_a": draw(c, 2), "lokr_w2_b": draw(2, d)}
        w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    else:
        tensors["lokr_w2"] = w2 = draw(c, d, *core)
    return tensors, torch.kron(w1[:, :, None, None], w2.contiguous()).flatten(1) if w2.ndim == 4 else torch.kron(w1, w2)


def file_of(layers: dict[str, dict], metadata: dict[str, str] = XL, dtype=torch.float64) -> dict[str, bytes]:
    tensors = {f"{layer}.{part}": torch.as_tensor(value).to(dtype).clone() for layer, parts in layers.items() for part, value in parts.items()}
    return {adapters.WEIGHTS: save(tensors, metadata)}


def near(got: torch.Tensor, meant: torch.Tensor, limit: float = 1e-12) -> bool:
    return bool((got.double().flatten(1) - meant).norm() <= limit * meant.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_a_linear_loha_is_its_definition(dtype, alpha):
    tensors, _ = loha(Draw(1), 12, 20, 3)
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    wide = {name: value.double() for name, value in tensors.items()}
    meant = (1.0 if alpha is None else alpha / 3) * (wide["hada_w1_a"] @ wide["hada_w1_b"]) * (wide["hada_w2_a"] @ wide["hada_w2_b"])
    found = adapters.read(file_of({f"{TOP}_attn1_to_q": {**tensors, **({} if alpha is None else {"alpha": alpha})}}, dtype=dtype))
    assert found.card.method == "loha" and found.card.format == "lycoris" and found.card.rank == 9
    assert near(found.modules[f"{HERE}.attn1.to_q"].delta(), meant, 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("form", ["", "1", "2", "12"])
def test_a_lokr_has_a_scale_only_where_a_factor_is_decomposed(form):
    tensors, meant = lokr(Draw(2), (4, 3), (5, 7), form)
    found = adapters.read(file_of({f"{TOP}_attn1_to_q": {**tensors, "alpha": 3.0}}))
    module = found.modules[f"{HERE}.attn1.to_q"]
    assert found.card.method == "lokr" and near(module.delta(), (1.5 if form else 1.0) * meant)
    assert module.rank == found.card.rank <= 15 and module.shape == (20, 21)


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv_shortcut"])
@pytest.mark.parametrize("form", ["loha", "loha core", "lokr", "lokr 2", "lokr core"])
def test_a_convolution_has_the_kernel_of_its_name_or_of_its_core(name, form):
    kernel = (1, 1) if name == "conv_shortcut" else (3, 3)
    area, draw = kernel[0] * kernel[1], Draw(3)
    if form.startswith("loha"):
        tensors, meant = loha(draw, 6, 8 * (1 if "core" in form else area), 2, kernel if "core" in form else ())
    elif form == "lokr":
        tensors, meant = lokr(draw, (2, 2), (3, 4), "", kernel)
    else:
        tensors, meant = lokr(draw, (2, 2), (3, 4 * (1 if "core" in form else area)), "2", kernel if "core" in form else ())
    found = adapters.read(file_of({f"lora_unet_down_blocks_0_resnets_0_{name}": {**tensors, "alpha": 1.0}}))
    module = found.modules[f"down_blocks.0.resnets.0.{name}"]
    assert module.kind == "conv" and module.shape == (6, 8, *kernel)
    assert near(module.delta(), meant * (1.0 if form == "lokr" else 0.5)), "alpha 1, rank 2"


def test_a_projection_is_a_convolution_in_stable_diffusion_1_only_and_where_nothing_tells_it_is_refused():
    layers = {"lora_unet_mid_block_attentions_0_proj_in": {**loha(Draw(4), 8, 8)[0], "alpha": 2.0}}
    name = "mid_block.attentions.0.proj_in"
    assert adapters.read(file_of(layers, SD1)).modules[name].shape == (8, 8, 1, 1)
    assert adapters.read(file_of(layers, XL)).modules[name].shape == (8, 8)
    for width, kind in ((768, "conv"), (1024, "linear"), (2048, "linear")):
        wide = {**layers, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": loha(Draw(5), 8, width)[0]}
        assert adapters.read(file_of(wide, {})).modules[name].kind == kind
    with pytest.raises(AdapterError, match="proj_in is a convolution in Stable Diffusion 1"):
        adapters.read(file_of(layers, {}))


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_layer_of_flux_that_holds_several_is_taken_apart(kind):
    width, hidden, draw = 12, 48, Draw(6)
    rows = {"double_blocks_0_img_attn_qkv": 3 * width, "single_blocks_0_linear1": 3 * width + hidden, "double_blocks_0_img_mlp_0": hidden}
    dense, layers = {}, {}
    for name, out in rows.items():
        tensors, dense[name] = loha(draw, out, width) if kind == "loha" else lokr(draw, (4, 3), (out // 4, 4), "2")
        layers[f"lora_unet_{name}"] = {**tensors, "alpha": 2.0}
    found = adapters.read(file_of(layers, {})).modules
    parts = [f"transformer_blocks.0.attn.to_{one}" for one in "qkv"]
    assert near(torch.cat([found[name].delta() for name in parts]), dense["double_blocks_0_img_attn_qkv"])
    parts = [*(f"single_transformer_blocks.0.attn.to_{one}" for one in "qkv"), "single_transformer_blocks.0.proj_mlp"]
    assert near(torch.cat([found[name].delta() for name in parts]), dense["single_blocks_0_linear1"]) and len(found[parts[3]].B) == hidden
    assert near(found["transformer_blocks.0.ff.net.0.proj"].delta(), dense["double_blocks_0_img_mlp_0"]) and len(found) == 8


def test_text_encoders_and_plain_layers_beside_them_and_lycoris_own_names():
    draw, layers, dense = Draw(7), {}, {}
    for stem, own in ((f"{TOP}_attn1_to_k", f"{HERE}.attn1.to_k"), ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_encoder_2.encoder.layers.0.mlp.fc1")):
        tensors, dense[own] = loha(draw, 8, 6)
        layers[stem] = {**tensors, "alpha": 2.0}
    down, up = draw(2, 6), draw(8, 2)
    layers[f"{TOP}_attn1_to_v"] = {"lora_down.weight": down, "lora_up.weight": up, "alpha": 1.0}
    dense[f"{HERE}.attn1.to_v"] = 0.5 * up @ down
    tensors, dense[f"{HERE}.attn1.to_q"] = lokr(draw, (2, 2), (4, 3), "2")
    layers[f"{TOP}_attn1_to_q"] = {**tensors, "alpha": 2.0}
    found = adapters.read(file_of(layers))
    assert found.card.method == "lycoris" and found.modules.keys() == dense.keys()
    assert all(near(found.modules[name].delta(), meant) for name, meant in dense.items())
    own, meant = loha(draw, 8, 6)
    assert near(adapters.read(file_of({"lycoris_transformer_blocks_0_attn_to_q": own}, {})).modules["transformer_blocks.0.attn.to_q"].delta(), meant)


def test_more_rank_than_the_weight_has_is_not_kept():
    tensors, meant = loha(Draw(8), 10, 14, 6)
    module = adapters.read(file_of({f"{TOP}_attn1_to_q": {**tensors, "alpha": 3.0}})).modules[f"{HERE}.attn1.to_q"]
    assert module.rank == 10 and near(module.delta(), 0.5 * meant)


Q = f"{TOP}_attn1_to_q"
WHOLE = loha(Draw(9), 8, 6)[0]
REFUSED = {
    "DoRA": ({Q: {**WHOLE, "dora_scale": torch.ones(8, 1)}}, r"attn1_to_q\.dora_scale"),
    "scalar": ({Q: {**WHOLE, "scalar": torch.ones(())}}, r"attn1_to_q\.scalar"),
    "half": ({Q: {name: value for name, value in WHOLE.items() if name != "hada_w2_b"}}, "no whole LoHa or LoKr"),
    "one core": ({Q: {**WHOLE, "hada_t1": torch.ones(2, 2, 3, 3)}}, "no whole LoHa or LoKr"),
    "both": ({Q: {**WHOLE, **lokr(Draw(1), (2, 2), (4, 3), "")[0]}}, "no whole LoHa or LoKr"),
    "twice": ({Q: {**WHOLE, "lora_down.weight": torch.ones(2, 6), "lora_up.weight": torch.ones(8, 2)}}, "has its factors twice"),
    "two names": ({Q: WHOLE, Q.replace("down_blocks_1_attentions_0", "input_blocks_4_1"): WHOLE}, "has its factors twice"),
    "bias": ({Q: {**WHOLE, "bias": torch.ones(8)}}, "is not known here"),
    "difference": ({Q: WHOLE, f"{TOP}_norm1": {"diff": torch.ones(8)}}, "is not known here"),
    "OFT": ({Q: {"oft_blocks": torch.ones(2, 2, 2)}}, "is not known here"),
    "other ranks": ({Q: {**WHOLE, "hada_w2_a": torch.ones(8, 3), "hada_w2_b": torch.ones(3, 6)}}, "do not fit each other"),
    "two dims": ({Q: {"lokr_w1_a": torch.ones(2, 1), "lokr_w1_b": torch.ones(1, 2), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(2, 3)}}, "do not fit each other"),
    "an alpha for each row": ({Q: {**WHOLE, "alpha": torch.ones(8)}}, "do not fit each other"),
    "unknown layer": ({"lora_unet_something": WHOLE}, "is no layer known here"),
    "text behind another's name": ({"lycoris_text_model_encoder_layers_0_mlp_fc1": WHOLE}, "is no layer known here"),
    "not nine of each": ({"lora_unet_down_blocks_0_resnets_0_conv1": loha(Draw(1), 8, 10)[0]}, "do not fit each other"),
    "untrained": ({Q: {**WHOLE, "hada_w2_a": torch.zeros(8, 2)}}, "changes nothing"),
    "not a number": ({Q: {**WHOLE, "hada_w2_a": torch.full((8, 2), float("nan"))}}, "NaN"),
    "an endless alpha": ({Q: {**WHOLE, "alpha": float("inf")}}, "Inf"),
}  # fmt: skip


@pytest.mark.parametrize(("layers", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_unclear_is_refused_and_named(layers, said):
    with pytest.raises(AdapterError, match=said):
        adapters.read(file_of(layers))


def test_one_that_would_be_enormous_is_refused_before_it_is_computed():
    files = file_of({f"{TOP}_attn1_to_q": {"lokr_w1": torch.ones(64, 64), "lokr_w2": torch.ones(512, 512)}}, dtype=torch.bfloat16)
    (problem,) = adapters.inspect(files).problems
    assert "has rank 32768 as a plain LoRA and would take 9 GB" in problem.sentence
    with pytest.raises(AdapterError, match="would take 9 GB"):
        adapters.read(files)


def test_it_enters_the_library_and_draws(home, workspace, tmp_path):
    base = tiny_image.write_pipeline(tmp_path / "tiny-sdxl", "sdxl")
    draw, layers, dense = Draw(10), {}, {}
    for number, (name, shape) in enumerate(adapters.base_shapes(base).items()):
        if not name.endswith(("to_q", "to_k", "proj_in", "conv1", "conv_shortcut", "fc1")):
            continue
        starts = {"text_encoder.": "lora_te1_text_model_", "text_encoder_2.": "lora_te2_text_model_"}
        start = next((start for start in starts if name.startswith(start)), "")
        flat = shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)
        if number % 2:
            tensors, dense[name] = loha(draw, shape[0], flat)
        else:
            tensors, dense[name] = lokr(draw, (2, 2), (shape[0] // 2, flat // 2), "2")
        layers[starts.get(start, "lora_unet_") + name.removeprefix(start).replace(".", "_")] = {**{part: 0.1 * value for part, value in tensors.items()}, "alpha": 2.0}
        dense[name] = dense[name] * 0.1 ** len(tensors)
    file = tmp_path / "style.safetensors"
    save_file({f"{layer}.{part}": torch.as_tensor(value).float() for layer, parts in layers.items() for part, value in parts.items()}, file, XL)
    with made.at(home):
        try:
            id = shelf.import_adapter(workspace, str(file), base=str(base), name="style")
            found = adapters.read(library.adapter_folder(workspace, id)).modules
            assert found.keys() == dense.keys() and all(near(found[name].delta(), meant, 1e-6) for name, meant in dense.items())
            assert library.card(workspace, id)["method"] == "lora"
            events = list(shelf.draw(workspace, str(base), "a red circle", {"on": [(id, 1.0)], "off": []}, steps=2, width=32, height=32, seed=1))
            assert events[-1]["sides"]["on"]["path"] != events[-1]["sides"]["off"]["path"]
        finally:
            bench.stop()
