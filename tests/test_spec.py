"""The spec: what it refuses and how it says so, and that everything derives from it."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lora_studio import presets, settings, studio
from lora_studio.errors import SpecError
from lora_studio.spec import TrainSpec, methods, parse

PLAIN = {"data": [{"path": "x"}]}


def problems_of(tree) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        parse(tree)
    return {problem.path: problem.sentence for problem in caught.value.problems}


def test_all_problems_come_back_at_once_each_with_its_field():
    found = problems_of(
        {"data": [{"path": "x", "weigth": 2}], "optim": {"lr": 0, "lora_plus_ratio": 1}, "method": {"rank": "a", "targets": 3},
         "compute": {"device": "gpu"}, "foo": 1}
    )  # fmt: skip
    assert set(found) == {"data.0.weigth", "optim.lr", "optim.lora_plus_ratio", "method.rank", "method.targets", "compute.device", "foo"}
    assert found["optim.lr"] == "optim.lr is 0; it must be above 0."
    assert "Did you mean weight?" in found["data.0.weigth"]
    assert "auto, or a list of layer names" in found["method.targets"]


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"task": {"kind": "chatt"}}, "task", "must be one of 'chat'"),
        ({"task": {"kind": "text", "template": "chatml"}}, "task.template", "belongs to chat"),
        ({"task": {"kind": "chat", "overlength": "split"}}, "task.overlength", "it must be one of"),
        ({"optim": {"lr": float("nan")}}, "optim.lr", "finite"),
        ({"optim": {"lr": 1e9}}, "optim.lr", "at most 100"),
        ({"schedule": {"batch_size": 0}}, "schedule.batch_size", "at least 1"),
        ({"schedule": {"batch_size": 1.5}}, "schedule.batch_size", "whole number"),
        ({"name": " \n "}, "name", "one line"),
        ({"name": "x" * 81}, "name", "at most 80"),
        ({"data": []}, "data", "at least 1"),
        ({"output": 3}, "output", "group of settings"),
    ],
)
def test_a_bad_value_gets_a_sentence_with_its_field_and_what_is_allowed(change, path, words):
    found = problems_of({**PLAIN, **change})
    assert path in found and words in found[path], found


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"epochs": 5, "steps": 9}},
        {"validation": {"size": 0, "patience": 2}},
        {"validation": {"size": 0, "every": 2}},
        {"output": {"sample_every": 4}},
        {"optim": {"kind": "adafactor", "beta1": 0.5}},
        {"optim": {"kind": "sgd", "beta2": 0.5}},
        {"schedule": {"steps": 5, "warmup": 6}},
        {"base": {"id": "demo-text", "revision": "main"}},
    ],
)
def test_a_setting_without_effect_is_an_error(change):
    assert len(problems_of({**PLAIN, **change})) == 1


def test_a_newer_version_is_refused_untouched():
    assert "version 9" in problems_of({**PLAIN, "version": 9})[""]


def test_yaml_in_and_out_is_the_same_spec():
    for preset in presets.available():
        spec = studio.compose(preset.name, {"data": [{"path": "x"}]})
        assert parse(yaml.safe_load(settings.dumps(spec))) == spec
        assert parse(yaml.safe_load(settings.dumps(spec, sparse=True))) == spec


@pytest.mark.parametrize("text", ["{{{a}}}", "9" * 5000, "[" * 5000, "&a [*a, *a]", "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))])])
def test_yaml_that_is_no_setting_of_anybody_gets_a_sentence(text):
    with pytest.raises(SpecError, match="not readable as YAML"):
        settings.read_yaml(text)


def test_a_key_given_twice_and_broken_yaml_are_named_with_their_line():
    for text, words in (("a: 1\na: 2", "sets a twice (line 2)"), ("a: [1", "line 1"), ("- 1", "holds a list")):
        with pytest.raises(SpecError) as caught:
            settings.as_tree(text)
        assert words in str(caught.value)


def test_overrides_reach_into_groups_and_lists():
    tree = settings.override(PLAIN, ["data.0.cap=5", "optim.lr=1e-3", "task.kind=text", "method.targets=[q_proj]"])
    spec = parse(tree)
    assert (spec.data[0].cap, spec.optim.lr, spec.task.kind, spec.method.targets) == (5, 1e-3, "text", ["q_proj"])
    for bad in ("nonsense", "=3", "data.7.cap=1"):
        with pytest.raises(SpecError):
            settings.override(PLAIN, [bad])


def test_changing_a_kind_drops_the_settings_of_the_other_kind():
    tree = settings.override({**PLAIN, "task": {"kind": "chat", "template": "chatml"}}, ["task.kind=text"])
    assert parse(tree).task.kind == "text"
    assert settings.overlay({"task": {"kind": "chat", "template": "chatml"}}, {"task": {"kind": "text"}}) == {"task": {"kind": "text"}}


def test_every_field_has_help():
    assert not [leaf.path for leaf in settings.leaves() if len(leaf.help) < 15]


def test_flags_and_form_values_are_exactly_the_leaves_of_the_spec():
    from lora_studio.cli import command

    leaves = {leaf.path for leaf in settings.leaves()}
    own = {"file", "preset", "overrides", "as_json", "detach", "show_spec"}
    for name in ("train", "preflight"):
        flags = {parameter.name.replace("__", ".") for parameter in command().commands[name].params} - own
        assert flags == leaves
    assert set(studio.form_values()) == leaves
    kinds = [("task", kind) for kind in ("chat", "prompt_completion", "text", "image")] + [("method", kind) for kind in methods.KINDS]
    assert leaves == set().union(*(_leaf_paths(parse({**PLAIN, group: {"kind": kind}}).model_dump()) for group, kind in kinds))


def _leaf_paths(tree: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in tree.items():
        found |= _leaf_paths(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found - {"version"}


def test_the_command_shown_makes_the_same_spec():
    import shlex

    from lora_studio.cli import command, spec_from

    tree = {
        **PLAIN, "name": "it's a `name`", "task": {"kind": "text", "overlength": "cut"}, "optim": {"lora_plus_ratio": 8, "clip": None},
        "data": [{"path": "a b.jsonl"}, {"path": "y", "weight": 2.0, "columns": {"text": "body"}}],
        "method": {"targets": ["q_proj", "v_proj"]}, "output": {"sample_prompts": ["Who?", "It's: [x]"]},
    }  # fmt: skip
    for spec in (parse(tree), parse(PLAIN), studio.compose("demo/pirate")):
        words = shlex.split(studio.command(spec).replace("\\\n", " "))[4:]
        context = command().commands["train"].make_context("train", list(words))
        flags = {name: value for name, value in context.params.items() if name not in ("file", "preset", "overrides", "as_json", "detach", "show_spec")}
        assert spec_from(None, None, flags, []) == spec


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "base", "data", "task", "optim", "lr", "path", "id"]), inner, max_size=4), max_leaves=8))  # fmt: skip
def test_whatever_is_given_is_a_spec_or_a_sentence(value):
    tree = {"data": [{"path": "x"}], **value} if isinstance(value, dict) else {"data": value}
    try:
        assert isinstance(parse(tree), TrainSpec)
    except SpecError as error:
        assert str(error) and all(problem.sentence.endswith(".") for problem in error.problems), str(error)
