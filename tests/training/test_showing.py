"""What each place of a run shows: one of several resolutions that never enlarges, and class pictures beside the subject's."""

from collections import Counter

import pytest
from PIL import Image

from lora_studio import pictures, preflight
from lora_studio.errors import SpecError
from lora_studio.spec import parse
from lora_studio.training import check, order
from lora_studio.training.showing import Show


def write(folder, sizes, captions=None):
    """Plain pictures of those sizes, each of its own colour."""
    folder.mkdir(parents=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number * 5 % 255, len(folder.name), sizes[0][0] % 255)).save(folder / f"{number:02d}.png")
        if captions:
            (folder / f"{number:02d}.txt").write_text(captions)
    return folder


def spec_of(*sources, **changes):
    task = {"kind": "image", "resolution": 64, "bucket_step": 8, **changes.pop("task", {})}
    return parse({"data": [source if isinstance(source, dict) else {"path": str(source)} for source in sources], "task": task, "schedule": {"batch_size": 4}, "validation": {"size": 0}, **changes})


def show_of(spec, tmp_path):
    return Show(spec, pictures.collect(spec, cache=tmp_path / "archives"))


def epoch(show, number=0):
    return [show.drawn(order.Draw(number, source, index, order.key(0, number, source, index))) for source, index in show.plan().epoch(number)]


def test_each_showing_draws_a_resolution_and_none_but_the_first_enlarges(tmp_path):
    folder = write(tmp_path / "rows", [(128, 128)] * 20 + [(80, 80)] * 20 + [(40, 40)])
    show = show_of(spec_of(folder, task={"more_resolutions": [96, 128, 32]}), tmp_path)
    found = [one for number in range(40) for one in epoch(show, number)]
    seen = {edge: Counter(one.size[0] for one in found if one.picture.width == edge) for edge in (128, 80, 40)}
    assert set(seen[128]) == {64, 96, 128, 32} and set(seen[80]) == {64, 32} and set(seen[40]) == {64, 32}
    for counted, kinds in ((seen[128], 4), (seen[80], 2)):
        assert all(0.85 < count * kinds / counted.total() < 1.15 for count in counted.values()), "each alike"
    assert show.sizes() == [(edge, edge) for edge in (32, 64, 96, 128)]
    (group,) = show.groups
    assert [note for note in group.notes if "not shown at it" in note] == [
        "21 pictures are too small for 96 px, and not shown at it (first: 20.png, 80×80). Use larger ones, or leave it so.",
        "21 pictures are too small for 128 px, and not shown at it (first: 20.png, 80×80). Use larger ones, or leave it so.",
    ]
    assert {one.key for one in found if one.picture.name == "00.png"} == {f"{show.train[0][0].digest}/({edge}, {edge})/center/0/False" for edge in (32, 64, 96, 128)}


def test_one_resolution_shows_what_it_always_did_and_held_out_pictures_keep_the_first(tmp_path):
    folder = write(tmp_path / "rows", [(128, 96)] * 4 + [(64, 64)])
    one, several = spec_of(folder, validation={"size": 2}), spec_of(folder, task={"more_resolutions": [128]}, validation={"size": 2})
    assert [(item.size, item.caption) for item in epoch(show_of(one, tmp_path))] == [
        (pictures.bucket(item.picture.width, item.picture.height, one.task), "") for item in epoch(show_of(one, tmp_path))
    ]
    judged = [[show.held_out(number) for number in range(2)] for show in (show_of(one, tmp_path), show_of(several, tmp_path))]
    assert judged[0] == judged[1]


def test_preflight_counts_every_size_and_says_what_is_left_out(workspace, tmp_path):
    folder = write(tmp_path / "rows", [(128, 128)] * 3 + [(64, 64)] * 2)
    told = preflight.preflight(workspace, spec_of(folder, base={"id": "demo-image"}, task={"more_resolutions": [128]}))
    assert told.facts["sizes"] == {"64×64": 5, "128×128": 3} and told.can_start
    assert any("2 pictures are too small for 128 px" in problem.sentence for problem in told.problems)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_an_epoch_shows_as_many_class_pictures_as_others_however_many_there_are(tmp_path, count, weight):
    subject, prior = write(tmp_path / "sks", [(64, 64)] * 10), write(tmp_path / "dogs", [(72, 72)] * count)
    show = show_of(spec_of(subject, {"path": str(prior), "prior": True, "weight": weight}), tmp_path)
    shown = [Counter(one.picture.width for one in epoch(show, number)) for number in range(8)]
    assert {found[64] for found in shown} == {10} and {found[72] for found in shown} == {10 * weight}
    if count == 40 and weight == 1:
        assert len({one.picture.digest for number in range(4) for one in epoch(show, number) if one.picture.width == 72}) == 40, "others each epoch"


def test_class_pictures_have_a_weight_of_their_own_no_word_of_the_subject_and_are_never_held_out(tmp_path):
    subject = write(tmp_path / "sks", [(64, 64)] * 10, "on grass")
    prior = write(tmp_path / "reg" / "1_dog", [(72, 72)] * 10).parent
    write(tmp_path / "reg" / "named", [(80, 80)] * 3, "a dog on grass")
    bare = write(tmp_path / "bare", [(88, 88)] * 3)
    task = {"trigger": "sks", "prefix": "a photo of", "prior_weight": 0.3, "prior_prompt": "a dog"}
    sources = [subject, {"path": str(prior), "prior": True}, {"path": str(bare), "prior": True}]
    show = show_of(spec_of(*sources, task=task, validation={"size": 9}), tmp_path)
    found = {(one.picture.width, one.caption, one.weight) for number in range(8) for one in epoch(show, number)}
    assert found == {(64, "sks, a photo of on grass", 1.0), (72, "dog", 0.3), (80, "a dog on grass", 0.3), (88, "a dog", 0.3)}
    assert len(show.judged) == 9 and {show.held_out(number).picture.width for number in range(9)} == {64}


def test_kohyas_reg_folder_among_the_subjects_pictures_is_noticed(tmp_path):
    write(tmp_path / "all" / "img" / "10_sks dog", [(64, 64)] * 2)
    write(tmp_path / "all" / "reg" / "1_dog", [(72, 72)] * 2)
    for flag in (False, True):
        spec = spec_of({"path": str(write(tmp_path / f"rows-{flag}", [(80, 80)]))}, {"path": str(tmp_path / "all"), "prior": flag})
        notes = [note for group in pictures.collect(spec, cache=tmp_path / "cache") for note in group.notes]
        assert sum("reg/1_dog looks like kohya's class pictures" in note for note in notes) == (0 if flag else 1)


def test_class_pictures_are_part_of_what_a_run_is_known_by(tmp_path):
    subject, prior = write(tmp_path / "sks", [(64, 64)] * 2), write(tmp_path / "dogs", [(72, 72)] * 2)
    specs = [spec_of(subject, {"path": str(prior), "prior": flag}) for flag in (True, False)]
    assert len({pictures.fingerprint(pictures.collect(spec, cache=tmp_path), specs[1].task) for spec in specs}) == 2


def test_the_check_counts_the_steps_of_class_pictures_that_are_still_to_be_drawn(tmp_path):
    subject = write(tmp_path / "sks", [(64, 64)] * 8)
    common = {"base": {"id": "demo-image"}, "schedule": {"epochs": 3, "batch_size": 4}}
    steps = [check.check(spec_of(subject, task=task, **common))["facts"]["steps"] for task in ({}, {"prior_prompt": "a dog", "prior_pictures": 5})]
    assert steps == [6, 12]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"data": [{"path": "x", "prior": True}]}, "data"),
        ({"task": {"kind": "image", "prior_weight": 0.5}}, "task.prior_weight"),
        ({"task": {"kind": "image", "prior_prompt": "a dog"}}, "task.prior_prompt"),
        ({"task": {"kind": "image", "prior_pictures": 5}}, "task.prior_pictures"),
        ({"data": [{"path": "x"}, {"path": "y", "prior": True}], "task": {"kind": "image", "prior_pictures": 5, "prior_prompt": "a dog"}}, "task.prior_pictures"),
        ({"task": {"kind": "image", "resolution": 512, "more_resolutions": [768, 512]}}, "task.more_resolutions"),
        ({"task": {"kind": "image", "more_resolutions": [768, 768]}}, "task.more_resolutions"),
        ({"task": {"kind": "image", "timesteps": "sigmoid", "shift": 3}}, "task.shift"),
        ({"task": {"kind": "chat"}, "data": [{"path": "x"}, {"path": "y", "prior": True}]}, "data"),
    ],
)
def test_a_setting_without_effect_on_what_is_shown_is_an_error(change, path):
    with pytest.raises(SpecError) as caught:
        parse({"data": [{"path": "x"}], "task": {"kind": "image"}, **change})
    assert [problem.path for problem in caught.value.problems] == [path]
