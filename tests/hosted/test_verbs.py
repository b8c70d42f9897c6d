"""Users are kept apart, verb by verb: every verb that takes a workspace is called for one visitor with the ids of another."""

import importlib
import inspect

import pytest

from lora_studio import albums, fence, grids, shelf, tryouts, workspace
from lora_studio.errors import StudioError
from lora_studio.fence import Limits
from lora_studio.jobs import bench
from lora_studio.pictures.edits import Edit
from lora_studio.spec import compare, parse, sweep
from tests.hosted import belongings
from tests.test_floors import FLOORS

MODULES = [*FLOORS[5], "library"]


def verbs():
    for module in MODULES:
        found = importlib.import_module(f"lora_studio.{module}")
        for name, function in inspect.getmembers(found, inspect.isfunction):
            parameters = list(inspect.signature(function).parameters)
            own = function.__module__.startswith(f"lora_studio.{module}")
            if own and not name.startswith("_") and parameters[:1] == ["workspace"]:
                yield f"{module}.{name}", function


VERBS = dict(verbs())


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Two visitors; one owns one of everything."""
    import os

    place = tmp_path_factory.mktemp("people")
    before = os.environ.get("LORA_STUDIO_HOME")
    os.environ["LORA_STUDIO_HOME"] = str(place / "home")
    ana, ben = (workspace.of_visitor(f"id-of-{name}", name, Limits()) for name in ("ana", "ben"))
    (place / "scratch").mkdir()
    found = belongings.make(ana, "canaryana", scratch=place / "scratch")
    yield ana, ben, found
    bench.stop()
    os.environ.pop("LORA_STUDIO_HOME") if before is None else os.environ.update(LORA_STUDIO_HOME=before)


@pytest.fixture(autouse=True)
def home(people, monkeypatch):
    monkeypatch.setenv("LORA_STUDIO_HOME", str(people[0].root.parent.parent))
    fence.watch(lambda: people[1])
    yield people[0].root.parent.parent
    fence.watch(lambda: None)


def arguments(owned: belongings.Belongings, id: str, scratch) -> dict[str, object]:
    """What each parameter of a verb is given, by its name: something of another's wherever it could be one."""
    parts = [(id, 1.0)]
    spec = parse({"data": [{"path": owned.data}], "schedule": {"steps": 1}})
    return {
        "id": id, "ids": [id, id], "parts": parts, "keys": [id], "sides": {"a": parts}, "name": id, "entry": id, "path": owned.data, "source": id, "tuned": owned.model, "base": owned.model,
        "token": owned.export, "picture": "canaryana.png", "pictures": ["canaryana.png"], "texts": {"canaryana.png": "stolen"}, "change": Edit("prefix", text="stolen "), "files": [scratch / "none.png"],
        "file": scratch / "none.png", "folder": scratch, "target": scratch / "out", "seconds": 0.1, "form": "gguf", "dtype": "float32", "how": "ties", "rank": 1, "spec": spec, "report": report(),
        "data": [owned.data], "to": shelf.Push("ben/stolen"), "repo": "canaryana/none", "prompt": "hello", "messages": [], "asked": {}, "model": "demo-text", "text": "stolen", "fields": {},
    }  # fmt: skip


def report():
    from lora_studio.preflight import Report

    return Report()


def swept(owned):
    return sweep.parse({"run": {"data": [{"path": owned.data}], "schedule": {"steps": 1}}, "over": {"method.rank": [1, 2]}})


def compared(owned):
    return compare.parse({"run": {"data": [{"path": owned.data}], "schedule": {"steps": 4}, "validation": {"size": 0.1}}, "rates": [1e-3], "plus_rates": [1e-3]})


# What a name alone does not say: verbs whose parameters mean something of their own.
ROWS = {
    "studio.sample": lambda owned, id: {"name": owned.sample},
    "studio.picture": lambda owned, id: {"name": owned.picture},
    "exports.file": lambda owned, id: {"name": owned.export_name},
    "tryouts.answer": lambda owned, id: {"asked": tryouts.Asked("hello", [(id, 1.0)])},
    "grids.draw": lambda owned, id: {"asked": grids.Asked(owned.model, ("hello",), (grids.Row("a", ((id, 1.0, "x"),)),), (1.0,), {})},
    "library.verify": lambda owned, id: {"id": id},
    "sweeps.check": lambda owned, id: {"spec": swept(owned)},
    "sweeps.start": lambda owned, id: {"spec": swept(owned)},
    "comparisons.check": lambda owned, id: {"spec": compared(owned)},
    "comparisons.start": lambda owned, id: {"spec": compared(owned)},
    "library.update": lambda owned, id: {"notes": "stolen"},
    "library.find": lambda owned, id: {"text": "canaryana"},
    "library.count": lambda owned, id: {"text": "canaryana"},
    "library.survey": lambda owned, id: {"text": "canaryana"},
    "studio.wait_until_ended": lambda owned, id: {"seconds": 0.1},
    "albums.write_captions": lambda owned, id: {"model": "demo-text"},
}
# Verbs that make something of the caller's own from a free text: what they are given is a new name or address and no id.
MAKES = {"baking.folder_for", "shelf.check_name", "shelf.pull", "studio.upload", "library.add", "shelf.import_files", "albums.create"}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_verb_finds_nothing_of_another_visitor(verb, people, tmp_path):
    ana, ben, owned = people
    (tmp_path / "none.png").write_bytes(b"")
    function, before = VERBS[verb], belongings.state(ana)
    seen = 0
    for id in owned.ids:
        given = arguments(owned, id, tmp_path) | ROWS.get(verb, lambda owned, id: {})(owned, id)
        wanted = {
            name: given.get(name, KeyError)
            for name, parameter in list(inspect.signature(function).parameters.items())[1:]
            if (parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)) or name in ROWS.get(verb, lambda owned, id: {})(owned, id)
        }
        assert KeyError not in wanted.values(), f"{verb} has no row: say what its parameters are in arguments() or ROWS ({wanted})"
        try:
            found = function(ben, **wanted)
            found = list(found) if inspect.isgenerator(found) else found
        except (StudioError, OSError) as error:
            found = "" if owned.canary in str(wanted.values()) else str(error)  # a sentence may repeat what was asked
            seen += 1
        if verb not in MAKES and not isinstance(found, str):
            assert owned.canary not in text_of(found), (verb, id)
    assert belongings.state(ana) == before, f"{verb} changed something of another's"
    assert seen or verb in MAKES or "id" not in inspect.signature(function).parameters, f"{verb} answered for another's ids"


def text_of(found) -> str:
    """Everything a verb answered, but the paths and names that it was given itself."""
    return repr(getattr(found, "facts", found)) if not hasattr(found, "preview") else repr((found.preview, found.rows))


def test_every_module_of_verbs_is_in_the_matrix():
    assert len(VERBS) > 80 and albums.view in VERBS.values()


def test_owners_find_what_is_theirs(people):
    """The matrix would pass as well over an empty home: what others do not find is there."""
    ana, _, owned = people
    fence.watch(lambda: ana)
    from lora_studio import data, exports, library, studio

    assert library.card(ana, owned.adapter)["name"] == "canaryana adapter" and studio.show(ana, owned.run).state == "done"
    assert studio.sample(ana, owned.run, owned.sample).is_file() and studio.picture(ana, owned.picture).is_file()
    assert exports.file(ana, owned.export, owned.export_name).is_file() and albums.view(ana, owned.album).captions
    assert data.locate(owned.data).is_file() and library.find(ana, "canaryana") and library.removed(ana)[0][0] == owned.removed
