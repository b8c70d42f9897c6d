"""The Pictures page: drop pictures, see them with their captions, edit one or many, undo, count, and train with them."""

from collections.abc import Callable
from pathlib import Path

import gradio as gr

from lora_studio import albums, studio
from lora_studio.errors import DataError, SpecError, StudioError
from lora_studio.ui import counts, gallery, theme
from lora_studio.ui.album_words import pictures, scope, told_of, undoing
from lora_studio.ui.events import LIVE, QUIET, TYPED, Newest, busy
from lora_studio.ui.seat import Seated
from lora_studio.ui.train import sources_of
from lora_studio.workspace import Workspace

PAGE = 60
NEW = ""
SHOWN = [("Every picture", "all"), ("Without a caption", "missing"), ("Same caption as another", "same"), ("Chosen ones", "chosen")]
NONE = "Drop pictures on the left, or a .zip of them. Captions beside them (.txt, metadata.jsonl) come along."
ADDRESS = """(album) => { if(!window.studioIsReady || !album) return; const url = new URL(location);
  if(url.searchParams.get('tab') !== 'pictures') return; url.searchParams.set('album', album); history.replaceState(null, '', url); }"""


class Pictures(Seated):
    """The page's parts, and what they do."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    # ---- layout

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## Pictures\nDrop pictures, caption them, and train with them. Every change is on disk at once, and can be undone.")
        self.page, self.chosen, self.revision, self.counting = gr.State(0), gr.State([]), gr.State(""), gr.State(False)
        self.started, self.turn = gr.State(None), gr.State(0)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=290, elem_id="pictures-left"):
                self._left()
            with gr.Column(scale=5, min_width=320):
                self._right()

    def _left(self) -> None:
        self.album = gr.Dropdown([("A new album", NEW)], value=NEW, label="Album", interactive=True, elem_id="album")
        self.new_name = gr.Textbox("", label="Name of the new album", placeholder="as the .zip, or by the date", max_lines=1, interactive=True, elem_id="album-name")
        self.drop = gr.File(label="Drop up to 1,000 pictures, or a .zip", file_count="multiple", height=160, interactive=True, elem_id="drop")
        self.told = theme.sentences(elem_id="album-told")
        with gr.Accordion("Start from a demo, a folder or the Hub", open=False, elem_id="copy"):
            self.source = gr.Dropdown(self.sources(), value=None, allow_custom_value=True, label="Make an editable copy of", info="Pick, or type a path or a Hub data set. The original stays as it is.", interactive=True, elem_id="copy-source")
            self.copy = gr.Button("Copy", size="md")
        with gr.Accordion("Change many captions", open=True, elem_id="tools"):
            self._tools()
        with gr.Accordion("Let a model write captions", open=False, elem_id="captioner"):
            self.model = gr.Dropdown(list(albums.CAPTIONERS), value=albums.CAPTIONERS[0], allow_custom_value=True, label="Image-to-text model", info="A Hub id or a folder. Fetched when the run starts.", interactive=True, elem_id="caption-model")
            self.which = gr.Radio([("Those without", "missing"), ("The chosen ones", "chosen"), ("All", "all")], value="missing", label="Captions for", interactive=True, elem_id="caption-which")
            self.prompt = gr.Textbox("", label="Prompt", placeholder="the model's own way", max_lines=3, interactive=True, elem_id="caption-prompt")
            self.caption = gr.Button("Write captions", size="md", elem_id="write-captions")
        with gr.Accordion("Statistics", open=False, elem_id="statistics") as self.statistics:
            self.resolution = gr.Number(512, label="Resolution of training", precision=0, step=8, interactive=True)
            self.tiles = theme.tiles(elem_id="album-tiles")
            self.warnings = theme.sentences(elem_id="album-warnings")
            self.bars = counts.bars(elem_id="album-bars")
        with gr.Accordion("Remove an album, or bring one back", open=False, elem_id="discard"):
            self.discard = gr.Button("Remove this album", variant="stop", size="md", elem_id="discard-album")
            self.gone = gr.Dropdown([], value=None, label="Removed albums stay here for 30 days", interactive=True, elem_id="gone-albums")
            self.restore = gr.Button("Bring it back", size="md", elem_id="restore-album")

    def _tools(self) -> None:
        self.scope = gr.Markdown("", elem_id="scope")
        with gr.Row():
            self.find = gr.Textbox("", label="Find", max_lines=1, min_width=100, interactive=True, elem_id="find")
            self.put = gr.Textbox("", label="Replace by", max_lines=1, min_width=100, interactive=True, elem_id="put")
        with gr.Row(equal_height=True):
            self.loose = gr.Checkbox(False, label="Ignore case", container=False, min_width=100, interactive=True)
            self.replace = gr.Button("Replace", size="md", min_width=100)
        self.words = gr.Textbox("", label="Words", placeholder="a tag, a trigger word, a beginning", max_lines=1, interactive=True, elem_id="words")
        with gr.Row():
            self.by_kind = {
                kind: gr.Button(label, size="md", min_width=104)
                for kind, label in (("prefix", "Put before"), ("suffix", "Put after"), ("trigger", "Trigger first"), ("add_tag", "Add tag"), ("remove_tag", "Remove tag"))
            }
        self.remove = gr.Button("Remove the chosen pictures", variant="stop", size="md", interactive=False, elem_id="remove-pictures")

    def _right(self) -> None:
        with gr.Row(equal_height=True):
            self.undo = gr.Button("Nothing to undo", size="md", min_width=150, interactive=False, elem_id="undo-edit", scale=3)
            self.redo = gr.Button("Redo", size="md", min_width=80, interactive=False, elem_id="redo-edit", scale=1)
            self.train = gr.Button("Train with these", variant="primary", size="md", min_width=150, interactive=False, elem_id="train-with", scale=2)
        with gr.Row(equal_height=True):
            self.search = gr.Textbox("", label="Search", placeholder="in captions and names", max_lines=1, min_width=140, scale=2, interactive=True, elem_id="search-pictures")
            self.filter = gr.Dropdown(SHOWN, value="all", label="Show", min_width=140, scale=2, interactive=True, elem_id="filter")
        with gr.Row(equal_height=True):
            self.count = gr.Markdown("", elem_id="album-count")
            self.all = gr.Button("Choose all", size="sm", min_width=104, scale=0)
            self.none = gr.Button("Choose none", size="sm", min_width=104, scale=0)
        self.gallery = gallery.Gallery(gallery.empty(NONE), seats=lambda: self.workspace, elem_id="gallery")
        with gr.Row(visible=False, elem_id="pager") as self.pager:
            self.back, self.next = gr.Button("Previous", size="md"), gr.Button("Next", size="md")

    # ---- wiring

    @property
    def asked(self) -> list:
        """What the gallery is asked for."""
        return [self.album, self.page, self.search, self.filter, self.chosen]

    @property
    def shown(self) -> list:
        """What the gallery and its buttons show."""
        return [self.page, self.chosen, self.revision, self.gallery, self.count, self.scope, self.undo, self.redo, self.train, self.remove, self.pager, self.back, self.next]

    @property
    def opened(self) -> list:
        """What showing an album from elsewhere fills."""
        return [self.album, self.new_name, self.search, self.filter, self.told, self.gone, *self.shown]

    @property
    def counted(self) -> list:
        """What the statistics fill."""
        return [self.tiles, self.warnings, self.bars]

    def connect(self, tabs: gr.Tabs, train, open_run) -> None:
        """Let the parts act. `train` is the Train page, `open_run` is (function that gives the updates showing a run, its outputs)."""
        show, outputs = open_run
        asked = [self.album, self.chosen, self.model, self.which, self.prompt]
        self.caption.click(self.write_captions, asked, [self.told, self.started], **busy(self.told)).then(show, self.started, outputs, **QUIET)
        self._connect_ways_in()
        newest = Newest()
        look = {"fn": newest(self.look, self.shown), "inputs": self.asked, "outputs": self.shown, **TYPED}
        searched = newest(lambda *asked: self.look(asked[0], 0, *asked[2:]), self.shown)
        gr.on([self.search.change, self.filter.input], searched, self.asked, self.shown, **LIVE)
        self._connect_gallery(look)
        self._connect_edits(look)
        train.captions.click(lambda rows: self.edit_source(train, rows), train.form["data"], [tabs, *self.opened, train.form["data"], train.data], **busy(train.captions))
        self.train.click(lambda album, *form: [gr.Tabs(selected="train"), *train.bring(self.path(album), *form)], [self.album, *train.bringing], [tabs, *train.brought], **QUIET)

    def _connect_ways_in(self) -> None:
        waited = {**busy(self.told, "full"), "concurrency_limit": 2}
        taken = self.drop.upload(self.take, [self.drop, self.album, self.new_name], [self.drop, *self.opened], **waited)
        copied = self.copy.click(self.make_copy, [self.source, self.new_name], self.opened, **waited)
        gone = self.discard.click(self.throw_away, self.album, self.opened, **QUIET)
        back = self.restore.click(self.fetch_back, self.gone, self.opened, **QUIET)
        for event in (taken, copied, gone, back):
            self._then_count(event)
        self.album.input(lambda album: self.open(album), self.album, self.opened, **TYPED).then(self.recount, [self.album, self.resolution, self.counting], self.counted, **TYPED)
        self.album.change(None, self.album, None, js=ADDRESS, api_visibility="private")

    def _connect_gallery(self, look: dict) -> None:
        for button, step in ((self.back, -1), (self.next, 1)):
            button.click(lambda page, step=step: page + step, self.page, self.page, **QUIET).then(**look)
        # Every event by itself: of several, "always_last" would ask again with the first one's data.
        told = {**QUIET, "trigger_mode": "multiple", "concurrency_limit": 1}
        self.gallery.choose(self.choose, [self.album, self.turn], [self.turn, self.chosen, self.scope, self.remove], **told)
        self.gallery.saved(self.saved, [self.revision, *self.asked], self.shown, **told).then(self.recount, [self.album, self.resolution, self.counting], self.counted, **TYPED)
        self.all.click(self.choose_all, self.asked, self.shown, **QUIET)
        self.none.click(lambda *asked: self.look(*asked[:4], []), self.asked, self.shown, **QUIET)

    def _connect_edits(self, look: dict) -> None:
        chosen = [self.album, self.chosen, self.revision]
        words = [self.words, self.put, self.find, self.loose]
        events = [self.replace.click(self.doer("replace"), [*chosen, *words], self.told, **QUIET)]
        events += [button.click(self.doer(kind), [*chosen, *words], self.told, **QUIET) for kind, button in self.by_kind.items()]
        events += [button.click(fn, chosen, self.told, **QUIET) for button, fn in ((self.undo, self.take_back), (self.redo, self.do_again), (self.remove, self.take_out))]
        for event in events:
            self._then_count(event.then(**look))
        gr.on([self.statistics.expand], lambda: True, None, self.counting, **QUIET).then(self.recount, [self.album, self.resolution, self.counting], self.counted, **TYPED)
        self.statistics.collapse(lambda: False, None, self.counting, **QUIET)
        gr.on([self.resolution.submit, self.resolution.blur], self.recount, [self.album, self.resolution, self.counting], self.counted, **TYPED)

    def _then_count(self, event) -> None:
        event.then(self.recount, [self.album, self.resolution, self.counting], self.counted, **{**TYPED, **busy(self.tiles)})

    # ---- what is shown

    def sources(self) -> list[tuple[str, str]]:
        """What a copy can be made of: the demos, and what was uploaded that is no album."""
        return [(label, path) for label, path in studio.data_choices(self.workspace) if not albums.named(self.workspace, path) and not path.endswith((".jsonl", ".json", ".csv", ".tsv", ".parquet"))]

    def choices(self) -> list[tuple[str, str]]:
        """The albums, and a new one."""
        return [*((name, name) for name in albums.names(self.workspace)), ("A new album", NEW)]

    def path(self, album: str | None) -> str:
        """Where an album is, as a source of a run."""
        return albums.source_of(self.workspace, album).path if album else ""

    def open(self, album: str | None, *told: dict) -> list:
        """Updates for `opened`: an album, or the way to a new one."""
        choices = self.choices()
        if album is None:
            album = choices[0][1]
        if album not in [name for _, name in choices]:
            told, album = (theme.said("error", f"There is no album {album} any more. Choose another one, or drop pictures to make one."),), NEW
        fresh = gr.update(value="", visible=album == NEW)
        return [gr.update(choices=choices, value=album), fresh, "", "all", list(told), self.removed(), *self.look(album, 0, "", "all", [])]

    def removed(self) -> dict:
        """The albums that can be brought back."""
        found = [(name, entry) for entry, name in albums.discarded(self.workspace)]
        return gr.update(choices=found, value=found[0][1] if found else None)

    def fresh(self, album: str | None, *asked) -> list:
        """Updates for `opened` when the page is opened again: the same album, where it has changed since."""
        *asked, revision = asked
        if not album:
            return self.open(None) if self.choices()[0][1] else [gr.update(choices=self.choices()), *[gr.skip()] * (len(self.opened) - 1)]
        shown = self.look(album, *asked)
        if shown[self.shown.index(self.revision)] == revision:
            shown = [gr.skip()] * len(shown)
        return [gr.update(choices=self.choices()), *[gr.skip()] * 5, *shown]

    def look(self, album: str | None, page: int, search: str | None, kind: str, chosen: list[str]) -> list:
        """Updates for `shown`: one page of an album."""
        try:
            view = albums.view(self.workspace, album) if album else None
        except StudioError as error:
            return self._blank(str(error))
        if view is None:
            return self._blank(NONE)
        chosen = [name for name in chosen if name in view.captions]
        names = albums.fitting(view, search or "", kind, chosen)
        page = max(0, min(page, (len(names) - 1) // PAGE))
        part = names[page * PAGE : (page + 1) * PAGE]
        value = gallery.shown(view, part, chosen)
        value["none"] = "No picture fits. Search for something else." if view.captions else "This album is empty. Drop pictures on the left, or undo."
        where = f"{page * PAGE + 1:,} to {page * PAGE + len(part):,} of {len(names):,}" if len(names) > PAGE else f"{len(names):,}"
        told = f"{where} picture{'' if len(names) == 1 else 's'}" + ("" if len(names) == len(view.captions) else f" of the {len(view.captions):,} in the album")
        return [
            page, chosen, view.revision, value, told, scope(chosen, len(view.captions)), *undoing(view), gr.update(interactive=bool(view.captions)),
            gr.update(interactive=bool(chosen)), gr.update(visible=len(names) > PAGE), gr.update(interactive=page > 0), gr.update(interactive=len(names) > (page + 1) * PAGE),
        ]  # fmt: skip

    def _blank(self, none: str) -> list:
        off = [gr.update(value="Nothing to undo", interactive=False), *(gr.update(interactive=False) for _ in range(3))]
        return [0, [], "", gallery.empty(none), "", "", *off, gr.update(visible=False), gr.skip(), gr.skip()]

    def choose(self, event: gr.EventData, album: str, turn: int) -> list:
        """What the page says is chosen."""
        if not gallery.is_newer(event, turn):
            return [gr.skip()] * 4
        chosen = gallery.chosen_of(event)
        return [event.turn, chosen, scope(chosen, self.count_of(album)), gr.update(interactive=bool(chosen))]

    def count_of(self, album: str | None) -> int:
        """How many pictures an album has."""
        try:
            return len(albums.view(self.workspace, album).captions) if album else 0
        except StudioError:
            return 0

    def choose_all(self, *asked) -> list:
        """Choose everything that the search and the filter show, on every page."""
        album, page, search, kind, chosen = asked
        if not self.count_of(album):
            return self.look(*asked)
        return self.look(album, page, search, kind, albums.fitting(albums.view(self.workspace, album), search or "", kind, chosen))

    def saved(self, event: gr.EventData, revision: str, *asked) -> list:
        """After one caption was saved: the gallery stays as it is, unless someone else has changed the album meanwhile."""
        if event.before != revision or not self.count_of(asked[0]):
            return self.look(*asked)
        view, shown = albums.view(self.workspace, asked[0]), [gr.skip()] * len(self.shown)
        for part, update in zip((self.revision, self.undo, self.redo), (event.after, *undoing(view))):
            shown[self.shown.index(part)] = update
        return shown

    def recount(self, album: str | None, resolution, counting: bool) -> list:
        """The statistics, while they are open."""
        if not counting or not album:
            return [[], [], []] if not album else [gr.skip()] * 3
        try:
            found = albums.measure(self.workspace, album, resolution=int(resolution or 512))
        except (StudioError, ValueError) as error:
            return [[], [theme.said("error", str(error))], []]
        return [counts.tiles_of(found), counts.sentences_of(found), counts.bars_of(found)]

    # ---- what is done

    def take(self, files: list[str] | None, album: str, name: str, progress=gr.Progress()) -> list:
        """Make an album of dropped files, or add them to the one that is open."""
        paths, report = [Path(file) for file in files or []], reporter(progress)
        try:
            if album:
                found = albums.add(self.workspace, album, paths, report=report)
            else:
                album, found = albums.create(self.workspace, paths, name=(name or "").strip(), report=report)
        except StudioError as error:
            stay = [gr.skip()] * len(self.opened)
            stay[self.opened.index(self.told)] = [theme.said("error", str(error))]
            return [None, *stay]
        count = len(found.items)
        said = theme.said("ok", f"{count:,} picture{' is' if count == 1 else 's are'} in {album}.")
        return [None, *self.open(album, said, *(theme.said("warning", sentence) for sentence in found.sentences()))]

    def make_copy(self, source: str | None, name: str, progress=gr.Progress()) -> list:
        """Make an editable copy of a source."""
        try:
            if not (source or "").strip():
                raise DataError("album.no_files")
            album, found = albums.copy(self.workspace, source.strip(), name=(name or "").strip(), report=reporter(progress))
        except StudioError as error:
            stay = [gr.skip()] * len(self.opened)
            stay[self.opened.index(self.told)] = [theme.said("error", str(error))]
            return stay
        return self.open(album, theme.said("ok", f"{album} is a copy of {source}; edit it as you like."), *(theme.said("warning", sentence) for sentence in found.sentences()))

    def throw_away(self, album: str) -> list:
        """Take an album away, and show the next one."""
        try:
            albums.discard(self.workspace, album or "")
        except StudioError as error:
            return self.open(album, theme.said("error", str(error)))
        return self.open(None, theme.said("ok", f"{album} was removed. It can be brought back for 30 days, at the bottom of this column."))

    def fetch_back(self, entry: str | None) -> list:
        """Bring an album back, and show it."""
        try:
            album = albums.bring_back(self.workspace, entry or "")
        except StudioError as error:
            return self.open(None, theme.said("error", str(error)))
        return self.open(album, theme.said("ok", f"{album} is back."))

    def edit_source(self, train, rows: str) -> list:
        """Updates that lead from the Train page to the captions of its first source: to its album, or to an editable copy."""
        sources = sources_of(rows)
        try:
            if not sources:
                raise DataError("album.no_files")
            path = sources[0]["path"]
            album, told = albums.named(self.workspace, path), []
            if album is None:
                album, found = albums.copy(self.workspace, path)
                told = [theme.said("ok", f"{album} is an editable copy of {path}, and the Train page trains with it now."), *(theme.said("warning", sentence) for sentence in found.sentences())]
                sources[0] = {**sources[0], "path": self.path(album)}
        except StudioError as error:
            gr.Warning(str(error))
            return [gr.skip()] * (3 + len(self.opened))
        return [gr.Tabs(selected="pictures"), *self.open(album, *told), *train.rows_of(sources)]

    def write_captions(self, album, chosen, model, which, prompt) -> list:
        """Queue a run that writes captions. Gives what is said and the id of the run, or None."""
        try:
            asked = {"pictures": chosen if which == "chosen" else which, "prompt": prompt or ""}
            return [[], albums.write_captions(self.workspace, album or "", model=str(model or "").strip(), **asked)]
        except SpecError as error:
            return [[theme.said("error", problem.sentence) for problem in error.problems], None]
        except StudioError as error:
            return [[theme.said("error", str(error))], None]

    def _done(self, act: Callable[[], str]) -> list[dict]:
        try:
            return [theme.said("ok", act())]
        except StudioError as error:
            return [theme.said("error", str(error))]

    def doer(self, kind: str):
        """The function that makes one kind of change to the chosen captions, or to all."""

        def act(*given) -> list[dict]:
            album, chosen, revision, words, put, find, loose = given
            change = albums.Edit(kind, put or "" if kind == "replace" else words or "", find or "", bool(loose))
            return self._done(lambda: told_of(kind, albums.edit(self.workspace, album or "", change, chosen or None, revision=revision), change))

        return act

    def take_back(self, album, chosen, revision) -> list[dict]:
        return self._done(lambda: f"Undone: {albums.undo(self.workspace, album or '', revision=revision)}.")

    def do_again(self, album, chosen, revision) -> list[dict]:
        return self._done(lambda: f"Done again: {albums.redo(self.workspace, album or '', revision=revision)}.")

    def take_out(self, album, chosen, revision) -> list[dict]:
        return self._done(lambda: f"{pictures(albums.remove(self.workspace, album or '', chosen, revision=revision))} removed. Undo brings them back.")


def reporter(progress) -> Callable[[int, int], None]:
    """What tells Gradio how far a look at many pictures has come."""
    return lambda done, total: progress((done, total), desc="Looking at the pictures", unit="pictures") if done % 10 == 0 or done == total else None
