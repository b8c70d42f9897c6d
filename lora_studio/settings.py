"""Specs as text and as a flat list of settings: YAML in and out, `path=value` overrides, and the leaves that flags and forms are made of."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from lora_studio import problems
from lora_studio.errors import Problem, SpecError
from lora_studio.spec import TrainSpec, parse, to_tree

MOST_VALUES = 200_000


class _Loader(yaml.SafeLoader):
    """Plain YAML that refuses a key given twice; no tag ever builds an object."""


def _mapping(loader, node):
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise SpecError("spec.duplicate_key", source=loader.name, name=key, line=line)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str, source: str = "The spec") -> Any:
    """The value a YAML text holds. Raises SpecError naming the source and the line."""
    try:
        loader = _Loader(text)
        loader.name = source
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MOST_VALUES:
            raise SpecError("spec.not_yaml", source=source, reason="its aliases make too much of it")
        return loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, {error.problem}" if mark else str(error)
        raise SpecError("spec.not_yaml", source=source, reason=where) from None
    except (TypeError, ValueError, RecursionError):
        raise SpecError("spec.not_yaml", source=source, reason="it holds a key, a number or a nesting that no setting can have") from None


def _size(node, known: dict) -> float:
    """How many values a node becomes, each alias counted as what it stands for; one that stands within itself has no end."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node.value, list) else []
        known[id(node)] = 1 + sum(_size(one, known) for part in parts for one in (part if isinstance(part, tuple) else (part,)))
    return known[id(node)]


def read_tree(path: str | Path) -> dict:
    """The settings in a YAML file, not yet checked. Raises SpecError."""
    path = Path(path)
    if not path.is_file():
        raise SpecError("spec.no_file", path=path)
    return as_tree(path.read_text(encoding="utf-8"), str(path))


def as_tree(text: str, source: str = "The spec") -> dict:
    """The settings in a YAML text, not yet checked. Raises SpecError."""
    tree = read_yaml(text, source)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise SpecError("spec.not_mapping", source=source, kind=type(tree).__name__)
    return tree


def load(path: str | Path) -> TrainSpec:
    """The spec in a YAML file. Raises SpecError with all problems at once."""
    return parse(read_tree(path))


def load_text(text: str) -> TrainSpec:
    """The spec in a YAML text. Raises SpecError with all problems at once."""
    return parse(as_tree(text))


def dumps(spec: TrainSpec, *, sparse: bool = False) -> str:
    """The spec as YAML; sparse leaves out what equals the default."""
    return yaml.safe_dump(to_tree(spec, sparse=sparse), sort_keys=False, allow_unicode=True, width=100)


def overlay(lower: dict, upper: dict) -> dict:
    """`lower` with what `upper` sets on top. Groups are merged; a group whose kind changes starts afresh; lists are replaced."""
    result = dict(lower)
    for key, value in upper.items():
        below = lower.get(key)
        same_kind = isinstance(below, dict) and isinstance(value, dict) and value.get("kind", below.get("kind")) == below.get("kind")
        result[key] = overlay(below, value) if same_kind and key != "columns" else value
    return result


def override(tree: dict, assignments: list[str]) -> dict:
    """The tree with `path=value` assignments applied in order; values are YAML. Raises SpecError."""
    for text in assignments:
        path, sign, value = text.partition("=")
        if not sign or not path.strip():
            raise SpecError("spec.bad_override", text=text)
        tree = set_path(tree, path.strip(), read_yaml(value, f"--set {path}"))
    return tree


def set_path(tree: dict, path: str, value: Any) -> dict:
    """A copy of the tree in which the dotted path holds the value; numbers step into lists (`data.0.cap`)."""
    head, _, rest = path.partition(".")
    here = tree.get(head) if isinstance(tree, dict) else None
    if rest and isinstance(here, list):
        number, _, deeper = rest.partition(".")
        if not number.isdigit() or int(number) >= len(here):
            raise SpecError("spec.problems", problems=[Problem(path, f"{path}: {head} has {len(here)} entries, numbered from 0.")])
        items = list(here)
        items[int(number)] = set_path(items[int(number)], deeper, value) if deeper else value
        return {**tree, head: items}
    if not rest:
        return {**tree, head: value}
    inner = here if isinstance(here, dict) else {}
    if rest == "kind" and inner.get("kind") not in (None, value):
        inner = {}  # the settings of one kind mean nothing to another
    return {**tree, head: set_path(inner, rest, value)}


@dataclass(frozen=True)
class Leaf:
    """One setting: its dotted path, type, default and help; `kinds` says for which kinds of its group it exists (empty: all)."""

    path: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    optional: bool = False
    low: float | None = None
    high: float | None = None
    kinds: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        return self.path.partition(".")[0]

    @property
    def label(self) -> str:
        return self.path.rpartition(".")[2].replace("_", " ")


@cache
def leaves() -> tuple[Leaf, ...]:
    """Every setting of a TrainSpec in the order of the fields. `data` is one leaf: a list of sources."""
    return tuple(leaf for leaf in _leaves(TrainSpec, "") if leaf.path != "version")


def _leaves(model: type[BaseModel], prefix: str):
    for name, field in model.model_fields.items():
        path, options = prefix + name, problems.models_in(field.annotation)
        if not options or get_origin(field.annotation) is list:
            yield _leaf(path, field)
            continue
        seen: dict[str, Leaf] = {}
        for option in options:
            for leaf in _leaves(option, path + "."):
                seen[leaf.path] = _joined(seen.get(leaf.path), leaf, option, len(options))
        yield from seen.values()


def _joined(before: Leaf | None, leaf: Leaf, option: type[BaseModel], count: int) -> Leaf:
    """A leaf of one member of a union, joined with the same leaf of the members before it."""
    if count == 1:
        return leaf
    kind = option.model_fields["kind"].default
    if before is None:
        return Leaf(**{**vars(leaf), "kinds": (kind,)})
    choices = before.choices + tuple(choice for choice in leaf.choices if choice not in before.choices)
    return Leaf(**{**vars(before), "kinds": before.kinds + (kind,), "choices": choices})


def _leaf(path: str, field) -> Leaf:
    plain, optional = _plain(field.annotation)
    limits = {type(item).__name__: item for item in [*field.metadata, *_metadata(field.annotation)]}
    low = next((getattr(limits[kind], key) for kind, key in (("Ge", "ge"), ("Gt", "gt")) if kind in limits), None)
    high = next((getattr(limits[kind], key) for kind, key in (("Le", "le"), ("Lt", "lt")) if kind in limits), None)
    choices = tuple(get_args(plain)) if get_origin(plain) is Literal else ()
    default = None if field.is_required() else field.get_default()
    return Leaf(path, plain, default, field.description or "", choices, optional, low, high)


def _plain(annotation) -> tuple[Any, bool]:
    """An annotation without None and without limits, and whether None was allowed."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        inner = [item for item in get_args(annotation) if item is not NoneType]
        optional = len(inner) < len(get_args(annotation))
        return (_plain(inner[0])[0] if len(inner) == 1 else annotation), optional
    return annotation, False


def _metadata(annotation) -> list:
    """The limits inside `Annotated[int, ...] | None`."""
    items = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    found = []
    for item in items:
        if get_origin(item) is Annotated:
            for extra in get_args(item)[1:]:
                found += getattr(extra, "metadata", [extra])
    return found


def inline(value: Any) -> str:
    """A value as YAML on one line, as it stands after a flag."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
