"""Baking: bit for bit what PEFT's merge gives for one adapter, the exact sum rounded once for several, and nothing or all on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_studio import adapters, checkpoints
from lora_studio.checkpoints import writing
from lora_studio.errors import AdapterError, BakeError, BaseModelError, MachineError
from tests import tiny, tiny_image

BF16 = torch.bfloat16
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(folder, dtype=BF16, *, shards: bool = False, **changes):
    """A tiny Llama in a folder, in one file or several, with a licence beside it."""
    model = tiny.model(**{"tie_word_embeddings": False, "hidden_size": 48, "head_dim": 12, **changes}).to(dtype)
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    tiny.tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("do what you like")
    (folder / "pytorch_model.bin").write_bytes(b"no")
    return folder


def adapter(base, target, *, seed: int, rank: int = 3, alpha: int = 7, targets=LINEARS, size: float = 0.2, **more):
    """A random PEFT adapter of a base, saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    made = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * size)
    made.save_pretrained(target, save_embedding_layers=False)
    return target


def weights(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def baked(base, target, *parts, **how):
    plan = checkpoints.plan(base, [(adapters.read(path), weight) for path, weight in parts], **how)
    checkpoints.apply(plan, target)
    return target


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_one_adapter_gives_the_very_bits_of_pefts_merge(tmp_path, dtype, shards):
    base = write(tmp_path / "base", dtype, shards=shards)
    lora = adapter(base, tmp_path / "lora", seed=1)
    target = baked(base, tmp_path / "out", (lora, 1.0))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = peft.PeftModel.from_pretrained(model, lora).merge_and_unload()
    found = weights(target)
    assert all(torch.equal(found[name], value) for name, value in merged.state_dict().items()) and set(found) == set(merged.state_dict())
    assert sum(not torch.equal(found[name], value) for name, value in weights(base).items()) == 14
    for file in base.glob("*.safetensors"):  # the header too, and everything that no adapter touches
        assert (target / file.name).stat().st_size == file.stat().st_size
    names = {file.name for file in target.iterdir()}
    assert names >= {"config.json", "tokenizer.json", "LICENSE"} and "pytorch_model.bin" not in names and "manifest.json" not in names
    assert (target / "config.json").read_bytes() == (base / "config.json").read_bytes()
    again = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    ids = torch.arange(5, 20)[None]
    assert torch.equal(again(ids).logits, merged(ids).logits)


def test_several_adapters_are_summed_exactly_and_rounded_once(tmp_path):
    base = write(tmp_path / "base")
    one = adapter(base, tmp_path / "one", seed=1)
    two = adapter(base, tmp_path / "two", seed=2, rank=5, alpha=3, targets=["q_proj", "down_proj"], use_rslora=True)
    found = weights(baked(base, tmp_path / "out", (one, 0.7), (two, -1.3), (one, 0.1)))
    parts = [(adapters.read(one), 0.7), (adapters.read(two), -1.3), (adapters.read(one), 0.1)]
    for name, before in weights(base).items():
        exact = before.double()
        for part, weight in parts:
            module = part.modules.get(name.removesuffix(".weight"))
            if module is not None:
                exact = exact + weight * module.scale * module.B.double() @ module.A.double()
        # Rounded once: no number is further from the truth than half a unit in the last place, and a hair for the fp32 sum.
        unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact.abs())[1] - 8)
        assert ((found[name].double() - exact).abs() <= 0.501 * unit + 1e-30).all(), name


def test_another_precision_and_its_words_in_the_configuration(tmp_path):
    base = write(tmp_path / "base", torch.float32, shards=True)
    lora = adapter(base, tmp_path / "lora", seed=1)
    target = baked(base, tmp_path / "out", (lora, 1.0), dtype="bf16")
    wide = weights(baked(base, tmp_path / "wide", (lora, 1.0)))
    assert all(torch.equal(value, wide[name].to(BF16)) for name, value in weights(target).items())
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.numel() * 2 for value in wide.values())
    assert transformers.AutoModelForCausalLM.from_pretrained(target).dtype == BF16


def test_a_tied_head_stays_what_it_was_when_only_the_embedding_is_adapted_and_the_other_way_round(tmp_path):
    base = write(tmp_path / "base", torch.float32, tie_word_embeddings=True, shards=True)
    before = weights(base)["model.embed_tokens.weight"]
    for targets, changed, same in ((["embed_tokens"], "model.embed_tokens", "lm_head"), (["lm_head"], "lm_head", "model.embed_tokens")):
        lora = adapter(base, tmp_path / targets[0], seed=1, targets=targets, size=0.5)
        plan = checkpoints.plan(base, [(adapters.read(lora), 1.0)])
        assert "written apart" in plan.notes[0]
        checkpoints.apply(plan, tmp_path / f"out-{targets[0]}")
        found = weights(tmp_path / f"out-{targets[0]}")
        assert torch.equal(found[f"{same}.weight"], before) and not torch.equal(found[f"{changed}.weight"], before)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{targets[0]}")
        assert not model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight
        unmerged = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), lora)
        ids = torch.arange(5, 20)[None]
        assert torch.allclose(model(ids).logits, unmerged(ids).logits, atol=1e-4)


def test_a_layer_that_lies_transposed_and_an_image_pipeline_with_convolutions(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50, n_positions=32))
    model.save_pretrained(tmp_path / "gpt2")
    lora = adapter(tmp_path / "gpt2", tmp_path / "lora", seed=1, targets=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    baked(tmp_path / "gpt2", tmp_path / "out", (lora, 1.0))
    merged = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2"), lora).merge_and_unload()
    ids = torch.arange(5, 20)[None]
    assert torch.allclose(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, merged(ids).logits, atol=1e-6)

    base = tiny_image.write_pipeline(tmp_path / "sd")
    modules = tiny_image.random_adapter(base, seed=3)
    part = adapters.with_modules(adapters.Card("peft", base=str(base)), modules)
    checkpoints.apply(checkpoints.plan(base, [(part, 0.5)]), tmp_path / "sd-out")
    before, after = weights(base / "unet"), weights(tmp_path / "sd-out" / "unet")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in modules} and any("conv1" in name for name in changed)
    for name, module in modules.items():
        assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + 0.5 * module.delta(), atol=1e-6)
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd-out")
    assert torch.equal(pipeline.unet.state_dict()[next(iter(changed))], after[next(iter(changed))])
    assert torch.equal(weights(base / "vae")["decoder.conv_in.weight"], weights(tmp_path / "sd-out" / "vae")["decoder.conv_in.weight"])


def test_the_loss_of_the_precision_is_told_within_a_hundredth_before_anything_is_written(tmp_path):
    base = write(tmp_path / "base", hidden_size=256, head_dim=64, intermediate_size=512)
    lora = adapter(base, tmp_path / "lora", seed=1, size=0.02)
    plan = checkpoints.plan(base, [(adapters.read(lora), 1.0)])
    told = checkpoints.loss(plan, rows=64)
    assert 0.2 < told.share < 1 and not (tmp_path / "out").exists()
    checkpoints.apply(plan, tmp_path / "out")
    before, after, wrong, size = weights(base), weights(tmp_path / "out"), 0.0, 0.0
    for name, module in adapters.read(lora).modules.items():
        update = module.cast(torch.float64).delta()
        error = (after[f"{name}.weight"].double() - before[f"{name}.weight"].double() - update).square().sum().item()
        wrong, size = wrong + error, size + update.square().sum().item()
        assert checkpoints.loss(plan, rows=10**6).layers[name] == pytest.approx((error / update.square().sum().item()) ** 0.5, rel=1e-6)
    assert told.overall == pytest.approx((wrong / size) ** 0.5, rel=0.01) and checkpoints.loss(plan, rows=10**6).share == 1


def test_what_cannot_be_baked_is_refused_by_name_before_a_byte_is_written(tmp_path):
    base = write(tmp_path / "base", shards=True)
    lora = adapter(base, tmp_path / "lora", seed=1)
    read, before = adapters.read(lora), sorted(tmp_path.iterdir())
    cases = [
        (lambda: checkpoints.plan(tmp_path / "nowhere", [(read, 1.0)]), BakeError, "is not the folder of a model"),
        (lambda: checkpoints.plan(base, [(read, 1.0)], dtype="int3"), BakeError, "int3 is no precision"),
        (lambda: checkpoints.plan(base, [(read, 0.0)]), BakeError, "No weight of base would change"),
        (lambda: checkpoints.plan(write(tmp_path / "other", hidden_size=32, head_dim=8), [(read, 1.0)]), AdapterError, r"down_proj is for a weight of shape \[48, 64\], but in other it has \[32, 64\]"),
        (lambda: checkpoints.plan(write(tmp_path / "less", num_hidden_layers=1), [(read, 1.0)]), AdapterError, "layers.1"),
        (lambda: checkpoints.apply(checkpoints.plan(base, [(read, 1.0)]), base), BakeError, "exists already"),
    ]
    for act, kind, said in cases:
        with pytest.raises(kind, match=said):
            act()
    whole = (base / "model.safetensors.index.json").read_text()
    first = sorted(base.glob("model-*.safetensors"))[0]
    data = first.read_bytes()
    first.write_bytes(data[:-7])
    with pytest.raises(BaseModelError, match=first.name):
        checkpoints.plan(base, [(read, 1.0)])
    first.unlink()
    with pytest.raises(BaseModelError, match=f"{first.name} is named in model.safetensors.index.json and not there"):
        checkpoints.plan(base, [(read, 1.0)])
    first.write_bytes(data)
    (base / "model.safetensors.index.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"index.json cannot be read"):
        checkpoints.plan(base, [(read, 1.0)])
    (base / "model.safetensors.index.json").write_text(whole)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name not in ("other", "less")] == before


def test_packed_numbers_of_a_quantised_base_are_refused_with_the_way_out(tmp_path):
    base = write(tmp_path / "base")
    lora = adapter(base, tmp_path / "lora", seed=1, targets=["q_proj"])
    found = weights(base)
    name = "model.layers.0.self_attn.q_proj.weight"
    found[name] = torch.zeros(found[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(found, base / "model.safetensors")
    with pytest.raises(BakeError, match=r"q_proj holds packed numbers.*full-precision model it was made from"):
        checkpoints.plan(base, [(adapters.read(lora), 1.0)])


def test_a_full_disk_or_a_stop_leaves_nothing_behind(tmp_path, monkeypatch):
    base = write(tmp_path / "base", shards=True)
    plan = checkpoints.plan(base, [(adapters.read(adapter(base, tmp_path / "lora", seed=1)), 1.0)])
    before = sorted(tmp_path.iterdir())

    def stop(done, total):
        assert 0 < done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.apply(plan, tmp_path / "out", report=stop)
    usage = writing.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BakeError, match=r"has 0\.0 GB free, and the baked model needs 0\.1 GB"):
        checkpoints.apply(plan, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_write_that_failed_while_the_rest_was_summed_is_told(tmp_path, monkeypatch):
    base = write(tmp_path / "base")
    plan = checkpoints.plan(base, [(adapters.read(adapter(base, tmp_path / "lora", seed=1)), 1.0)])
    before = sorted(tmp_path.iterdir())

    def broken(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writing.os, "fdatasync", broken)
    monkeypatch.setattr(writing, "FLUSH_SECONDS", 0.0)
    slow = writing.numbers.rewritten
    monkeypatch.setattr(writing.numbers, "rewritten", lambda *given: (time.sleep(0.05), slow(*given))[1])
    with pytest.raises(MachineError, match="Input/output error"):
        checkpoints.apply(plan, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_kill_leaves_nothing_under_the_final_name(tmp_path):
    base = write(tmp_path / "base", shards=True)
    lora = adapter(base, tmp_path / "lora", seed=1)
    program = (
        "import sys, time, pathlib; from lora_studio import adapters, checkpoints\n"
        "base, lora, out = map(pathlib.Path, sys.argv[1:])\n"
        "def slow(done, total): print(done, flush=True); time.sleep(0.05)\n"
        "checkpoints.apply(checkpoints.plan(base, [(adapters.read(lora), 1.0)]), out, report=slow)\n"
    )
    for lines in (1, 4, 9):
        child = subprocess.Popen([sys.executable, "-c", program, base, lora, tmp_path / "out"], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(lines):
            assert child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait(20)
        assert not (tmp_path / "out").exists()
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program.replace("time.sleep(0.05)", "None"), base, lora, tmp_path / "out"], check=True, capture_output=True, env=os.environ)
    assert time.monotonic() - began < 120 and set(weights(tmp_path / "out")) == set(weights(base))


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_what_was_baked_is_extracted_again_at_its_rank_and_within_a_loss(tmp_path, shards):
    base = write(tmp_path / "base", torch.float32, shards=shards)
    lora = adapter(base, tmp_path / "lora", seed=1, rank=5, size=0.5)
    tuned = baked(base, tmp_path / "tuned", (lora, 0.8))
    meant = adapters.read(lora).modules
    found = checkpoints.extract(tuned, base, rank=5)
    assert set(found.modules) == set(meant) and found.loss < 1e-5 and found.left_out == ()
    for name, module in meant.items():
        assert (found.modules[name].delta() - 0.8 * module.delta()).norm() < 1e-4 * module.delta().norm() and found.modules[name].rank == 5
    within = checkpoints.extract(tuned, base, loss=0.3)
    assert 0 < within.loss <= 0.3 and all(value <= 0.3 for value in within.layers.values())
    for name, module in within.modules.items():
        spectrum = torch.linalg.svdvals(0.8 * meant[name].cast(torch.float64).delta())
        needed = next(rank for rank in range(1, 6) if spectrum[rank:].norm() <= 0.3 * spectrum.norm())
        assert module.rank == needed
    part = adapters.with_modules(adapters.Card("peft", base=str(base)), found.modules)
    checkpoints.apply(checkpoints.plan(base, [(part, 1.0)]), tmp_path / "again")
    assert all(torch.allclose(value, weights(tuned)[name], atol=1e-5) for name, value in weights(tmp_path / "again").items())


def test_extraction_names_what_no_adapter_carries_and_refuses_two_that_do_not_belong(tmp_path):
    base = write(tmp_path / "base", torch.float32)
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    changed = weights(tuned)
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        changed[name] = changed[name] + torch.randn_like(changed[name]) * 0.1
    save_file(changed, tuned / "model.safetensors", {"format": "pt"})
    found = checkpoints.extract(tuned, base, rank=4)
    assert set(found.modules) == {"model.layers.0.mlp.up_proj"} and set(found.left_out) == {"model.norm.weight", "model.embed_tokens.weight"}
    assert 0.3 < found.loss < 1
    for act, said in (
        (lambda: checkpoints.extract(base, base, rank=4), "differ in no layer that an adapter carries"),
        (lambda: checkpoints.extract(tuned, base), "none was given"),
        (lambda: checkpoints.extract(write(tmp_path / "other", hidden_size=32, head_dim=8), base, rank=4), r"is \[.*32.*\] in other and \[.*48.*\] in base"),
        (lambda: checkpoints.extract(write(tmp_path / "less", num_hidden_layers=1), base, rank=4), "not there in less"),
    ):
        with pytest.raises(BakeError, match=said):
            act()


def test_an_adapter_learnt_over_4_bits_is_baked_into_the_full_precision_original(tmp_path):
    """An evaluation pass may repack 4-bit weights in place, after which a merge into them reads garbage; baking never looks at them."""
    base = write(tmp_path / "base", torch.float32, hidden_size=64, head_dim=16)
    four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit)
    packed.save_pretrained(tmp_path / "packed")
    torch.manual_seed(1)
    model = peft.get_peft_model(packed, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    ids = torch.arange(24).view(2, 12)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        model(ids)
    model.save_pretrained(tmp_path / "lora")
    lora = adapters.read(tmp_path / "lora")
    with pytest.raises(BakeError, match="full-precision model it was made from"):
        checkpoints.plan(tmp_path / "packed", [(lora, 1.0)])
    checkpoints.apply(checkpoints.plan(base, [(lora, 1.0)]), tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    for name, module in lora.modules.items():
        update = module.delta(torch.float64)
        assert float((after[f"{name}.weight"].double() - before[f"{name}.weight"].double() - update).norm() / update.norm()) < 1e-5, name
