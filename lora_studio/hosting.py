"""How the studio is open, read once from the environment: to the person at this machine, to its owner, or to visitors who sign in."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_studio.errors import HostError
from lora_studio.fence import GB, Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KINDS = ("local", "owner", "visitors")
# (variable, field of Limits, how its number becomes the field's)
LIMITS = (
    ("LORA_STUDIO_DISK_GB", "disk", lambda number: int(number * GB)),
    ("LORA_STUDIO_UPLOAD_GB", "upload", lambda number: int(number * GB)),
    ("LORA_STUDIO_RUNS", "runs", int),
    ("LORA_STUDIO_STEPS", "steps", int),
    ("LORA_STUDIO_ADAPTERS", "adapters", int),
    ("LORA_STUDIO_HOURS", "seconds", lambda number: number * 3600.0),
)
LOCAL_UPLOAD = 4 * GB


@dataclass(frozen=True)
class OAuth:
    """The application that people sign in with: the provider's address, the client's id and secret, and the scopes it asks for."""

    provider: str
    id: str
    secret: str = field(repr=False)
    scopes: str = "openid profile"


@dataclass(frozen=True)
class Hosting:
    """How the studio is open. `kind` is local, owner or visitors; `password` is wanted where people sign in without OAuth; `hosts` are the
    names it may be addressed by (empty: any), `public` those that its pages come from; `space` is the Space's id, `storage` the
    folder that outlives the machine, if there is one."""

    kind: Literal["local", "owner", "visitors"] = "local"
    owners: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    hosts: tuple[str, ...] = LOOPBACK
    public: tuple[str, ...] = ()
    oauth: OAuth | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)
    password_is_made: bool = False
    space: str = ""
    storage: str = ""

    @property
    def lasts(self) -> str:
        """What becomes of files when the machine goes, in a sentence; empty where nothing is to be said."""
        if self.storage or not self.space:
            return ""
        return "Nothing lasting is attached: files go when this Space sleeps or restarts. Publish what you want to keep, or attach a storage bucket at /data and set LORA_STUDIO_STORAGE=/data."

    @property
    def is_open(self) -> bool:
        """Whether nobody has to sign in, because only this machine reaches it."""
        return self.kind == "local" and not self.password


def of(environment: Mapping[str, str], *, host: str) -> Hosting:
    """How a studio with that environment, listening on `host`, is open. Safe by default: on loopback it is the person's at this machine;
    anywhere else somebody has to sign in. Raises HostError for what does not go together."""
    space, said = environment.get("SPACE_ID", ""), environment.get("LORA_STUDIO_OPEN", "").strip().lower()
    kind = said or ("owner" if space else "local")
    if kind not in KINDS:
        raise HostError("host.kind", kind=kind[:40], known=", ".join(KINDS))
    if kind == "local" and space:
        raise HostError("host.local_space", known="owner or visitors")
    oauth = _oauth(environment)
    if kind == "visitors" and oauth is None:
        raise HostError("host.no_oauth")
    owners = _words(environment.get("LORA_STUDIO_OWNERS", "")) or _words(environment.get("SPACE_AUTHOR_NAME", ""))
    if kind == "owner" and oauth and not owners:
        raise HostError("host.no_owner")
    public = _words(environment.get("SPACE_HOST", "")) + _words(environment.get("LORA_STUDIO_HOSTS", ""))
    alone = kind == "local" and host in LOOPBACK and not public
    needs_password = not alone and (oauth is None or kind == "local")
    password = environment.get("LORA_STUDIO_PASSWORD", "")
    if password and len(password) < 8:
        raise HostError("host.short_password")
    return Hosting(
        kind, owners, _limits(environment), () if space else public or (LOOPBACK if host in LOOPBACK else ()), public,
        None if needs_password or kind == "local" else oauth,
        (password or secrets.token_urlsafe(12)) if needs_password or (password and kind == "local") else "",
        needs_password and not password, space, environment.get("LORA_STUDIO_STORAGE", ""),
    )  # fmt: skip


def _oauth(environment: Mapping[str, str]) -> OAuth | None:
    names = ("OPENID_PROVIDER_URL", "OAUTH_CLIENT_ID", "OAUTH_CLIENT_SECRET")
    found = [environment.get(name, "") for name in names]
    return OAuth(found[0].rstrip("/"), found[1], found[2], environment.get("OAUTH_SCOPES") or "openid profile") if all(found) else None


def _limits(environment: Mapping[str, str]) -> Limits:
    values = {}
    for variable, name, read in LIMITS:
        text = environment.get(variable, "").strip()
        if not text:
            continue
        try:
            values[name] = read(float(text))
        except ValueError:
            values[name] = 0
        if not values[name] > 0:
            raise HostError("host.number", variable=variable, text=text[:40])
    lists = {"bases": _words(environment.get("LORA_STUDIO_BASES", "")), "data": _words(environment.get("LORA_STUDIO_DATA", ""))}
    return Limits(**{name: words for name, words in lists.items() if words}, **values)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
