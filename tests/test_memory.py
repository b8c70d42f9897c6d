"""What a run takes is told before it starts, near what it reports; where that is too much, new values are named that do help, and the retry has them."""

from types import SimpleNamespace

import pytest
import torch

from lora_studio import memory, preflight, retries, runs, settings, studio
from lora_studio.errors import MachineError, RunError
from lora_studio.spec import parse
from lora_studio.training import image, job, text
from tests import tiny, tiny_image
from tests.campaigns import memory as campaign


@pytest.fixture
def facts(workspace):
    return lambda tree, **how: studio.preflight(workspace, parse(tree), **how).facts


@pytest.mark.parametrize("name", ["pirate", "stripes"])
def test_the_demos_take_what_was_told_within_fifteen_percent(workspace, name):
    found = campaign.measure(campaign.demo(name))
    assert abs(found["told"] / found["measured"] - 1) < 0.15, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "experts", "experts checkpointing", "experts bf16"])
def test_a_mixture_takes_what_was_told_within_fifteen_percent(workspace, tmp_path, name):
    """One of 52 M parameters, read from a matrix for each expert."""
    found = campaign.measure(campaign.text_cases(tmp_path)[f"middle mixture {name}"])
    assert abs(found["told"] / found["measured"] - 1) < 0.15, found


def test_experts_are_counted_where_they_learn_and_what_a_token_passes_everywhere(facts, chat_rows, tmp_path):
    def parts(compute=(), **changes):
        base = tiny.write_base(tmp_path / f"{len(list(tmp_path.iterdir()))}", "qwen3_moe", **changes)
        return lambda **method: facts(tiny.tree(base, chat_rows, method={"rank": 4, "alpha": 8, **method}, compute={"device": "cpu", "precision": "fp32", **dict(compute)}))["memory_parts"]

    two, four, lean = parts(), parts(num_experts_per_tok=4), parts({"checkpointing": True})
    assert "experts" not in two() and four()["activations"] > two()["activations"]
    one_layer = 4 * 4 * 3 * 16 * 32  # bytes of four experts of three matrices
    assert two(experts=True)["experts"] == int((2 + memory.MADE_EXPERTS) * one_layer)
    assert lean(experts=True)["experts"] == int(memory.MADE_EXPERTS * one_layer)
    more = two(experts=True)["adapter"] - two()["adapter"]
    assert more == 4 * 2 * 4 * 4 * ((32 + 2 * 16) + (16 + 32))  # bytes · layers · experts · rank · (in + out) of gate with up, and of down


def test_weights_gradients_and_optimizer_are_counted_to_the_byte(facts, base, chat_rows):
    """Against torch's own tensors after a step."""
    import peft

    parts = facts(tiny.tree(base, chat_rows, method={"rank": 4, "alpha": 8}))["memory_parts"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    model = peft.get_peft_model(tiny.model(), config)
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt)
    model(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([[2, 3, 4]])).loss.backward()
    optimizer.step()
    assert parts["adapter"] == sum(one.nbytes for one in learnt) and parts["gradients"] == sum(one.grad.nbytes for one in learnt)
    assert parts["optimizer"] == sum(value.nbytes for state in optimizer.state.values() for name, value in state.items() if name != "step")
    assert parts["base"] == sum(one.nbytes for one in model.parameters() if not one.requires_grad)


def test_every_setting_that_saves_memory_lowers_the_estimate(facts, base, chat_rows):
    def activations(**changes):
        tree = {"schedule": {"batch_size": 8, "steps": 4}, "compute": {"device": "cpu", "precision": "fp32"}}
        found = facts(tiny.tree(base, chat_rows, **{**tree, **changes}))
        return found["memory_parts"]["activations"] + found["memory_parts"]["logits"]

    plain = activations()
    assert activations(schedule={"batch_size": 4, "steps": 4}) < plain
    assert activations(task={"kind": "chat", "max_length": 16}) < plain < activations(compute={"device": "cpu", "precision": "fp32", "packing": False})
    assert activations(compute={"device": "cpu", "precision": "fp32", "checkpointing": True}) < plain
    assert activations(compute={"device": "cpu", "precision": "bf16"}) < plain


def test_optimizer_and_kind_of_adapter_count(facts, base, chat_rows):
    def parts(**changes):
        return facts(tiny.tree(base, chat_rows, **changes))["memory_parts"]

    plain = parts(method={"rank": 4, "alpha": 8})
    assert parts(method={"rank": 4, "alpha": 8}, optim={"kind": "sgd", "lr": 1e-3})["optimizer"] * 2 == plain["optimizer"]
    assert parts(method={"rank": 4, "alpha": 8, "freeze_a": True}, optim={"lr": 1e-3})["gradients"] < plain["gradients"]
    assert parts(method={"kind": "vera", "rank": 4}, optim={"lr": 1e-3})["gradients"] < plain["gradients"]


def test_an_image_run_needs_its_encoders_before_its_steps_and_not_with_them(facts, tmp_path):
    base, pictures = tiny_image.write_pipeline(tmp_path / "sd"), tiny_image.write_pictures(tmp_path / "pictures")
    tree = {"base": {"id": str(base)}, "data": [{"path": str(pictures)}], "task": {"kind": "image", "resolution": 32, "bucket_step": 16}, "compute": {"device": "cpu", "precision": "fp32"}}
    spec = parse({**tree, "output": {"sample_prompts": ["a red circle"]}})
    info = preflight.bases.inspect(spec.base)
    found = memory.estimate(spec, info, memory.Rows(count=6), trainable=1000, device="cpu")
    encoders = sum(one.numel() for one in tiny_image.sd().text_encoder.parameters())
    assert found.parts["text encoders"] == 4 * encoders and found.parts["VAE"] == 4 * sum(one.numel() for one in tiny_image.sd().vae.parameters())
    assert "text encoders" not in found.phases["it trains"] and "base" not in found.phases["it encodes captions"]
    assert "VAE" in found.phases["it draws samples"] and found.peak == max(map(found.of, found.phases))
    assert memory.estimate(parse(tree), info, memory.Rows(count=6), trainable=1000, device="cpu").phases.keys() == found.phases.keys() - {"it draws samples"}


# ---- badges and what to change


def middle(base, rows, **schedule):
    """A run whose batches weigh more than its libraries."""
    return tiny.tree(base, rows, schedule={"batch_size": 4096, "steps": 4, **schedule}, task={"kind": "chat", "max_length": 64}, compute={"device": "cpu", "precision": "fp32"})


@pytest.mark.parametrize(("share", "badge"), [(2.0, "fits"), (1.1, "tight"), (0.9, "too big")])
def test_the_badge_says_whether_it_fits_and_what_is_named_does(workspace, base, chat_rows, monkeypatch, share, badge):
    tree = middle(base, chat_rows)
    needed = studio.preflight(workspace, parse(tree)).facts["memory"]
    free = int(share * needed)
    monkeypatch.setattr(preflight.checks, "free_memory", lambda device: free)
    told = studio.preflight(workspace, parse(tree))
    assert told.facts["memory_badge"] == badge and told.can_start
    if badge == "fits":
        assert "memory_changes" not in told.facts
        return
    changes = told.facts["memory_changes"]
    assert changes and changes[0]["values"]["schedule.batch_size"] < 4096
    sentence = next(problem.sentence for problem in told.problems if "free on cpu" in problem.sentence)
    for change in changes:
        assert memory.in_words(change["values"]) in sentence
        after = studio.preflight(workspace, memory.changed(parse(tree), change["values"])).facts
        assert after["memory"] == change["peak"] <= memory.TIGHT * free and after["memory_badge"] == "fits"


def test_a_batch_is_cut_as_little_as_it_takes_and_the_step_stays_the_same():
    spec = parse({"data": [{"path": "x"}], "schedule": {"batch_size": 12, "accumulate": 3}})
    (first, *_) = memory.lighter(spec, lambda one: 100 * one.schedule.batch_size, 700, on_gpu=False)
    assert first.values == {"schedule.batch_size": 6, "schedule.accumulate": 6} and first.peak == 600 and first.share == pytest.approx(0.5)
    assert memory.lighter(spec, lambda one: 100, 50, on_gpu=False) == []


def test_where_no_single_setting_is_enough_several_are_named():
    spec = parse({"data": [{"path": "x"}], "schedule": {"batch_size": 4}, "task": {"kind": "chat", "max_length": 1024}})

    def peak(one):
        return one.schedule.batch_size * (1 if one.compute.checkpointing else 10)

    (only,) = memory.lighter(spec, peak, 1, on_gpu=False)
    assert only.values == {"schedule.batch_size": 1, "schedule.accumulate": 4, "compute.checkpointing": True} and only.peak == 1


# ---- when memory runs out anyway


def full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def ran_out(workspace, tree, monkeypatch, kind):
    monkeypatch.setattr(kind, "loss", full)
    folder = runs.create(workspace, studio.pinned(parse(tree)))
    with runs.Events(folder) as events:
        desk = SimpleNamespace(emit=events.emit, flush=events.flush, asked=lambda request: None, answered=lambda request: None)
        with pytest.raises(MachineError) as error:
            job.train(folder, desk)
        events.emit("failed", reason=str(error.value), key=error.value.key)
    return folder.name, str(error.value)


def test_the_message_names_values_and_shares_and_the_retry_starts_with_them(workspace, base, chat_rows, monkeypatch):
    id, sentence = ran_out(workspace, tiny.tree(base, chat_rows, validation={"size": 0}, output={"sample_prompts": []}), monkeypatch, text.TextTask)
    values = retries.offer(workspace, id)
    assert memory.in_words(values) + " saves" in sentence and "Set schedule.batch_size to 2 and schedule.accumulate to 4" in sentence
    assert values == {"schedule.batch_size": 2, "schedule.accumulate": 4}
    monkeypatch.undo()
    monkeypatch.setenv("LORA_STUDIO_HOME", str(workspace.root))
    new = retries.again(workspace, id)
    spec, before = studio.spec_of(workspace, new), studio.spec_of(workspace, id)
    assert (spec.schedule.batch_size, spec.schedule.accumulate) == (2, 4) and spec == memory.changed(before, values)
    assert studio.wait_until_ended(workspace, new, seconds=120).state == "done"
    assert retries.offer(workspace, new) == {}
    with pytest.raises(RunError, match="cannot be tried with less memory"):
        retries.again(workspace, new)


def test_an_image_run_is_told_too(workspace, tmp_path, monkeypatch):
    base, pictures = tiny_image.write_pipeline(tmp_path / "sd"), tiny_image.write_pictures(tmp_path / "pictures")
    tree = {
        "base": {"id": str(base)}, "data": [{"path": str(pictures)}], "validation": {"size": 0}, "task": {"kind": "image", "resolution": 32, "bucket_step": 16},
        "schedule": {"steps": 2, "batch_size": 4, "warmup": 0}, "compute": {"device": "cpu", "precision": "fp32"},
    }  # fmt: skip
    id, sentence = ran_out(workspace, tree, monkeypatch, image.ImageTask)
    assert memory.in_words(retries.offer(workspace, id)) + " saves" in sentence


def test_a_run_the_system_killed_gets_the_offer_and_one_that_failed_otherwise_does_not(workspace, base, chat_rows):
    folder = runs.create(workspace, studio.pinned(parse(tiny.tree(base, chat_rows))))
    with runs.Events(folder) as events:
        events.emit("failed", reason="The process was killed (signal 9, SIGKILL); the system does that when memory runs out.")
    assert retries.offer(workspace, folder.name)["schedule.batch_size"] < 4
    with runs.Events(folder) as events:
        events.emit("failed", reason="The loss became nan.", key="training.not_finite")
    assert retries.offer(workspace, folder.name) == {}


def test_every_optimizer_has_its_state():
    assert set(memory.STATE) == set(next(leaf for leaf in settings.leaves() if leaf.path == "optim.kind").choices)
