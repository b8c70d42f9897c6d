"""The arguments of a request, looked at before they are used."""

from lora_studio.errors import BenchError
from lora_studio.spec import Base


def argument(request: dict, name: str, kind: type):
    """An argument that a request must have. Raises BenchError."""
    if not isinstance(request.get(name), kind):
        raise BenchError("bench.request", reason=f"{request.get('verb')} needs {name}")
    return request[name]


def one_of(name: str, value, known: tuple[str, ...]) -> None:
    """Raise BenchError when a setting is none of those known."""
    if value not in known:
        raise BenchError("bench.setting", name=name, value=repr(value)[:40], rule=f"it must be one of {', '.join(known)}")


def base_of(given) -> Base:
    """A base given as its id, or as {id, revision}."""
    try:
        return Base.model_validate({"id": given} if isinstance(given, str) else given)
    except ValueError:
        raise BenchError("bench.request", reason=f"{str(given)[:60]} does not name a base") from None
