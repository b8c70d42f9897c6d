"""What comes with a publication (a tag, a pull request, gating, a collection, a folder of its own): asked for once, seen afterwards, never twice."""

# ruff: noqa: F811 - fixtures of another file are imported, and asked for by their names

import functools
import json
import re

import pytest

from lora_studio import card, library, listing, shelf
from lora_studio import hub as studio_hub
from lora_studio.errors import HubError
from lora_studio.hub import Extras, client
from lora_studio.workspace import Workspace
from tests.browser import made
from tests.test_hub import CARD, adapter, impatient, served, slept, weights  # noqa: F401

LIST = "---\nlicense: mit\nbase_model: Qwen/Qwen3-0.6B\n---\n# Mine\n\nMy own words.\n"


def publish(source, id="me/pirate", *, listing=None, private=None, token="hf_me", **wish):
    return studio_hub.publish(source, id, private=private, token=token, files={"README.md": CARD}, wish=Extras(**wish), listing=listing)


def lister(repo: str, folder: str):
    facts = card.Facts(name=f"The {folder}", base="Qwen/Qwen3-1.7B", license="mit", method={"kind": "lora", "rank": 8})
    return lambda before: listing.write(facts, repo_id=repo, folder=folder, before=before)


def change(folder, size: int = 1000) -> None:
    (folder / "more.safetensors").write_bytes(weights(size))


def commits(hub, id="me/pirate") -> int:
    return len(hub.repos[id].commits)


# ---- versions


def test_a_version_is_set_once_and_again_for_the_same_files_it_stays(served, adapter):
    done = publish(adapter, tag="v1")
    assert done.tag == "v1" and served.repos["me/pirate"].tags == {"v1": done.commit}
    served.calm()
    assert publish(adapter, tag="v1").sent == () and not served.received("put", "commit", "tag")
    change(adapter)
    second = publish(adapter, tag="v2")
    assert served.repos["me/pirate"].tags == {"v1": done.commit, "v2": second.commit} and second.commit != done.commit


def test_a_version_that_holds_other_files_is_refused_before_anything_is_sent(served, adapter):
    publish(adapter, tag="v1.9")
    change(adapter)
    served.calm()
    with pytest.raises(HubError, match=r"has the version v1.9 already.*such as v1.10") as caught:
        publish(adapter, tag="v1.9")
    assert caught.value.key == "hub.tag" and not served.received("put", "commit", "preupload") and commits(served) == 2


@pytest.mark.parametrize("kind", ["cut", "lost", 503, "silent"])
def test_a_version_whose_answer_is_lost_is_noticed_by_looking(served, adapter, kind):
    for times in (1, 99):
        served.fault("tag", kind, times=times)
        with impatient(kind):
            if times == 1:
                assert publish(adapter, f"me/{kind}", tag="v1").tag == "v1"
            else:
                with pytest.raises(HubError, match="The files are published, but the tag is not set"):
                    publish(adapter, f"me/again-{kind}", tag="v1")
        served.calm()
    assert publish(adapter, f"me/again-{kind}", tag="v1").sent == () and commits(served, f"me/again-{kind}") == 2
    assert list(served.repos[f"me/again-{kind}"].tags) == ["v1"]


# ---- pull requests


def test_a_pull_request_to_somebody_else_is_opened_once_and_added_to(served, adapter):
    repo = served.repo("other/pirate", {"notes.md": b"theirs"})
    first = publish(adapter, "other/pirate", pull_request=True)
    assert first.pull_request == f"{served.url}/other/pirate/discussions/1" and commits(served, "other/pirate") == 2
    assert repo.requests[1].author == "me" and set(repo.requests[1].commits[0][2]) > {"adapter_model.safetensors", "README.md"}
    assert publish(adapter, "other/pirate", pull_request=True).sent == ()
    change(adapter)
    second = publish(adapter, "other/pirate", pull_request=True)
    assert second.sent == ("more.safetensors",) and second.pull_request == first.pull_request
    assert len(repo.requests) == 1 and [oid for oid, _, _ in repo.requests[1].commits] == [first.commit, second.commit]
    assert served.files("other/pirate") == {"notes.md": b"theirs"}, "main is as it was"


def test_a_closed_pull_request_and_one_of_another_are_not_added_to(served, adapter):
    repo = served.repo("other/pirate", {"notes.md": b"theirs"})
    publish(adapter, "other/pirate", pull_request=True)
    repo.requests[1].status = "closed"
    publish(adapter, "other/pirate", pull_request=True)
    publish(adapter, "other/pirate", pull_request=True, token="hf_other")
    assert [one.author for one in repo.requests.values()] == ["me", "me", "other"] and all(len(one.commits) == 1 for one in repo.requests.values())


@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize("kind", ["lost", "cut", 503])
def test_a_lost_answer_never_opens_a_second_pull_request(served, adapter, kind, times):
    repo = served.repo("other/pirate", {"notes.md": b"theirs"})
    served.fault("commit", kind, times=times)
    try:
        publish(adapter, "other/pirate", pull_request=True)
    except HubError as error:
        assert times == 99 and kind != "lost", error
    served.calm()
    publish(adapter, "other/pirate", pull_request=True)
    assert len(repo.requests) == 1 and len(repo.requests[1].commits) == 1


@pytest.mark.parametrize("step", [("discussions", 1), ("info", 1), ("tree", 1), ("preupload", 1), ("batch", 1), ("put", 1), ("verify", 1), ("commit", 1), ("info", 2)])
def test_a_fault_at_any_step_of_a_pull_request_leaves_one_of_one_commit(served, adapter, step):
    for kind in ("cut", "lost", 503):
        repo = served.repo("other/pirate", {"notes.md": b"theirs"})
        served.fault(step[0], kind, nth=step[1])
        assert publish(adapter, "other/pirate", pull_request=True).pull_request, kind
        served.calm()
        assert publish(adapter, "other/pirate", pull_request=True).sent == ()
        assert len(repo.requests) == 1 and len(repo.requests[1].commits) == 1 and len(repo.commits) == 2


def test_a_pull_request_has_no_say_in_the_rest_and_needs_a_repository(served, adapter):
    served.repo("other/pirate")
    with pytest.raises(HubError, match="tag and gated is for whoever owns"):
        publish(adapter, "other/pirate", pull_request=True, tag="v1", gated="auto")
    with pytest.raises(HubError) as caught:
        publish(adapter, "other/none", pull_request=True)
    assert caught.value.key == "hub.missing" and "other/none" not in served.repos


# ---- who may have it


def test_a_gate_stands_before_there_is_anything_to_have(served, adapter):
    publish(adapter, gated="manual", private=False)
    order = [note.route for note in served.seen if note.route in ("settings", "put", "commit")]
    assert served.repos["me/pirate"].gated == "manual" and order[0] == "settings" and not served.repos["me/pirate"].private
    served.calm()
    publish(adapter, gated="manual")
    publish(adapter)
    assert not [note for note in served.seen if note.route == "settings"] and served.repos["me/pirate"].gated == "manual"
    publish(adapter, gated="none")
    assert served.repos["me/pirate"].gated is False


@pytest.mark.parametrize(("kind", "words"), [(403, "does not allow"), (503, "failed while"), ("cut", "connection broke"), ("silent", "no sign"), (401, "wrong or has expired")])
def test_without_its_gate_nothing_is_sent(served, adapter, kind, words):
    served.fault("settings", kind, times=99)
    with impatient(kind), pytest.raises(HubError, match=words):
        publish(adapter, gated="auto")
    assert commits(served) == 1 and not served.objects
    served.calm()
    assert publish(adapter, gated="auto").commit and served.repos["me/pirate"].gated == "auto"


def test_a_gate_that_the_hub_took_and_did_not_set_is_said(served, adapter, monkeypatch):
    from tests.hub.server import Handler, ok

    monkeypatch.setattr(Handler, "on_settings", lambda self, body, id: ok({}))
    with pytest.raises(HubError, match="should be gated .auto., and the Hub says none"):
        publish(adapter, gated="auto")
    assert not served.objects


# ---- collections


def test_a_collection_is_found_by_its_title_or_made_and_holds_it_once(served, adapter):
    first = publish(adapter, collection="My adapters")
    ((slug, made),) = served.collections.items()
    assert first.collection == f"{served.url}/collections/{slug}" and made.items == ["me/pirate"] and made.private
    served.calm()
    publish(adapter, collection="my adapters")
    publish(adapter, collection=slug)
    assert list(served.collections) == [slug] and made.items == ["me/pirate"] and not served.received("make_collection", "collect")
    assert publish(adapter, "me/second", collection=slug).collection == first.collection and made.items == ["me/pirate", "me/second"]


@pytest.mark.parametrize("route", ["collections", "make_collection", "collection", "collect"])
def test_a_fault_around_a_collection_puts_nothing_in_twice(served, adapter, route):
    for number, kind in enumerate(("cut", "lost", 503)):
        served.fault(route, kind)
        publish(adapter, collection=f"Shelf {number}")
        served.calm()
    assert [one.items for one in served.collections.values()] == [["me/pirate"]] * 3
    served.fault(route, 503, times=99)
    with pytest.raises(HubError, match="published, but not in the collection yet"):
        publish(adapter, collection="Shelf 4")
    assert commits(served) == 2


def test_a_collection_of_somebody_else_and_one_that_is_not_there_are_said(served, adapter):
    with pytest.raises(HubError, match=r"no collection me/none-0{24}.*Nothing was published"):
        publish(adapter, collection=f"me/none-{0:024x}")
    assert not served.objects and not served.repos
    from tests.hub.rules import Collection

    theirs = f"other/theirs-{9:024x}"
    served.collections[theirs] = Collection("Theirs")
    with pytest.raises(HubError, match="does not allow this for other/theirs.*scope write-collections.*published, but not in"):
        publish(adapter, collection=theirs)
    assert served.collections[theirs].items == [] and commits(served) == 2


# ---- several in one repository


def test_two_adapters_live_in_one_repository_with_a_list_and_each_is_pulled_alone(served, adapter, tmp_path):
    served.repo("me/all", {"README.md": LIST.encode()}, private=True)
    publish(adapter, "me/all", folder="pirate", listing=lister("me/all", "pirate"), tag="pirate-1")
    second = tmp_path / "second"
    second.mkdir()
    (second / "adapter_model.safetensors").write_bytes(weights(500))
    (second / "adapter_config.json").write_text(json.dumps({"r": 4}))
    publish(second, "me/all", folder="capitals", listing=lister("me/all", "capitals"))
    readme = served.files("me/all")["README.md"].decode()
    assert "My own words." in readme and readme.count("| [pirate](") == readme.count("| [capitals](") == 1 == readme.count("# Mine")
    assert "base_model:\n- Qwen/Qwen3-0.6B\n- Qwen/Qwen3-1.7B\n" in readme and "license: mit" in readme
    assert served.files("me/all")["pirate/README.md"] == CARD.encode()
    served.calm()
    for folder, source in (("pirate", adapter), ("capitals", second)):
        assert publish(source, "me/all", folder=folder, listing=lister("me/all", folder), tag=f"{folder}-1").sent == ()
        studio_hub.pull("me/all", tmp_path / folder, subfolder=folder, token="hf_me")
        assert (tmp_path / folder / "adapter_config.json").read_bytes() == (source / "adapter_config.json").read_bytes()
    assert commits(served, "me/all") == 4 and set(served.repos["me/all"].tags) == {"pirate-1", "capitals-1"}


def test_adapters_of_a_library_are_updated_in_place_recorded_and_pulled_by_their_folder(served, home, workspace, tmp_path):
    ids = {name: made.adapter(home, name, seed=seed) for seed, name in enumerate(("pirate", "capitals"))}
    for name, id in ids.items():
        shelf.publish(workspace, id, shelf.Push("me/all", folder=name), token="hf_me")
    library.note(workspace, ids["pirate"], "A second version.")
    push = shelf.Push("me/all", folder="pirate", tag="v2", collection="Ships")
    second = shelf.publish(workspace, ids["pirate"], push, token="hf_me")
    assert second.sent == ("pirate/README.md",) and shelf.publish(workspace, ids["pirate"], push, token="hf_me").sent == ()
    first, last = library.card(workspace, ids["pirate"])["publications"]
    assert first["folder"] == last["folder"] == "pirate" and last["tag"] == "v2" and last["commit"] == second.commit != first["commit"]
    assert last["collection"] == second.collection and served.files("me/all")["README.md"].count(b"| [") == 2
    assert b'subfolder="capitals"' in served.files("me/all")["capitals/README.md"]
    fresh = Workspace(tmp_path / "fresh")
    fresh.root.mkdir()
    try:
        pulled = shelf.import_adapter(fresh, "me/all/capitals", token="hf_me")
    finally:
        with made.at(home) as bench:
            bench.stop()
    known = library.card(fresh, pulled)
    assert pulled == ids["capitals"] and known["name"] == "capitals" and known["source"] == f"me/all/capitals@{second.commit}"


def test_what_was_only_asked_for_is_not_listed_as_published(served, home, workspace):
    served.repo("other/theirs", {"notes.md": b"theirs"})
    id = made.adapter(home, "pirate", seed=1)
    done = shelf.publish(workspace, id, shelf.Push("other/theirs", pull_request=True), token="hf_me")
    (record,) = library.card(workspace, id)["publications"]
    assert record["pull_request"] == done.pull_request and shelf.published(workspace) == []
    shelf.publish(workspace, id, shelf.Push("me/mine", False), token="hf_me")
    assert [one["url"] for one in shelf.published(workspace)] == [f"{served.url}/me/mine"]


def test_a_list_keeps_the_row_that_another_added_at_the_same_moment(served, adapter):
    repo, commit = served.repo("me/all", private=True), studio_hub.push._commit
    theirs = lister("me/all", "theirs")("").encode()

    def after_someone(talk, additions, aim, parent):
        if len(repo.commits) == 1:
            repo.commit("theirs", {**repo.commits[-1][2], "README.md": theirs})
        return commit(talk, additions, aim, parent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studio_hub.push, "_commit", after_someone)
        publish(adapter, "me/all", folder="ours", listing=lister("me/all", "ours"))
    readme = served.files("me/all")["README.md"].decode()
    assert "| [ours](" in readme and "| [theirs](" in readme and len(repo.commits) == 3


@pytest.mark.parametrize("route", ["head", "get", "validate", "preupload", "put", "commit", "info", "tree"])
def test_a_fault_at_any_step_of_a_folder_is_survived_by_one_commit(served, adapter, route):
    for kind in ("cut", "lost", 503):
        repo = served.repo("me/all", {"README.md": LIST.encode()}, private=True)
        served.fault(route, kind)
        publish(adapter, "me/all", folder="pirate", listing=lister("me/all", "pirate"))
        assert len(repo.commits) == 3 and "My own words." in served.files("me/all")["README.md"].decode(), kind
        served.calm()
        assert publish(adapter, "me/all", folder="pirate", listing=lister("me/all", "pirate")).sent == ()


def test_a_list_is_stable_and_no_name_breaks_it():
    facts = card.Facts(name="x | <b>\n<!-- end of adapters --> [y](z)", base="Qwen/Qwen3-0.6B", method={"kind": "lora"})
    write = functools.partial(listing.write, facts, repo_id="me/all")
    once = write(folder="a.b")
    assert write(folder="a.b", before=once) == once and once.count(listing.END) == 1
    both = write(folder="c", before=once)
    rows = [line for line in both.splitlines() if re.match(r"\| \[", line)]
    assert len(rows) == 2 and write(folder="a.b", before=both) == both and all(row.count(" | ") == 4 for row in rows)


def test_a_secret_in_the_list_that_is_there_is_not_sent_on(served, adapter):
    served.repo("me/all", {"README.md": LIST.encode() + b"hf_" + b"a1B2" * 8}, private=True)
    with pytest.raises(HubError, match="README.md holds a Hugging Face token"):
        publish(adapter, "me/all", folder="pirate", listing=lister("me/all", "pirate"))
    assert commits(served, "me/all") == 2 and not served.objects


@pytest.mark.parametrize(
    ("wish", "key"),
    [
        ({"tag": "v 1"}, "hub.tag_name"), ({"tag": "a..b"}, "hub.tag_name"), ({"tag": "refs/heads/main"}, "hub.tag_name"), ({"tag": "-v"}, "hub.tag_name"),
        ({"folder": "../x"}, "hub.folder_name"), ({"folder": "a/b"}, "hub.folder_name"), ({"folder": ".git"}, "hub.folder_name"), ({"folder": "x" * 99}, "hub.folder_name"),
        ({"gated": "yes"}, "hub.gate_name"), ({"collection": "x" * 60}, "hub.collection_name"), ({"collection": "a\nb"}, "hub.collection_name"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_is_said_before_the_hub_is_asked(served, adapter, wish, key):
    with pytest.raises(HubError) as caught:
        publish(adapter, **wish)
    assert caught.value.key == key and not served.seen


# ---- an interrupted push


def test_wherever_a_push_is_cut_the_next_sends_no_more_than_what_is_missing(served, adapter, monkeypatch):
    """20 places in the stream of the weights' bytes; what is missing are the files that the Hub does not have whole."""
    monkeypatch.setattr(client, "WAITS", ())
    for number in range(6):
        (adapter / f"part-{number}.safetensors").write_bytes(weights(40_000 + 7919 * number))
    items = [item for item in studio_hub.plan(adapter) if item.path.endswith(".safetensors")]
    total, shares = sum(item.size for item in items), []
    for cut in range(20):
        served.bytes_left = total * (2 * cut + 1) // 40
        with pytest.raises(HubError, match="what the Hub has already is not sent again"):
            publish(adapter)
        missing = sum(item.size for item in items if item.sha256 not in served.objects)
        served.calm()
        publish(adapter)
        assert 0 < served.received("put") <= 1.05 * missing and commits(served) == 2
        shares.append(served.received("put") / missing)
        served.repos.clear(), served.objects.clear(), served.calm()
    assert max(shares) == 1.0 and len(shares) == 20
