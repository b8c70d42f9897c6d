"""Pictures of data sets as the datasets library gives them. Real data sets in local folders; the download itself is not tested here."""

import io
import json

import datasets
import pytest
from PIL import Image

from lora_studio.errors import DataError
from lora_studio.pictures import hub_sets, sources
from lora_studio.spec import Source
from tests.pictures import captions, draw, spec


def encoded(color, kind="PNG", size=(64, 48)) -> dict:
    found = io.BytesIO()
    Image.new("RGB", size, color).save(found, kind)
    return {"bytes": found.getvalue(), "path": "x"}


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    """What the datasets library prepares stays in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def make(tmp_path):
    """A data set in Parquet, of these columns; those of pictures hold dicts."""

    def write(**columns):
        kinds = {}
        for name, values in columns.items():
            picture = any(isinstance(value, dict) for value in values)
            kinds[name] = datasets.Image() if picture else datasets.Value("int64" if isinstance(values[0], int) else "string")
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(folder / "train.parquet")
        return folder

    return write


def groups(folder, cache, limit=None, **options):
    """As collect goes on once the data set is found to be one of the Hub."""
    source = Source(path=str(folder), **options)
    found = hub_sets.fetch(source, cache, limit=limit)
    return sources._groups(source, spec(folder).task, found, limit, True)


def test_pictures_and_captions_come_out_as_they_went_in(make, tmp_path):
    pictures = [encoded((1, 2, 3)), encoded((4, 5, 6), "JPEG"), encoded((7, 8, 9), "WEBP"), encoded((3, 3, 3), "AVIF")]
    (group,) = groups(make(image=pictures, text=["a", None, " c ", "d"]), tmp_path / "cache")
    assert captions(group) == {
        "pictures/000000.png": "a",
        "pictures/000001.jpg": "",
        "pictures/000002.webp": "c",
        "pictures/000003.avif": "d",
    }
    assert [item.path.read_bytes() for item in group.items] == [picture["bytes"] for picture in pictures]


def test_columns_of_other_names_and_masks(make, tmp_path):
    folder = make(photo=[encoded((1, 2, 3))], where=[encoded((255, 255, 255))], words=["x"], text=["no"])
    (group,) = groups(folder, tmp_path / "cache", columns={"picture": "photo", "caption": "words", "mask": "where"})
    assert captions(group) == {"pictures/000000.png": "x"} and group.items[0].mask.name == "000000.png"
    for columns in ({"picture": "gone"}, {"picture": "words"}, {"mask": "words"}):
        with pytest.raises(DataError, match=r"has no column"):
            groups(folder, tmp_path / "cache", columns=columns)


def test_caps_and_limits_write_no_more(make, tmp_path):
    folder = make(image=[encoded((number, 0, 0)) for number in range(5)], label=[1, 2, 3, 4, 5])
    assert len(groups(folder, tmp_path / "cache", limit=2)[0].items) == 2
    assert len(groups(folder, tmp_path / "cache", cap=3)[0].items) == 3
    assert len(groups(folder, tmp_path / "cache")[0].items) == 5
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 10
    assert len(groups(folder, tmp_path / "cache")[0].items) == 5
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 10


def test_bad_pictures_are_counted_and_a_path_never_leads_to_a_file_of_this_machine(make, tmp_path):
    secret = draw(tmp_path / "secret.png")
    rows = [
        encoded((1, 2, 3)),
        {"bytes": b"<html>", "path": "a"},
        {"bytes": None, "path": str(secret)},
        {"bytes": encoded((1, 1, 1))["bytes"][:60], "path": "b"},
    ]
    (group,) = groups(make(image=rows, text=list("abcd")), tmp_path / "cache")
    assert captions(group) == {"pictures/000000.png": "a"}
    assert group.skipped == {
        "web pages, whatever their names say": ["pictures/000001.png"],
        "empty (0 bytes)": ["pictures/000002.png"],
        "cut off or damaged": ["pictures/000003.png"],
    }


def test_a_set_without_pictures_and_a_split_that_is_not_there_say_so(make, tmp_path):
    with pytest.raises(DataError, match=r"has no column of pictures \(it has text\)"):
        groups(make(text=["a"]), tmp_path / "cache")
    with pytest.raises(DataError, match="has no split test"):
        groups(make(image=[encoded((1, 2, 3))]), tmp_path / "cache", split="test")


def test_captions_that_are_no_text_are_counted_not_trained_on(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Sequence(datasets.Value("string"))})
    rows = {"image": [encoded((1, 2, 3))], "text": [["a", "b"]]}
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / "train.parquet")
    with pytest.raises(DataError, match="whose caption is not a text"):
        groups(folder, tmp_path / "cache")


def test_without_the_hub_a_data_set_is_named_as_not_fetched(tmp_path):
    from lora_studio import pictures

    with pytest.raises(DataError, match="The data set cats/pictures could not be fetched"):
        pictures.collect(spec("cats/pictures"), cache=tmp_path)


def test_an_imagefolder_of_the_hub_is_read_from_the_hubs_cache_only(tmp_path, monkeypatch):
    """Such sets name files instead of holding bytes; here the folder stands in for the cache they are downloaded to."""
    draw(tmp_path / "hub" / "set" / "a.png")
    (tmp_path / "hub" / "set" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a cat"}) + "\n")
    with pytest.raises(DataError, match="empty"):
        groups(tmp_path / "hub" / "set", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (group,) = groups(tmp_path / "hub" / "set", tmp_path / "cache2")
    assert captions(group) == {"pictures/000000.png": "a cat"}
