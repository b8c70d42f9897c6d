"""The verbs of baking: said before it is written, written with its recipe, and taken out again."""

import json

import peft
import pytest
import torch
import transformers

from lora_studio import baking, exports, library, shelf
from lora_studio.errors import BakeError, BenchError, BlendError
from lora_studio.jobs import bench
from tests import tiny
from tests.test_cli import command
from tests.test_dora import dora, merged
from tests.test_multiplied import multiplying_one

pytestmark = pytest.mark.usefixtures("with_bench")


def add(workspace, base, name, **how) -> str:
    return library.add(workspace, tiny.adapter_files(base, name=str(base), **how), {"name": name, "base": str(base)})


def test_what_is_said_before_is_what_is_written_and_it_answers_as_the_adapters_do(workspace, base, tmp_path):
    one, two = add(workspace, base, "one", seed=1, size=0.5), add(workspace, base, "two", seed=2, size=0.5)
    parts = [[one, 0.8], [two, -0.5]]
    told = baking.preview(workspace, parts)
    assert told["changed"] > 0 and told["loss"] < 1e-6 and not (tmp_path / "out").exists()
    events = list(baking.bake(workspace, parts, tmp_path / "out"))
    assert events[-1]["event"] == "done" and events[-1]["bytes"] == told["bytes"]
    assert any(event["event"] == "progress" and event["done"] == event["total"] for event in events)
    recipe = json.loads((tmp_path / "out" / baking.RECIPE).read_text())
    assert recipe["sum"] == [{"adapter": one, "name": "one", "weight": 0.8}, {"adapter": two, "name": "two", "weight": -0.5}]
    hashes = [library.card(workspace, id)["sha256"] for id in (one, two)]
    assert [(parent["sha256"], parent["weight"]) for parent in recipe["lineage"]["parents"]] == list(zip(hashes, [0.8, -0.5]))
    assert recipe["lineage"]["loss"] == told["loss"] and recipe["lineage"]["versions"].keys() == {"lora_studio", "torch"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| one | 0.8 |" in card and "vllm serve out" in card and "ollama create out" in card
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(plain, library.adapter_folder(workspace, one), adapter_name="one")
    model.load_adapter(library.adapter_folder(workspace, two), adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for name, weight in (("one", 0.8), ("two", -0.5)):
                if name in layer.scaling:
                    layer.set_scale(name, weight)
    ids = torch.arange(5, 30)[None]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    with pytest.raises(BakeError, match="exists already"):
        list(baking.bake(workspace, parts, tmp_path / "out"))
    with pytest.raises(BakeError, match="No weight of"):
        baking.preview(workspace, [[one, 0.0]])
    with pytest.raises(BenchError, match="plain names"):
        bench.ask("bake", base=str(base), parts=[[str(library.adapter_folder(workspace, one)), 1.0]], target=str(tmp_path / "x"), files={"../x": "y"})


def test_weights_by_layer_are_baked_and_stand_in_card_and_recipe(workspace, base, tmp_path):
    id, weight = add(workspace, base, "one", seed=1, size=0.5), {"": 0.8, "model.layers.0": -0.5, "mlp": 0.0}
    assert baking.preview(workspace, [[id, weight]])["changed"] == 2 < baking.preview(workspace, [[id, 1.0]])["changed"]
    list(baking.bake(workspace, [[id, weight]], tmp_path / "out"))
    assert json.loads((tmp_path / "out" / baking.RECIPE).read_text())["sum"] == [{"adapter": id, "name": "one", "weight": weight}]
    assert "| one | 0.8, `model.layers.0` -0.5, `mlp` 0 |" in (tmp_path / "out" / "README.md").read_text()
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "out"))
    from lora_studio import adapters

    for name, module in adapters.read(library.adapter_folder(workspace, id)).modules.items():
        factor = 0.0 if ".mlp." in name else -0.5 if "layers.0" in name else 0.8
        assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + factor * module.delta(), atol=1e-6)
    with pytest.raises(BlendError, match=r"layers\.5 means no layer of one"):
        baking.preview(workspace, [[id, {"layers.5": 1.0}]])


def test_bake_and_extract_on_the_command_line_are_each_others_way_back(workspace, base, tmp_path):
    id = add(workspace, base, "mine", seed=3, size=0.5)
    plan = json.loads(command("bake", f"{id}=0.5", "--plan", "--json").stdout)
    assert plan["changed"] and plan["out"] is None
    assert "Give --out FOLDER" in command("bake", id, code=1).stderr
    said = command("bake", f"{id}=0.5", "--out", tmp_path / "tuned").stdout
    assert "tensors change" in said and str(tmp_path / "tuned") in said
    done = json.loads(command("extract", tmp_path / "tuned", base, "--name", "back", "--rank", "4", "--json").stdout)
    assert done["loss"] < 1e-4 and done["left_out"] == []
    from lora_studio import adapters

    before, after = (adapters.read(library.adapter_folder(workspace, one)).modules for one in (id, done["id"]))
    assert set(before) == set(after)
    assert all((after[name].delta() - 0.5 * module.delta()).norm() < 1e-3 * module.delta().norm() for name, module in before.items())
    assert library.card(workspace, done["id"])["recipe"]["extracted"]["rank"] == 4
    assert "differ in no layer" in command("extract", base, base, "--name", "none", "--rank", "4", code=1).stderr


def test_a_dora_adapter_is_baked_with_its_own_formula_on_the_card_and_its_adapter_is_taken_out_again(workspace, base, tmp_path):
    id = library.add(workspace, dora(base, tmp_path / "dora", targets=["q_proj"]), {"name": "mine", "base": str(base)})
    plain = add(workspace, base, "plain", seed=2, size=0.5)
    assert baking.preview(workspace, [[id, 0.5], [plain, 1.0]])["loss"] < 1e-6
    list(baking.bake(workspace, [[id, 1.0]], tmp_path / "out"))
    assert "of a DoRA adapter `weight * (m / |V| * V - W0)`" in (tmp_path / "out" / "README.md").read_text()
    found, meant = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), merged(base, tmp_path / "dora").state_dict()
    assert all(torch.allclose(value, meant[name], rtol=0, atol=1e-6) for name, value in found.items())
    *_, done = baking.extract(workspace, str(tmp_path / "out"), str(base), name="taken out", loss=0.01)
    assert done["loss"] <= 0.01 and shelf.blend(workspace, [(done["id"], 0.5), (plain, 1.0)], name="both")[1]["loss"] < 1e-6
    for act in (lambda: shelf.preview(workspace, [(id, 1.0)]), lambda: baking.preview(workspace, [[id, 1.0], [plain, 1.0]], merge={"how": "ties", "density": 0.5})):
        with pytest.raises(BlendError, match="mine is a DoRA adapter"):
            act()
    assert [form.name for form in exports.forms(workspace, id) if not form.against] == ["peft"]


@pytest.mark.parametrize(("kind", "formula"), [("oft", "of an OFT adapter `weight * (W0 @ R.T - W0)`"), ("ia3", "of an IA3 adapter `weight * (l - 1) * W0`")])
def test_an_adapter_that_multiplies_is_baked_with_its_own_formula_and_a_plain_one_is_taken_out_again(workspace, base, tmp_path, kind, formula):
    id = library.add(workspace, multiplying_one(base, tmp_path / kind, kind, target_modules=["q_proj", "up_proj"], **({"feedforward_modules": []} if kind == "ia3" else {})), {"name": "mine", "base": str(base)})
    plain = add(workspace, base, "plain", seed=2, size=0.5)
    assert baking.preview(workspace, [[id, 0.5], [plain, 1.0]])["loss"] < 1e-6
    list(baking.bake(workspace, [[id, 1.0]], tmp_path / "out"))
    assert formula in (tmp_path / "out" / "README.md").read_text() and "DoRA" not in (tmp_path / "out" / "README.md").read_text()
    found, meant = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), merged(base, tmp_path / kind).state_dict()
    assert all(torch.allclose(value, meant[name], rtol=0, atol=1e-6) for name, value in found.items())
    *_, done = baking.extract(workspace, str(tmp_path / "out"), str(base), name="taken out", loss=0.01)
    assert done["loss"] <= 0.01 and shelf.blend(workspace, [(done["id"], 0.5), (plain, 1.0)], name="both")[1]["loss"] < 1e-6
    with pytest.raises(BlendError, match=f"mine is an {kind.upper()} adapter.*`extract`"):
        shelf.preview(workspace, [(id, 1.0)])
