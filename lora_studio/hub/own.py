"""A private repository of one's own: found, made, looked at and committed to, and refused as soon as others could see it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub import errors as hub

from lora_studio.errors import HostError, HubError
from lora_studio.hub import client, names, push
from lora_studio.hub.client import Talk
from lora_studio.hub.extras import Aim
from lora_studio.hub.remote import Remote, look, same
from lora_studio.hub.scan import item_of

LATER = "Nothing here is lost."
ROUNDS = 3
NO_ROOM, ROOM = (402, 403, 413, 507), re.compile(r"storage|quota|limit|exceed|space|full", re.IGNORECASE)
MESSAGE = "Keep from LoRA Studio"


def open_own(name: str, token: str, *, make: bool) -> tuple[Talk, Remote]:
    """The repository `name` of whoever the token belongs to, with what is in it; it is made, private, where it is not there and `make` says
    so. Raises HubError, and HostError where it is another's, public, or not there."""
    account = client.who(token, outcome=LATER)
    id = names.check_id(name, owner=account.name)
    if id.split("/")[0].lower() != account.name.lower():
        raise HostError("keep.foreign", id=id, name=account.name)
    talk = Talk(id, token, LATER)
    remote = find(talk)
    if remote is None and make:
        if not account.writes:
            raise HostError("keep.read_token", name=account.name)
        talk.do("making the repository", lambda: _make(talk))
        remote = find(talk)
    if remote is None:
        raise HostError("keep.gone", id=id)
    return talk, _private(talk, remote)


def address(id: str) -> str:
    """Where a repository is looked at."""
    return f"{constants.ENDPOINT}/{id}"


def _make(talk: Talk) -> None:
    """Make it. When the name is taken meanwhile, with the answer to an earlier attempt lost, that is us."""
    try:
        talk.api.create_repo(talk.id, private=True)
    except hub.HfHubHTTPError as error:
        if client.status_of(error) != 409:
            raise


def find(talk: Talk) -> Remote | None:
    """What is in it now; None when it is not there. Raises HubError."""
    return push.find(talk, Aim(), "looking for the repository")


def seen(talk: Talk) -> Remote:
    """What is in it now. Raises HubError, and HostError where it is gone or public."""
    remote = find(talk)
    if remote is None:
        raise HostError("keep.gone", id=talk.id)
    return _private(talk, remote)


def _private(talk: Talk, remote: Remote) -> Remote:
    if not remote.private:
        raise HostError("keep.public", id=talk.id)
    return remote


def commit(talk: Talk, before: Remote, files: Mapping[str, Path | bytes], gone: Iterable[str], *, proof: str) -> Remote:
    """Send files and commit them, with files that go, in one step on top of `before`. `proof` is the one of them by which the commit is known
    again when its answer was lost. Returns what is there then. Raises HubError and HostError; then it is all there, or nothing of it counts."""
    mark = item_of(proof, files[proof], None)
    there = sorted(set(gone) & set(before.files))
    for attempt in range(ROUNDS):
        additions = [CommitOperationAdd(path, source) for path, source in files.items()]
        _step(talk, "sending files", lambda additions=additions: talk.api.preupload_lfs_files(talk.id, additions))
        deletions, failure, again = [CommitOperationDelete(path) for path in there], None, False
        try:
            talk.api.create_commit(talk.id, [*additions, *deletions], commit_message=MESSAGE, parent_commit=before.commit)
        except client.FAILURES as error:
            cause = client.root(error)
            failure, again = _refusal(talk, cause, "committing"), client.passing(cause)
            client.pause(cause if again else None)
        # Whatever was answered: the answer may be lost and the commit be there all the same.
        try:
            now = talk.do("looking whether the commit arrived", lambda: look(talk))
        except HubError as error:
            raise HostError("keep.unknown", id=talk.id, reason=str(failure or error)) from None
        if same(mark, now.files.get(proof)):
            missing = [path for path, source in files.items() if path not in now.files or now.files[path].size != _size(source)]
            if missing:
                raise HostError("keep.not_whole", id=talk.id, files=", ".join(missing[:3]))
            return _private(talk, now)
        if now.commit != before.commit or failure is None:
            raise HostError("keep.moved", id=talk.id)
        if not again or attempt == ROUNDS - 1:
            raise failure
    raise AssertionError("the last attempt raises")


def free(talk: Talk, gone: set[str]) -> int:
    """Delete for good the large files of these sha256 that no commit needs any more, with the history that names them; else they count
    against the account's room for ever. Returns how many there were. Raises HubError."""
    there = talk.do("asking what takes room", lambda: list(talk.api.list_lfs_files(talk.id)))
    found = [one for one in there if one.file_oid in gone]
    if found:
        talk.do("freeing room", lambda: talk.api.permanently_delete_lfs_files(talk.id, found))
    return len(found)


def _step(talk: Talk, doing: str, action) -> None:
    try:
        talk.do(doing, action, allow=(hub.HfHubHTTPError,))
    except hub.HfHubHTTPError as error:
        raise _refusal(talk, error, doing) from None


def _refusal(talk: Talk, error: BaseException, doing: str) -> HubError | HostError:
    """What a failure comes to: an account without room has a sentence of its own."""
    if client.status_of(error) in NO_ROOM and ROOM.search(reason := talk.reason(error)):
        return HostError("keep.full", id=talk.id, reason=reason)
    return talk.sentence(error, doing)


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size
