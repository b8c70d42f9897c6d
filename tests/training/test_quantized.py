"""QLoRA on a CPU: gradients survive an evaluation, a cut run goes on to the same bytes, and the adapter is for the untouched base too."""

import peft
import pytest
import torch
import transformers

from lora_studio import adapters, checkpoints
from lora_studio.errors import SpecError
from lora_studio.spec import parse
from lora_studio.training import quantized, text
from tests import tiny
from tests.training.test_job import adapter_bytes, run_of, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose layers are wide enough for every kernel."""
    return tiny.write_base(tmp_path_factory.mktemp("wide") / "base", hidden_size=64, head_dim=16, num_key_value_heads=4, intermediate_size=128)


def gradients(model):
    model.train()
    model.zero_grad()
    ids = torch.arange(5, 29).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_gradients_are_the_same_after_an_evaluation(wide, bits):
    how = quantized.options(bits, torch.bfloat16, CPU)
    model = quantized.keep_trainable(text.load_model(wide, "wide", torch.bfloat16, **how))
    assert sum("bnb" in type(layer).__module__ or "bitsandbytes" in type(layer).__module__ for layer in model.modules()) >= 14
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    before = gradients(model)
    model.eval()
    with torch.no_grad():
        model(torch.arange(5, 29).view(2, 12))
    after = gradients(model)
    assert before.keys() == after.keys() and len(before) == 8
    assert all(torch.equal(before[name], after[name]) for name in before) and all(bool(value.any()) for value in after.values())


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_cut_run_goes_on_to_the_identical_adapter_which_is_baked_into_the_original(workspace, wide, chat_rows, tmp_path, bits):
    compute = {"device": "cpu", "precision": "bf16", "threads": 1, "quantize": bits}
    tree = {**tiny.tree(wide, chat_rows), "compute": compute, "optim": {"lr": 1e-2}, "validation": {"size": 8, "every": 4, "keep_best": False}}
    whole, cut = run_of(workspace, tree), run_of(workspace, tree)
    told = train(whole)
    losses = [event["loss"] for event in told if event["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.02
    train(cut, stop_at=5)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    adapter = adapters.read(whole / "adapter")
    checkpoints.apply(checkpoints.plan(wide, [(adapter, 1.0)]), tmp_path / "baked")
    merged = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(wide), whole / "adapter").merge_and_unload()
    for name, value in transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").state_dict().items():
        assert torch.allclose(value, merged.state_dict()[name], atol=1e-6), name


def test_starts_that_need_the_bases_own_numbers_are_refused():
    for init in ("pissa", "olora", "orthogonal"):
        with pytest.raises(SpecError, match="need the base's own numbers"):
            parse({"data": [{"path": "x"}], "method": {"init": init}, "compute": {"quantize": "4bit"}})
    for kind in ("loha", "lokr"):
        with pytest.raises(SpecError, match=f"method.kind {kind}"):
            parse({"data": [{"path": "x"}], "method": {"kind": kind}, "compute": {"quantize": "4bit"}})
