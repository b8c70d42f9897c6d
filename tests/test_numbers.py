"""The numbers of an adapter are those that PEFT and the files say; what is measured is of the merged model itself, which is put back bit for bit."""

import json

import peft
import pytest
import torch

from lora_studio import adapters, library, numbers
from lora_studio.cli import app
from lora_studio.home import demo_base
from lora_studio.inference.desk import Desk
from lora_studio.spec import Base
from tests import tiny, tiny_image
from tests.inference.test_by_layer import asked
from tests.training.test_job import run_of, train


@pytest.fixture
def shelved(workspace, base):
    return library.add(workspace, tiny.adapter_files(base, seed=1), {"name": "one", "base": str(base)})


def test_share_and_sizes_are_those_of_peft_and_of_the_files(workspace, base, shelved):
    found = numbers.of(workspace, shelved)
    model = tiny.model()
    whole = sum(one.numel() for one in model.parameters())
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    learnt = sum(one.numel() for one in peft.get_peft_model(model, config).parameters() if one.requires_grad)
    assert (found.parameters, found.base_parameters) == (learnt, whole)
    assert found.bytes == (library.adapter_folder(workspace, shelved) / adapters.WEIGHTS).stat().st_size
    assert found.base_bytes == (base / "model.safetensors").stat().st_size
    assert found.training == 4 * whole + 16 * learnt and found.full == 16 * whole
    told = dict(found.rows())
    assert f"{learnt:,} of {whole:,} parameters: {100 * learnt / whole:.2g} %" in told["trainable"]
    assert f"{100 * (1 - found.training / found.full):.0f} % less" in told["memory to train it"]


def test_optimizer_and_gradients_take_what_the_formula_says():
    """AdamW in fp32, as torch itself holds it after a step: 16 bytes for what is learnt, 4 for what is not."""
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt)
    model(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([[2, 3, 4]])).loss.backward()
    optimizer.step()
    held = sum(one.nbytes for one in model.parameters()) + sum(one.grad.nbytes for one in learnt)
    held += sum(value.nbytes for state in optimizer.state.values() for name, value in state.items() if name != "step")
    count = sum(one.numel() for one in learnt)
    frozen = sum(one.numel() for one in model.parameters()) - count
    assert held == numbers.FROZEN * frozen + numbers.LEARNT * count


def test_extra_work_is_what_the_layers_do_when_it_is_counted(workspace, base, shelved):
    """Every product of a pass is counted by torch's own counter: base and adapter."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.model(attn_implementation="eager").eval()
    ids = torch.tensor([[5]])

    def products(model) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        by = counter.get_flop_counts()["Global"]
        return sum(count for operation, count in by.items() if "bmm" not in str(operation)) // 2

    found = numbers.of(workspace, shelved)
    alone = products(model)
    assert found.base_work == alone
    adapted = peft.PeftModel.from_pretrained(model, str(library.adapter_folder(workspace, shelved)))
    assert found.work == products(adapted) - alone


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_of_a_mixture_the_work_is_that_of_the_experts_that_a_token_passes(workspace, tmp_path, chat_rows, kind):
    """The base's products counted by torch's own counter, of a model that asks each expert by itself; whether it keeps them in one stack or apart."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    base = tiny.write_base(tmp_path / kind, kind)
    folder = run_of(workspace, tiny.tree(base, chat_rows, method={"rank": 3, "alpha": 6, "experts": True}, schedule={"steps": 1, "batch_size": 2}))
    train(folder)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", experts_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.tensor([[5]]), use_cache=False)
    counted = sum(count for operation, count in counter.get_flop_counts()["Global"].items() if "bmm" not in str(operation)) // 2
    found = numbers.of_folder(folder / "adapter")
    assert found.base_work == counted
    inner, passed = (16, 2) if kind == "qwen3_moe" else (64, model.config.num_experts_per_tok)
    dense = sum(3 * sum(layer.weight.shape) for name, layer in model.named_modules() if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")))
    assert found.work == dense + 2 * passed * 3 * ((32 + 2 * inner) + (inner + 32))


def test_a_convolution_counts_its_kernel_and_a_missing_base_leaves_the_rest(workspace, tmp_path):
    folder = demo_base("demo-image")
    modules = tiny_image.random_adapter(folder, seed=1)
    id = library.add(workspace, tiny_image.adapter_files(folder, modules, name="demo-image"), {"name": "style", "base": "demo-image"})
    found = numbers.of(workspace, id)
    assert found.work == sum(module.A.numel() + module.B.numel() for module in modules.values()) == found.parameters
    assert found.base_bytes == sum(file.stat().st_size for file in folder.rglob("*.safetensors")) and found.base_work > 0
    lost = numbers.of_folder(library.adapter_folder(workspace, id), base="nobody/nothing")
    assert lost.training is None and [name for name, _ in lost.rows()] == ["trainable", "file", "extra work unmerged"]


def test_what_is_measured_is_the_merged_model_and_the_base_is_itself_again(base, tmp_path):
    desk, place = Desk(), tiny.write_adapter(tmp_path / "one", base, seed=1)
    given = {"base": str(base), "device": "cpu", "lock": str(tmp_path / "lock"), "precision": "fp32"}
    asked(desk, "load", **given)
    before = {name: value.clone() for name, value in desk.shelf.model.named_parameters()}
    told = asked(desk, "measure", **given, parts=[[place, 1.0, "one"]], rounds=3)
    assert told["rounds"] == 3 and min(told[name] for name in ("base", "unmerged", "merged")) > 0 and told["of"] == "64 tokens"
    assert told["off"] < 1e-5 < 1e-2 < told["moved"]  # merged is unmerged, and neither is the base
    assert all(torch.equal(value, before[name]) for name, value in desk.shelf.model.named_parameters())
    words = numbers.measured_in_words(told)
    assert f"Merged it takes {100 * told['merged'] / told['base']:.0f} % of the base's time" in words


def test_an_image_model_is_measured_at_one_step_of_a_picture(tmp_path):
    folder = demo_base("demo-image")
    place = tmp_path / "style"
    place.mkdir()
    for name, data in tiny_image.adapter_files(folder, tiny_image.random_adapter(folder, seed=1), name="demo-image").items():
        (place / name).write_bytes(data)
    told = asked(Desk(), "measure", base="demo-image", device="cpu", lock=str(tmp_path / "lock"), parts=[[str(place), 1.0, "style"]], rounds=2)
    assert told["of"] == "one step at 64 × 64" and told["off"] < 1e-4 < told["moved"]


def test_the_command_line_inspects_and_measures(workspace, base, shelved):
    from typer.testing import CliRunner

    told = json.loads(CliRunner().invoke(app, ["inspect", "one", "--measure", "--json"]).stdout)
    from lora_studio.jobs import bench

    bench.stop()
    assert told["numbers"]["parameters"] == numbers.of(workspace, shelved).parameters
    assert told["measured"]["rounds"] == 15 and told["measured"]["off"] < 0.05


def test_a_base_that_is_named_is_compared(base, tmp_path):
    place = tiny.write_adapter(tmp_path / "one", base, seed=1, name="nobody/nothing")
    assert numbers.of_folder(place).base_parameters is None
    assert numbers.of_folder(place, base=Base(id=str(base)).id).base_parameters == sum(one.numel() for one in tiny.model().parameters())
