"""What lasts in a private repository: it comes back whole after the disk was lost, whatever the Hub does nothing is lost here or committed twice,
nobody else sees it, and no secret goes there. With the real client and a small Hub on loopback.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lora_studio import durable, fence, keeping, runs, studio
from lora_studio.errors import HostError, HubError, StudioError
from lora_studio.jobs import tokens
from lora_studio.spec import parse
from lora_studio.storage import Storage, repository
from lora_studio.storage.repository import Repository
from lora_studio.workspace import of_visitor
from tests.campaigns import kills
from tests.hosted import belongings
from tests.test_hub import served, slept  # noqa: F401
from tests.test_storage import state

ID = f"ana/{keeping.NAME}"
TOKENS = {name: f"hf_{name}" + "c4N4" * 6 for name in ("ana", "ben")}


@pytest.fixture
def hub(served, home):  # noqa: F811
    """The small Hub with two visitors; what this process keeps is forgotten at the end."""
    for name, token in TOKENS.items():
        served.account(name, token=token)
    keeping._kept.secret = "of the application"
    yield served
    restart()
    keeping._kept.secret = ""


def restart() -> None:
    """What a process that ends forgets."""
    for room in list(keeping._kept.rooms.values()):
        keeping._leave(room.workspace)
    keeping._kept.asked.clear()
    tokens._lent.clear()


def visitor(name: str = "ana"):
    found = of_visitor(f"id-of-{name}", name, fence.Limits())
    tokens.lend(found.root, TOKENS[name], until=time.time() + 600)
    return found


def lose(home) -> None:
    """The machine goes, with its disk."""
    restart()
    shutil.rmtree(home)


def rows(workspace, name: str = "rows", text: str = "one") -> None:
    (workspace.data / f"{name}.jsonl").write_text(text)


def keep(workspace, token: str = TOKENS["ana"]) -> dict:
    """Keep it, whatever was just written too."""
    keeping.begin(workspace, token)
    return keeping.turn(workspace, token, everything=True)


def commits(hub, id: str = ID) -> int:
    return len(hub.repos[id].commits)


def test_everything_of_a_visitor_comes_back_when_they_sign_in_and_nobody_else_sees_it(hub, home, tmp_path):
    ana, ben = visitor(), visitor("ben")
    owned = belongings.make(ana, "canaryana", scratch=tmp_path)
    rows(ben, text="of ben")
    told, expected = keep(ana), state(ana.root)
    assert told["state"] == "kept" and told["repo"] == ID and told["files"] > 20 and hub.repos[ID].private
    assert list(hub.repos) == [ID]
    lose(home)
    ana, ben = visitor(), visitor("ben")
    assert keeping.arrive(ben, TOKENS["ben"])["state"] == "off" and not state(ben.root)
    told = keeping.arrive(ana, TOKENS["ana"])
    found = {name: data for name, data in state(ana.root).items() if name not in ("keep.json", "repository.json")}
    wanted = {name: data for name, data in expected.items() if name not in ("keep.json", "repository.json") and not name.startswith("exports/")}
    assert found == wanted and told["state"] == "kept"
    assert any(f"files were brought back from {ID}." in note for note in told["notes"])
    assert studio.show(ana, owned.run).state == "done" and not state(ben.root)
    with pytest.raises(HostError, match="is not yours"):
        keeping.begin(ben, TOKENS["ben"], repo=ID)
    assert not (home / ".keep").exists() or not [path for path in (home / ".keep").rglob("*") if path.is_file()]


def test_a_run_whose_machine_went_with_its_disk_goes_on_to_the_identical_adapter(hub, home, base, chat_rows):
    ana = visitor()
    whole = studio.start(ana, parse(kills.settings(base, chat_rows, steps=120)))
    expected, told = kills.finish(ana, whole), kills.history(ana, whole)
    id = studio.start(ana, parse({**kills.settings(base, chat_rows, steps=120), "name": "cut"}))
    folder = ana.run_folder(id)
    while not [event for event in runs.read(folder)[0] if event["kind"] == "saved"]:
        time.sleep(0.005)
    os.killpg(durable.read_json(folder / "process.json")["pid"], signal.SIGSTOP)
    assert runs.ended(folder) is None, "the run was over before it could be stopped"
    keep(ana)
    os.killpg(durable.read_json(folder / "process.json")["pid"], signal.SIGKILL)
    while runs.is_live(folder):
        time.sleep(0.02)
    lose(home)
    ana = visitor()
    keeping.arrive(ana, TOKENS["ana"])
    status = studio.show(ana, id)
    assert status.state == "failed" and "Resume goes on from step" in status.reason, status
    assert studio.show(ana, whole).state == "done" and kills.history(ana, whole) == told
    assert studio.resume(ana, id) == id
    assert kills.finish(ana, id) == expected and kills.history(ana, id) == told


def test_one_commit_a_turn_and_none_where_nothing_is_new(hub):
    ana = visitor()
    for number in range(5):
        rows(ana, f"rows{number}", str(number))
    keep(ana)
    before = commits(hub)
    for _ in range(3):
        assert keeping.turn(ana, everything=True)["state"] == "kept"
    assert commits(hub) == before == 2  # the one that comes with a repository, and ours
    rows(ana, "rows0", "other")
    keeping.turn(ana, everything=True)
    assert commits(hub) == 3
    restart()
    assert keeping.arrive(visitor(), TOKENS["ana"])["state"] == "kept" and commits(hub) == 4, "a new studio says once that it is the one that writes"


def back(hub, home, tmp_path, name: str) -> dict[str, bytes]:
    """What a studio on a bare disk gets back from the Hub."""
    hub.calm()
    restart()
    bare = of_visitor("id-of-ana", "ana", fence.Limits())
    aside = home.with_name(f"aside-{name}")
    home.rename(aside)
    try:
        keeping.arrive(visitor(), TOKENS["ana"])
        return {path: data for path, data in state(bare.root).items() if path.startswith("data/")}
    finally:
        restart()
        shutil.rmtree(home)
        aside.rename(home)


STEPS = ["whoami", "info", "tree", "preupload", "batch", "put", "verify", "commit"]


@pytest.mark.parametrize("kind", [401, 403, 503, "cut", "half", "html"])
@pytest.mark.parametrize("route", STEPS)
def test_whatever_the_hub_does_nothing_is_lost_and_it_goes_on(hub, home, tmp_path, route, kind):
    ana = visitor()
    rows(ana, "first")
    if route != "whoami":
        keep(ana)
    rows(ana, "second", "new" * 1000)
    before, known = state(ana.root), commits(hub) if ID in hub.repos else 0
    hub.fault(route, kind, times=99)
    if route == "whoami":
        with pytest.raises(StudioError) as refused:
            keeping.begin(ana, TOKENS["ana"])
        told = str(refused.value)
        assert keeping.state(ana)["state"] == "off" and not hub.repos
    else:
        result = keeping.turn(ana, everything=True)
        told = result["sentence"]
        # A check that fails after the bytes arrived passes the second time: they are there.
        is_over = route == "verify" and kind not in (401, 403)
        assert result["state"] in (("kept",) if is_over else ("trouble", "waits")), result
        assert commits(hub) == known + is_over
        told = told or "Nothing here is lost."
    assert told.endswith(".") and TOKENS["ana"] not in told and len(told) < 600
    assert "Nothing here is lost" in told, told
    hub.calm()
    tokens._lent.clear()
    assert keep(visitor())["state"] == "kept"
    assert {name: data for name, data in state(ana.root).items() if name in before} | {"repository.json": b"", "keep.json": b""} == before | {"repository.json": b"", "keep.json": b""}
    assert back(hub, home, tmp_path, "a") == {"data/first.jsonl": b"one", "data/second.jsonl": b"new" * 1000}


def test_a_lost_answer_makes_no_second_commit(hub, home, tmp_path):
    ana = visitor()
    rows(ana)
    keep(ana)
    before = commits(hub)
    rows(ana, text="two")
    hub.fault("commit", "lost")
    assert keeping.turn(ana, everything=True)["state"] == "kept" and commits(hub) == before + 1
    rows(ana, text="three")
    hub.fault("commit", "lost")
    hub.fault("info", 503, nth=2, times=99)
    told = keeping.turn(ana, everything=True)
    assert told["state"] == "trouble" and "cannot be looked at" in told["sentence"]
    hub.calm()
    assert keeping.turn(ana, everything=True)["state"] == "kept" and commits(hub) <= before + 3
    assert back(hub, home, tmp_path, "a") == {"data/rows.jsonl": b"three"}


def test_what_arrived_before_a_cut_is_not_sent_again(hub):
    ana = visitor()
    for number in range(6):
        rows(ana, f"rows{number}", str(number) * 50_000)
    hub.bytes_left = 200_000
    with pytest.raises(HubError, match="Nothing here is lost"):
        keeping.begin(ana, TOKENS["ana"])
    came = sum(len(data) == 50_000 for data in hub.objects.values())
    assert 0 < came < 6
    hub.calm()
    assert keep(ana)["state"] == "kept"
    assert hub.received("put") <= (6 - came) * 50_000 * 1.05 + 10_000


def test_two_studios_at_the_same_moment_do_not_overwrite_each_other(hub, home, tmp_path):
    """The other commits between this one's look and its commit: the Hub refuses the second, and what was kept first is carried along."""
    roots = [tmp_path / name for name in ("one", "two")]
    for root in roots:
        (root / "data").mkdir(parents=True)
        (root / "data" / f"{root.name}.jsonl").write_text(root.name)

    def storage(root, kind=Repository):
        return Storage(root, kind(keeping.NAME, TOKENS["ana"], staging=tmp_path / "staging", make=True))

    class Late(Repository):
        other = None

        def look(self):
            super().look()
            if self.other is not None:
                other, self.other = self.other, None
                assert other.save(settled=0.0)

    other = storage(roots[0])
    other.restore()
    mine = storage(roots[1], Late)
    mine.restore()
    mine.place.other = other
    with pytest.raises(HostError, match="somebody else at the same moment"):
        mine.save(settled=0.0)
    assert mine.save(settled=0.0) and commits(hub) == 3
    (roots[0] / "data" / "one.jsonl").write_text("later")
    with pytest.raises(HostError, match="started later"):
        other.save(settled=0.0)
    third = storage(tmp_path / "three")
    third.restore()
    assert (tmp_path / "three" / "data" / "one.jsonl").read_text() == "one" and (tmp_path / "three" / "data" / "two.jsonl").read_text() == "two"


def test_a_public_repository_takes_nothing(hub):
    ana = visitor()
    rows(ana)
    hub.repo(ID)
    with pytest.raises(HostError, match="can be seen by everybody"):
        keeping.begin(ana, TOKENS["ana"])
    del hub.repos[ID]
    keep(ana)
    hub.repos[ID].private, before = False, commits(hub)
    rows(ana, text="two")
    hub.calm()
    told = keeping.turn(ana, everything=True)
    assert told["state"] == "stopped" and "can be seen by everybody" in told["sentence"]
    assert commits(hub) == before and not hub.received("preupload", "put", "commit")


def test_a_repository_that_was_deleted_is_not_made_again_before_somebody_says_so(hub, home, tmp_path):
    ana = visitor()
    rows(ana)
    keep(ana)
    del hub.repos[ID]
    told = keeping.turn(ana, everything=True)
    assert told["state"] == "stopped" and "Nothing here is lost" in told["sentence"] and (ana.data / "rows.jsonl").read_text() == "one"
    restart()
    assert keeping.arrive(visitor(), TOKENS["ana"])["state"] == "stopped" and ID not in hub.repos
    assert keep(ana)["state"] == "kept" and (ana.data / "rows.jsonl").read_text() == "one"
    assert back(hub, home, tmp_path, "a") == {"data/rows.jsonl": b"one"}


@pytest.mark.parametrize(("route", "status"), [("commit", 403), ("batch", 403), ("put", 507), ("commit", 413)])
def test_an_account_without_room_is_told_what_to_do(hub, route, status):
    ana = visitor()
    rows(ana)
    hub.texts = ["Private repository storage limit reached"]
    hub.fault(route, status, times=99)
    with pytest.raises(HostError, match=r"no room for ana/.*Free room at"):
        keeping.begin(ana, TOKENS["ana"])


def test_a_secret_stays_here_and_the_rest_goes(hub, home, tmp_path):
    ana = visitor()
    rows(ana)
    rows(ana, "leak", "api: hf_" + "Z9y8" * 8)
    rows(ana, "own", f"mine: {TOKENS['ana']}")
    durable.publish_folder(ana.root / "library" / "one", {"card.json": b"{}", "notes.md": b"-----BEGIN PRIVATE KEY-----"})
    told = keep(ana)
    assert told["state"] == "kept" and len(told["notes"]) == 3
    assert any(note.startswith("data/leak.jsonl holds a Hugging Face token (line 1)") for note in told["notes"]), told["notes"]
    sent = b"".join([*hub.objects.values(), *hub.files(ID).values()])
    assert b"Z9y8" not in sent and TOKENS["ana"].encode() not in sent and b"PRIVATE KEY" not in sent
    rows(ana, "leak", "nothing")
    assert not [note for note in keeping.turn(ana, everything=True)["notes"] if "leak" in note]
    assert back(hub, home, tmp_path, "a") == {"data/rows.jsonl": b"one", "data/leak.jsonl": b"nothing"}


def test_the_token_is_in_no_file_here_or_there(hub, home):
    ana = visitor()
    rows(ana)
    keep(ana)
    hub.fault("commit", 403, times=99)
    hub.texts = [TOKENS["ana"]]
    rows(ana, text="two")
    assert TOKENS["ana"] not in str(keeping.turn(ana, everything=True))
    found = [path for path in home.rglob("*") if path.is_file() and TOKENS["ana"].encode() in path.read_bytes()]
    assert not found and not [data for data in (*hub.objects.values(), *hub.files(ID).values()) if TOKENS["ana"].encode() in data]


def test_what_somebody_else_wrote_there_is_not_trusted_with_a_visitors_workspace(hub, home):
    """A run folder names bases and rows by their place on this machine: only what this studio wrote comes back into it."""
    ana = visitor()
    rows(ana)
    keep(ana)
    lose(home)
    keeping._kept.secret = "of another application"
    told = keeping.arrive(visitor(), TOKENS["ana"])
    before = commits(hub)
    assert told["state"] == "stopped" and "was not kept by this studio" in told["sentence"] and not (ana.data / "rows.jsonl").exists()
    rows(visitor(), "mine")
    assert keeping.turn(ana, everything=True)["state"] == "stopped" and commits(hub) == before
    owner = keeping.Workspace(home / "own")
    (home / "own").mkdir()
    keeping.begin(owner, TOKENS["ana"])
    assert (owner.data / "rows.jsonl").read_text() == "one", "a studio of their own takes what is theirs"


def test_what_is_here_is_not_overwritten_and_work_on_both_sides_comes_together_when_somebody_says_so(hub, home):
    ana = visitor()
    rows(ana, "both", "old")
    rows(ana, "there")
    keep(ana)
    lose(home)
    ana = visitor()
    rows(ana, "both", "newer")
    told = keeping.arrive(ana, TOKENS["ana"])
    assert told["state"] == "there" and not (ana.data / "there.jsonl").exists() and commits(hub) == 2
    keep(ana)
    assert (ana.data / "both.jsonl").read_text() == "newer" and (ana.data / "there.jsonl").read_text() == "one"


def test_what_is_damaged_there_is_left_out_and_what_arrives_damaged_is_not_taken(hub, home):
    ana = visitor()
    rows(ana)
    rows(ana, "fine", "fine")
    durable.publish_folder(ana.root / "library" / "one", {"card.json": b"{}"})
    keep(ana)
    head = hub.repos[ID].commits[-1][2]
    path = next(path for path, data in head.items() if data == b"one")
    lose(home)
    hub.fault("cdn", "flip", times=99)
    told = keeping.arrive(visitor(), TOKENS["ana"])
    assert told["state"] == "trouble" and "arrived with other bytes" in told["sentence"]
    assert not list(ana.data.iterdir()) and not (ana.root / "library").exists(), "not even an empty folder"
    hub.calm()
    restart()
    hub.repos[ID].commits[-1][2][path] = b"two"
    hub.objects[hashlib.sha256(b"two").hexdigest()] = b"two"
    told = keeping.arrive(visitor(), TOKENS["ana"])
    assert not durable.damage(ana.root / "library" / "one")
    assert "data/rows.jsonl is damaged" in " ".join(told["notes"]) and [file.name for file in ana.data.iterdir()] == ["fine.jsonl"]
    rows(ana)
    assert keeping.turn(ana, everything=True)["state"] == "kept" and hub.files(ID)[path] == b"one", "made again here, it is sent again"


def test_it_waits_for_who_signed_out_or_was_refused_and_goes_on_by_itself(hub):
    ana = visitor()
    rows(ana)
    keep(ana)
    assert not keeping._kept.rooms[ana.root].storage.place.token, "it was there for the turn only"
    tokens.take_back(ana.root)
    rows(ana, text="two")
    told = keeping.turn(ana)
    assert told["state"] == "waits" and "signed in again" in told["sentence"]
    hub.accounts[TOKENS["ana"]].expired = True
    tokens.lend(ana.root, TOKENS["ana"], until=time.time() + 60)
    assert keeping.turn(ana)["state"] == "waits"
    hub.calm()
    assert keeping.turn(ana)["state"] == "waits" and not hub.seen, "a token that was refused is not tried again"
    new = "hf_new" + "c4N4" * 6
    hub.account("ana", token=new)
    tokens.lend(ana.root, new, until=time.time() + 60)
    assert keeping.turn(ana)["state"] == "kept"


def test_more_than_a_visitor_may_hold_is_not_brought_back(hub, home):
    ana = visitor()
    rows(ana, text="x" * 5000)
    keep(ana)
    lose(home)
    small = of_visitor("id-of-ana", "ana", fence.Limits(disk=1000))
    told = keeping.arrive(small, TOKENS["ana"])
    assert told["state"] == "stopped" and "it may hold" in told["sentence"] and not list(small.data.iterdir())


def test_the_thread_keeps_what_is_due_and_the_last_turn_everything(hub, home):
    ana = visitor()
    rows(ana)
    keep(ana)
    rows(ana, text="two")
    keeping._pass(ana)
    assert commits(hub) == 2, "not before it is due"
    keeping._kept.rooms[ana.root].due = 0.0
    keeping._pass(ana)
    until = time.monotonic() + 20
    while commits(hub) == 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert commits(hub) == 3
    rows(ana, text="three")
    assert keeping.last(seconds=20) == (1, 1) and commits(hub) == 4


def test_it_ends_when_its_owner_says_so(hub, home):
    ana = visitor()
    rows(ana)
    keep(ana)
    assert keeping.stop(ana)["state"] == "off"
    rows(ana, text="two")
    before = commits(hub)
    assert keeping.turn(ana)["state"] == "off" and keeping.arrive(ana, TOKENS["ana"])["state"] == "off" and commits(hub) == before
    restart()
    assert keeping.arrive(visitor(), TOKENS["ana"])["state"] == "off" and commits(hub) == before


def test_the_command_line_keeps_a_home_and_brings_it_back_on_another_machine(hub, home, workspace, tmp_path):
    rows(workspace)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}

    def said(*words: str, at=home) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lora_studio", "keep", "--token-stdin", *words]
        return subprocess.run(command, input=TOKENS["ana"], capture_output=True, text=True, timeout=120, env={**environment, "LORA_STUDIO_HOME": str(at)})

    first = said("--repo", "laptop")
    assert first.returncode == 0 and "Kept in ana/laptop, which only you see: 1 file," in first.stdout, first
    other = tmp_path / "other"
    back = json.loads(said("--repo", "laptop", "--json", at=other).stdout)
    assert back["state"] == "kept" and (other / "data" / "rows.jsonl").read_text() == "one"
    lock = durable.Lock(home / "keep.lock")
    assert lock.take()
    refused = said()
    assert refused.returncode == 1 and "keeps its work itself" in refused.stderr and not refused.stdout
    lock.release()
    assert "Nothing is sent from now on" in said("--stop").stdout and durable.read_json(home / "keep.json") == {"repo": "ana/laptop", "on": False}
    assert TOKENS["ana"] not in str([path.read_bytes() for top in (home, other) for path in top.rglob("*") if path.is_file()])


def test_room_that_nobody_needs_is_freed_on_the_hub_and_what_is_needed_stays(hub, home, tmp_path, monkeypatch):
    monkeypatch.setattr(repository, "FREE_BYTES", 3000)
    ana = visitor()
    rows(ana, "stays", "s" * 2000)
    rows(ana, text="a" * 2000)
    keep(ana)
    for letter in "bcdef":
        rows(ana, text=letter * 2000)
        assert keeping.turn(ana, everything=True)["state"] == "kept"
    kept = b"".join(hub.objects.values())
    assert b"s" * 2000 in kept and b"f" * 2000 in kept and b"a" * 2000 not in kept and b"b" * 2000 not in kept
    hub.fault("large", 403, times=99)
    for letter in "ghij":
        rows(ana, text=letter * 2000)
        assert keeping.turn(ana, everything=True)["state"] == "kept", "without the right to do so, only the room is not freed"
    assert back(hub, home, tmp_path, "a") == {"data/stays.jsonl": b"s" * 2000, "data/rows.jsonl": b"j" * 2000}
