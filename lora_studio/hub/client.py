"""huggingface_hub within limits: a time limit on every request, retries that are counted, and a sentence for every failure.

The client by itself waits for ever on a silent Hub, sleeps as long as a Retry-After says, and repeats some requests six
times and others never. All of its requests go through one httpx2 client, so that client is where the limits are
(`set_client_factory`): it fills in time limits, and turns silence, a broken connection, 429 and 5xx into `Interrupted`,
which huggingface_hub does not retry; `Talk.do` then retries, the same few times for every step. No watchdog process is
needed, and nothing is left to kill. The PUT of a file's bytes is still retried by huggingface_hub, part by part, and Xet
(hf_xet, where the Hub offers it) does not go through this client: it has limits of its own and gives up after two minutes.
"""

import errno
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2
import huggingface_hub
from huggingface_hub import errors, set_client_factory
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._http import default_client_factory

from lora_studio.errors import HubError

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 60.0
WAITS = (1.0, 4.0)
LONGEST_WAIT = 60
CLIENT_WAIT = 10  # a longer Retry-After is not left to huggingface_hub, which would sleep through it without a word
PASSING = {408, 429, 500, 502, 503, 504}
# What huggingface_hub is known to raise: HTTP, files, RuntimeError around uploads, and whatever parsing a proxy's page gives.
FAILURES = (httpx2.HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)


class Interrupted(httpx2.HTTPError):
    """A request that may succeed later: `status` is what the Hub said (None: nothing), `wait` what it asks to wait;
    `silent` means that it said nothing for too long."""

    def __init__(self, message: str, *, status: int | None = None, wait: int | None = None, silent: bool = False):
        super().__init__(message)
        self.status, self.wait, self.silent = status, wait, silent


class Client(httpx2.Client):
    """The HTTP client of huggingface_hub, with time limits that no call can switch off."""

    def send(self, request: httpx2.Request, **options) -> httpx2.Response:
        """Send within the limits. Raises Interrupted for silence, a broken connection, 429 and 5xx."""
        limits = {"connect": CONNECT_SECONDS, "read": SILENT_SECONDS, "write": SILENT_SECONDS, "pool": SILENT_SECONDS}
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {name: min(given.get(name) or limit, limit) for name, limit in limits.items()}
        try:
            response = super().send(request, **options)
        except httpx2.TimeoutException as error:
            seconds = request.extensions["timeout"]["connect" if isinstance(error, httpx2.ConnectTimeout) else "read"]
            raise Interrupted(f"no answer within {seconds:g} seconds", silent=True) from None
        except httpx2.TransportError as error:
            if request.method == "PUT":
                raise
            raise Interrupted(str(error) or type(error).__name__) from None
        wait = _wait(response.headers) if response.status_code in PASSING else None
        conflict = response.status_code == 409 and request.url.path.endswith("/api/repos/create") and b"in progress" in response.read()
        passing = response.status_code in PASSING and request.method != "PUT"
        if conflict or passing or (wait or 0) > CLIENT_WAIT:
            response.close()
            raise Interrupted(f"the Hub answered {response.status_code}", status=response.status_code, wait=wait)
        return response


def _wait(headers) -> int | None:
    """The seconds the Hub asks to wait."""
    limited = re.search(r"r=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))
    text = limited.group(1) if limited else headers.get("retry-after", "").strip()
    return int(text) if text.isdigit() else None


def limit() -> None:
    """Put the limits on huggingface_hub in this process; done once, when this file is imported."""
    hook = default_client_factory().event_hooks["request"]
    set_client_factory(lambda: Client(event_hooks={"request": hook}, follow_redirects=True, timeout=None))
    disable_progress_bars()


limit()


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, the organizations it may see, and whether it may write."""

    name: str
    organizations: tuple[str, ...] = ()
    role: str = ""

    @property
    def writes(self) -> bool:
        """Whether the token may write at all. What a fine-grained one may write is known only to the Hub."""
        return self.role != "read"


@dataclass
class Talk:
    """A conversation with the Hub about one repository. `outcome` ends every sentence: what is left after a failure."""

    id: str
    token: str | None = field(repr=False)
    outcome: str
    report: Callable[[str], None] | None = field(default=None, repr=False)

    @property
    def api(self) -> huggingface_hub.HfApi:
        """The client, speaking for this token (or for nobody)."""
        return huggingface_hub.HfApi(token=self.token or False)

    def do(self, doing: str, action: Callable, *, allow: tuple = (), more: str = ""):
        """The result of `action`, tried a few times. Raises HubError, or one of `allow` as it is."""
        if self.report:
            self.report(doing + more)
        for wait in (*WAITS, None):
            try:
                return action()
            except FAILURES as error:
                cause = root(error)
                if isinstance(cause, allow):
                    raise cause from None
                # A RuntimeError around an HTTP error comes from a PUT that was tried six times already.
                tired = isinstance(error, RuntimeError) and not isinstance(cause, Interrupted)
                if wait is None or tired or not passing(cause):
                    raise self.sentence(cause, doing) from None
                pause(cause, wait)

    def sentence(self, error: BaseException, doing: str) -> HubError:
        """What went wrong, for the user."""
        status, outcome = status_of(error), self.outcome
        if isinstance(error, errors.OfflineModeIsEnabled):
            return HubError("hub.offline", outcome=outcome)
        if isinstance(error, Interrupted) and (error.wait or 0) > LONGEST_WAIT:
            return HubError("hub.wait", wait=_duration(error.wait), doing=doing, outcome=outcome)
        if isinstance(error, Interrupted) and error.silent:
            return HubError("hub.silent", doing=doing, reason=self.clean(error), outcome=outcome)
        if status is not None and (status in PASSING or isinstance(error, Interrupted)):
            return HubError("hub.down", status=status, doing=doing, outcome=outcome)
        if isinstance(error, errors.GatedRepoError):
            return HubError("hub.gated", id=self.id, address=f"{huggingface_hub.constants.ENDPOINT}/{self.id}")
        if isinstance(error, errors.RevisionNotFoundError):
            return HubError("hub.no_revision", id=self.id)
        if (
            status in (401, 403) and error.response.request.method == "PUT" and "/api/" not in error.response.request.url.path
        ):  # the storage, which is never shown the token
            return HubError("hub.refused", status=status, doing=doing, id=self.id, reason=self.reason(error), outcome=outcome)
        if status == 401 and (self.token or not isinstance(error, errors.RepositoryNotFoundError)):
            return HubError("hub.bad_token", doing=doing, outcome=outcome)
        if status in (401, 404) and isinstance(error, errors.RepositoryNotFoundError):
            return HubError("hub.missing", id=self.id)
        if status == 403:
            return HubError("hub.denied", doing=doing, id=self.id, reason=self.reason(error), outcome=outcome)
        if status is not None:
            return HubError("hub.refused", status=status, doing=doing, id=self.id, reason=self.reason(error), outcome=outcome)
        if isinstance(error, httpx2.HTTPError):
            return HubError("hub.cut", doing=doing, reason=self.clean(error) or type(error).__name__, outcome=outcome)
        if isinstance(error, OSError) and error.errno is not None:
            return HubError("hub.file", path=error.filename or self.id, reason=error.strerror or type(error).__name__, outcome=outcome)
        if isinstance(error, (ConnectionError, RuntimeError)):
            return HubError("hub.cut", doing=doing, reason=self.clean(error) or type(error).__name__, outcome=outcome)
        return HubError("hub.proxy", doing=doing, outcome=outcome)

    def reason(self, error: BaseException) -> str:
        """What the Hub itself said, on one line."""
        said = getattr(error, "server_message", None) or (str(error).splitlines() or [""])[0]
        return self.clean(said).rstrip(".") or "no reason was given"

    def clean(self, text) -> str:
        """A text from outside, on one short line and without tokens, for an error."""
        line = " ".join(str(text).split())
        if self.token:
            line = line.replace(self.token, "hf_...")
        return re.sub(r"hf_[A-Za-z0-9_]{8,}", "hf_...", line)[:200]


def root(error: BaseException) -> BaseException:
    """The HTTP error inside what huggingface_hub wrapped around it; the error itself when there is none."""
    seen, inner = set(), error
    while inner is not None and id(inner) not in seen:
        if isinstance(inner, httpx2.HTTPError) and (isinstance(inner, Interrupted) or status_of(inner) or not isinstance(inner, OSError)):
            return inner
        seen.add(id(inner))
        inner = inner.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error."""
    response = getattr(error, "response", None) if isinstance(error, errors.HfHubHTTPError) else None
    return response.status_code if response is not None else getattr(error, "status", None)


def passing(error: BaseException) -> bool:
    """Whether trying again soon may help."""
    if isinstance(error, Interrupted):
        return (error.wait or 0) <= LONGEST_WAIT
    return isinstance(error, httpx2.HTTPError) and (status_of(error) is None or status_of(error) in PASSING)


def pause(error: BaseException | None, seconds: float | None = None) -> None:
    """Wait before the next attempt: as long as the Hub asks, within the limit."""
    time.sleep(min(LONGEST_WAIT, max(seconds or WAITS[0], getattr(error, "wait", None) or 0)))


def full(error: BaseException) -> bool:
    """Whether the disk is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _duration(seconds: int) -> str:
    return f"{seconds} seconds" if seconds < 120 else f"about {round(seconds / 60)} minutes"


def token_of(token: str | None) -> str:
    """The token given, or the one of the Hub's own login where None is given ("" is nobody's). Raises HubError when there is none."""
    found = huggingface_hub.get_token() if token is None else token
    if not found:
        raise HubError("hub.no_token")
    return found


def who(token: str | None = None, *, outcome: str = "Nothing was sent.") -> Account:
    """Whose token this is (the Hub's own login when None). Raises HubError."""
    talk = Talk("your account", token_of(token), outcome)
    return talk.do("asking who you are", lambda: _account(talk.api.whoami()))


def _account(answer: dict) -> Account:
    access = (answer.get("auth") or {}).get("accessToken") or {}
    return Account(str(answer["name"]), tuple(str(row["name"]) for row in answer.get("orgs") or ()), str(access.get("role", "")))
