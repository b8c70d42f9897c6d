"""The Publish page: an adapter, where it goes, what exactly would be sent, and "published" only once it was read back."""

import contextlib
import queue
import threading

import gradio as gr

from lora_studio import card, demo_space, library, shelf
from lora_studio.errors import HostError, HubError, StudioError
from lora_studio.ui import theme
from lora_studio.ui.account import lacks
from lora_studio.ui.events import LIVE, QUIET, TYPED, Newest
from lora_studio.ui.seat import Seated, token_of
from lora_studio.workspace import Workspace

NEWEST, NOBODY = 300, "your-name"
GATED = [("As it is; a new one: everybody who sees it", ""), ("Whoever accepts the terms", "auto"), ("Whoever you let in", "manual"), ("Everybody who sees it", "none")]
COMMON = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "other")
SIGN_IN = (
    "The studio uses the Hub's own login: run `hf auth login` in a terminal, then press **Look again**. "
    "Or paste a token here; it is held in memory while this page is open, and nowhere else."
)
FILES = """<ul class="files">{{#each value}}<li><span>{{name}}</span><small>{{size}}</small></li>{{/each}}</ul>"""
FILES_CSS = """
.files{list-style:none;margin:0;padding:0;font-size:13px;color:var(--body-text-color)}
.files li{display:flex;justify-content:space-between;gap:12px;padding:4px 2px;border-bottom:1px solid var(--border-color-primary);overflow-wrap:anywhere}
.files small{font-size:12.5px;white-space:nowrap;color:var(--body-text-color-subdued)}
"""
DONE = """{{#if value}}<p class="published">✓ {{value.title}} <a href="{{value.url}}" target="_blank" rel="noreferrer noopener">{{value.url}}</a><br>
<small>{{value.what}}</small>{{#if value.demo}}<br>Demo Space at <a href="{{value.demo}}" target="_blank" rel="noreferrer noopener">{{value.demo}}</a>{{/if}}</p>{{/if}}"""
DONE_CSS = """
.published{margin:0;padding:10px 12px;border:1px solid var(--studio-ok);border-radius:8px;font-size:14px;color:var(--body-text-color);overflow-wrap:anywhere}
.published a{color:var(--color-accent)}.published small{font-size:12.5px;color:var(--body-text-color-subdued)}
"""


# (what is asked for, the scopes of which a sign-in needs one for it): Hugging Face's own names of them.
NEEDED = (("pull_request", ("write-discussions", "write-repos", "manage-repos")), ("collection", ("write-collections",)))
PLAIN = ("", False, "", "", "", False)  # nothing of what is under More


class Publish(Seated):
    """The page's parts, and what they do."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    # ---- layout

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## Publish\nPush an adapter or a blend to the Hugging Face Hub, with a model card of what is known of it.")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                self._where()
            with gr.Column(scale=3, min_width=300):
                self._what()

    def _where(self) -> None:
        self.owner = gr.State(None)
        self.adapter = gr.Dropdown([], value=None, label="Adapter", interactive=True, elem_id="publish-adapter")
        self.account = theme.sentences(elem_id="account")
        with gr.Accordion("Sign in", open=False) as self.sign_in:
            gr.Markdown(SIGN_IN)
            self.token = gr.Textbox("", label="Token", type="password", max_lines=1, interactive=True, elem_id="token", html_attributes=gr.InputHTMLAttributes(autocomplete="off"))
            self.look = gr.Button("Look again", size="sm")
        self.repo = gr.Textbox("", label="Repository", info="owner/name; it is made if it is not there.", max_lines=1, interactive=True, elem_id="repo")
        self.visible_to = gr.Radio([("Private: only you", "private"), ("Public: everybody", "public")], value="private", label="Who may see it", interactive=True)
        self.license = gr.Dropdown([("none is said", ""), *licenses()], value="", label="Licence of the adapter", interactive=True, elem_id="license")
        with gr.Accordion("More", open=False, elem_id="publish-more"):
            one = {"max_lines": 1, "interactive": True}
            self.tag = gr.Textbox("", label="Version", info="A tag for these files, such as v1.0; one that stands for other files is refused.", elem_id="tag", **one)
            self.folder = gr.Textbox("", label="Folder", info="For a repository of several adapters: each in its own folder, with a list of them.", elem_id="folder", **one)
            self.gated = gr.Radio(GATED, value="", label="Who may have the files", interactive=True, elem_id="gated")
            self.collection = gr.Textbox("", label="Collection", info="The title of one of yours (it is made if it is not there), or its address.", elem_id="collection", **one)
            self.asks = gr.Checkbox(False, label="Open a pull request", info="Asks the repository's owner to take the files. Once more adds to the same one.", interactive=True, elem_id="asks")
            self.shows = gr.Checkbox(False, label="Also make a demo Space", info="A page where people try it beside its base: owner/name-demo, as private as the adapter. Once more updates it.", interactive=True, elem_id="demo-space")
        self.more = [self.tag, self.asks, self.gated, self.collection, self.folder, self.shows]
        self.go = gr.Button("Publish", variant="primary", size="lg", elem_id="publish")

    def _what(self) -> None:
        self.told = theme.sentences(elem_id="publish-told")
        self.done = theme.Shown(None, html_template=DONE, css_template=DONE_CSS, elem_classes="flush", elem_id="published")
        self.files = theme.Shown([], html_template=FILES, css_template=FILES_CSS, elem_classes="flush", elem_id="files")
        self.readme = gr.Code("", language="markdown", label="The model card, as it would be sent", interactive=False, elem_id="readme", max_lines=40, wrap_lines=True)

    # ---- wiring

    @property
    def opened(self) -> list:
        """What showing an adapter fills."""
        return [self.adapter, self.repo, self.visible_to, self.license, self.done, *self.drafted, *self.more]

    @property
    def drafted(self) -> list:
        """What a draft fills."""
        return [self.told, self.files, self.readme]

    def connect(self, tab: gr.Tab) -> None:
        """Let the parts act; who is signed in is asked when the page is seen."""
        form = [self.adapter, self.repo, self.visible_to, self.license, self.token, *self.more]
        signing = {"fn": self.sign, "inputs": [self.adapter, self.repo, self.token], "outputs": [self.account, self.sign_in, self.owner, self.repo]}
        self.adapter.input(self.open, [self.adapter, self.owner], self.opened, **TYPED)
        arrived = tab.select(self.arrive, [self.adapter, self.owner], self.opened, **QUIET)
        arrived.then(**signing, **QUIET, concurrency_limit=4)
        gr.on([self.look.click, self.token.blur, self.token.submit], **signing, **TYPED, concurrency_limit=4)
        draft = Newest()(self.draft, self.drafted)
        for part in (self.adapter, self.repo, self.visible_to, self.license, *self.more):
            part.change(draft, form, self.drafted, **LIVE)
        self.go.click(self.push, form, [self.told, self.done, self.go], **QUIET, concurrency_limit=4)

    # ---- what is shown

    def open(self, id: str | None, owner: str | None) -> list:
        """Updates for `opened`: an adapter (the newest without an id), and what would be sent."""
        items = library.find(self.workspace, limit=NEWEST)
        if id and id not in {item.id for item in items}:
            with contextlib.suppress(StudioError):
                own = library.folder_of(self.workspace, id).name
                items = [item for item in library.find(self.workspace, own) if item.id == own] + items
        id = id if id in {item.id for item in items} else (items[0].id if items else None)
        shown = gr.update(choices=[(f"{item.name} · {item.base} · r{item.rank}", item.id) for item in items], value=id)
        if id is None:
            return [shown, "", "private", "", None, [theme.said("note", "There is no adapter yet. Train one, or add one in the Library.")], [], "", *PLAIN]
        repo = self._suggest(id, owner or NOBODY)
        return [shown, repo, "private", "", None, *self.draft(id, repo, "private", "", None), *PLAIN]

    def arrive(self, id: str | None, owner: str | None) -> list:
        """The newest adapter where none was chosen yet."""
        return [gr.skip()] * len(self.opened) if id else self.open(None, owner)

    def sign(self, id: str | None, repo: str | None, token: str | None) -> list:
        """Who is signed in, and a repository of theirs where none was typed."""
        is_ours = not repo or repo.startswith(f"{NOBODY}/")
        try:
            account = shelf.who(token_of(token))
        except StudioError as error:
            return [[theme.said("warning", str(error))], gr.update(open=True), None, self._suggest(id, NOBODY) if is_ours else gr.skip()]
        missing = lacks("contribute-repos", "write-repos", "manage-repos")
        if missing:
            return [[theme.said("warning", str(HostError("host.scope", missing=missing)))], gr.update(open=False), account.name, gr.skip()]
        may = "" if account.writes else " This token may only read, so nothing can be published with it."
        told = [theme.said("ok" if account.writes else "warning", f"Signed in as {account.name}.{may}")]
        return [told, gr.update(open=False), account.name, self._suggest(id, account.name) if is_ours else gr.skip()]

    def _suggest(self, id: str | None, owner: str) -> str:
        try:
            return shelf.suggest_repo(self.workspace, id, owner=owner) if id else ""
        except StudioError:
            return ""

    def draft(self, id: str | None, repo: str, visible_to: str, license: str, token: str | None, *more) -> list:
        """What would be sent, and what stands against it."""
        if not id:
            return [gr.skip()] * 3
        try:
            found = shelf.draft(self.workspace, id, asked(repo, visible_to, license, *more), token=token_of(token))
        except StudioError as error:
            return [[theme.said("error", str(error))], [], ""]
        told = [theme.said("error", f"{finding[:1].upper()}{finding[1:]}. It is not sent while this is in it.") for finding in found.findings]
        if not license:
            told.append(theme.said("warning", "No licence is said, so nobody knows what they may do with it. Choose one if you can."))
        return [told, [{"name": name, "size": size_in_words(size)} for name, size in found.files], found.readme]

    # ---- publishing

    def push(self, id: str | None, repo: str, visible_to: str, license: str, token: str | None, *more):
        """Publish, saying each step; "published" comes only after the Hub was read back."""
        if not id:
            yield [[theme.said("error", "No adapter was chosen. Choose one above.")], gr.skip(), gr.skip()]
            return
        to = asked(repo, visible_to, license, *more)
        missing = [] if (token or "").strip() else [scope for name, wanted in NEEDED if getattr(to, name) and (scope := lacks(*wanted))]
        if missing:
            yield [[theme.said("error", str(HostError("host.scope_more", missing=missing[0])))], None, gr.skip()]
            return
        shows = bool((more or PLAIN)[-1])
        if shows and to.pull_request:
            yield [[theme.said("error", str(HubError("hub.request_only", what="a demo Space")))], None, gr.skip()]
            return
        steps: queue.Queue = queue.Queue()
        workspace, own = self.workspace, token_of(token)  # asked for here: the thread below serves nobody

        def work() -> None:
            try:
                done = shelf.publish(workspace, id, to, token=own, report=steps.put)
                steps.put((done, _demo(workspace, id, to, done, token=own, report=steps.put) if shows else None))
            except BaseException as error:  # noqa: BLE001 - handed over to the thread that waits
                steps.put(error)

        threading.Thread(target=work, daemon=True).start()
        done: list[str] = []
        while isinstance(news := steps.get(), str):
            done.append(news)
            yield [progress(done), None, gr.update(value="Publishing …", interactive=False)]
        ready = gr.update(value="Publish", interactive=True)
        if isinstance(news, StudioError):
            yield [[*progress(done), theme.said("error", str(news))], None, ready]
        elif isinstance(news, BaseException):
            yield [[*progress(done), theme.said("error", f"{type(news).__name__}: the studio failed. Its log has the whole story; try again.")], None, ready]
            raise news
        else:
            news, demo = news
            sent = f"{len(news.sent)} files, {size_in_words(news.sent_bytes)} sent" if news.sent else "everything was there already"
            more = "".join([f", version {news.tag}"] * bool(news.tag) + [f", in {news.collection}"] * bool(news.collection))
            what = f"{'private' if news.private else 'public'}, commit {news.commit[:12]}{more}, read back and found whole; {sent}"
            title = "Pull request at" if news.pull_request else "Published at"
            told = [theme.said("warning", note) for note in demo.notes] if demo else []
            shown = {"title": title, "url": news.pull_request or news.url, "what": what, "demo": demo.url if demo else ""}
            yield [[*progress(done), *told], shown, ready]


def _demo(workspace: Workspace, id: str, to: shelf.Push, done, *, token: str | None, report) -> demo_space.Deployed:
    """The demo Space of what was just published, beside it. What goes wrong with it takes nothing back of the publication, and says so."""
    try:
        return demo_space.deploy(workspace, id, f"{'/'.join(done.url.rsplit('/', 2)[-2:])}-demo", license=to.license, token=token, report=report)
    except StudioError as error:
        return demo_space.Deployed("", done.private, (f"The adapter is published, but its demo Space is not there: {error}",))


def progress(steps: list[str]) -> list[dict]:
    """The steps so far, as one sentence."""
    told = ", ".join(steps)
    return [theme.said("note", f"{told[:1].upper()}{told[1:]}.")] if steps else []


def asked(repo: str, visible_to: str, license: str, *more) -> shelf.Push:
    """Where it goes and how, as the form holds it. A pull request goes to what is there, whoever may see that."""
    tag, asks, gated, collection, folder, _ = more or PLAIN
    words = {name: (text or "").strip() for name, text in (("tag", tag), ("gated", gated), ("collection", (collection or "").rpartition("/collections/")[2]), ("folder", folder))}
    return shelf.Push((repo or "").strip(), None if asks else visible_to != "public", license or None, pull_request=bool(asks), **words)


def licenses() -> list[tuple[str, str]]:
    """The licences that the Hub knows, the usual ones first."""
    return [(name, name) for name in (*COMMON, *sorted(card.LICENSES - set(COMMON)))]


def size_in_words(size: int) -> str:
    """A number of bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
