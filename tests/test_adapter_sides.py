"""VeRA, MiSS, OFT and IA3 as PEFT saves them: their files leave out how wide the layers are, and the base says it."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_studio import adapters, library, shelf
from lora_studio.adapters import sides
from lora_studio.errors import AdapterError
from lora_studio.home import demo_base
from tests.test_dora import merged
from tests.test_multiplied import gpt2
from tests.test_shelf import place, space

__all__ = ["place", "space"]  # pytest finds fixtures by their names here
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS), "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "oft of one block": lambda: peft.OFTConfig(r=0, oft_block_size=8, block_share=True, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}  # fmt: skip
TURNED = {  # of weights that lie transposed
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
    "ia3": lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
}


def saved(base, folder: Path, config, *, name: str = "") -> Path:
    """An adapter none of whose tensors is as it began, in PEFT's own folder, that names its base."""
    torch.manual_seed(0)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    known = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps({**known, "base_model_name_or_path": name or str(base)}))
    return folder


def changed(base, folder) -> dict[str, torch.Tensor]:
    """What PEFT's merge adds to each layer, in the base's own layout."""
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    moved = {name: after - before[name] for name, after in merged(base, folder).state_dict().items() if name.endswith(".weight")}
    return {name.removesuffix(".weight"): value for name, value in moved.items() if bool(value.any())}


def update(module, weight: torch.Tensor) -> torch.Tensor:
    """What a module adds to a weight (out, in)."""
    return module.delta() if hasattr(module, "A") else module.delta(weight)


@pytest.mark.parametrize("kind", CONFIGS)
def test_with_the_bases_sides_it_is_what_peft_merges(base, tmp_path, kind):
    folder = saved(base, tmp_path / "it", CONFIGS[kind]())
    with pytest.raises(AdapterError, match="does not say how wide its layers are"):
        adapters.read(folder)
    assert sides.base_to_ask(folder) == str(base)
    files = sides.noted(folder, adapters.base_shapes(base))
    modules, meant, before = adapters.read(files).modules, changed(base, folder), load_file(base / "model.safetensors")
    assert modules.keys() == meant.keys() and len(meant) == 6
    for name, change in meant.items():
        assert float((update(modules[name], before[f"{name}.weight"]) - change).norm() / change.norm()) < 1e-5, name


@pytest.mark.parametrize("kind", TURNED)
def test_sides_of_weights_that_lie_transposed_are_turned(tmp_path, kind):
    base = gpt2(tmp_path / "base")
    folder = saved(base, tmp_path / "it", TURNED[kind]())
    files = sides.noted(folder, adapters.base_shapes(base))
    modules, meant, before = adapters.read(files).modules, changed(base, folder), transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert len(modules) == len(meant) > 1
    for name, module in modules.items():
        change = meant[name].T
        assert module.shape == tuple(change.shape)
        assert float((update(module, before[f"{name}.weight"].T) - change).norm() / change.norm()) < 1e-5, name


def test_only_what_leaves_them_out_is_asked_for(base, tmp_path):
    folder = saved(base, tmp_path / "it", CONFIGS["ia3"]())
    files = sides.noted(folder, adapters.base_shapes(base))
    (tmp_path / "whole").mkdir()
    for name, data in files.items():
        (tmp_path / "whole" / name).write_bytes(data)
    assert sides.base_to_ask(tmp_path / "whole") is None
    assert sides.base_to_ask(saved(base, tmp_path / "plain", peft.LoraConfig(target_modules=TARGETS))) is None
    known = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps({**known, "base_model_name_or_path": None}))
    assert sides.base_to_ask(folder) == ""
    (folder / adapters.CONFIG).unlink()
    assert sides.base_to_ask(folder) is None


def test_a_base_that_does_not_say_it_either_or_is_another_one_leaves_a_sentence(base, tmp_path):
    folder = saved(base, tmp_path / "it", CONFIGS["oft"]())
    shapes = adapters.base_shapes(base)
    packed = dict.fromkeys(shapes, (1 << 10, 1))  # as bitsandbytes packs them
    for found in (packed, {}):
        (problem,) = adapters.inspect(sides.noted(folder, found)).problems
        assert "model.layers.0" in problem.sentence and "not one of that method" in problem.sentence
    wider = {name: (shape[0], 2 * shape[1]) for name, shape in shapes.items()}
    (problem,) = adapters.inspect(sides.noted(folder, wider)).problems
    assert "do not fit each other" in problem.sentence


# ---- into the library


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "oft of one block"])
def test_it_enters_the_library_with_its_sides_and_is_not_asked_again(space, tmp_path, kind):
    folder = saved(demo_base("demo-text"), tmp_path / "theirs", CONFIGS[kind](), name="demo-text")
    (folder / "README.md").write_text("Theirs.")
    id = shelf.import_adapter(space, str(folder), name="theirs")
    kept = library.adapter_folder(space, id)
    card = library.card(space, id)
    assert card["method"] == kind and card["base"] == "demo-text" and (kept / "README.md").read_text() == "Theirs."
    assert sides.base_to_ask(kept) is None and adapters.read(kept).modules
    theirs, ours = (load_file(where / adapters.WEIGHTS) for where in (folder, kept))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs), "no number has changed"
    assert shelf.import_files(space, sorted(folder.iterdir()), name="theirs") == id and library.count(space) == 1


def test_without_its_base_here_it_is_asked_for_by_name_and_nothing_enters(space, tmp_path):
    folder = saved(demo_base("demo-text"), tmp_path / "theirs", CONFIGS["ia3"](), name="someone/not-here")
    with pytest.raises(AdapterError, match=r"does not say how wide its layers are\. The base it was made for does: fetch that"):
        shelf.import_adapter(space, str(folder))
    assert library.count(space) == 0
    id = shelf.import_adapter(space, str(folder), base="demo-text")
    assert library.card(space, id)["base"] == "demo-text"
