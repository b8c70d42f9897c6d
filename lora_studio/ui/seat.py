"""Whose workspace it is: the one of whoever is being served, found anew for every request, and nobody's between requests."""

from pathlib import Path

from gradio import Request
from gradio.context import LocalContext

from lora_studio.home import home
from lora_studio.workspace import Workspace

PERSON, WORKSPACE = "studio.person", "studio.workspace"  # what the door writes into a request's scope


class Seats:
    """The workspace of who asks. With one person's studio it is always the same; else it stands in the scope of the request that is being
    served, and where there is none it is an empty one in which nothing can be found."""

    def __init__(self, only: Workspace | None = None):
        self.only = only

    def __call__(self) -> Workspace:
        if self.only is not None:
            return self.only
        return asking().get(WORKSPACE) or nobody()


def nobody() -> Workspace:
    """A workspace without a folder: pages are built over it before anybody is there."""
    return Workspace(Path(home()) / "nobody", "nobody")


def asking() -> dict:
    """The ASGI scope of the request that is being served; empty where there is none."""
    request = LocalContext.request.get(None)
    if isinstance(request, Request):
        request = request.request  # Gradio's own stands around Starlette's, and turns what it is asked for into copies
    return getattr(request, "scope", None) or {}


def token_of(typed: str | None) -> str | None:
    """The token to speak to the Hub with: the typed one, else that of the sign-in. None, which means the machine's own login, is for who
    owns the studio; a visitor without one is nobody there ("")."""
    scope = asking()
    person, workspace = scope.get(PERSON), scope.get(WORKSPACE)
    if typed and typed.strip():
        return typed.strip()
    if person is not None and person.token:
        return person.token
    return "" if workspace is not None and workspace.limits is not None else None


class Seated:
    """A page (or a part of one) in which `self.workspace` is that of whoever asks. It is made with a workspace, or with Seats."""

    @property
    def workspace(self) -> Workspace:
        """The workspace of who asks."""
        return self._seats() if callable(self._seats) else self._seats

    @workspace.setter
    def workspace(self, seats) -> None:
        self._seats = seats
