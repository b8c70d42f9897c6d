"""The bundled base demo-image keeps its promises: size, tokenizer, loading, held-out pictures; so do its judge and its two data sets."""

import json
import logging
import os
import warnings
from pathlib import Path
from random import Random

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

from diffusers import StableDiffusionPipeline  # noqa: E402
from PIL import Image  # noqa: E402

from lora_studio.demo import image_score, make_image_base, make_image_data  # noqa: E402
from lora_studio.demo import image_world as world  # noqa: E402

BASE = Path(make_image_base.__file__).parent / "image"
PRESETS = BASE.parents[2] / "presets" / "demo"


class Heard(logging.Handler):
    """Keeps what a library says aloud."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(BASE)


# ---- the judge


@pytest.mark.parametrize("styles", [(), ("stripes",), ("outline",), ("stripes", "outline")])
def test_the_judge_sees_what_was_drawn(styles):
    chance = Random(5)
    for scene in chance.sample(world.SCENES, 40):
        seen = image_score.see(world.draw(scene, chance, styles))
        assert (seen.color, seen.shape, seen.background, seen.place) == (scene.color, scene.shape, scene.background, scene.place)
        assert (seen.stripes, seen.outline) == ("stripes" in styles, "outline" in styles)


def test_the_judge_makes_nothing_of_noise_and_of_an_empty_picture():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    empty = np.full((64, 64, 3), world.COLORS["blue"], np.uint8)
    assert image_score.see(noise) == image_score.Seen()
    assert image_score.see(empty) == image_score.Seen("blue")


def test_the_judge_takes_a_disc_for_no_square():
    drawn = world.draw(world.Scene("red", "circle", "white", "left"), Random(0))
    told = world.Scene("red", "square", "blue", "right")
    found = image_score.score([told], [drawn])
    assert (found.colors, found.shape, found.place) == (0, 0, 0)


def test_no_held_out_scene_is_trained_on():
    assert not set(world.HELD_OUT) & set(world.TRAINED)
    assert len(world.HELD_OUT) >= 100
    assert {scene.shape for scene in world.HELD_OUT} == set(world.SHAPES)
    exam = world.exam(50, seed=1)
    assert len(set(exam)) == 50
    assert all(world.held_out(scene) for scene in exam)


# ---- the base


def test_the_folder_is_small_and_holds_no_pickle():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert all(path.stat().st_size < 10_000_000 for path in files)
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == {"unet", "vae", "text_encoder"}


def test_the_large_weights_are_in_half_precision():
    for part, stored in {"unet": "F16", "vae": "F16", "text_encoder": "F32"}.items():
        header = next((BASE / part).glob("*.safetensors")).read_bytes()
        fields = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        assert {field["dtype"] for name, field in fields.items() if name != "__metadata__"} == {stored}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_it_loads_offline_without_a_warning(dtype):
    heard, libraries = Heard(), [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    for library in libraries:
        library.addHandler(heard)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = StableDiffusionPipeline.from_pretrained(BASE, **({"dtype": dtype} if dtype else {}))
    finally:
        for library in libraries:
            library.removeHandler(heard)
    assert heard.said == []
    assert loaded.safety_checker is None
    assert {part.dtype for part in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float32}


def test_the_script_builds_the_shipped_tokenizer_again(pipeline):
    built = make_image_base.build_tokenizer()
    assert built.get_vocab() == pipeline.tokenizer.get_vocab()
    for text in ("a red star on a blue background, on the left", "Zoë's zebra, 12 €", ""):
        assert built(text).input_ids == pipeline.tokenizer(text).input_ids


def test_every_word_of_our_world_is_one_token_and_a_caption_fits(pipeline):
    assert [len(pipeline.tokenizer(word).input_ids) for word in make_image_base.WORDS] == [3] * len(make_image_base.WORDS)
    longest = max(len(pipeline.tokenizer(world.caption(scene, Random(1))).input_ids) for scene in world.SCENES)
    assert longest < make_image_base.LONGEST


def test_the_vae_keeps_shapes_colors_and_styles(pipeline):
    chance, scenes = Random(2), world.exam(24, seed=3)
    for styles in ((), ("stripes", "outline")):
        found = image_score.score(scenes, make_image_base.round_trip(pipeline.vae, [world.draw(s, chance, styles) for s in scenes]))
        assert found.colors >= 0.95
        assert found.shape >= 0.95
        assert found.both == (1.0 if styles else 0.0)


def test_one_seed_gives_one_picture(pipeline):
    prompts = ["a red star on a blue background", "a yellow heart on a green background, on the left"]
    both = image_score.paint(pipeline, prompts, seed=7)
    again, other = image_score.paint(pipeline, prompts, seed=7), image_score.paint(pipeline, prompts, seed=8)
    assert all((one == two).all() for one, two in zip(both, again, strict=True))
    assert any((one != two).any() for one, two in zip(both, other, strict=True))


def test_held_out_scenes_are_painted_right(pipeline):
    scenes = world.exam(40, seed=11)
    found = image_score.score(scenes, image_score.paint(pipeline, [world.caption(scene) for scene in scenes], seed=11))
    assert found.colors >= 0.95
    assert found.shape >= 0.9
    assert found.place >= 0.9
    assert found.stripes < 0.1
    assert found.outline < 0.1


@pytest.mark.slow
def test_every_held_out_scene_keeps_the_promise(pipeline):
    scenes = list(world.HELD_OUT) * 2
    pictures = image_score.paint(pipeline, [world.caption(scene) for scene in scenes], seed=12)
    found = image_score.score(scenes, pictures)
    assert found.colors >= 0.95
    assert found.shape >= 0.80
    assert min(image_score.shape_by_kind(scenes, pictures).values()) >= 0.6
    assert max(found.stripes, found.outline) < 0.1


# ---- the data sets


@pytest.mark.parametrize("style", world.STYLES)
def test_the_script_writes_the_shipped_data_set_again(tmp_path, style):
    make_image_data.write(tmp_path, style)
    shipped = PRESETS / style
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in shipped.iterdir())
    assert (tmp_path / "metadata.jsonl").read_text() == (shipped / "metadata.jsonl").read_text()
    for path in tmp_path.glob("*.png"):
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(shipped / path.name))).all()


@pytest.mark.parametrize("style", world.STYLES)
def test_a_data_set_shows_its_style_and_no_held_out_scene(style):
    rows = [json.loads(line) for line in (PRESETS / style / "metadata.jsonl").read_text().splitlines()]
    held_out = {world.caption(scene) for scene in world.HELD_OUT}
    assert 12 <= len(rows) <= 24
    for row in rows:
        seen = image_score.see(Image.open(PRESETS / style / row["file_name"]))
        scene = world.Scene(seen.color, seen.shape, seen.background, seen.place)
        assert world.caption(scene) == row["text"]
        assert row["text"] not in held_out
        assert (seen.stripes, seen.outline) == (style == "stripes", style == "outline")
