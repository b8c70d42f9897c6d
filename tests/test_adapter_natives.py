"""PEFT's other additive methods are read as exactly what PEFT computes with them."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_studio import adapters, blend
from lora_studio.adapters import natives
from lora_studio.errors import AdapterError
from tests import tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=5, total_step=10, target_modules=TARGETS),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 7}, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS),
    "lokr, both": lambda: peft.LoKrConfig(r=2, alpha=5, decompose_both=True, decompose_factor=8, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=5, target_modules=TARGETS),
}


def saved(config, folder, *, widths=True):
    """An adapter of a tiny Llama, none of whose tensors is zero, in PEFT's own file, and the change PEFT merges for each layer."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.model(), config)
    for tensor in model.parameters():
        if tensor.requires_grad:
            torch.nn.init.normal_(tensor, std=0.3)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    linears = {name: layer.in_features for name, layer in tiny.model().named_modules() if isinstance(layer, torch.nn.Linear)}
    save_file(tensors, file, {"format": "pt", **({natives.WIDTHS: json.dumps(linears)} if widths else {})})
    before = tiny.model()
    again = peft.PeftModel.from_pretrained(tiny.model(), folder).merge_and_unload()
    old = dict(before.named_parameters())
    return {name.removesuffix(".weight"): new.detach() - old[name].detach() for name, new in again.named_parameters() if not torch.equal(new, old[name])}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_native_adapter_is_what_peft_merges(name, tmp_path):
    meant = saved(CONFIGS[name](), tmp_path)
    adapter = adapters.read(tmp_path)
    assert adapter.card.method == name.partition(",")[0] and set(adapter.modules) == set(meant) and len(meant) == 6
    for layer, change in meant.items():
        got = adapter.modules[layer]
        assert got.shape == tuple(change.shape) and got.rank == adapter.card.layers[layer].rank
        assert float((got.delta() - change).norm() / change.norm()) < 2e-6, layer


@pytest.mark.parametrize("name", CONFIGS)
def test_it_blends_with_a_plain_one_and_is_written_as_plain_lora(name, tmp_path):
    meant = saved(CONFIGS[name](), tmp_path)
    adapter = adapters.read(tmp_path)
    adapters.refuse_blend({"one": adapter.card})
    mixed = blend.stack([adapter.modules, adapter.modules], [0.75, -0.25])
    files = adapters.write(adapters.with_modules(adapter.card, mixed))
    for name, data in files.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(data)
    before, after = tiny.model(), peft.PeftModel.from_pretrained(tiny.model(), tmp_path / "out").merge_and_unload()
    for layer, change in meant.items():
        moved = after.get_submodule(layer).weight - before.get_submodule(layer).weight
        assert float((moved - 0.5 * change).norm() / (0.5 * change).norm()) < 1e-5


def test_what_the_file_does_not_say_is_asked_for(tmp_path):
    for name in ("vera", "miss"):
        saved(CONFIGS[name](), tmp_path / name, widths=False)
        (problem,) = adapters.inspect(tmp_path / name).problems
        assert "does not say how wide its layers are" in problem.sentence
    saved(peft.VeraConfig(r=8, target_modules=TARGETS, save_projection=False), tmp_path / "alone")
    assert "without the matrices" in adapters.inspect(tmp_path / "alone").problems[0].sentence
    saved(peft.MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=["q_proj"]), tmp_path / "mini")
    assert "convert_to_lora" in adapters.inspect(tmp_path / "mini").problems[0].sentence


def test_a_tensor_of_another_method_is_refused_by_name(tmp_path):
    saved(CONFIGS["loha"](), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOKR"}))
    with pytest.raises(AdapterError, match=r"lokr adapter.*hada_w"):
        adapters.read(tmp_path)
