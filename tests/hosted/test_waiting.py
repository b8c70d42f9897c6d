"""A visitor's run that has to fetch its base: with a token that was revoked it waits, says so, and starts once its owner has signed in again."""

import time
from pathlib import Path

import pytest
from huggingface_hub import constants  # before a test changes what it reads: it keeps for good what it finds when it is first imported

from lora_studio import albums, comparisons, data, fence, library, runs, search, studio, sweeps, visits, workspace
from lora_studio.errors import DataError, SpecError
from lora_studio.fence import Limits
from lora_studio.home import demo_base
from lora_studio.jobs import local, queue, tokens
from lora_studio.pictures import hub_sets
from lora_studio.spec import Source, compare, parse, sweep
from tests import tiny
from tests.hosted import belongings
from tests.hub.rules import Account
from tests.hub.server import Hub

LIMITS = Limits(bases=("demo-text", "team/*"))
NEW, REVOKED, OTHER = ("hf_" + letter * 30 for letter in "nro")
SIGN_IN = "Sign in again, and it starts by itself."


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A small Hub with a private base that only ana's new token opens; the workers speak to it."""
    found = Hub()
    found.account("team", token=NEW)
    found.repo("team/tiny", {path.name: path.read_bytes() for path in demo_base("demo-text").iterdir() if path.suffix in (".json", ".safetensors", ".jinja")}, private=True)
    for name, value in {"HF_ENDPOINT": found.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    yield found
    found.close()


def until(true, folder, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, (folder / "log.txt").read_text()[-2000:]
        time.sleep(0.1)


def queued(ana, spec) -> tuple:
    """The folder of a visitor's run that waits, and whether it needs their token."""
    fence.watch(lambda: ana)
    needs = visits.needs_token(ana, spec)
    fence.watch(lambda: None)
    folder = runs.create(ana, spec)
    runs.set_card(folder, needs_token=needs)
    queue.add(ana, folder, device="cpu")
    return folder, needs


def test_a_run_with_a_revoked_token_waits_and_starts_after_signing_in_again(hub, home):
    ana = workspace.of_visitor("id-of-ana", "ana", LIMITS)
    spec = parse({"base": {"id": "team/tiny"}, "data": [{"path": "demo/pirate"}], "schedule": {"steps": 2, "batch_size": 2}, "method": {"rank": 2}})
    folder, needs = queued(ana, spec)
    try:
        assert needs and queue.pump() == [] and SIGN_IN in studio.show(ana, folder.name).reason  # nobody is signed in
        assert not hub.seen

        tokens.lend(ana.root, REVOKED, until=time.time() + 600)
        assert queue.pump() == [folder.name]
        until(lambda: not local.processes(folder) and runs.is_waiting(folder), folder)
        assert any(request.authorized for request in hub.seen) and SIGN_IN in studio.show(ana, folder.name).reason
        assert studio.show(ana, folder.name).state == "queued" and not (folder / "adapter").exists()

        tokens.lend(ana.root, REVOKED, until=time.time() + 600)  # every request lends it: the refused one is not tried again
        assert queue.pump() == []

        tokens.lend(ana.root, NEW, until=time.time() + 600)
        assert queue.pump() == [folder.name]
        until(lambda: runs.ended(folder) is not None, folder, 300)
        assert studio.show(ana, folder.name).state == "done" and (folder / "adapter").is_dir()
    finally:
        tokens.take_back(ana.root)
        local.end(folder)
    for path in home.parent.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert REVOKED.encode() not in content and NEW.encode() not in content, path


def run_with_rows_of_the_hub(ana, hub):
    """A run of ana's whose rows are a private data set of her team; queued."""
    rows = b"".join(b'{"prompt": "Who is %d?", "completion": "It is %d."}\n' % (number, number) for number in range(12))
    hub.repo("team/rows", {"train.jsonl": rows}, private=True)
    spec = parse({"data": [{"path": "team/rows", "split": "train"}], "schedule": {"steps": 2, "batch_size": 2}, "method": {"rank": 2}, "validation": {"size": 0}})
    return queued(ana, spec)[0]


def test_a_run_whose_rows_are_refused_waits_and_starts_after_signing_in_again(hub, home):
    ana = workspace.of_visitor("id-of-ana", "ana", Limits(data=("team/*",)))
    folder = run_with_rows_of_the_hub(ana, hub)
    try:
        assert queue.pump() == [] and SIGN_IN in studio.show(ana, folder.name).reason
        tokens.lend(ana.root, REVOKED, until=time.time() + 600)
        assert queue.pump() == [folder.name]
        until(lambda: not local.processes(folder) and runs.is_waiting(folder), folder)
        assert studio.show(ana, folder.name).state == "queued" and SIGN_IN in studio.show(ana, folder.name).reason

        tokens.lend(ana.root, NEW, until=time.time() + 600)
        assert queue.pump() == [folder.name]
        until(lambda: runs.ended(folder) is not None, folder, 300)
        assert studio.show(ana, folder.name).state == "done", (folder / "log.txt").read_text()

        # What ana's token fetched is nobody else's: without it the same rows are refused, though they lie in the cache.
        hub.accounts[OTHER] = Account("ben", "write")
        ben = workspace.of_visitor("id-of-ben", "ben", Limits(data=("team/*",)))
        again = runs.create(ben, runs.spec_of(folder))
        runs.set_card(again, needs_token=True)
        queue.add(ben, again, device="cpu")
        tokens.lend(ben.root, OTHER, until=time.time() + 600)
        until(lambda: queue.pump() == [again.name], again)  # the one before may still hold the device
        until(lambda: runs.ended(again) is not None, again, 300)
        assert studio.show(ben, again.name).state == "failed" and "your account may not see it" in studio.show(ben, again.name).reason
    finally:
        tokens.take_back(ana.root)
        local.end(folder)


@pytest.fixture
def lent(monkeypatch, hub):
    """Lends a token to this process, as to one that works for a visitor; what it fetches comes from the small Hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("rows", "pictures"):  # one for each: a process remembers what a data set looks like
        hub.repo(f"team/{name}", {"train.jsonl": b'{"prompt": "a", "completion": "b"}\n'}, private=True)
    yield fence.lend
    fence.lend("")


@pytest.mark.parametrize(("name", "read"), [("rows", data.load_hub), ("pictures", lambda source: hub_sets.fetch(source, Path("nowhere")))])
def test_what_the_hub_says_of_a_token_is_told_apart_for_rows_and_pictures(hub, lent, name, read):
    """A refused token lets a run wait, also when it is refused half way; an account that may not see the data set never gets in by waiting."""
    source = Source(path=f"team/{name}")
    lent(REVOKED)
    with pytest.raises(DataError) as caught:
        read(source)
    assert caught.value.key == "data.bad_token"
    lent(NEW)
    hub.fault("info", 401, times=9)
    with pytest.raises(DataError) as caught:
        read(source)
    assert caught.value.key == "data.bad_token" and hub.seen[-1].route == "info"
    hub.calm()
    for route in ("auth", "info"):  # a connection that breaks is a sentence, and nothing to sign in again for
        hub.fault(route, "cut", times=9)
        with pytest.raises(DataError) as caught:
            read(source)
        assert caught.value.key == "data.hub" and hub.seen[-1].route == route
        hub.calm()
    hub.account("ben", token=OTHER)
    lent(OTHER)
    with pytest.raises(DataError, match="it is not there, or your account may not see it") as caught:
        read(source)
    assert caught.value.key == "data.hub"
    hub.fault("auth", 403)
    with pytest.raises(DataError, match="it is gated, and your account has not been let in"):
        read(source)


def test_a_visitor_is_served_nothing_private_that_lies_in_the_cache(hub, lent):
    """The page works for somebody whose token it does not use: what a run fetched for another is not read out of the cache for them."""
    lent("")
    fence.watch(lambda: workspace.of_visitor("id-of-ben", "ben", Limits(data=("team/*",))))
    try:
        with pytest.raises(DataError, match="may not see it"):
            data.load_hub(Source(path="team/rows"))
    finally:
        fence.watch(lambda: None)
    assert not [seen for seen in hub.seen if seen.authorized]


def test_every_verb_that_starts_a_job_waits_for_a_sign_in_where_the_base_has_to_be_fetched(hub, home, tmp_path):
    """Searches, comparisons, sweeps and captions as well as runs: none of them starts without its owner's token, and none fails for want of it."""
    ana = workspace.of_visitor("id-of-ana", "ana", Limits(bases=("demo-text", "team/*"), runs=9))
    fence.watch(lambda: ana)
    tree = {"base": {"id": "team/tiny"}, "data": [{"path": "demo/pirate"}], "schedule": {"steps": 2, "batch_size": 2}, "method": {"rank": 2}}
    files = tiny.adapter_files(demo_base("demo-text"), seed=1, rank=2, ends=("q_proj",), name="team/tiny")
    adapter = library.add(ana, files, {"name": "one", "base": "team/tiny"})
    belongings.picture(tmp_path / "red.png")
    album, _ = albums.create(ana, [tmp_path / "red.png"], name="album")
    started = {
        "train": lambda: studio.start(ana, parse(tree)),
        "sweep": lambda: sweeps.start(ana, sweep.parse({"run": tree, "over": {"method.rank": [1, 2]}, "keep": "all"})),
        "compare": lambda: comparisons.start(ana, compare.parse({"run": tree | {"schedule": {"steps": 4}, "validation": {"size": 0.1}}, "rates": [1e-3], "plus_rates": [1e-3]})),
        "search": lambda: search.start(ana, [adapter], ["demo/pirate"]),
        "captions": lambda: albums.write_captions(ana, album, model="team/tiny"),
    }
    try:
        for what, start in started.items():
            folder = ana.run_folder(start())
            assert queue.waits_for_sign_in(folder) and runs.is_waiting(folder), what
            assert studio.show(ana, folder.name).state == "queued" and SIGN_IN in studio.show(ana, folder.name).reason, what
        assert not [seen for seen in hub.seen if seen.authorized]
    finally:
        fence.watch(lambda: None)


def test_a_visitor_trains_no_more_adapters_side_by_side_than_the_owner_allows(home):
    ana = workspace.of_visitor("id-of-ana", "ana", Limits(adapters=3))
    run = {"data": [{"path": "demo/pirate"}], "schedule": {"steps": 2, "batch_size": 2}, "method": {"rank": 2}}
    fence.watch(lambda: ana)
    try:
        four, three = (sweep.parse({"run": run, "over": {"method.rank": ranks}}) for ranks in ([1, 2, 3, 4], [1, 2, 3]))
        folded = sweep.parse({"run": run, "over": {"method.rank": [1, 2]}, "folds": 2})
        for asked in (four, folded):
            with pytest.raises(SpecError, match=r"would train (4|6) adapters in one run, and 3 is the most here"):
                sweeps.start(ana, asked)
        seeds = compare.parse({"run": run | {"schedule": {"steps": 4}}, "rates": [1e-3], "plus_rates": [1e-3], "seeds": 4})
        with pytest.raises(SpecError, match="would train 4 adapters in one run"):
            comparisons.start(ana, seeds)
        assert not list(ana.run_folders()) and sweeps.check(ana, three).can_start
    finally:
        fence.watch(lambda: None)
    assert not sweeps.check(workspace.local(), four).facts.get("adapters", 0) < 4 and sweeps.check(workspace.local(), four).can_start


def test_who_signs_out_takes_their_token_from_what_waits(home):
    ana = workspace.of_visitor("id-of-ana", "ana", LIMITS)
    folder = ana.runs / "20260101-000000-abcd"
    tokens.lend(ana.root, NEW, until=time.time() + 600)
    assert tokens.of(folder) == NEW and tokens.of(folder, after=time.time() + 1) is None
    tokens.take_back(ana.root)
    assert tokens.of(folder) is None
    tokens.lend(ana.root, NEW, until=time.time() - 1)
    assert tokens.of(folder) is None
