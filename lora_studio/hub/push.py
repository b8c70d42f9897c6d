"""Publish a folder to the Hub: look, send only what is missing, commit, look again, and only then say "published"."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, RepoFile, constants
from huggingface_hub import errors as hub
from huggingface_hub.utils import get_session, hf_raise_for_status

from lora_studio.errors import HubError
from lora_studio.hub import client, names
from lora_studio.hub.client import Account, Talk
from lora_studio.hub.scan import Item, plan, scan, stamp

ROUNDS = 3
NOTHING = "Nothing was published."
AGAIN = "It is not published yet; what the Hub has already is not sent again."
UNREAD = "The Hub took it, but it could not be checked; publishing again checks it and sends only what is missing."


@dataclass(frozen=True)
class Published:
    """What stands on the Hub, read back from it: the page, the commit, whether it is private, and what had to be sent."""

    url: str
    commit: str
    private: bool
    sent: tuple[str, ...] = ()
    sent_bytes: int = 0


@dataclass(frozen=True)
class Remote:
    """A repository as the Hub lists it."""

    commit: str
    private: bool
    files: Mapping[str, RepoFile]

    def missing(self, items: list[Item]) -> list[Item]:
        """The files that are not there with the same bytes."""
        return [item for item in items if not same(item, self.files.get(item.path))]


def same(item: Item, there: RepoFile | None) -> bool:
    """Whether the Hub's file has the size and the hash of ours."""
    if there is None or there.size != item.size:
        return False
    return there.lfs.sha256 == item.sha256 if there.lfs else there.blob_id == item.blob


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    files: Mapping[str, bytes | str] | None = None,
    message: str = "Publish from LoRA Studio",
    report: Callable[[str], None] | None = None,
) -> Published:
    """Make the repository hold every file of `folder`, with `files` (README.md, pictures) laid over it.

    A new repository is private unless `private` is False. An existing one keeps its visibility: asked for private, a
    public one is refused. `report` is told each step. Files that are there and not here are left alone.
    Raises HubError; then nothing is published, or what is there is whole, and a second call sends only the rest.
    """
    if "/" in str(repo_id):
        names.check_id(repo_id)
    token = client.token_of(token)
    items = plan(folder, files, token=token)
    found = scan(items)
    if found:
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise HubError("hub.scan", findings="; ".join(found[:5]) + more)
    if report:
        report("signing in")
    account = client.who(token, outcome=NOTHING)
    id = names.check_id(repo_id, owner=account.name)
    _check_owner(id, account)
    talk = Talk(id, token, NOTHING, report)
    _check_card(talk, items)
    start = _open(talk, private)
    commit, sent = _send(talk, start, items, message)
    talk.outcome = UNREAD
    remote = talk.do("reading the repository back", lambda: _look(talk, commit))
    missing = remote.missing(items)
    if missing:
        raise HubError("hub.not_whole", id=id, files=", ".join(item.path for item in missing[:5]))
    url = f"{constants.ENDPOINT}/{id}"
    return Published(url, remote.commit, remote.private, tuple(item.path for item in sent), sum(item.size for item in sent))


def _check_owner(id: str, account: Account) -> None:
    owner, name = id.split("/")
    known = [account.name, *account.organizations]
    if owner.lower() not in [one.lower() for one in known]:
        raise HubError("hub.namespace", owner=owner, known=", ".join(known[:8]), suggestion=f"{account.name}/{name}")
    if not account.writes:
        raise HubError("hub.read_token", name=account.name)


def _check_card(talk: Talk, items: list[Item]) -> None:
    """Let the Hub check README.md before there is a repository."""
    card = next((item for item in items if item.path == "README.md"), None)
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


def _look(talk: Talk, revision: str | None = None) -> Remote:
    """What the Hub lists at a revision: always the files of one commit."""
    info = talk.api.model_info(talk.id, revision=revision)
    tree = talk.api.list_repo_tree(talk.id, recursive=True, revision=info.sha)
    return Remote(info.sha, bool(info.private), {entry.path: entry for entry in tree if isinstance(entry, RepoFile)})


def _open(talk: Talk, private: bool | None) -> Remote:
    """The repository, made if it is not there; refused when it is someone else's, or public where private was asked for."""
    remote = _find(talk, "looking for the repository")
    if remote is None:
        taken = talk.do("making the repository", lambda: _create(talk, private))
        remote = _find(talk, "looking at the new repository")
        if remote is None and taken:
            raise HubError("hub.foreign", id=talk.id, reason=talk.clean(taken))
        if remote is None:
            raise HubError("hub.missing", id=talk.id)
    else:
        _check_rights(talk)
    if private and not remote.private:
        raise HubError("hub.public", id=talk.id, suggestion=names.suggest(f"{talk.id}-private"))
    return remote


def _find(talk: Talk, doing: str) -> Remote | None:
    try:
        return talk.do(doing, lambda: _look(talk), allow=(hub.RepositoryNotFoundError,))
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


def _send(talk: Talk, remote: Remote, items: list[Item], message: str) -> tuple[str, list[Item]]:
    """Upload and commit what is missing. Returns the commit that holds it all, and what was sent."""
    sent: dict[str, Item] = {}
    failure, again = None, True
    for _ in range(ROUNDS):
        missing = remote.missing(items)
        if not missing:
            return remote.commit, list(sent.values())
        if not again:
            raise failure
        additions = [_addition(item) for item in missing]
        size = sum(item.size for item in missing)
        talk.outcome = AGAIN
        talk.do("uploading", partial(talk.api.preupload_lfs_files, talk.id, additions), more=f" {_count(missing)}, {size / 1e6:.1f} MB")
        sent.update({item.path: item for item in missing})
        _check_unchanged(missing)
        try:
            return _commit(talk, additions, message, remote.commit), list(sent.values())
        except client.FAILURES as error:
            cause = client.root(error)
            moved = client.status_of(cause) in (409, 412)
            failure = HubError("hub.moved", id=talk.id) if moved else talk.sentence(cause, "committing")
            again = moved or client.passing(cause)
        # The answer may be lost and the commit be there all the same, so look before saying anything.
        client.pause(cause if again else None)
        try:
            remote = talk.do("looking whether the commit arrived", lambda: _look(talk))
        except HubError:
            raise HubError("hub.unknown", id=talk.id, reason=str(failure)) from None
    if remote.missing(items):
        raise failure
    return remote.commit, list(sent.values())


def _check_unchanged(items: list[Item]) -> None:
    """A file that was written to meanwhile may have gone out half old, half new."""
    for item in items:
        if isinstance(item.source, Path) and item.stamp != stamp(item.source):
            raise HubError("hub.file", path=item.path, reason="it changed while it was published", outcome=AGAIN)


def _commit(talk: Talk, additions: list[CommitOperationAdd], message: str, parent: str) -> str:
    if talk.report:
        talk.report("committing")
    return talk.api.create_commit(talk.id, additions, commit_message=message, parent_commit=parent).oid


def _addition(item: Item) -> CommitOperationAdd:
    addition = CommitOperationAdd(item.path, item.source)
    addition.upload_info.sha256 = bytes.fromhex(item.sha256)  # known already: no second reading of a large file
    return addition


def _count(items: list) -> str:
    return "1 file" if len(items) == 1 else f"{len(items)} files"

