"""Weights by layer pattern: whole words only, the most specific wins whatever the order, and a pattern without effect is an error."""

import itertools

import pytest

from lora_studio import weights
from lora_studio.errors import BlendError

LLAMA = [f"model.layers.{number}.{part}" for number in range(12) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
UNET = [
    "conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v", "up_blocks.1.resnets.0.conv1", "up_blocks.3.attentions.1.proj_in", "conv_out",
    "text_encoder.encoder.layers.0.self_attn.q_proj", "text_encoder.encoder.layers.1.mlp.fc1", "text_encoder_2.encoder.layers.0.mlp.fc1",
]  # fmt: skip
FLUX = [
    *(f"transformer_blocks.{number}.attn.to_q" for number in range(12)), *(f"single_transformer_blocks.{number}.attn.to_q" for number in range(3)),
    "x_embedder", "proj_out",
]  # fmt: skip

MEANS = [
    ("layers.1", "model.layers.1.mlp.up_proj", True), ("layers.1", "model.layers.10.mlp.up_proj", False), ("layers.1", "model.layers.11", False),
    ("transformer_blocks.1", "transformer_blocks.1.attn.to_q", True), ("transformer_blocks.1", "single_transformer_blocks.1.attn.to_q", False),
    ("transformer_blocks.1", "transformer_blocks.10.attn.to_q", False), ("model.layers.0-3", "model.layers.3.mlp.up_proj", True),
    ("model.layers.0-3", "model.layers.4.mlp.up_proj", False), ("model.layers.0-3", "model.layers.30.mlp.up_proj", False),
    ("8-11", "model.layers.10.mlp", True), ("*.mlp", "model.layers.4.mlp.up_proj", True), ("*.mlp", "mlp.up_proj", False),
    ("mlp", "model.layers.4.mlp", True), ("layers.*.mlp", "model.layers.4.mlp.up_proj", True), ("layers.*.mlp", "model.layers.mlp", False),
    ("layers.*.*.up_proj", "model.layers.4.mlp.up_proj", True), ("proj", "model.layers.4.mlp.up_proj", False), ("model", "language_model.x", False),
    ("text_encoder", "text_encoder.encoder.layers.0.mlp.fc1", True), ("text_encoder", "text_encoder_2.encoder.layers.0.mlp.fc1", False),
    ("mid_block", "mid_block.resnets.0.conv1", True), ("a.b.a", "a.b.b.a.b.a", True), ("a.b.c.d", "b.c.d", False),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "name", "is_meant"), MEANS)
def test_a_pattern_means_whole_words_in_a_row(pattern, name, is_meant):
    assert weights.means(pattern, name) is is_meant


def test_the_smaller_part_wins_in_whatever_order_patterns_are_written():
    given = {"": 0.6, "model.layers.0-3": 0.2, "mlp": 0.0, "model.layers.0-3.mlp": 0.4, "model.layers.2": 0.9, "model.layers.0-1": 0.3, "layers.*.mlp": 0.1}
    wanted = {
        "model.layers.0.self_attn.q_proj": 0.3,  # the narrower range
        "model.layers.3.self_attn.q_proj": 0.2,
        "model.layers.3.mlp.up_proj": 0.4,  # ends where `mlp` does, with more words
        "model.layers.2.self_attn.q_proj": 0.9,  # a number before a range
        "model.layers.9.mlp.up_proj": 0.1,
        "vision.mlp.fc1": 0.0,
        "model.layers.9.self_attn.q_proj": 0.6,
    }
    for order in itertools.permutations(given.items()):
        for name, weight in wanted.items():
            assert weights.of(dict(order), name) == weight, (name, order)
    for order in itertools.permutations([("model.layers.0", 1.0), ("q_proj", 2.0), ("model.layers.0.self_attn", 3.0), ("*", 0.5)]):
        assert weights.of(dict(order), "model.layers.0.self_attn.q_proj") == 2.0 and weights.of(dict(order), "model.layers.0.self_attn.k_proj") == 0.5
    for order in itertools.permutations([("layers.*", 1.0), ("layers.0-99", 2.0), ("layers.1-2", 3.0), ("layers.5", 4.0), ("layers.5-5", 5.0)]):
        assert [weights.of(dict(order), f"layers.{word}") for word in ("x", 50, 2, 5)] == [1.0, 2.0, 3.0, 4.0]
    assert weights.of({"": 0.6, "model.layers.0-3": 0.2, "*.mlp": 0.0}, "model.layers.1.mlp.up_proj") == 0.0


def test_the_weight_of_the_rest_is_that_of_the_empty_key_or_1():
    found = weights.by_layer({"layers.0-3": 0.5}, LLAMA)
    assert set(found) == set(LLAMA) and {found[name] for name in LLAMA[:12]} == {0.5} and {found[name] for name in LLAMA[12:]} == {1.0}
    assert set(weights.by_layer({"": 0.25, "layers.0-3": 0.5}, LLAMA).values()) == {0.25, 0.5}
    assert weights.by_layer({}, LLAMA) == dict.fromkeys(LLAMA, 1.0) and weights.by_layer(0.3, LLAMA) == dict.fromkeys(LLAMA, 0.3)


@pytest.mark.parametrize("pattern", ["layers.12", "layer.1", "model.layers.1.q_proj", "transformer_blocks.0", "20-30"])
def test_a_pattern_that_means_nothing_is_an_error_that_names_the_blocks_there_are(pattern):
    with pytest.raises(BlendError) as caught:
        weights.by_layer({"": 1.0, "mlp": 0.0, pattern: 0.5}, LLAMA, "pirate")
    said = str(caught.value)
    assert caught.value.key == "weights.idle" and pattern in said and "pirate" in said and "model.layers.0, model.layers.1" in said and "and 6 more" in said


@pytest.mark.parametrize("pattern", ["a..b", ".a", "a.", " ", "a b", "3-1", "to_*", "**", "a|b", "ä", 3, None])
def test_what_is_no_pattern_is_a_sentence(pattern):
    with pytest.raises(BlendError, match="is no pattern of layers"):
        weights.check({pattern: 0.5})


@pytest.mark.parametrize("weight", [True, None, "1", [1.0], float("nan"), float("inf"), -2e6])
def test_what_is_no_weight_is_a_sentence_that_says_where(weight):
    with pytest.raises(BlendError, match="is not a number from"):
        weights.check(weight)
    with pytest.raises(BlendError, match="of mlp is not a number from"):
        weights.check({"mlp": weight})
    with pytest.raises(BlendError, match="is not a number from"):
        weights.check({"": weight})


def test_blocks_come_in_the_order_of_the_model_and_each_is_a_pattern_of_its_own_layers():
    assert weights.blocks(LLAMA[::-1]) == [f"model.layers.{number}" for number in range(12)]
    assert weights.blocks(["lm_head", *LLAMA[:6], "model.embed_tokens"]) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]
    assert weights.blocks(UNET) == [
        "text_encoder", "text_encoder_2", "conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.3", "conv_out",
    ]  # fmt: skip
    assert weights.blocks(FLUX) == [
        "x_embedder", *(f"transformer_blocks.{number}" for number in range(12)), *(f"single_transformer_blocks.{number}" for number in range(3)), "proj_out",
    ]  # fmt: skip
    for names in (LLAMA, UNET, FLUX):
        blocks = weights.blocks(names)
        found = weights.by_layer({block: float(number) for number, block in enumerate(blocks)}, names)
        assert sorted(set(found.values())) == list(range(len(blocks)))
        assert all(name == block or name.startswith(f"{block}.") for name, block in ((name, blocks[int(place)]) for name, place in found.items()))


def test_weights_are_multiplied_and_added_layer_by_layer():
    left, right = {"": 0.5, "mlp": -1.0}, {"layers.0": 2.0}
    assert weights.by_layer(weights.times(right, -0.5), LLAMA) == {name: -0.5 * weight for name, weight in weights.by_layer(right, LLAMA).items()}
    assert weights.times(0.5, 3.0) == 1.5 and weights.plus(0.25, 0.5, LLAMA) == 0.75
    names = [*LLAMA, "vision.model.layers.0.mlp.up_proj", "model.layers.0.mlp"]
    both = weights.by_layer(weights.plus(left, right, names), names)
    assert both == {name: weights.of(left, name) + weights.of(right, name) for name in names}


def test_whether_anything_acts_and_how_it_is_told():
    assert weights.acts(0.5) and weights.acts({"mlp": 0.0}) and weights.acts({"": 0.0, "mlp": 0.5})
    assert not weights.acts(0.0) and not weights.acts({"": 0.0, "mlp": -0.0})
    assert weights.in_words(0.5) == "0.5" and weights.in_words({"": 0.5, "mlp": 0.0, "layers.1": 2.0}) == "0.5, layers.1 2, mlp 0"
    assert weights.in_words({f"layers.{number}": 0.5 for number in range(9)}) == "1, 9 by layer"
    assert weights.in_words({"mlp": "much"}) == "1, mlp much", "a card that was edited by hand"
