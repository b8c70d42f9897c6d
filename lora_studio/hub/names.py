"""What a repository may be called on the Hub, said as rules, with a name that would do."""

import re
import unicodedata

from lora_studio.errors import HubError

LONGEST = 96
# (the name breaks the rule, the rule). The first that is broken is said.
RULES = (
    (lambda id: not id.strip(), "a name is needed"),
    (lambda id: bool(re.match(r"[~/.\\]|[A-Za-z]:|[a-z]+:", id)), "it looks like a path or an address, not like owner/name"),
    (lambda id: any(ord(letter) < 32 for letter in id), "it holds a line break or another control character"),
    (lambda id: id.count("/") > 1, "it has more than one slash; the form is owner/name"),
    (lambda id: bool(re.search(r"[^A-Za-z0-9._/-]", id)), "only the letters A to Z, digits, and - _ . may be used"),
    (lambda id: any(not part for part in id.split("/")), "the owner or the name is empty; the form is owner/name"),
    (lambda id: "--" in id or ".." in id, "-- and .. are not allowed"),
    (lambda id: any(part[0] in "-." or part[-1] in "-." for part in id.split("/")), "it may not begin or end with - or ."),
    (lambda id: id.endswith(".git"), "it may not end with .git"),
    (lambda id: len(id) > LONGEST, f"it is longer than {LONGEST} characters"),
)


def check_id(id: str, *, owner: str | None = None) -> str:
    """The full id `owner/name` of a repository; a bare name gets `owner`. Raises HubError with the rule and a suggestion."""
    text = str(id)
    broken = next((rule for breaks, rule in RULES if breaks(text)), None)
    if broken is None and "/" not in text and owner is None:
        broken = "the owner is missing; the form is owner/name"
    full = text if broken or "/" in text else f"{owner}/{text}"
    if broken is None and len(full) > LONGEST:
        broken = f"with its owner it is longer than {LONGEST} characters"
    if broken:
        raise HubError("hub.id", id=repr(text[:120]), rule=broken, suggestion=suggest(text, owner=owner))
    return full


def suggest(text: str, *, owner: str | None = None) -> str:
    """An allowed id as near to `text` as can be."""
    parts = [_clean(part) for part in re.split(r"[/\\]", text)]
    name = parts[-1] or "my-adapter"
    namespace = owner or (parts[0] if len(parts) == 2 and parts[0] else "your-name")
    return f"{namespace}/{name[: LONGEST - len(namespace) - 1].rstrip('-.')}"


def _clean(part: str) -> str:
    plain = unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", plain)
    plain = re.sub(r"\.{2,}", ".", re.sub(r"-{2,}", "-", plain)).strip("-.")
    while plain.endswith(".git"):
        plain = plain.removesuffix(".git").strip("-.")
    return plain
