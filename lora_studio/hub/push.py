"""Publish a folder to the Hub: look, send only what is missing, commit, look again, and only then say "published"."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub import errors as hub
from huggingface_hub.utils import get_session, hf_raise_for_status

from lora_studio.errors import HubError
from lora_studio.hub import client, extras, names
from lora_studio.hub.client import Account, Talk
from lora_studio.hub.extras import Aim, Extras
from lora_studio.hub.pull import fetch
from lora_studio.hub.remote import Remote, look
from lora_studio.hub.scan import Item, item_of, plan, scan, stamp

CARD = "README.md"
MESSAGE = "Publish from LoRA Studio"
LARGEST_LIST = 1 << 20
ROUNDS = 3
NOTHING = "Nothing was published."
AGAIN = "It is not published yet; what the Hub has already is not sent again."
UNREAD = "The Hub took it, but it could not be checked; publishing again checks it and sends only what is missing."


@dataclass(frozen=True)
class Published:
    """What stands on the Hub, read back from it: the page, the commit, whether it is private, what had to be sent, the tag, and the
    addresses of the pull request and the collection."""

    url: str
    commit: str
    private: bool
    sent: tuple[str, ...] = ()
    sent_bytes: int = 0
    tag: str = ""
    pull_request: str = ""
    collection: str = ""


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    files: Mapping[str, bytes | str] | None = None,
    wish: Extras = Extras(),
    listing: Callable[[str], str] | None = None,
    report: Callable[[str], None] | None = None,
) -> Published:
    """Make the repository hold every file of `folder`, with `files` (README.md, pictures) laid over it.

    A new repository is private unless `private` is False. An existing one keeps its visibility: asked for private, a
    public one is refused. `wish` may hold a tag, a subfolder, ...; with a subfolder `listing` makes the repository's own README.md
    from the one that is there. `report` is told each step. Files that are there and not here are left alone.
    Raises HubError; then nothing is published, or what is there is whole, and a second call sends only the rest.
    """
    if "/" in str(repo_id):
        names.check_id(repo_id)
    wish.check()
    token = client.token_of(token)
    items = plan(folder, files, token=token)
    _check_leaks(items)
    if report:
        report("signing in")
    account = client.who(token, outcome=NOTHING)
    id = names.check_id(repo_id, owner=account.name)
    _check_owner(id, account, asks=wish.pull_request)
    talk = Talk(id, token, NOTHING, report)
    _check_card(talk, items)
    extras.check_collection(talk, wish.collection)
    if wish.folder:
        items = [replace(item, path=f"{wish.folder}/{item.path}") for item in items]
    aim = Aim(f"{MESSAGE}: {wish.folder}" if wish.folder else MESSAGE, account.name) if wish.pull_request else Aim()
    start = _open(talk, private, aim)
    _prepare(talk, wish, start, items)
    commit, sent = _send(talk, start, items, aim, listing=listing if wish.folder else None)
    return _finish(talk, wish, aim, commit, items, sent)


def _prepare(talk: Talk, wish: Extras, start: Remote, items: list[Item]) -> None:
    """What can be refused is refused before anything is sent, and who may have it is settled before there is something to have."""
    if wish.tag:
        extras.check_tag(talk, wish.tag, items)
    extras.gate(talk, start, wish.gated)


def _finish(talk: Talk, wish: Extras, aim: Aim, commit: str, items: list[Item], sent: list[Item]) -> Published:
    """Read the repository back, and add what comes with it."""
    talk.outcome = UNREAD
    remote = talk.do("reading the repository back", lambda: look(talk, commit))
    missing = remote.missing(items)
    if missing:
        raise HubError("hub.not_whole", id=talk.id, files=", ".join(item.path for item in missing[:5]))
    if wish.tag:
        extras.put_tag(talk, wish.tag, remote.commit, items)
    collection = extras.collect(talk, wish.collection, private=remote.private) if wish.collection else ""
    sizes = sum(item.size for item in sent)
    url, asked = f"{constants.ENDPOINT}/{talk.id}", aim.address(talk.id)
    return Published(url, remote.commit, remote.private, tuple(item.path for item in sent), sizes, wish.tag, asked, collection)


def _check_leaks(items: list[Item]) -> None:
    found = scan(items)
    if found:
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise HubError("hub.scan", findings="; ".join(found[:5]) + more)


def _check_owner(id: str, account: Account, *, asks: bool) -> None:
    """Whether somebody may publish there at all; who `asks` by a pull request may ask anybody."""
    owner, name = id.split("/")
    known = [account.name, *account.organizations]
    if not asks and owner.lower() not in [one.lower() for one in known]:
        raise HubError("hub.namespace", owner=owner, known=", ".join(known[:8]), suggestion=f"{account.name}/{name}")
    if not account.writes:
        raise HubError("hub.read_token", name=account.name)


def _check_card(talk: Talk, items: list[Item]) -> None:
    """Let the Hub check README.md before there is a repository."""
    card = next((item for item in items if item.path == CARD), None)
    if card is None:
        return
    asked = {"repoType": "model", "content": card.read().decode("utf-8", "replace")}

    def check() -> list[str]:
        answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=asked)
        if answer.status_code != 400:
            hf_raise_for_status(answer)
        return [str(error["message"]) for error in answer.json()["errors"]]

    wrong = talk.do("checking the model card", check)
    if wrong:
        raise HubError("hub.card", reason=talk.clean("; ".join(wrong)).rstrip("."))


def _open(talk: Talk, private: bool | None, aim: Aim) -> Remote:
    """The repository, made if it is not there; refused when it is someone else's, or public where private was asked for. A pull request
    needs one that is there, and no right to write to it."""
    asks = aim.opens
    remote = find(talk, aim, "looking for the repository")
    if remote is None and not asks:
        taken = talk.do("making the repository", lambda: _create(talk, private))
        remote = find(talk, aim, "looking at the new repository")
        if remote is None and taken:
            raise HubError("hub.foreign", id=talk.id, reason=talk.clean(taken))
    elif not asks:
        _check_rights(talk)
    if remote is None:
        raise HubError("hub.missing", id=talk.id)
    if private and not remote.private:
        raise HubError("hub.public", id=talk.id, suggestion=names.suggest(f"{talk.id}-private"))
    return remote


def find(talk: Talk, aim: Aim, doing: str) -> Remote | None:
    """What is in a repository now; None when it is not there. Raises HubError."""
    try:
        return talk.do(doing, lambda: aim.look(talk), allow=(hub.RepositoryNotFoundError,))
    except hub.RepositoryNotFoundError as error:
        # huggingface_hub takes every 401 for a missing repository; only this header tells that it is one.
        if client.status_of(error) == 401 and error.response.headers.get("X-Error-Code") != "RepoNotFound":
            raise talk.sentence(error, doing) from None
        return None


def _check_rights(talk: Talk) -> None:
    doing = "asking whether you may write"
    try:
        talk.do(doing, lambda: talk.api.auth_check(talk.id, write=True), allow=(hub.HfHubHTTPError,))
    except hub.HfHubHTTPError as error:
        if client.status_of(error) == 403:
            raise HubError("hub.foreign", id=talk.id, reason=talk.reason(error)) from None
        raise talk.sentence(error, doing) from None


def _create(talk: Talk, private: bool | None) -> str:
    """Make the repository. When the name is taken, what the Hub says: with the answer to an earlier attempt lost that is us."""
    try:
        talk.api.create_repo(talk.id, private=private is not False)
    except hub.HfHubHTTPError as error:
        if client.status_of(error) != 409:
            raise
        return talk.reason(error)
    return ""


def _send(talk: Talk, remote: Remote, items: list[Item], aim: Aim, *, listing: Callable[[str], str] | None) -> tuple[str, list[Item]]:
    """Upload and commit what is missing. Returns the commit that holds it all, and what was sent."""
    sent: dict[str, Item] = {}
    failure, again = None, True
    for _ in range(ROUNDS):
        missing = remote.missing([*items, *_listed(talk, remote, listing)])
        if not missing:
            return remote.commit, list(sent.values())
        if not again:
            raise failure
        additions = [_addition(item) for item in missing]
        size = sum(item.size for item in missing)
        talk.outcome = AGAIN
        upload = partial(talk.api.preupload_lfs_files, talk.id, additions, revision=aim.revision, create_pr=aim.opens)
        talk.do("uploading", upload, more=f" {_count(missing)}, {size / 1e6:.1f} MB")
        sent.update({item.path: item for item in missing})
        _check_unchanged(missing)
        try:
            return _commit(talk, additions, aim, remote.commit), list(sent.values())
        except client.FAILURES as error:
            cause = client.root(error)
            moved = client.status_of(cause) in (409, 412)
            failure = HubError("hub.moved", id=talk.id) if moved else talk.sentence(cause, "committing")
            again = moved or client.passing(cause)
        # The answer may be lost and the commit be there all the same, so look before saying anything.
        client.pause(cause if again else None)
        try:
            remote = talk.do("looking whether the commit arrived", lambda: aim.look(talk))
        except HubError:
            raise HubError("hub.unknown", id=talk.id, reason=str(failure)) from None
    if remote.missing(items):
        raise failure
    return remote.commit, list(sent.values())


def _listed(talk: Talk, remote: Remote, listing: Callable[[str], str] | None) -> list[Item]:
    """The repository's own README.md where it holds several adapters, made anew from the one that is there: others may have added theirs."""
    if listing is None:
        return []
    there, before = remote.files.get(CARD), ""
    if there is not None:
        if there.size > LARGEST_LIST:
            raise HubError("hub.card", reason=f"{CARD} of {talk.id} is larger than 1 MB")
        with tempfile.TemporaryDirectory() as place:
            fetch(talk, there, remote.commit, Path(place))
            before = (Path(place) / CARD).read_text(encoding="utf-8", errors="replace")
    item = item_of(CARD, listing(before).encode(), talk.token)
    _check_leaks([item])
    if remote.missing([item]):
        _check_card(talk, [item])
    return [item]


def _check_unchanged(items: list[Item]) -> None:
    """A file that was written to meanwhile may have gone out half old, half new."""
    for item in items:
        if isinstance(item.source, Path) and item.stamp != stamp(item.source):
            raise HubError("hub.file", path=item.path, reason="it changed while it was published", outcome=AGAIN)


def _commit(talk: Talk, additions: list[CommitOperationAdd], aim: Aim, parent: str) -> str:
    if talk.report:
        talk.report("committing")
    title = aim.title or MESSAGE
    done = talk.api.create_commit(
        talk.id, additions, commit_message=title, revision=aim.revision, create_pr=aim.opens, parent_commit=parent
    )
    if aim.opens:
        aim.number = done.pr_num
    return done.oid


def _addition(item: Item) -> CommitOperationAdd:
    addition = CommitOperationAdd(item.path, item.source)
    addition.upload_info.sha256 = bytes.fromhex(item.sha256)  # known already: no second reading of a large file
    return addition


def _count(items: list) -> str:
    return "1 file" if len(items) == 1 else f"{len(items)} files"
