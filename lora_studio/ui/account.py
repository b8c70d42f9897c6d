"""Who is signed in, how much of their room is used, and what lasts: one line below the studio's name, where people sign in at all."""

import gradio as gr

from lora_studio import fence
from lora_studio.hosting import Hosting
from lora_studio.ui import theme
from lora_studio.ui.seat import PERSON, Seated, asking

LINE = """{{#if value.name}}<p class="account"><b>{{value.name}}</b>{{#if value.room}}<span>{{value.room}}</span>{{/if}}<span>{{value.lasts}}</span><a href="/logout">Sign out</a>
{{#if value.space}}<a href="https://huggingface.co/spaces/{{value.space}}?duplicate=true" target="_blank" rel="noreferrer noopener">Duplicate this Space</a>{{/if}}</p>{{/if}}"""
LINE_CSS = """
.account{display:flex;flex-wrap:wrap;gap:4px 14px;margin:0;font-size:13px;color:var(--body-text-color-subdued);overflow-wrap:anywhere}
.account b{color:var(--body-text-color)}.account a{color:var(--color-accent)}
"""
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


class Account(Seated):
    """The line, which is empty where nobody signs in."""

    def __init__(self, seats, hosting: Hosting):
        self.workspace, self.hosting = seats, hosting

    def build(self, pages: gr.Blocks) -> None:
        """Put it on the page."""
        self.line = theme.Shown({}, html_template=LINE, css_template=LINE_CSS, elem_classes="flush", elem_id="whoami", visible=not self.hosting.is_open)
        if not self.hosting.is_open:
            pages.load(self.words, None, self.line, **QUIET)

    def words(self) -> dict:
        """What it says to who asks."""
        person, workspace = asking().get(PERSON), self.workspace
        if person is None:
            return {}
        room = f"{fence.used(workspace.root) / fence.GB:.2f} of {workspace.limits.disk / fence.GB:g} GB used" if workspace.limits else ""
        return {"name": person.name, "room": room, "lasts": self.hosting.lasts, "space": self.hosting.space}


def lacks(*wanted: str) -> str:
    """The scope that the sign-in of who asks was not given, when it has none of those that would do: the first, by name. Empty where all is
    well, and where no scopes are known."""
    person = asking().get(PERSON)
    return wanted[0] if person is not None and person.scopes and not set(wanted) & set(person.scopes) else ""
