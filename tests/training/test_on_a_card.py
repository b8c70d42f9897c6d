"""Whole runs, the Playground and captions on a pretended graphics card: nothing mixes it with main memory, and what is learnt and said is what
a CPU learns and says. A card's own kernels (of bitsandbytes, for documents of several lengths) are stood in for."""

from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_studio import adapters, runs, search
from lora_studio.inference import captioning
from lora_studio.inference.desk import Desk
from lora_studio.inference.draw import Easel
from lora_studio.inference.text import Manner, Shelf
from lora_studio.jobs import queue
from lora_studio.spec import Base
from lora_studio.training import packed
from tests import pretended, tiny, tiny_captioners, tiny_image
from tests.inference import test_captioning, test_draw, test_searching
from tests.inference.test_by_layer import asked
from tests.training import (
    test_blocks,
    test_causal_families,
    test_clips,
    test_full,
    test_full_image,
    test_image,
    test_image_families,
    test_job,
    test_kontext,
    test_many,
    test_methods,
    test_mixture_experts,
    test_quantized,
    test_text_encoders,
    test_virtual,
)  # fmt: skip
from tests.training.test_job import run_of, train

CONVERSATION = [{"role": "user", "content": "red fox?"}]
blip, shelved, wide = test_captioning.blip, test_searching.shelved, test_quantized.wide
kontext, pairs, clips = test_kontext.folder, test_kontext.rows, test_clips.folder


@pytest.fixture(autouse=True)
def queued(monkeypatch):
    """Runs are queued, and started by nobody: a mode of torch is for one thread, so all is done here."""
    monkeypatch.setattr(queue, "pump", lambda: [])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The folder of a tiny image base of a kind, made when it is asked for."""
    made, place = {}, tmp_path_factory.mktemp("pipelines")
    return lambda kind="sd15": made[kind] if kind in made else made.setdefault(kind, tiny_image.write_pipeline(place / kind, kind))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny_image.write_pictures(tmp_path_factory.mktemp("rows") / "pictures")


def on_card(folder, work=None, *, uses: str = "", **kind) -> list[dict]:
    """Do a run's work on the pretended card, of a kind and with an operation that it `uses`; its history."""
    runs.set_card(folder, device="cuda:0")
    with pretended.card(**kind) as card:
        told = train(folder, work=work)
    assert not uses or card.operations[uses] > 10
    assert card.operations.total() > 1000 and next(event["device"] for event in told if event["kind"] == "started") == "cuda:0"
    return told


def losses(told: list[dict]) -> list[float]:
    return [event["loss"] for event in told if event["kind"] in ("step", "eval")]


def learnt(folder) -> dict[str, torch.Tensor]:
    """Every number that a run left, in float64."""
    files = sorted(path for place in ("adapter", "adapters", "model") for path in (folder / place).rglob("*.safetensors"))
    return {f"{path.relative_to(folder)} {name}": tensor.double() for path in files for name, tensor in load_file(path).items()}


def compare(workspace, tree: dict, *, loss: float = 1e-5, weights: float = 1e-4, on_gpu: dict | None = None, **card) -> None:
    """Train here and on the card, there with what only a GPU takes; losses and learnt numbers may differ by these shares."""
    here = run_of(workspace, tree)
    there = run_of(workspace, {**tree, "compute": {**tree["compute"], **(on_gpu or {})}})
    told, retold = train(here), on_card(there, **card)
    assert told[-1]["kind"] == retold[-1]["kind"] == "done" and losses(retold) == pytest.approx(losses(told), rel=loss)
    assert len([event for event in retold if event["kind"] == "sample"]) == len([event for event in told if event["kind"] == "sample"])
    one, other = learnt(here), learnt(there)
    assert one.keys() == other.keys() and one
    off = sum(float((other[name] - value).square().sum()) for name, value in one.items()) ** 0.5
    assert off <= weights * sum(float(value.square().sum()) for value in one.values()) ** 0.5


def some(names, *quick: str) -> list:
    """All of them, of which those that are not named are slow."""
    assert set(quick) <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


# ---- language models


# AdaLoRA takes away whatever is just below a limit: the last bit decides which, and the loss stays.
@pytest.mark.parametrize("name", some(test_methods.VARIANTS, "dora", "eva", "adalora", "vera"))
def test_methods_learn_on_it(workspace, base, chat_rows, name):
    compare(workspace, test_methods.tree_of(base, chat_rows, name), weights=1 if name == "adalora" else 1e-4)


@pytest.mark.parametrize("name", some(test_job.VARIANTS, "bf16", "padded", "checkpointing", "8-bit"))
def test_settings_of_a_run_hold_on_it(workspace, base, chat_rows, name):
    rounded = {"loss": 1e-3, "weights": 0.2} if name in ("bf16", "loftq") else {}
    compare(workspace, {**tiny.tree(base, chat_rows), **test_job.VARIANTS[name]}, **rounded)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_language_model_in_fewer_bits_learns_on_it(workspace, wide, chat_rows, bits):
    compute = {"device": "cpu", "precision": "bf16", "threads": 1, "quantize": bits}
    compare(workspace, {**tiny.tree(wide, chat_rows), "compute": compute, "optim": {"lr": 1e-2}}, loss=5e-3, weights=0.5)


@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_for_documents_of_several_lengths_is_told_what_it_takes(workspace, tmp_path, chat_rows, window):
    """From compute capability 8.0 on, in bf16: (tokens, heads, d), the ends in int32, queries in groups, and a window of tokens."""
    base = tiny.write_base(tmp_path / "base", "mistral", sliding_window=window)
    tree = {**tiny.tree(base, chat_rows), **test_job.VARIANTS["bf16"]}
    compare(workspace, tree, loss=1e-3, weights=0.2, uses="torch_attn::_varlen_attn", capability=(8, 0))


@pytest.mark.parametrize("name", some([*test_full.VARIANTS, *test_virtual.VARIANTS], "as a LoRA", "prompt", "prefix from words"))
def test_whole_models_and_virtual_tokens_learn_on_it(workspace, base, chat_rows, name):
    compare(workspace, (test_full if name in test_full.VARIANTS else test_virtual).tree_of(base, chat_rows, name))


@pytest.mark.parametrize("name", some(test_mixture_experts.VARIANTS, "plain"))
def test_experts_of_a_mixture_learn_on_it(workspace, tmp_path, chat_rows, name):
    tree = tiny.tree(tiny.write_base(tmp_path / "mixture", "qwen3_moe"), chat_rows)
    compare(workspace, {**tree, "method": {"rank": 4, "alpha": 8, **test_mixture_experts.VARIANTS[name]}, "optim": {"lr": 1e-2}})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*test_causal_families.SHORT, *test_causal_families.MORE])
def test_every_kind_of_causal_model_learns_on_it(workspace, tmp_path, chat_rows, kind):
    compare(workspace, test_causal_families.tree_of(test_causal_families.write(tmp_path / kind, kind), chat_rows))


@pytest.mark.parametrize("which", some(["text", "text, checkpointing", "text, padded", "image"], "text, checkpointing", "image"))
def test_several_adapters_learn_side_by_side_on_it(workspace, base, chat_rows, pipeline, pictures, which):
    more = {"text, checkpointing": test_many.CHECKPOINTING, "text, padded": test_many.PADDED}.get(which, {})
    tree = test_many.image_tree(pipeline(), pictures) if which == "image" else test_many.text_tree(base, chat_rows, **more)
    here, there = (test_many.made(workspace, tree, keep="all") for _ in range(2))
    told, retold = test_many.train(here), on_card(there, test_many.many.run)
    assert told[-1]["kind"] == retold[-1]["kind"] == "done"
    one, other = learnt(here), learnt(there)
    assert one.keys() == other.keys() and all(float((other[name] - value).norm()) <= 1e-4 * float(value.norm()) for name, value in one.items())


def test_what_is_left_in_main_memory_is_seen(workspace, base, chat_rows, monkeypatch):
    """Otherwise the others would pass over anything."""
    concatenate = packed.concatenate
    monkeypatch.setattr(packed, "concatenate", lambda documents, device=None: concatenate(documents, device=torch.device("cpu")))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu"):
        on_card(run_of(workspace, tiny.tree(base, chat_rows)))


# ---- models that draw


@pytest.mark.parametrize("name", some(test_image.VARIANTS, "crops, flips, dropout", "convolutions"))
def test_pictures_are_learnt_on_it(workspace, pipeline, pictures, name):
    rounded = {"loss": 2e-3, "weights": 0.5} if name == "bf16" else {}
    compare(workspace, test_image.tree(pipeline(), pictures, **test_image.VARIANTS[name]), **rounded)


@pytest.mark.parametrize("name", some(["dora", "eva", "lora-ga, rank-stabilised", "dylora", "vera", "loha", "lokr"], "dora"))
def test_methods_learn_pictures_on_it(workspace, pipeline, pictures, name):
    compare(workspace, test_image.tree(pipeline(), pictures, method=test_methods.VARIANTS[name], optim={"lr": 1e-2}), weights=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", test_full_image.VARIANTS)
def test_whole_image_models_learn_on_it(workspace, pipeline, pictures, name):
    compare(workspace, test_image.tree(pipeline(), pictures, method=test_full_image.VARIANTS[name], optim={"lr": 1e-3}))


@pytest.mark.parametrize("kind", some(tiny_image.PIPELINES, "flux", "wan"))
def test_every_family_of_image_models_learns_and_draws_on_it(workspace, pipeline, pictures, kind):
    compare(workspace, test_image_families.tree(pipeline(kind), pictures))


@pytest.mark.parametrize("kind", some(test_blocks.KINDS, "flux"))
@pytest.mark.parametrize("on_gpu", [{"block_swap": 1}, {"encoders": "cpu"}], ids=str)
def test_what_stays_in_main_memory_until_its_turn_changes_nothing(workspace, pipeline, pictures, kind, on_gpu):
    compare(workspace, test_image_families.tree(pipeline(kind), pictures), on_gpu=on_gpu)


@pytest.mark.parametrize("kind", some(test_blocks.KINDS, "flux"))
@pytest.mark.parametrize("on_gpu", [{"quantize": "4bit"}, pytest.param({"quantize": "8bit"}, marks=pytest.mark.slow), {"encoders": "4bit"}], ids=str)
def test_what_is_kept_in_fewer_bits_learns_and_draws_near_the_full_one(workspace, pipeline, pictures, kind, on_gpu):
    compare(workspace, test_image_families.tree(pipeline(kind), pictures), loss=0.1, weights=2, on_gpu=on_gpu)


@pytest.mark.slow
@pytest.mark.parametrize("kind", test_text_encoders.KINDS)
def test_text_encoders_learn_beside_the_part_on_it(workspace, pipeline, pictures, kind):
    compare(workspace, test_text_encoders.tree(pipeline(kind), pictures))


@pytest.mark.slow
def test_pairs_are_learnt_on_it(workspace, kontext, pairs):
    compare(workspace, test_kontext.tree(kontext, pairs))


@pytest.mark.slow
def test_clips_are_learnt_on_it(workspace, pipeline, clips):
    compare(workspace, test_clips.tree(pipeline("wan"), clips))


# ---- what is done with them


def spoken(folder, base, **how) -> tuple[torch.Tensor, str]:
    shelf = Shelf(Base(id=str(base)), precision="fp32", **how)
    shelf.hang("mine", adapters.read(folder), label="mine")
    answer = shelf.answer(CONVERSATION, weights={"mine": 1.0}, manner=Manner(longest=8))
    return shelf.logits([5, 9, 31, 77], weights={"mine": 1.0}).cpu().double(), "".join(answer)


@pytest.mark.parametrize("name", ["dora", "oft", "prefix"])
def test_the_playground_speaks_on_it_as_on_a_cpu(workspace, base, chat_rows, name):
    run = run_of(workspace, (test_virtual if name == "prefix" else test_methods).tree_of(base, chat_rows, name, schedule={"steps": 3, "batch_size": 2}))
    train(run)
    meant, text = spoken(run / "adapter", base)
    with pretended.card() as card:
        found, said = spoken(run / "adapter", base, device="cuda:0")
    assert card.operations.total() > 100 and said == text and torch.allclose(found, meant, rtol=0, atol=1e-5)


def test_the_playground_draws_on_it_as_on_a_cpu(pipeline, tmp_path):
    def drawn(**how):
        easel = Easel(Base(id=str(pipeline())), precision="fp32", **how)
        easel.put("mine", tiny_image.random_adapter(pipeline(), seed=1))
        return [test_draw.pixels(easel, weights, tmp_path) for weights in ({}, {"mine": 0.7})]

    bare, mixed = drawn()
    with pretended.card() as card:
        found = drawn(device="cuda:0")
    assert card.operations.total() > 1000 and float((found[0] - bare).abs().max()) <= 1 and float((found[1] - mixed).abs().max()) <= 1 < float((mixed - bare).abs().max())


@pytest.mark.parametrize("device", ["cuda:0", "cuda"])  # as a run has it, and as ZeroGPU lends it
@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_bench_answers_draws_and_measures_on_it(base, pipeline, tmp_path, home, kind, device):
    if kind == "text":
        folder, place, verb = base, tiny.write_adapter(tmp_path / "mine", base, seed=1), "answer"
        asking = {"messages": CONVERSATION, "seed": 5, "temperature": 1.0, "longest": 6}
    else:
        folder, verb = pipeline(), "draw"
        place = test_draw.write(tmp_path / "mine", folder, tiny_image.random_adapter(folder, seed=1))
        asking = {"prompt": "a red circle", "target": str(tmp_path / "drawn"), "seed": 3, "steps": 2, "width": 32, "height": 32, "guidance": 3.0}
    parts, told = [[str(place), 0.7, "mine"]], []
    for found in ("cpu", device):
        with pretended.card() if found == device else nullcontext() as card:
            desk = Desk()
            given = {"base": str(folder), "device": found, "lock": str(tmp_path / "lock"), "precision": "fp32"}
            told.append((asked(desk, verb, **given, **asking, sides={"base": [], "mine": parts}), asked(desk, "measure", **given, parts=parts, rounds=1)))
            desk.close()
    (here, times), (there, measured) = told
    assert card.operations.total() > 1000 and measured["device"] == device and measured["off"] < 1e-4 < measured["moved"] == pytest.approx(times["moved"], rel=1e-3)
    assert kind == "image" or [side["text"] for side in here["sides"].values()] == [side["text"] for side in there["sides"].values()]


def test_captions_are_written_on_it(blip):
    image, texts = Image.new("RGB", (48, 32), tiny_captioners.COLOURS["red"]), []
    spec = captioning.CaptionSpec(**{"album": "mine", "model": {"id": str(blip)}})
    with pretended.card() as card:
        texts.append(captioning.Writer(spec, "cuda:0", lambda: False).write(image))
    assert texts == ["a red picture"] and card.operations.total() > 100


def test_weights_are_searched_for_on_it(workspace, shelved, chat_rows):
    asked = {**test_searching.ASKED, "evaluations": 6}
    here, there = (workspace.run_folder(search.start(workspace, shelved, [str(chat_rows)], cap=4, **asked)) for _ in range(2))
    told = test_searching.work(here)
    runs.set_card(there, device="cuda:0")
    with pretended.card() as card:
        retold = test_searching.work(there)
    assert card.operations.total() > 1000 and retold[-1]["kind"] == "done" and losses(retold) == pytest.approx(losses(told), rel=1e-5)
