"""What may come with a publication: a folder of its own, gating, a tag, a pull request, a collection. Each is looked at before it is
asked for, and looked at again afterwards, so that a lost answer makes nothing twice."""

import re
from dataclasses import dataclass, replace

from huggingface_hub import Collection, constants
from huggingface_hub import errors as hub

from lora_studio.errors import HubError
from lora_studio.hub import client
from lora_studio.hub.client import Talk
from lora_studio.hub.remote import Remote, look
from lora_studio.hub.scan import Item

GATES = {"auto": "auto", "manual": "manual", "none": False}
NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,78}\w)?", re.ASCII)
SLUG = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{16,24}", re.ASCII)
LONGEST_TITLE = 59
UNTAGGED = "The files are published, but the tag is not set; publishing again sets it."
UNCOLLECTED = "The files are published, but not in the collection yet; publishing again puts them there."


@dataclass(frozen=True, kw_only=True)
class Extras:
    """`tag` names this version; `pull_request` asks whoever owns the repository to take the files, instead of pushing; `gated` says who
    may have them (auto: who accepts the terms, manual: who is let in, none: everybody; "": as it is); `collection` is a slug, or a title of
    one of the owner's; `folder` is the subfolder where an adapter lives beside others."""

    tag: str = ""
    pull_request: bool = False
    gated: str = ""
    collection: str = ""
    folder: str = ""

    def check(self) -> None:
        """Raise HubError for a name that cannot be, and for what a pull request has no say in."""
        for key, name in (("hub.tag_name", self.tag), ("hub.folder_name", self.folder)):
            if name and (not NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith(".lock")):
                raise HubError(key, name=repr(name[:80]))
        if self.gated and self.gated not in GATES:
            raise HubError("hub.gate_name", name=repr(self.gated[:40]), known=", ".join(GATES))
        if not SLUG.fullmatch(self.collection) and (
            len(self.collection) > LONGEST_TITLE or any(ord(letter) < 32 for letter in self.collection)
        ):
            raise HubError("hub.collection_name", name=repr(self.collection[:80]), longest=LONGEST_TITLE)
        idle = [name for name in ("tag", "gated", "collection") if getattr(self, name)]
        if self.pull_request and idle:
            raise HubError("hub.request_only", what=" and ".join(idle))


# ---- where the commits go


@dataclass
class Aim:
    """Where the commits of a publication go: to main, or to a pull request. `title` is the pull request's, by which it and its `author`
    are found again; `number` is known once it is there."""

    title: str = ""
    author: str = ""
    number: int | None = None

    @property
    def opens(self) -> bool:
        """Whether the next commit opens the pull request."""
        return bool(self.title) and self.number is None

    @property
    def revision(self) -> str | None:
        """The branch to commit to; None is main."""
        return f"refs/pr/{self.number}" if self.number else None

    def look(self, talk: Talk) -> Remote:
        """What is there now. An open pull request of the same author and title is the one to add to."""
        if self.opens:
            found = talk.api.get_repo_discussions(talk.id, author=self.author, discussion_type="pull_request")
            ours = (
                one
                for one in found
                if one.is_pull_request and one.status in ("open", "draft") and one.title == self.title and one.author == self.author
            )
            self.number = min((one.num for one in ours), default=None)
        return look(talk, self.revision)

    def address(self, id: str) -> str:
        """The page of the pull request, once there is one."""
        return f"{constants.ENDPOINT}/{id}/discussions/{self.number}" if self.number else ""


# ---- who may have it


def gate(talk: Talk, remote: Remote, wish: str) -> None:
    """Say who may have the files, before any is there. Raises HubError when it is not so afterwards."""
    if not wish or remote.gated == wish:
        return
    talk.do("setting who may have it", lambda: talk.api.update_repo_settings(talk.id, gated=GATES[wish]))
    found = talk.do("looking at who may have it", lambda: look(talk)).gated
    if found != wish:
        raise HubError("hub.not_gated", id=talk.id, wish=wish, found=found)


# ---- tags


def tagged(talk: Talk, tag: str) -> Remote | None:
    """What a tag stands for; None where there is no such tag."""
    refs = talk.do("looking at the tags", lambda: talk.api.list_repo_refs(talk.id)).tags
    commit = next((one.target_commit for one in refs if one.name == tag), None)
    return talk.do("looking at what is tagged", lambda: look(talk, commit)) if commit else None


def check_tag(talk: Talk, tag: str, items: list[Item]) -> None:
    """Raise HubError when the tag is there for other files than these."""
    there = tagged(talk, tag)
    if there is not None and there.missing(items):
        raise HubError("hub.tag", id=talk.id, tag=tag, suggestion=_next(tag))


def put_tag(talk: Talk, tag: str, commit: str, items: list[Item]) -> None:
    """Set the tag at a commit; one that is there for the same files stays. Raises HubError."""
    talk.outcome = UNTAGGED
    there = tagged(talk, tag)
    if there is None:
        talk.do("setting the tag", lambda: talk.api.create_tag(talk.id, tag=tag, revision=commit, exist_ok=True))
        there = tagged(talk, tag)
    if there is None or there.missing(items):
        raise HubError("hub.tag_moved", id=talk.id, tag=tag, suggestion=_next(tag))


def _next(tag: str) -> str:
    """The name of the version after this one."""
    number = re.search(r"\d+$", tag)
    return tag[: number.start()] + str(int(number.group()) + 1) if number else f"{tag}-2"


# ---- collections


def check_collection(talk: Talk, wish: str) -> None:
    """Raise HubError when a collection that is named by its slug is not there."""
    if SLUG.fullmatch(wish):
        _collection(talk, wish)


def _collection(talk: Talk, slug: str) -> Collection:
    about = replace(talk, id=slug)
    try:
        return about.do("looking at the collection", lambda: talk.api.get_collection(slug), allow=(hub.HfHubHTTPError,))
    except hub.HfHubHTTPError as error:
        if client.status_of(error) != 404:
            raise about.sentence(error, "looking at the collection") from None
        raise HubError("hub.no_collection", slug=slug, outcome=talk.outcome) from None


def collect(talk: Talk, wish: str, *, private: bool) -> str:
    """Put the repository into a collection: one by its slug, or the one of the repository's owner with this title, which is made where it is
    not there. Returns its address. Raises HubError."""
    talk.outcome, owner = UNCOLLECTED, talk.id.split("/")[0]

    def found_or_made() -> str:
        there = next((one.slug for one in talk.api.list_collections(owner=owner) if one.title.strip().lower() == wish.lower()), None)
        return there or talk.api.create_collection(wish, namespace=owner, private=private, exists_ok=True).slug

    slug = wish if SLUG.fullmatch(wish) else talk.do("looking for the collection", found_or_made)
    if not _holds(_collection(talk, slug), talk.id):
        replace(talk, id=slug).do("adding to the collection", lambda: talk.api.add_collection_item(slug, talk.id, "model", exists_ok=True))
        if not _holds(_collection(talk, slug), talk.id):
            raise HubError("hub.not_collected", id=talk.id, slug=slug)
    return f"{constants.ENDPOINT}/collections/{slug}"


def _holds(collection: Collection, id: str) -> bool:
    return any(item.item_type == "model" and item.item_id == id for item in collection.items)
