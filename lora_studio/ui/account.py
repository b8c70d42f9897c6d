"""Who is signed in, how much of their room is used, and what lasts: below the studio's name, where people sign in at all. Their work may be
kept in a private repository of theirs, which is offered here.
"""

from collections.abc import Iterator

import gradio as gr

from lora_studio import fence, keeping
from lora_studio.errors import HostError, StudioError
from lora_studio.hosting import Hosting
from lora_studio.jobs import tokens
from lora_studio.ui import theme
from lora_studio.ui.events import QUIET
from lora_studio.ui.pump import Pump
from lora_studio.ui.seat import PERSON, Seated, asking, token_of

LINE = """{{#if value.name}}<p class="account"><b>{{value.name}}</b>{{#if value.room}}<span>{{value.room}}</span>{{/if}}{{#if value.lasts}}<span>{{value.lasts}}</span>{{/if}}<a href="/logout">Sign out</a>
{{#if value.space}}<a href="https://huggingface.co/spaces/{{value.space}}?duplicate=true" target="_blank" rel="noreferrer noopener">Duplicate this Space</a>{{/if}}</p>{{/if}}"""
LINE_CSS = """
.account{display:flex;flex-wrap:wrap;align-items:baseline;gap:4px 14px;margin:0;font-size:13px;color:var(--body-text-color-subdued);overflow-wrap:anywhere}
.account b{color:var(--body-text-color)}.account a{color:var(--color-accent);margin:0;padding:0}
"""
KEPT = """{{#if value.words}}<p class="account" role="status"><span>{{value.words}}</span>{{#if value.url}}<a href="{{value.url}}" target="_blank" rel="noreferrer noopener">See it on the Hub</a>{{/if}}
{{#if value.back}}<a href="/">Show what came back</a>{{/if}}</p>{{#each value.notes}}<p class="account">{{this}}</p>{{/each}}{{/if}}"""
ABOUT = (
    f"Your runs, adapters, albums and rows are sent to **{keeping.NAME}**, a private repository in your account, every few minutes while you are signed in: "
    "only files that are closed, and none in which a password or a key is found. After a restart they come back when you sign in."
)
UNKEPT = "What is made here is not being kept at the moment. Publish what you want to keep, and tell the owner of this studio."


class Account(Seated):
    """The line, and the offer to keep one's work; nothing of it where nobody signs in."""

    def __init__(self, seats, hosting: Hosting, pump: Pump | None = None):
        self.workspace, self.hosting, self.pump = seats, hosting, pump

    def build(self, pages: gr.Blocks) -> None:
        """Put it on the page."""
        is_seen = not self.hosting.is_open
        self.line = theme.Shown({}, html_template=LINE, css_template=LINE_CSS, elem_classes="flush", elem_id="whoami", visible=is_seen)
        if not is_seen:
            return
        self.kept = theme.Shown({}, html_template=KEPT, css_template=LINE_CSS, elem_classes="flush", elem_id="kept")
        with gr.Accordion("Keep my work in a private repository of mine", open=False, elem_id="keep"):
            gr.Markdown(ABOUT)
            with gr.Row():
                keep = gr.Button("Keep my work", variant="primary", size="sm", elem_id="keep-work")
                stop = gr.Button("Stop keeping it", size="sm", elem_id="keep-stop")
        shown = [self.line, self.kept]
        pages.load(self.words, None, self.line, **QUIET).then(self.arrive, None, shown, **QUIET, concurrency_limit=None)
        keep.click(self.begin, None, shown, **QUIET, concurrency_limit=None)
        stop.click(self.stop, None, shown, **QUIET)

    def words(self) -> dict:
        """What the line says to who asks."""
        return self._line(asking().get(PERSON), self.workspace)

    def _line(self, person, workspace) -> dict:
        if person is None:
            return {}
        room = f"{fence.used(workspace.root) / fence.GB:.2f} of {workspace.limits.disk / fence.GB:g} GB used" if workspace.limits else ""
        lasts = self.hosting.lasts
        if self.pump is not None and self.pump.trouble:
            lasts = UNKEPT if workspace.limits else self.pump.trouble
        elif lasts and keeping.state(workspace)["state"] == "kept":
            lasts = ""
        elif lasts and workspace.limits:
            lasts = "Nothing lasting is attached: files go when this Space sleeps or restarts. Keep your work (below), or publish what you want to keep."
        return {"name": person.name, "room": room, "lasts": lasts, "space": self.hosting.space}

    # ---- keeping

    def arrive(self) -> Iterator[list]:
        """Go on keeping, or bring back, what is theirs who signed in."""
        person, workspace, token = asking().get(PERSON), self.workspace, token_of(None)
        if person is None:
            yield [{}, {}]
            return
        if person.token and workspace.limits is None:
            tokens.lend(workspace.root, person.token, until=person.until)
        before = keeping.state(workspace)
        if before["state"] == "off":
            yield [gr.skip(), self._shown({**before, "state": "busy"})]
        told = keeping.arrive(workspace, token)
        yield [self._line(person, workspace), self._shown(told, back=before["state"] == "off")]

    def begin(self) -> Iterator[list]:
        """Keep it from now on, as its owner says."""
        # Who asks is known until the first answer only.
        person, workspace, token = asking().get(PERSON), self.workspace, token_of(None)
        missing = lacks("contribute-repos", "write-repos", "manage-repos")
        yield [gr.skip(), {"words": "Keeping your work …"}]
        try:
            if missing:
                raise HostError("host.scope", missing=missing)
            told = keeping.begin(workspace, token)
        except StudioError as error:
            yield [self._line(person, workspace), {"words": str(error)}]
            return
        yield [self._line(person, workspace), self._shown(told, back=True)]

    def stop(self) -> list:
        """Send nothing from now on."""
        keeping.stop(self.workspace)
        return [self.words(), {"words": "Nothing is sent from now on. What was kept stays on the Hub until you delete it there."}]

    def _shown(self, told: dict, *, back: bool = False) -> dict:
        return {"words": keeping.words(told), "url": told["url"], "notes": told["notes"], "back": back and any("brought back" in note for note in told["notes"])}


def lacks(*wanted: str) -> str:
    """The scope that the sign-in of who asks was not given, when it has none of those that would do: the first, by name. Empty where all is
    well, and where no scopes are known."""
    person = asking().get(PERSON)
    return wanted[0] if person is not None and person.scopes and not set(wanted) & set(person.scopes) else ""
