"""The Library page: every adapter as a card, what is known of the chosen one, and the way in, out and back."""

import time

import gradio as gr

from lora_studio import library, shelf
from lora_studio.errors import StudioError
from lora_studio.ui import theme, tree
from lora_studio.ui.events import QUIET, TYPED, Newest, busy
from lora_studio.ui.export import Export
from lora_studio.ui.numbers import Numbers
from lora_studio.ui.seat import Seated, token_of
from lora_studio.workspace import Workspace

PAGE = 60
ORDERS = [("Newest first", "newest"), ("Oldest first", "oldest"), ("By name", "name"), ("Largest first", "size"), ("Highest rank first", "rank")]
ANY = ""

CARDS = """<div class="cards" role="listbox" aria-label="Adapters">{{#each value.items}}
<button type="button" role="option" class="card" data-id="{{id}}" aria-selected="{{chosen}}">
<b>{{#if favourite}}<i title="favourite">★</i> {{/if}}{{name}}</b><small>{{base}}</small><small>{{method}}</small>
{{#if damage}}<em>damaged</em>{{/if}}<span class="tags">{{#each tags}}<u>{{this}}</u>{{/each}}</span><small class="when">{{when}}</small></button>
{{/each}}</div>{{#unless value.items}}<p class="none">{{value.none}}</p>{{/unless}}"""
CARDS_CSS = """
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:9px;padding:2px}
.card{display:flex;flex-direction:column;gap:2px;text-align:left;font:inherit;cursor:pointer;padding:10px 12px;border-radius:10px;border:1px solid var(--border-color-primary);background:var(--background-fill-primary);color:var(--body-text-color);min-width:0}
.card:hover{border-color:var(--color-accent)}.card[aria-selected=true]{border-color:var(--color-accent);box-shadow:0 0 0 1px var(--color-accent)}
.card b{font-size:14.5px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}.card i{font-style:normal;color:var(--color-accent)}
.card small{font-size:12px;color:var(--body-text-color-subdued);white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.card em{font-style:normal;font-size:12px;color:var(--studio-bad)}.card .when{margin-top:auto;padding-top:4px}
.tags{display:flex;flex-wrap:wrap;gap:4px}.tags u{text-decoration:none;font-size:11px;padding:0 7px;border-radius:99px;border:1px solid var(--border-color-primary);max-width:100%;overflow:hidden;text-overflow:ellipsis}
.none{color:var(--body-text-color-subdued)}
"""
CARDS_SCRIPT = """
element.addEventListener('click', event => { const card = event.target.closest('.card'); if(!card) return;
  const url = new URL(location); url.searchParams.set('adapter', card.dataset.id); history.replaceState(null, '', url);
  trigger('pick', {id: card.dataset.id}); });
"""
FACTS = """<dl class="facts">{{#each value.rows}}<dt>{{label}}</dt><dd>{{value}}</dd>{{/each}}{{#if value.run}}<dt>run</dt><dd><button type="button" data-id="{{value.run}}">{{value.run}}</button></dd>{{/if}}</dl>"""
FACTS_CSS = """
.facts{display:grid;grid-template-columns:max-content 1fr;gap:3px 14px;margin:0;font-size:13px}
.facts dt{color:var(--body-text-color-subdued);font-weight:400;margin:0}.facts dd{margin:0;color:var(--body-text-color);overflow-wrap:anywhere;min-width:0}
.facts button{font:inherit;font-size:13px;padding:0;border:none;background:none;color:var(--color-accent);cursor:pointer;text-decoration:underline}
"""
FACTS_SCRIPT = """
element.addEventListener('click', event => { const link = event.target.closest('button[data-id]'); if(!link) return;
  trigger('run', {id: link.dataset.id}); });
"""


class Library(Seated):
    """The page's parts, and what they do."""

    def __init__(self, workspace: Workspace):
        self.workspace, self.export, self.numbers = workspace, Export(workspace, "adapter-export"), Numbers(workspace)

    # ---- layout

    def build(self) -> None:
        """Lay the page out inside the current tab."""
        gr.Markdown("## Library\nEvery adapter that was trained, blended, imported or pulled.")
        self.chosen, self.many, self.gone = gr.State(None), gr.State(PAGE), gr.State(None)
        with gr.Row(equal_height=True):
            self.words = gr.Textbox("", label="Search", placeholder="name, base, tag, trigger, notes, id", scale=3, min_width=180, max_lines=1, interactive=True)
            self.base = gr.Dropdown([("any", ANY)], value=ANY, label="Base", scale=2, min_width=150, interactive=True)
            self.tag = gr.Dropdown([("any", ANY)], value=ANY, label="Tag", min_width=110, interactive=True)
            self.method = gr.Dropdown([("any", ANY)], value=ANY, label="Method", min_width=110, interactive=True)
            self.order = gr.Dropdown(ORDERS, value="newest", label="Order", min_width=190, interactive=True)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                self._list()
            with gr.Column(scale=2, min_width=300):
                self._detail()

    def _list(self) -> None:
        with gr.Column(visible=False, elem_id="undo-box") as self.undo_box, gr.Row(equal_height=True):
            self.undo_told = gr.Markdown("")
            self.undo = gr.Button("Undo", size="sm", min_width=90)
        with gr.Row(equal_height=True):
            self.told = gr.Markdown("", elem_id="library-count")
            self.starred = gr.Checkbox(False, label="Favourites only", container=False, min_width=150, interactive=True)
        self.grid = theme.Shown({"items": [], "none": ""}, html_template=CARDS, css_template=CARDS_CSS, js_on_load=CARDS_SCRIPT, elem_classes="flush", elem_id="cards")
        self.more = gr.Button("Show more", size="sm", visible=False)
        with gr.Accordion("Add an adapter", open=False, elem_id="import"):
            self._import()
        with gr.Accordion("Recently removed", open=False):
            self.removed = gr.Dropdown([], value=None, label="Removed adapters stay here for 30 days", interactive=True)
            self.back = gr.Button("Bring it back", size="sm")

    def _import(self) -> None:
        gr.Markdown("Give a folder or a .safetensors file on this machine, or a Hub repository; or upload the files. It is read and checked before it enters.")
        with gr.Row():
            self.source = gr.Textbox("", label="Folder, file or owner/name", max_lines=1, interactive=True, scale=2, elem_id="import-source")
            self.revision = gr.Textbox("", label="Revision", placeholder="of a Hub repository", max_lines=1, min_width=120, interactive=True)
        self.files = gr.File(label="Or upload .safetensors and adapter_config.json, or a .zip of them", file_count="multiple", height=120, interactive=True, elem_id="import-files")
        with gr.Row():
            self.new_name = gr.Textbox("", label="Name", placeholder="as it is called there", max_lines=1, interactive=True)
            self.new_base = gr.Textbox("", label="Base", placeholder="as it says itself", max_lines=1, interactive=True)
        self.take = gr.Button("Check and add", variant="primary")
        self.take_told = theme.sentences(elem_id="import-told")

    def _detail(self) -> None:
        self.hint = gr.Markdown("Choose an adapter to see what is known of it.")
        with gr.Column(visible=False, elem_id="adapter") as self.panel:
            with gr.Row():
                self.talk = gr.Button("Talk to it", variant="primary", min_width=110)
                self.use = gr.Button("Use in Blend", min_width=110)
                self.publish = gr.Button("Publish", min_width=110)
            self.name = gr.Textbox("", label="Name", max_lines=1, interactive=True, elem_id="adapter-name")
            self.facts = theme.Shown({"rows": [], "run": ""}, html_template=FACTS, css_template=FACTS_CSS, js_on_load=FACTS_SCRIPT, elem_classes="flush", elem_id="facts")
            self.tree = tree.tree(elem_id="tree")
            with gr.Row():
                self.tags = gr.Textbox("", label="Tags (comma between)", max_lines=1, interactive=True)
                self.trigger = gr.Textbox("", label="Trigger", placeholder="a word that calls it", max_lines=1, interactive=True)
            self.notes = gr.Textbox("", label="Notes", lines=2, max_lines=10, interactive=True)
            with gr.Row():
                self.save = gr.Button("Save changes", size="md", min_width=110)
                self.star = gr.Button("☆ Favourite", size="md", min_width=110)
                self.download = gr.Button("Download", size="md", min_width=110, link_target="_self")
                self.verify = gr.Button("Check files", size="md", min_width=110)
                self.remove = gr.Button("Remove", variant="stop", size="md", min_width=110)
            self.card_told = theme.sentences(elem_id="adapter-told")
            self.numbers.build()
            self.export.build()

    # ---- wiring

    @property
    def asked(self) -> list:
        """What the list is asked for."""
        return [self.words, self.base, self.tag, self.method, self.order, self.starred, self.many]

    @property
    def listed(self) -> list:
        """What the list fills."""
        return [self.told, self.grid, self.more, self.base, self.tag, self.method, self.removed]

    @property
    def detail(self) -> list:
        """What choosing an adapter fills."""
        return [self.chosen, self.hint, self.panel, self.name, self.facts, self.tree, self.tags, self.trigger, self.notes, self.star, self.download, self.card_told]

    @property
    def opened(self) -> list:
        """What showing an adapter from elsewhere fills: its card, and a list that was asked for nothing else."""
        return [self.words, self.starred, *self.detail, *self.listed]

    def connect(self, tabs: gr.Tabs, pages: dict) -> None:
        """Let the parts act. `pages` are the other pages by name."""
        again = {"fn": Newest()(self.search, self.listed), "inputs": [*self.asked, self.chosen], "outputs": self.listed, **TYPED}
        for part in (self.words, self.base, self.tag, self.method, self.order, self.starred):
            part.change(**again, concurrency_limit=None)
        self.more.click(lambda many: many + PAGE, self.many, self.many, **QUIET).then(**again)
        self.grid.pick(self.pick, None, self.detail, **QUIET).then(**again)
        self.tree.pick(self.pick, None, self.detail, **QUIET).then(**again)
        self.export.connect(self.chosen)
        self.numbers.connect(self.chosen)
        runs = pages["runs"]
        self.facts.run(self._visit(runs), None, [tabs, *runs.opened], **QUIET)
        fields = [self.chosen, self.name, self.tags, self.trigger, self.notes]
        self.save.click(self.write, fields, self.detail, **QUIET).then(**again)
        self.star.click(self.mark, self.chosen, self.detail, **QUIET).then(**again)
        self.verify.click(self.check, self.chosen, self.detail, **busy(self.card_told)).then(**again)
        self.remove.click(self.take_off, self.chosen, [self.gone, self.undo_box, self.undo_told, *self.detail], **QUIET).then(**again)
        self.undo.click(self.bring_back, self.gone, [self.undo_box, *self.detail], **QUIET).then(**again)
        self.back.click(self.bring_back, self.removed, [self.undo_box, *self.detail], **QUIET).then(**again)
        given = {self.source, self.revision, self.files, self.new_name, self.new_base, pages["publish"].token}
        self.token = pages["publish"].token
        done = [self.take_told, self.source, self.files, self.new_name, *self.detail]
        taken = self.take.click(self.add, given, done, concurrency_limit=2, **busy(self.take_told))
        taken.then(**again)
        self._jumps(tabs, pages)

    def _jumps(self, tabs: gr.Tabs, pages: dict) -> None:
        """The ways from an adapter to the pages that work with it."""
        blend, playground, publish = pages["blend"], pages["playground"], pages["publish"]
        self.use.click(lambda id, *mix: [gr.Tabs(selected="blend"), *blend.add(id, *mix)], [self.chosen, *blend.mix.inputs], [tabs, *blend.opened], **QUIET)
        self.talk.click(lambda id: [gr.Tabs(selected="playground"), *playground.open([[id, 1.0]])], self.chosen, [tabs, *playground.opened], **QUIET)
        self.publish.click(lambda id, owner: [gr.Tabs(selected="publish"), *publish.open(id, owner)], [self.chosen, publish.owner], [tabs, *publish.opened], **QUIET)

    def _visit(self, runs):
        def visit(event: gr.EventData):
            return [gr.Tabs(selected="runs"), *runs.open(str(event.id))]

        return visit

    # ---- what is shown

    def open(self, id: str | None) -> list:
        """Updates for `opened`: the whole list, and one adapter."""
        return ["", False, *self.show(id), *self.search("", ANY, ANY, ANY, "newest", False, PAGE, id)]

    def search(self, *asked) -> list:
        """The cards that fit, and what can be filtered by. `asked` is what `self.asked` holds, and the chosen adapter."""
        words, base, tag, method, order, starred, many, chosen = asked
        filters = {"base": base or None, "tag": tag or None, "method": method or None, "favourite": True if starred else None}
        found = library.survey(self.workspace, words or "", order=order or "newest", limit=many, **filters)
        none = "No adapter fits. Search for something else." if found.total else "There are no adapters yet. Train one, or add one below."
        told = f"{found.total:,} adapter{'' if found.total == 1 else 's'}"
        back = [(f"{name}, removed {time.strftime('%d %b %H:%M', time.localtime(when))}", id) for id, name, when in library.removed(self.workspace)[:100]]
        return [
            told if found.count == found.total else f"{found.count:,} of {told}",
            {"items": [entry(item, chosen) for item in found.items], "none": none},
            gr.update(visible=found.count > many),
            choices(found.bases),
            choices(found.tags),
            choices(found.methods),
            gr.update(choices=back, value=back[0][1] if back else None),
        ]

    def pick(self, event: gr.EventData) -> list:
        """The adapter that was clicked."""
        return self.show(str(event.id))

    def show(self, id: str | None, *told: dict) -> list:
        """Everything about one adapter; nothing without an id, or where it is no longer there."""
        try:
            card = library.card(self.workspace, id) if id else None
        except StudioError as error:
            card, told = None, (theme.said("error", str(error)),)
        if card is None:
            hint = told[0]["sentence"] if told else "Choose an adapter to see what is known of it."
            return [None, gr.update(value=hint, visible=True), gr.update(visible=False), "", {"rows": [], "run": ""}, tree.EMPTY, "", "", "", gr.skip(), gr.skip(), []]
        said = [theme.said("error", f"The files are damaged: {card['damage']}. Import the adapter again; its card keeps your notes.")] if card["damage"] else []
        return [
            card["id"],
            gr.update(visible=False),
            gr.update(visible=True),
            card["name"],
            {"rows": rows_of(card), "run": card["run"] or ""},
            tree.drawn(self.workspace, card["id"]),
            ", ".join(card["tags"]),
            card["trigger"],
            card["notes"],
            "★ Favourite" if card["favourite"] else "☆ Favourite",
            gr.update(link=f"/studio/library/{card['id']}", interactive=not card["damage"]),
            [*said, *told],
        ]

    # ---- what the buttons do

    def write(self, id: str, name: str, tags: str, trigger: str, notes: str) -> list:
        """Save what was typed about an adapter; where something cannot be saved, what was typed stays."""
        try:
            if (name or "").strip() != library.card(self.workspace, id)["name"]:
                shelf.rename(self.workspace, id, name or "")
            now = library.card(self.workspace, id)["tags"]
            wanted = [tag.strip() for tag in (tags or "").split(",") if tag.strip()]
            library.tag(self.workspace, id, add=tuple(wanted), remove=tuple(tag for tag in now if tag.casefold() not in {one.casefold() for one in wanted}))
            library.note(self.workspace, id, notes or "")
            library.update(self.workspace, id, trigger=(trigger or "").strip()[:200])
        except StudioError as error:
            return [*[gr.skip()] * (len(self.detail) - 1), [theme.said("error", str(error))]]
        return self.show(id, theme.said("ok", "Saved."))

    def mark(self, id: str) -> list:
        """Make it a favourite, or not one any more."""
        try:
            library.favourite(self.workspace, id, not library.card(self.workspace, id)["favourite"])
        except StudioError as error:
            return self.show(None, theme.said("error", str(error)))
        return self.show(id)

    def check(self, id: str) -> list:
        """Read every byte again."""
        try:
            library.card(self.workspace, id)  # says so where nothing was chosen
            damage = library.verify(self.workspace, id)[id]
        except StudioError as error:
            return self.show(None, theme.said("error", str(error)))
        return self.show(id) if damage else self.show(id, theme.said("ok", "Every byte is what it was when it came in."))

    def take_off(self, id: str) -> list:
        """Remove it, and offer to bring it back."""
        try:
            name = library.card(self.workspace, id)["name"]
            library.remove(self.workspace, id)
        except StudioError as error:
            return [None, gr.update(visible=False), "", *self.show(None, theme.said("error", str(error)))]
        return [id, gr.update(visible=True), f"{theme.plain(name)} was removed. It can be brought back for 30 days.", *self.show(None)]

    def bring_back(self, id: str | None) -> list:
        """Undo a removal."""
        if not id:
            return [gr.update(visible=False), *[gr.skip()] * len(self.detail)]
        try:
            library.undo(self.workspace, id)
        except StudioError as error:
            gr.Warning(str(error))
            return [gr.update(visible=False), *[gr.skip()] * len(self.detail)]
        return [gr.update(visible=False), *self.show(id)]

    def add(self, given: dict):
        """Check an adapter and put it on the shelf. First says what is being done, then what came of it; what was typed stays until it is in."""
        source, revision, name, base = (given[field] or "" for field in (self.source, self.revision, self.new_name, self.new_base))
        stay = [gr.skip()] * (3 + len(self.detail))
        yield [[theme.said("note", "It is being read and checked. The first time, this starts the bench, which takes a few seconds.")], *stay]
        known = {"name": name.strip() or None, "base": base.strip() or None}
        try:
            if given[self.files]:
                id = shelf.import_files(self.workspace, [shelf.Path(file) for file in given[self.files]], **known)
            elif source.strip():
                id = shelf.import_adapter(self.workspace, source.strip(), revision=revision.strip() or None, token=token_of(given[self.token]), **known)
            else:
                yield [[theme.said("error", "Nothing was given. Give a folder, a file or a Hub repository, or upload the files.")], *stay]
                return
        except StudioError as error:
            yield [[theme.said("error", str(error))], *stay]
            return
        card = library.card(self.workspace, id)
        yield [[theme.said("ok", f"{card['name']} is in the library.")], "", None, "", *self.show(id)]


def choices(values: list[str]) -> dict:
    """A filter's choices; what was chosen stays."""
    return gr.update(choices=[("any", ANY), *(value for value in values if value)])


def entry(item: library.Item, chosen: str | None) -> dict:
    """An adapter in the list."""
    return {
        "id": item.id, "name": item.name, "base": item.base, "method": f"{item.method}{f' r{item.rank}' if item.rank else ''} · {item.bytes / 1e6:.2f} MB", "damage": bool(item.damage),
        "tags": list(item.tags[:6]), "favourite": item.favourite, "when": time.strftime("%d %b %Y, %H:%M", time.localtime(item.created)),
        "chosen": "true" if item.id == chosen else "false",
    }  # fmt: skip


def rows_of(card: dict) -> list[dict]:
    """What is known of an adapter, in the order in which it is asked for."""
    rank = f", rank {card['rank']}" if card["rank"] else ""
    alpha = "" if card["alpha"] is None else f", alpha {card['alpha']:g}"
    data, recipe = card["data"] or {}, card["recipe"] or {}
    loss = recipe.get("loss")
    found = [
        ("base", card["base"] + (f" @ {card['base_revision'][:12]}" if card["base_revision"] else "")),
        ("method", f"{'rank-stabilised ' if card['rslora'] else ''}{card['method']}{rank}{alpha}"),
        ("size", f"{card['bytes'] / 1e6:.2f} MB, {card['parameters']:,} parameters in {card['layers']} layers"),
        ("targets", ", ".join(map(str, card["targets"]))),
        ("measured", ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in card["metrics"].items() if isinstance(value, int | float))),
        ("rows", ", ".join(map(str, data.get("sources", ())))),
        ("fingerprint of rows", str(data.get("print", ""))[:16]),
        ("recipe", recipe_in_words(recipe)),
        ("true error", f"{loss:.1e}" if isinstance(loss, int | float) else ""),
        ("came from", card["source"]),
        ("published", ", ".join(f"{one.get('repo')} ({'private' if one.get('private') else 'public'}, {str(one.get('commit'))[:12]})" for one in card["publications"] if isinstance(one, dict))),
        ("added", time.strftime("%d %b %Y, %H:%M", time.localtime(card["created"]))),
        ("id", card["id"]),
        ("sha256", card["sha256"][:16]),
    ]
    return [{"label": label, "value": value} for label, value in found if value]


def recipe_in_words(recipe: dict) -> str:
    """How an adapter was put together."""
    if not recipe:
        return ""
    rank = recipe.get("rank")
    if "merge" in recipe:
        merge = recipe["merge"]
        settings = ", ".join(f"{key} {value}" for key, value in merge.items() if key not in ("how", "parts"))
        return f"{merge.get('how')} of {len(merge.get('parts', ()))} adapters" + (f", {settings}" if settings else "")
    if "resize" in recipe:
        return "resized: " + ", ".join(f"{key} {value}" for key, value in recipe["resize"].items() if key != "adapter")
    if "extracted" in recipe:
        return f"extracted from {recipe['extracted'].get('from')}"
    return f"sum of {len(recipe.get('sum', ()))} adapters, {'exact' if rank is None else f'compressed to rank {rank}'}"
