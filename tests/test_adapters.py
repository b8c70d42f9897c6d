"""Adapter files: what is wrong with each bad one is said in its sentence, what is right is read exactly, and nothing crashes."""

import io
import json
import math
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save

from lora_studio import adapters
from lora_studio.adapters import writing
from lora_studio.adapters.config import match, pattern
from lora_studio.errors import SENTENCES, AdapterError, BlendError, StudioError
from lora_studio.lowrank import LowRank
from tests import tiny

LAYERS = [f"model.layers.{number}.self_attn.{end}" for number in range(2) for end in ("q_proj", "v_proj")]
CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def tensors(layers=LAYERS, rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in layers:
        made[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, 8, generator=generator)
        made[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
    return made


A0, B0 = (f"base_model.model.{LAYERS[0]}.lora_{part}.weight" for part in "AB")


def files(weights=None, config=None, **changes) -> dict[str, bytes]:
    """The files of a PEFT folder; `changes` set fields of its configuration, None takes one away."""
    tree = {**(CONFIG if config is None else config), **changes}
    data = weights if isinstance(weights, bytes) else save(tensors() if weights is None else weights)
    return {adapters.WEIGHTS: data, adapters.CONFIG: json.dumps({key: value for key, value in tree.items() if value is not None}).encode()}


def raw(header: dict | str | bytes, body: bytes = b"") -> bytes:
    """A safetensors file with exactly this header."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(start: int, end: int, shape=None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors().items() if name not in names}


def torch_zip() -> bytes:
    """What torch.save writes, made without torch.save: a zip with a data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return buffer.getvalue()


GOOD = save(tensors())
HEADER_LENGTH = struct.unpack("<Q", GOOD[:8])[0]
NAN = {**tensors(), B0: torch.tensor([[math.nan, 1.0]] * 6)}
INF = {**tensors(), A0: torch.full((2, 8), math.inf)}


def image(*names: str, **metadata: str) -> dict[str, bytes]:
    """An adapter file with these tensors and nothing beside it."""
    return {adapters.WEIGHTS: save({name: torch.zeros(4, 8) for name in names}, metadata)}


# (what it is, its files, the key of its sentence, a word of it)
BAD = [
    ("pickle renamed", files(pickle.dumps({"a": 1}, protocol=2)), "adapter.pickle", "never opened"),
    ("newer pickle", files(pickle.dumps({"a": 1}, protocol=5)), "adapter.pickle", "never opened"),
    ("torch.save renamed", files(torch_zip()), "adapter.pickle", "never opened"),
    ("zip", files(plain_zip()), "adapter.stranger", "zip archive"),
    ("web page", files(b"\n<!DOCTYPE html><html>Sign in</html>"), "adapter.stranger", "web page"),
    ("LFS pointer", files(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "adapter.stranger", "Git LFS pointer"),
    ("GGUF", files(b"GGUF\x03\x00\x00\x00" + bytes(64)), "adapter.stranger", "GGUF"),
    ("JSON error", files(b'{"error": "Repository not found"}'), "adapter.stranger", "JSON"),
    ("empty file", files(b""), "adapter.empty_file", "is empty"),
    ("seven bytes", files(GOOD[:7]), "adapter.cut", "7 bytes"),
    ("cut in the header", files(GOOD[: HEADER_LENGTH // 2]), "adapter.cut", "cut off"),
    ("cut in the values", files(GOOD[:-1]), "adapter.cut", f"{len(GOOD):,}"),
    ("junk after the end", files(GOOD + b"xyz"), "adapter.junk", "3 bytes"),
    ("zip after the end", files(GOOD + plain_zip()), "adapter.junk", "after its end"),
    ("noise", files(random.Random(0).randbytes(4000)), "adapter.not_safetensors", "not a safetensors file"),
    ("header of 2^63 bytes", files(struct.pack("<Q", 2**63) + b"{" + bytes(100)), "adapter.not_safetensors", "first bytes"),
    ("header of 9 MB", files(raw(b"{" + b" " * (9 << 20) + b"}")), "adapter.header_limit", "larger header"),
    ("60,000 tensors", files(raw({f"{number}": entry(0, 4) for number in range(60_000)})), "adapter.header_limit", "50,000"),
    ("2 MB of metadata", files(raw({"__metadata__": {"a": "x" * (2 << 20)}, "t": entry(0, 4)}, bytes(4))), "adapter.header_limit", "metadata"),
    ("60,000 tensors in disguise", files(raw(json.dumps({f"{number}": entry(0, 4) for number in range(60_000)}).replace("data_offsets", "data\\u005foffsets"))), "adapter.header_limit", "50,000"),
    ("metadata no table", files(raw({"__metadata__": {"a": 1}, "t": entry(0, 4)}, bytes(4))), "adapter.not_safetensors", "metadata"),
    ("header not JSON", files(raw("{oops}")), "adapter.not_json", "broken"),
    ("header not UTF-8", files(raw(b'{"\xff": 1}')), "adapter.not_json", "UTF-8"),
    ("header with NaN", files(raw('{"t": NaN}')), "adapter.not_json", "NaN"),
    ("header a list", files(raw("[1, 2]")), "adapter.not_safetensors", "begin with {"),
    ("header begins with a space", files(raw(" " + json.dumps({"t": entry(0, 4)}), bytes(4))), "adapter.not_safetensors", "begin with {"),
    ("header nested deeply", files(raw('{"t":' + "[" * 100_000)), "adapter.not_json", "broken"),
    ("no tensors", files(raw("{}")), "adapter.no_tensors", "no tensors"),
    ("name twice", files(raw('{"t": %s, "t": %s}' % ((json.dumps(entry(0, 4)),) * 2), bytes(4))), "adapter.duplicate", "twice"),
    ("overlapping", files(raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12))), "adapter.entry", "overlaps"),
    ("same range twice", files(raw({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8))), "adapter.entry", "overlaps"),
    ("hole", files(raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))), "adapter.entry", "hole"),
    ("hole at the start", files(raw({"a": entry(4, 8)}, bytes(8))), "adapter.entry", "hole"),
    ("shape and range differ", files(raw({"a": entry(0, 8, [3])}, bytes(8))), "adapter.entry", "disagree"),
    ("range backwards", files(raw({"a": entry(8, 0, [2])}, bytes(8))), "adapter.entry", "disagree"),
    ("negative shape", files(raw({"a": entry(0, 8, [-2])}, bytes(8))), "adapter.entry", "whole numbers"),
    ("shape of fractions", files(raw({"a": entry(0, 8, [2.0])}, bytes(8))), "adapter.entry", "whole numbers"),
    ("unknown dtype", files(raw({"a": entry(0, 8, dtype="F99")}, bytes(8))), "adapter.entry", "F99"),
    ("entry without a shape", files(raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4))), "adapter.entry", "lacks"),
    ("empty tensor", files({**tensors(), A0: torch.zeros(0)}), "adapter.empty_tensor", "sharded"),
    ("NaN", files(NAN), "adapter.not_finite", "q_proj.lora_B.weight holds NaN"),
    ("Inf", files(INF), "adapter.not_finite", "q_proj.lora_A.weight holds Inf"),
    ("NaN in half precision", files({name: value.half() for name, value in NAN.items()}), "adapter.not_finite", "NaN"),
    ("never trained", files({name: value * ("lora_A" in name) for name, value in tensors().items()}), "adapter.no_effect", "changes nothing"),
    ("A all zero", files({name: value * ("lora_B" in name) for name, value in tensors().items()}), "adapter.no_effect", "changes nothing"),
    ("alpha 0", files(lora_alpha=0), "adapter.no_effect", "lora_alpha is 0"),
    ("up without down", files(without(A0)), "adapter.half", "has lora_B but no lora_A"),
    ("down without up", files(without(B0)), "adapter.half", "has lora_A but no lora_B"),
    ("factors do not fit", files({**tensors(), B0: torch.zeros(6, 3)}), "adapter.shapes", "[6, 3]"),
    ("whole numbers", files({name: value.int() for name, value in tensors().items()}), "adapter.not_floats", "I32"),
    ("rank of the configuration", files(r=5), "adapter.rank_differs", "4 layers differ"),
    ("weights beyond the targets", files(target_modules=["q_proj"]), "adapter.beyond_targets", "2 of 4 layers"),
    ("weights beyond the chosen blocks", files(layers_to_transform=[1]), "adapter.beyond_targets", "layers.0"),
    ("excluded layers", files(exclude_modules=["v_proj"]), "adapter.beyond_targets", "v_proj"),
    ("lora_alpha missing", files(lora_alpha=None), "adapter.no_alpha", "lora_alpha"),
    ("lora_alpha a text", files(lora_alpha="16"), "adapter.config_value", "lora_alpha is '16'"),
    ("lora_alpha 1e30", files(lora_alpha=1e30), "adapter.config_value", "1e+30"),
    ("rank a text", files(r="8"), "adapter.config_value", "r is '8'"),
    ("rank 0", files(r=0), "adapter.config_value", "r is 0"),
    ("another method", files(peft_type="BOFT"), "adapter.method", "BOFT"),
    ("IA3 of another program", files(peft_type="IA3"), "adapter.native_width", "ia3"),
    ("no method", files(peft_type=None), "adapter.config_lacks", "peft_type"),
    ("configuration not JSON", {**files(), adapters.CONFIG: b"r: 8"}, "adapter.not_json", "broken"),
    ("configuration a list", {**files(), adapters.CONFIG: b"[]"}, "adapter.not_json", "not an object"),
    ("configuration with a key twice", {**files(), adapters.CONFIG: b'{"r": 2, "r": 3}'}, "adapter.duplicate", "name r twice"),
    ("configuration of 2 MB", files(note="x" * (2 << 20)), "adapter.header_limit", "longer text"),
    ("no configuration", {adapters.WEIGHTS: GOOD}, "adapter.no_config", "adapter_config.json"),
    ("no weights", {adapters.CONFIG: files()[adapters.CONFIG]}, "adapter.no_weights", "adapter_model.safetensors"),
    ("pattern that takes forever", files(target_modules=r"(a+)+$"), "adapter.pattern", "forever"),
    ("pattern that is none", files(alpha_pattern={"(q_proj": 3}), "adapter.pattern", "cannot be used"),
    ("DoRA without magnitudes", files(use_dora=True), "adapter.dora_flag", "use_dora true"),
    ("magnitudes without DoRA", files({**tensors(), f"base_model.model.{LAYERS[0]}.lora_magnitude_vector": torch.ones(6)}), "adapter.dora_flag", "1 magnitude"),
    ("stray tensors", files({**tensors(), "base_model.model.score.weight": torch.ones(2, 2)}), "adapter.stray", "score.weight"),
    ("an adapter twice", files({**tensors(), A0.replace("lora_A", "lora_A.other"): torch.ones(2, 8)}), "adapter.twice", "twice"),
    ("no factors", files({"base_model.model.lm_head.weight": torch.ones(2, 2)}, modules_to_save=["lm_head"]), "adapter.no_factors", "lm_head"),
    ("whole model", {adapters.WEIGHTS: save({f"model.layers.{n}.mlp.up_proj.weight": torch.ones(2, 2) for n in range(3)})}, "adapter.whole_model", "Use it as a base"),
    ("unknown names", {adapters.WEIGHTS: save({"emb_params": torch.ones(2, 2)})}, "adapter.unknown_names", "emb_params"),
    ("SDXL by kohya", image("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"), "adapter.image", "kohya adapter for Stable Diffusion XL"),
    ("SD 1.5 by kohya", image("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "adapter.image", "Stable Diffusion 1.5"),
    ("named by its metadata", image("lora_unet_x.lora_down.weight", ss_base_model_version="sdxl_base_v1-0"), "adapter.image", "Stable Diffusion XL"),
    ("FLUX by diffusers", image("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"), "adapter.image", "diffusers adapter for FLUX.1"),
    ("Qwen-Image for ComfyUI", image("diffusion_model.transformer_blocks.0.img_mlp.net.lora_A.weight"), "adapter.image", "Qwen-Image"),
    ("LoKr of no known layer", image("lycoris_blocks_0_attn.lokr_w1"), "adapter.lycoris_layer", "lycoris_blocks_0_attn"),
    ("OFT by LyCORIS", image("lycoris_blocks_0_attn.oft_blocks"), "adapter.image", "lycoris"),
]  # fmt: skip


@pytest.mark.parametrize("what,bad,key,words", BAD, ids=[row[0] for row in BAD])
def test_every_bad_adapter_is_refused_in_its_own_sentence(what, bad, key, words, tmp_path):
    for number, source in enumerate((bad, tmp_path / "x")):
        if number:
            source.mkdir()
            for name, data in bad.items():
                (source / name).write_bytes(data)
        with pytest.raises(AdapterError) as caught:
            adapters.read(source)
        sentence = str(caught.value)
        literal = max(SENTENCES[key].replace("}", "{").split("{")[::2], key=len)
        assert literal in sentence and words in sentence, sentence
        assert str(tmp_path) not in sentence and "None" not in sentence and sentence.isprintable()


@pytest.mark.parametrize("suffix", sorted(adapters.PICKLED))
def test_pickles_are_refused_by_their_name_without_being_opened(tmp_path, suffix, monkeypatch):
    file = tmp_path / f"adapter_model{suffix}"
    file.write_bytes(GOOD)
    file.chmod(0)
    monkeypatch.setattr("builtins.open", lambda *arguments, **named: pytest.fail("it was opened"))
    for source in (file, tmp_path):
        with pytest.raises(AdapterError, match="is a pickle"):
            adapters.inspect(source)


def test_paths_that_hold_no_adapter_are_named(tmp_path):
    for path, words in [(tmp_path / "nowhere", "is not there"), (tmp_path, "has no adapter_model.safetensors")]:
        with pytest.raises(AdapterError, match=words):
            adapters.inspect(path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(GOOD)
    with pytest.raises(AdapterError, match=r"several weight files: a\.safetensors, b\.safetensors"):
        adapters.inspect(tmp_path)
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(AdapterError, match=r"adapter_config\.json cannot be read: Is a directory"):
        adapters.inspect(tmp_path / "a.safetensors")


def test_hostile_names_are_shown_harmlessly():
    name = "base_model.model.\x1b[2J\n../../etc\u202e.lora_A.weight"
    with pytest.raises(AdapterError) as caught:
        adapters.read(files({name: torch.ones(2, 2)}, target_modules=None))
    assert str(caught.value).isprintable() and "\\x1b" in str(caught.value)


@pytest.mark.parametrize("name,dtype", [("F64", torch.float64), ("F16", torch.float16), ("BF16", torch.bfloat16), ("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
def test_every_floating_dtype_is_read_exactly_and_computed_in_fp32_or_wider(name, dtype):
    weights = {key: value.to(dtype) for key, value in tensors().items()}
    read = adapters.read(files(weights))
    assert read.card.dtypes == (name,)
    module = read.modules[LAYERS[0]]
    assert torch.equal(module.A.view(torch.uint8), weights[A0].view(torch.uint8))
    torch.testing.assert_close(module.delta(torch.float64), 2 * weights[B0].double() @ weights[A0].double(), rtol=1e-5, atol=1e-5)
    again = adapters.read(adapters.write(read)).modules[LAYERS[0]]
    torch.testing.assert_close(again.delta(torch.float64), module.delta(torch.float64), rtol=1e-6, atol=1e-6)


def test_names_may_carry_the_name_of_the_adapter():
    named = {key.replace(".weight", ".default.weight"): value for key, value in tensors().items()}
    assert torch.equal(adapters.read(files(named)).modules[LAYERS[1]].delta(), adapters.read(files()).modules[LAYERS[1]].delta())


def test_several_problems_are_said_at_once():
    with pytest.raises(AdapterError) as caught:
        adapters.read(files(without(A0), r=5, lora_alpha=None))
    for words in ("no lora_A", "has rank 2", "no lora_alpha"):
        assert words in str(caught.value)
    card = adapters.inspect(files(without(A0), r=5, lora_alpha=None))
    assert len(card.problems) == 3 and not card.is_usable and len(card.layers) == 3


def test_what_is_missing_can_be_given():
    assert adapters.read(files(lora_alpha=None), config={"lora_alpha": 6}).modules[LAYERS[0]].scale == 3.0
    bare = adapters.read({adapters.WEIGHTS: GOOD}, config={"lora_alpha": 4, "base_model_name_or_path": "x"})
    assert bare.card.base == "x" and bare.modules[LAYERS[0]].scale == 2.0


# ---- scales, patterns, targets


PATTERNS = [
    ({}, {}, False), ({"q_proj": 3}, {}, False), ({}, {"v_proj": 16}, False), ({r"layers\.1\..*": 4}, {"layers.0.self_attn.q_proj": 7}, True),
    ({"q_proj": 3}, {"j": 100, "_proj": 3, "self_attn.q_proj": 5}, True),
]  # fmt: skip


@pytest.mark.parametrize("ranks,alphas,rslora", PATTERNS)
def test_scales_are_those_of_peft(tmp_path, ranks, alphas, rslora):
    import peft

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    model = peft.get_peft_model(tiny.model(), config)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    model.save_pretrained(tmp_path)
    ours = adapters.read(tmp_path)
    seen = 0
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            assert ours.modules[name].scale == pytest.approx(module.scaling["default"], rel=1e-12)
            torch.testing.assert_close(ours.modules[name].delta(), module.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6)
            seen += 1
    assert seen == len(ours.modules) == 4


TARGETS = [
    {"target_modules": ["q_proj"]}, {"target_modules": r".*layers\.1.*(q|k)_proj"}, {"target_modules": ["model.layers.0.mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, {"target_modules": ["proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, {"target_modules": ["q_proj"], "exclude_modules": r".*0.*"},
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": [0]},
]  # fmt: skip


@pytest.mark.parametrize("options", TARGETS)
def test_targets_mean_what_peft_takes_them_for(options):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    from lora_studio.adapters.config import PeftConfig, means

    theirs, ours = LoraConfig(**options), PeftConfig(peft_type="LORA", **options)
    names = [name for name, _ in tiny.model().named_modules() if name]
    assert [name for name in names if means(ours, name)] == [name for name in names if check_target_module_exists(theirs, name) is True or getattr(check_target_module_exists(theirs, name), "string", None)]
    for patterns in (["q_proj"], ["a", "self_attn.q_proj", "proj"], [r"layers\.\d\.self_attn\..*"]):
        for name in names:
            assert (match(dict.fromkeys(patterns), name) or name) == get_pattern_key(patterns, name)


def test_patterns_that_users_have_are_taken():
    unsloth = r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|o_proj)))"
    assert pattern(unsloth).fullmatch("model.layers.11.self_attn.o_proj")
    assert pattern(r"^(?!.*visual).*(?:q_proj|k_proj)").match("a.q_proj")


# ---- what cannot be blended yet


def peft_folder(tmp_path, **options):
    import peft

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.model(attention_bias=True), peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options}))
    for name, value in model.named_parameters():
        if "lora_B" in name or "embedding_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path)
    return tmp_path


REFUSED = [
    ({"use_dora": True}, "blend.dora", "DoRA"), ({"lora_bias": True}, "blend.bias", "biases"), ({"bias": "lora_only"}, "blend.bias", "biases"),
    ({"init_lora_weights": "pissa"}, "blend.mutates", "pissa"), ({"init_lora_weights": "pissa_niter_2"}, "blend.mutates", "pissa_niter_2"),
    ({"init_lora_weights": "olora"}, "blend.mutates", "olora"), ({"modules_to_save": ["lm_head"]}, "blend.extras", "lm_head.weight"),
    ({"trainable_token_indices": [1, 2]}, "blend.variant", "trained tokens"),
]  # fmt: skip


@pytest.mark.parametrize("options,key,words", REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_what_cannot_be_blended_is_read_and_refused_by_name(tmp_path, options, key, words):
    read = adapters.read(peft_folder(tmp_path, **options))
    assert read.card.is_usable and len(read.modules) == 4
    with pytest.raises(BlendError, match=words) as caught:
        adapters.refuse_blend({"fine": adapters.inspect(files()), "odd one": read.card})
    assert caught.value.key == key and "odd one" in str(caught.value)
    if key != "blend.extras":
        with pytest.raises(AdapterError, match="cannot be written in the common layout"):
            adapters.write(read)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal", "r": 4}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_what_can_be_blended_is_not_refused(tmp_path, options):
    card = adapters.inspect(peft_folder(tmp_path, **options))
    adapters.refuse_blend({"one": card, "two": card})
    assert card.is_usable


def test_other_methods_and_other_bases_are_refused_in_a_blend():
    fine = adapters.inspect(files())
    for kind, word in (("BOFT", "boft"), ("IA3", "an IA3 adapter: it multiplies")):
        with pytest.raises(BlendError, match=word):
            adapters.refuse_blend({"x": adapters.inspect(files(peft_type=kind))})
    with pytest.raises(BlendError, match="kohya"):
        adapters.refuse_blend({"x": adapters.inspect(image("lora_unet_x.lora_down.weight"))})
    other = adapters.inspect(files(base_model_name_or_path="someone/else"))
    with pytest.raises(BlendError, match="one was made for tiny, two for someone/else"):
        adapters.refuse_blend({"one": fine, "two": other})
    adapters.refuse_blend({"one": fine, "two": other}, prints={"one": "aa", "two": "aa"})
    with pytest.raises(BlendError, match="same base"):
        adapters.refuse_blend({"one": fine, "two": fine}, prints={"one": "aa", "two": "bb"})


def test_the_adapter_of_a_run_is_read(tmp_path, base, chat_rows, workspace):
    from lora_studio import library
    from lora_studio.spec import parse
    from lora_studio.training.methods import METHODS

    spec = parse(tiny.tree(base, chat_rows, method={"rank": 4, "alpha": 6, "rslora": True}))
    method = METHODS[spec.method.kind]
    model = method.attach(tiny.model(), spec, ["q_proj", "down_proj"])
    made = method.finish(model, spec)
    assert {problem.level for problem in adapters.inspect(made).problems} <= {"warning"}
    with pytest.raises(AdapterError, match="changes nothing"):  # a fresh one
        adapters.read(made)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    read = adapters.read(method.finish(model, spec))
    assert read.card.base == str(base) and read.card.targets == ("down_proj", "q_proj") and read.modules["model.layers.0.mlp.down_proj"].scale == 3.0
    assert adapters.check(read.card, adapters.base_shapes(base)) == []
    assert library.card(workspace, library.add(workspace, method.finish(model, spec), {"name": spec.name}))["rslora"] is True


# ---- against a base


def test_an_adapter_fits_its_base_and_what_does_not_is_named(tmp_path, base):
    shapes = adapters.base_shapes(base)
    card = adapters.inspect(peft_folder(tmp_path, target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"]))
    assert adapters.check(card, shapes) == []

    def said(changed, **named):
        return [(problem.level, problem.sentence) for problem in adapters.check(changed, shapes, label="pirate", base="tiny-llama", **named)]

    def card_of(layers: dict[str, tuple[int, int]], **changes):
        made = {}
        for name, (out, into) in layers.items():
            made[f"base_model.model.{name}.lora_A.weight"], made[f"base_model.model.{name}.lora_B.weight"] = torch.ones(2, into), torch.ones(out, 2)
        return adapters.inspect(files(made, **{"base_model_name_or_path": "tiny-llama", "target_modules": ["q_proj"], **changes}))

    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(2)]
    assert said(card_of(dict.fromkeys(names, (32, 32)))) == []
    [(level, sentence)] = said(card_of({names[0]: (32, 32)}))
    assert level == "warning" and "for 1 of the 2 layers" in sentence and names[1] in sentence
    [(level, sentence)] = said(card_of({f"model.layers.{number}.attn.q_proj": (32, 32) for number in range(3)}, base_model_name_or_path=None))
    assert level == "error" and "None of the 3 layers of pirate is in tiny-llama" in sentence
    [(level, sentence)] = said(card_of(dict.fromkeys([*names, "model.layers.7.self_attn.q_proj"], (32, 32))))
    assert level == "error" and "1 of 3 layers are not in tiny-llama" in sentence and "layers.7" in sentence
    [(level, sentence)] = said(card_of(dict.fromkeys(names, (64, 64))))
    assert level == "error" and "[64, 64]" in sentence and "[32, 32]" in sentence
    [(level, sentence)] = said(card_of(dict.fromkeys(names, (32, 32)), base_model_name_or_path="other/base"))
    assert level == "warning" and "made for other/base, not for tiny-llama" in sentence
    for other in ("language_" + names[0], names[0].removeprefix("model.")):  # PEFT would find neither
        assert said(card_of({other: (32, 32)}, target_modules=None))[0][0] == "error"


def test_a_transposed_base_fits_when_the_adapter_says_so():
    name = "h.0.attn.c_attn"
    weights = {f"base_model.model.transformer.{name}.lora_A.weight": torch.ones(2, 8), f"base_model.model.transformer.{name}.lora_B.weight": torch.ones(24, 2)}
    shapes = {name: (8, 24)}
    assert adapters.check(adapters.inspect(files(weights, target_modules=["c_attn"], fan_in_fan_out=True)), shapes) == []
    assert adapters.check(adapters.inspect(files(weights, target_modules=["c_attn"])), shapes) != []


def test_a_model_may_put_a_word_before_the_names_of_its_checkpoint():
    card = adapters.inspect(files())
    assert adapters.check(card, {name.removeprefix("model."): (6, 8) for name in LAYERS}) == []
    assert adapters.check(card, {name.removeprefix("model."): (6, 9) for name in LAYERS})[0].level == "error"


def test_targets_without_weights_are_a_warning():
    [problem] = adapters.inspect(files(target_modules=["q_proj", "v_proj", "gate_proj"])).problems
    assert problem.level == "warning" and "gate_proj" in problem.sentence


# ---- writing


def test_what_is_written_is_read_back_in_the_one_layout():
    modules = {
        "model.layers.0.q_proj": LowRank(torch.randn(3, 8), torch.randn(6, 3), 0.3),
        "model.layers.1.q_proj": LowRank(torch.randn(5, 8), torch.randn(6, 5), -2.0),
        "embed_tokens": LowRank(torch.randn(2, 20), torch.randn(6, 2), 1.0, "embedding"),
        "conv": LowRank(torch.randn(4, 6, 3, 3), torch.randn(8, 2, 1, 1), 1.5, "conv"),
    }
    made = adapters.write(adapters.with_modules(adapters.Card("peft", base="b", task_type="CAUSAL_LM"), modules))
    config = json.loads(made[adapters.CONFIG])
    assert config["r"] == config["lora_alpha"] == 6 and config["rank_pattern"] == config["alpha_pattern"] == {} and not config["use_rslora"]
    again = adapters.read(made)
    assert again.card.ranks == (6,) and again.card.base == "b" and again.modules.keys() == modules.keys()
    for name, module in again.modules.items():
        assert module.scale == 1.0 and module.groups == modules[name].groups
        torch.testing.assert_close(module.delta(torch.float64), modules[name].delta(torch.float64), rtol=1e-5, atol=1e-5)
    assert adapters.write(again) == made  # writing what was read changes no byte


def test_heads_survive_a_rewrite(tmp_path):
    read = adapters.read(peft_folder(tmp_path, modules_to_save=["lm_head"], use_rslora=True))
    again = adapters.read(adapters.write(read))
    assert again.card.extras == read.card.extras and torch.equal(*(one.extras["base_model.model.lm_head.weight"] for one in (read, again)))
    for name in read.modules:
        torch.testing.assert_close(again.modules[name].delta(), read.modules[name].delta())


def test_nothing_and_numbers_too_large_are_not_written():
    card = adapters.Card("peft")
    with pytest.raises(AdapterError, match="nothing to save"):
        adapters.write(adapters.with_modules(card, {}))
    large = {"x": LowRank(torch.full((1, 4), 1e6), torch.full((4, 1), 1e6))}
    adapters.write(adapters.with_modules(card, large))
    with pytest.raises(AdapterError, match="does not fit float16"):
        adapters.write(adapters.with_modules(card, large), dtype="float16")


@pytest.mark.parametrize(
    "names,targets",
    [
        (LAYERS, ["q_proj", "v_proj"]),
        ([*LAYERS, "lm_head"], ["lm_head", "q_proj", "v_proj"]),
        (LAYERS[:3], sorted(LAYERS[:3])),  # v_proj only in block 0
        (["m.layers.1.q_proj"], ["m.layers.1.q_proj"]),  # not the first block
        (["m.layers.0.a.to_q", "m.layers.0.b.to_q"], ["m.layers.0.a.to_q", "m.layers.0.b.to_q"]),
    ],
)
def test_targets_name_layers_shortly_only_where_every_block_has_them(names, targets):
    assert writing.targets_of(list(names)) == targets


# ---- inspecting is cheap, and nothing crashes


def test_inspecting_loads_no_torch_and_reads_no_values(tmp_path):
    for name, data in files().items():
        (tmp_path / name).write_bytes(data)
    code = f"import sys; from lora_studio import adapters, library; card = adapters.inspect({str(tmp_path)!r}); print(card.rank, card.alpha, card.targets, card.layers[{LAYERS[0]!r}].scale, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "4.0", "('q_proj',", "'v_proj')", "2.0", "False"]
    assert adapters.inspect(files(NAN)).is_usable  # values are not looked at
    card = adapters.inspect(files())
    assert (card.method, card.base, card.rank, card.alpha, card.parameters, card.bytes, card.dtypes) == ("lora", "tiny", 2, 4.0, 4 * 28, len(GOOD), ("F32",))


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to three random faults: flipped, deleted, doubled and swapped pieces, and numbers and quotes where they hurt."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at, kind = draw.randrange(min(len(found), draw.choice([8, 400, len(found)]))), draw.randrange(6)
        if kind == 0:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[at : at + draw.randint(1, 30)]
        elif kind == 2:
            found[at:at] = found[at : at + draw.randint(1, 60)]
        elif kind == 3:
            found[at : at + 1] = draw.choice([b'"', b"{", b"}", b"[", b"9", b"-1", b"1e9", b"null", b"\\ud800", b"\xff", b"\x00", b",", b"true", b"[[[["])
        elif kind == 4:
            del found[at:]
        else:
            found[:8] = struct.pack("<Q", draw.choice([0, 1, HEADER_LENGTH - 1, HEADER_LENGTH + 1, 2**32, 2**63, 2**64 - 1]))
        if not found:
            break
    return bytes(found)


def test_nothing_crashes_on_500_mutations():
    draw, outcomes = random.Random(7), {"read": 0, "refused": 0}
    good = files(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, layers_to_transform=[0, 1])
    for number in range(500):
        name = adapters.CONFIG if number % 3 == 0 else adapters.WEIGHTS
        try:
            adapters.read({**good, name: mutate(good[name], draw)})
            outcomes["read"] += 1
        except StudioError as error:
            assert str(error).isprintable() and "\n" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 300 and sum(outcomes.values()) == 500
