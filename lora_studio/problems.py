"""Pydantic's complaints as sentences: which field, what it holds, what it may hold, and what was probably meant."""

import difflib
from typing import Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lora_studio.errors import Problem, SpecError

# pydantic's error type -> what to say after "path is value; "
EXPECTED = {
    "greater_than": "it must be above {gt:g}",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than": "it must be below {lt:g}",
    "less_than_equal": "it must be at most {le:g}",
    "multiple_of": "it must be a multiple of {multiple_of}",
    "finite_number": "it must be a finite number",
    "int_parsing": "it must be a whole number",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_parsing": "it must be a number",
    "float_type": "it must be a number",
    "bool_parsing": "it must be true or false",
    "bool_type": "it must be true or false",
    "string_type": "it must be a text (put it in quotes)",
    "string_too_short": "it must not be empty",
    "string_too_long": "it must be at most {max_length} characters long",
    "list_type": "it must be a list",
    "dict_type": "it must be a mapping of names to names",
    "too_short": "it needs at least {min_length} entry",
    "literal_error": "it must be one of {expected}",
    "model_type": "it must be a group of settings (`key: value` lines)",
    "model_attributes_type": "it must be a group of settings (`key: value` lines)",
}


def of_validation(error: ValidationError, model: type[BaseModel], tree) -> list[Problem]:
    """Every complaint of a pydantic error about `tree` as a Problem, in the order of the fields, one per field."""
    found: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, SpecError):
            for problem in cause.problems:
                found.setdefault(problem.path, problem)
            continue
        path = _path(item["loc"], model)
        found.setdefault(path, Problem(path, _sentence(item, path, model)))
    return list(found.values())


def _path(location: tuple, model: type[BaseModel]) -> str:
    """A pydantic location as a dotted path; the tags of unions (`task.chat.rank`) are left out."""
    parts, current = [], model
    for step in location:
        options = models_in(current)
        if isinstance(step, str) and len(options) > 1 and any(_tag(option) == step for option in options):
            current = next(option for option in options if _tag(option) == step)
            continue
        if isinstance(step, str) and not options and step not in parts and not step.isidentifier():
            continue
        if isinstance(step, str) and not options and parts:
            continue  # the branch of a union of plain types, as in list[str] | "auto"
        parts.append(str(step))
        field = next((option.model_fields[step] for option in options if step in option.model_fields), None)
        current = field.annotation if field is not None else (current if isinstance(step, int) else None)
    return ".".join(parts)


def _sentence(item: dict, path: str, model: type[BaseModel]) -> str:
    kind, value, context = item["type"], item.get("input"), item.get("ctx", {})
    if kind == "missing":
        return f"{path} is missing. Set it."
    if kind == "literal_error" and path.endswith("targets"):
        return f"{path} is {_short(value)}; it must be auto, or a list of layer names such as [q_proj, v_proj]."
    if kind == "literal_error" and path.endswith("shift"):
        return f"{path} is {_short(value)}; it must be auto, resolution, or a number above 0 and at most 100."
    if kind == "extra_forbidden":
        return _unknown(path, model, item["loc"])
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return f"{path}.kind is {_short(context.get('tag'))}; it must be one of {context.get('expected_tags', 'chat, text')}."
    if kind == "string_pattern_mismatch":
        if path.endswith("device"):
            return f"{path} is {_short(value)}; it must be auto, cpu, mps, cuda, or cuda:0."
        return f"{path} is {_short(value)}; it must be a name on one line that is not only spaces."
    expected = EXPECTED.get(kind)
    if expected is None:
        return f"{path} is {_short(value)}: {item['msg'].lower()}."
    return f"{path} is {_short(value)}; {expected.format(**context)}."


def _unknown(path: str, model: type[BaseModel], location: tuple) -> str:
    parent, _, name = path.rpartition(".")
    others = [_tag(option) for option in models_at(model, parent) if name in option.model_fields]
    if others:
        kind = next((step for step in location if isinstance(step, str) and step not in path.split(".")), "this kind")
        return f"{path} has no effect on {kind}; it belongs to {' and '.join(others)}. Remove it, or change {parent}.kind."
    known = sorted({field for option in models_at(model, parent) for field in option.model_fields})
    near = difflib.get_close_matches(name, known, 1, 0.6)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{path} is not a setting.{hint} Known {'in ' + parent if parent else 'here'}: {', '.join(known)}."


def models_at(model: type[BaseModel], path: str) -> list[type[BaseModel]]:
    """The models a dotted path leads to (several where a union stands there)."""
    current = [model]
    for step in path.split(".") if path else []:
        if not step.isdigit():
            current = [inner for option in current if step in option.model_fields for inner in models_in(option.model_fields[step].annotation)]
    return current


def models_in(annotation) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation: itself, the members of a union, or the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, list) or type(annotation).__name__ in ("UnionType", "_AnnotatedAlias"):
        return [model for inner in get_args(annotation) for model in models_in(inner)]
    return []


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return kind.default if kind is not None else None


def _short(value) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
