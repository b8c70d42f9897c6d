"""OFT and IA3: known from their headers, refused wherever a product would be made of them, and what the papers say of them holds. See test_multiplied.py."""

import json

import peft
import pytest
import torch
import transformers

from lora_studio import adapters, exports, library, numbers
from lora_studio.adapters.files import reheaded
from lora_studio.errors import AdapterError, BlendError
from lora_studio.formats import export_as
from tests import tiny
from tests.training.test_job import run_of, train

KINDS = {"oft": {"kind": "oft", "block": 8}, "ia3": {"kind": "ia3"}}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory, base, chat_rows):
    """(kind, workspace, run) of a small trained one."""
    from lora_studio.workspace import Workspace

    root = tmp_path_factory.mktemp(request.param)
    tree = {**tiny.tree(base, chat_rows), "method": KINDS[request.param], "optim": {"lr": 5e-2}, "schedule": {"steps": 6, "batch_size": 4}}
    workspace = Workspace(root)
    run = run_of(workspace, {**tree, "validation": {"size": 0}, "output": {}})
    train(run)
    return request.param, workspace, run


def test_the_header_says_both_sides_of_every_layer_and_peft_reads_the_file(trained, base):
    kind, _, run = trained
    card = adapters.inspect(run / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert card.is_usable and card.method == kind and card.rank == 0
    assert {name: layer.shape for name, layer in card.layers.items()} == {
        name: tuple(plain.get_submodule(name).weight.shape) for name in card.layers
    } and len(card.layers) == 14
    assert not adapters.check(card, adapters.base_shapes(base))
    adapter = adapters.read(run / "adapter")
    assert adapter.modules.keys() == card.layers.keys() and not any(hasattr(module, "A") for module in adapter.modules.values())
    merged = peft.PeftModel.from_pretrained(plain, run / "adapter").merge_and_unload()
    original = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name in card.layers:
        before, after = (model.get_submodule(name).weight.detach().double() for model in (original, merged))
        assert float((after - before).abs().max()) > 1e-3, name
        if kind == "oft":  # a rotation keeps the lengths of the rows and the angles between them
            assert torch.allclose(after @ after.T, before @ before.T, atol=1e-5), name
        else:  # every row is a multiple of what it was
            ratio = (after / before).median(1, keepdim=True).values
            assert torch.allclose(before * ratio, after, atol=1e-6), name


def test_no_sum_is_made_of_it_and_every_refusal_says_what_to_do(trained, with_bench, tmp_path):
    kind, workspace, run = trained
    card = adapters.inspect(run / "adapter")
    with pytest.raises(BlendError, match=f"mine is an {kind.upper()} adapter: it multiplies"):
        adapters.refuse_blend({"mine": card})
    with pytest.raises(AdapterError):
        adapters.write(adapters.read(run / "adapter"))
    [item] = library.find(workspace)
    assert [form.name for form in exports.forms(workspace, item.id) if not form.against] == ["peft"]
    for form in ("gguf", "peft"):
        with pytest.raises(AdapterError, match="Export the files it came with"):
            export_as(workspace, item.id, tmp_path / form, form=form)


def test_what_it_costs_is_counted_by_its_own_formula(trained, base):
    kind, workspace, run = trained
    found = numbers.of_folder(run / "adapter")
    layers = adapters.inspect(run / "adapter").layers.values()
    assert found.work == sum(layer.shape[0] if kind == "ia3" else 8 * layer.shape[1] for layer in layers)
    assert any(("Σ out" if kind == "ia3" else "side of a block") in words for _, words in found.rows())


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"shapes": ""}, "does not say how wide"),
        ({"shapes": json.dumps({})}, "not one of that method"),
        ({"shapes": json.dumps({"model.layers.0.self_attn.q_proj": [3, 5]})}, "do not fit|not one of that method"),
    ],
)
def test_a_header_that_does_not_say_it_or_says_it_wrong_is_named(trained, metadata, words):
    _, _, run = trained
    files = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    files[adapters.WEIGHTS] = reheaded(files[adapters.WEIGHTS], metadata=metadata)
    with pytest.raises(AdapterError, match=words):
        adapters.read(files)


def test_numbers_that_are_none_are_found(trained):
    from safetensors.torch import load, save

    _, _, run = trained
    files = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    tensors = load(files[adapters.WEIGHTS])
    next(iter(tensors.values()))[0, 0] = torch.nan
    shapes = adapters.files.read_metadata(files[adapters.WEIGHTS])
    with pytest.raises(AdapterError, match="NaN"):
        adapters.read({**files, adapters.WEIGHTS: save(tensors, shapes)})
