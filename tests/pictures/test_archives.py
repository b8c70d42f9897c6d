"""Archives: unpacked once, whole or not at all, and never outside their folder."""

import io
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import threading
import zipfile

import pytest

from lora_studio import durable
from lora_studio.errors import DataError, MachineError
from lora_studio.pictures import archives, staging
from tests.pictures import captions, collect, draw, names, one, refused


def png() -> bytes:
    from PIL import Image

    found = io.BytesIO()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(found, "PNG")
    return found.getvalue()


def pack(path, files: dict, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path


def everything(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_zip_is_as_good_as_its_folder(tmp_path):
    draw(tmp_path / "set" / "10_sks dog" / "a.png")
    draw(tmp_path / "set" / "b.png", color=(1, 1, 1))
    (tmp_path / "set" / "b.txt").write_text("a cat")
    (tmp_path / "set" / "more" / "x").mkdir(parents=True)
    draw(tmp_path / "set" / "more" / "c.jpg", color=(1, 99, 1))
    (tmp_path / "set" / "more" / "metadata.jsonl").write_text('{"file_name": "c.jpg", "text": "a bird"}\n')
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "set")
    loose, packed = collect(tmp_path / "set"), collect(archive)
    for a, b in zip(loose, packed, strict=True):
        assert (captions(a), a.trigger, a.repeats, a.notes) == (captions(b), b.trigger, b.repeats, b.notes)
        assert [item.digest for item in a.items] == [item.digest for item in b.items]


def test_it_is_unpacked_once_by_its_content_and_again_when_something_is_gone(tmp_path):
    archive = pack(tmp_path / "a.zip", {"a.png": png(), "a.txt": "x"})
    (item,) = one(archive, cache=tmp_path / "cache").items
    before = item.path.stat().st_ino
    copy = shutil.copy(archive, tmp_path / "copy.zip")
    assert one(copy, cache=tmp_path / "cache").items[0].path.stat().st_ino == before
    item.path.write_bytes(b"")
    (item,) = one(archive, cache=tmp_path / "cache").items
    assert item.path.stat().st_size == len(png())
    item.path.with_suffix(".txt").unlink()
    assert captions(one(archive, cache=tmp_path / "cache")) == {"a.png": "x"}


def test_only_what_belongs_to_pictures_is_unpacked(tmp_path):
    files = {
        "a.png": png(),
        "run.sh": "rm",
        "__MACOSX/._a.png": b"x",
        ".hidden/b.png": png(),
        "inner.zip": b"PK",
        "sub/a.caption": "",
        "win\\b.png": png(),
    }
    one(pack(tmp_path / "a.zip", files), cache=tmp_path / "cache")
    unpacked = {name.partition("/")[2] for name in everything(tmp_path / "cache") if "/files/" in name}
    assert unpacked == {"files/a.png", "files/sub", "files/sub/a.caption", "files/win", "files/win/b.png"}


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "a/../../evil.png", "/tmp/evil.png", "C:\\evil.png", "..\\evil.png", "\\evil.png", "a/..", "//evil.png", "a\x01.png"],
)
def test_a_name_that_leads_out_refuses_the_whole_archive_and_writes_nothing(tmp_path, name):
    archive = pack(tmp_path / "in" / "a.zip", {"good.png": png(), name: png()})
    before = everything(tmp_path / "in")
    said = refused(archive, cache=tmp_path / "cache")
    assert "a.zip was not unpacked: it holds the name" in said and "Pack the pictures again" in said
    assert everything(tmp_path / "in") == before
    assert everything(tmp_path / "cache") <= {"pictures.lock"} and not list(tmp_path.parent.glob("evil*"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_are_refused(tmp_path, kind):
    member = zipfile.ZipInfo("a.png")
    member.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("b.png", png())
        packed.writestr(member, "/etc/passwd")
    assert "a.zip was not unpacked: it holds a.png, which is a link or a device" in refused(tmp_path / "a.zip", cache=tmp_path / "cache")
    assert everything(tmp_path / "cache") <= {"pictures.lock"}


def declare(archive, name: str, size: int) -> None:
    """Change what an archive says of the unpacked size of a member, in both of its lists."""
    found = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as packed:
        member, start = packed.getinfo(name), packed.start_dir
    struct.pack_into("<I", found, member.header_offset + 22, size)
    at = found.index(name.encode(), start) - 46
    struct.pack_into("<I", found, at + 24, size)
    archive.write_bytes(found)


def test_a_bomb_is_refused_by_what_it_declares(tmp_path):
    archive = pack(tmp_path / "a.zip", {f"{number}.png": png() for number in range(12)})
    for number in range(12):
        declare(archive, f"{number}.png", (1 << 30) - 1)
    assert "a.zip was not unpacked: it would unpack to 12.9 GB, and 8.6 GB is the most" in refused(archive, cache=tmp_path / "cache")
    declare(archive, "0.png", (1 << 32) - 2)
    assert "0.png would unpack to 4.3 GB" in refused(archive, cache=tmp_path / "cache")
    assert everything(tmp_path / "cache") == {"pictures.lock"}


def test_a_bomb_that_declares_less_than_it_holds_is_stopped(tmp_path):
    archive = pack(tmp_path / "a.zip", {"a.png": b"0" * 5_000_000})
    declare(archive, "a.png", 1000)
    assert "a.zip was not unpacked" in refused(archive, cache=tmp_path / "cache")
    assert everything(tmp_path / "cache") == {"pictures.lock"}


def test_the_disk_is_left_some_room(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "SPARE", 1 << 60)
    with pytest.raises(MachineError, match=r"has .* free, and this needs about"):
        collect(pack(tmp_path / "a.zip", {"a.png": png()}), cache=tmp_path / "cache")


def test_an_encrypted_zip_is_named_so(tmp_path):
    archive = pack(tmp_path / "a.zip", {"a.png": png()})
    found = bytearray(archive.read_bytes())
    found[6] |= 1
    found[found.rindex(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(found)
    assert refused(archive) == "a.zip was not unpacked: it is encrypted. Pack the pictures again as a plain .zip."


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.98])
def test_a_zip_cut_off_is_named_so(tmp_path, share):
    archive = pack(tmp_path / "a.zip", {f"{number}.png": os.urandom(500) for number in range(5)})
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    assert "a.zip was not unpacked: it is not a .zip, or cut off" in refused(archive)


def test_a_damaged_member_is_named(tmp_path):
    archive = pack(tmp_path / "a.zip", {"a.png": os.urandom(5000), "b.png": png()})
    found = bytearray(archive.read_bytes())
    found[2000:2050] = bytes(50)
    archive.write_bytes(found)
    assert "was not unpacked: bad crc" in refused(archive).lower()


def test_a_name_twice_and_a_name_that_is_file_and_folder_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed, pytest.warns(UserWarning):
        packed.writestr("a.png", png())
        packed.writestr("a.png", png()[:-4])
    assert "holds a.png twice" in refused(tmp_path / "a.zip")
    assert "is both a file and a folder" in refused(pack(tmp_path / "b.zip", {"a.png": png(), "a.png/b.png": png()}))
    assert "is too long" in refused(pack(tmp_path / "c.zip", {"a" * 300 + ".png": png()}))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_no_flipped_byte_makes_it_crash_or_leaves_half_a_folder(tmp_path, method):
    archive, draws = tmp_path / "a.zip", random.Random(method)
    with zipfile.ZipFile(archive, "w", method) as packed:
        for number in range(3):
            packed.writestr(f"{number}é.png", draws.randbytes(200))
    whole = archive.read_bytes()
    for _ in range(150):
        broken = bytearray(whole)
        for place in (draws.randrange(len(whole)), whole.index(b"PK\x01\x02", draws.randrange(600)) + draws.randrange(46)):
            broken[place] = draws.choice([0, 1, 255, draws.randrange(256)])
        archive.write_bytes(broken)
        try:
            unpacked = archives.unpack(archive, tmp_path / "cache", suffixes=(".png",))
            shutil.rmtree(unpacked.parent)
        except DataError as error:
            assert "a.zip was not unpacked: " in str(error)
        assert everything(tmp_path / "cache") <= {"pictures.lock"}


def test_a_zip_without_pictures_and_an_empty_one_say_so(tmp_path):
    assert "holds no picture" in refused(pack(tmp_path / "a.zip", {"read.md": "x"}))
    assert "holds no picture" in refused(pack(tmp_path / "b.zip", {}))


def test_what_a_killed_process_left_is_swept_and_never_taken_for_whole(tmp_path):
    archive = pack(tmp_path / "a.zip", {"a.png": png()})
    left = tmp_path / "cache" / f"{staging.STAGE}old"
    (left / "files").mkdir(parents=True)
    assert names(one(archive, cache=tmp_path / "cache")) == ["a.png"]
    assert not left.exists()


@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_process_killed_while_unpacking_harms_nothing(tmp_path, after):
    archive = pack(tmp_path / "a.zip", {f"{number}.png": png() for number in range(8)})
    code = f"""
import os, sys
from pathlib import Path
from lora_studio.pictures import archives
from tests.pictures import collect
write, done = archives._write, []
def until(*args):
    if len(done) == {after}:
        os.kill(os.getpid(), 9)
    done.append(1)
    return write(*args)
archives._write = until
collect(sys.argv[1], cache=Path(sys.argv[2]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(archive), str(tmp_path / "cache")], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert len(one(archive, cache=tmp_path / "cache").items) == 8
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_many_at_once_unpack_one_folder(tmp_path):
    archive, found = pack(tmp_path / "a.zip", {f"{number}.png": png() for number in range(20)}), []
    threads = [threading.Thread(target=lambda: found.append(len(one(archive, cache=tmp_path / "cache").items))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 6
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    assert not durable.is_locked(tmp_path / "cache" / "pictures.lock")


def test_a_zip_that_is_not_there_is_not_taken_for_a_hub_data_set():
    with pytest.raises(DataError, match=r"pets/pictures.zip is not there"):
        collect("pets/pictures.zip", cache=None)
