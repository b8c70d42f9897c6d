"""The pages: one Blocks with tabs, each a file of its own. They call studio's verbs and nothing below; torch is never loaded."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from starlette.middleware import Middleware

from lora_studio import fence, keeping, shelf, studio
from lora_studio.hosting import Hosting
from lora_studio.hosting import of as how_open
from lora_studio.ui import guard, routes, theme
from lora_studio.ui.account import Account
from lora_studio.ui.blend import Blend
from lora_studio.ui.door import Door
from lora_studio.ui.events import QUIET
from lora_studio.ui.how import How
from lora_studio.ui.library import Library
from lora_studio.ui.pictures import Pictures
from lora_studio.ui.playground import Playground
from lora_studio.ui.publish import Publish
from lora_studio.ui.pump import Pump
from lora_studio.ui.runs import Runs
from lora_studio.ui.seat import WORKSPACE, Seats, asking
from lora_studio.ui.sign_in import SignIn
from lora_studio.ui.train import Train
from lora_studio.ui.versus import Versus
from lora_studio.workspace import Workspace, local

PAGES = {"train": Train, "pictures": Pictures, "runs": Runs, "library": Library, "blend": Blend, "playground": Playground, "publish": Publish, "versus": Versus, "how": How}
# Tabs say that they were selected while the page loads too; the address follows only once it has been read.
ADDRESS = "() => { if(!window.studioIsReady) return; const url = new URL(location); url.searchParams.set('tab', '%s'); history.replaceState(null, '', url); }"


def build(seats: Workspace | Seats | None = None, hosting: Hosting | None = None, pump: Pump | None = None) -> gr.Blocks:
    """The studio's pages over a workspace, or over that of whoever asks. What the pump cannot keep is said where people sign in."""
    seats = seats or local()
    found = {name: kind(seats) for name, kind in PAGES.items()}
    by_name = {}
    with gr.Blocks(title="LoRA Studio", fill_width=True, delete_cache=(3600, 86400)) as pages:
        gr.HTML(studio.hardware(), html_template=theme.BRAND, css_template=theme.BRAND_CSS, elem_classes="flush")
        Account(seats, hosting or Hosting(), pump).build(pages)
        with gr.Tabs(selected="train", overflow_behavior="menu") as tabs:
            for name, page in found.items():
                with gr.Tab(getattr(page, "title", name.capitalize()), id=name) as by_name[name]:
                    page.build()
        _connect_pages(tabs, by_name, found)
        _connect_tabs(pages, tabs, by_name, found)
        train = found["train"]
        pages.load(lambda: train.fill(train.first), None, [*train.form.values(), train.data, train.plus], **QUIET)
        pages.load(lambda: train.first, None, train.preset, **QUIET)
    return pages


def _connect_pages(tabs: gr.Tabs, by_name: dict, found: dict) -> None:
    """Let every page act, and lead to the others."""
    run, library, publish = found["runs"], found["library"], found["publish"]
    found["train"].connect((lambda id: _opened(run, id), [tabs, *run.opened]))
    run.connect(found["train"], library, tabs)
    library.connect(tabs, found)
    found["pictures"].connect(tabs, found["train"], (lambda id: _opened(run, id), [tabs, *run.opened]))
    found["blend"].connect(tabs, found["playground"], library, publish)
    found["playground"].connect(tabs, found["blend"])
    publish.connect(by_name["publish"])
    found["versus"].connect(by_name["versus"])


def _opened(run: Runs, id: str | None) -> list:
    """Updates that go to a run that was started; none without one."""
    if id is None:
        return [gr.skip()] * (1 + len(run.opened))
    return [gr.Tabs(selected="runs"), *run.open(id)]


def _connect_tabs(pages: gr.Blocks, tabs: gr.Tabs, by_name: dict, found: dict) -> None:
    """Deep links (?tab=&run=&adapter=&album=), the address that follows, and a timer that ticks only while its page is open."""
    run, library, pictures = found["runs"], found["library"], found["pictures"]

    def route(request: gr.Request):
        asked = request.query_params
        wanted, id, adapter, album = asked.get("tab"), asked.get("run"), asked.get("adapter"), asked.get("album")
        tab = wanted if wanted in by_name else "runs" if id else "library" if adapter else "pictures" if album else None
        if tab is None:
            return [gr.skip()] * len(outputs)
        shown = library.open(adapter) if adapter else [gr.skip()] * len(library.opened)
        shown += pictures.open(album) if album or tab == "pictures" else [gr.skip()] * len(pictures.opened)
        return [gr.Tabs(selected=tab), gr.Timer(active=tab == "runs"), *run.land(id), *shown]

    outputs = [tabs, run.timer, *run.opened, *library.opened, *pictures.opened]
    pages.load(route, None, outputs, **QUIET).then(None, None, None, js="() => { window.studioIsReady = true; }", **QUIET)
    for name, tab in by_name.items():
        tab.select(None, None, None, js=ADDRESS % name, api_visibility="private")
        tab.select(lambda name=name: gr.Timer(active=name == "runs"), None, run.timer, queue=False, **QUIET)
    by_name["runs"].select(lambda id, asking: run.land(id) if id is None else [gr.skip()] * 5 + run.refresh_quietly(id, asking), [run.chosen, run.asking], run.opened, **QUIET)
    by_name["pictures"].select(pictures.fresh, [*pictures.asked, pictures.revision], pictures.opened, **QUIET)
    by_name["library"].select(library.search, [*library.asked, library.chosen], library.listed, **QUIET)


def serve(*, host: str = "127.0.0.1", port: int = 7860, block: bool = True):
    """Serve the studio as its environment says (see hosting.py): on loopback to the person at this machine, elsewhere to those who sign in.
    Raises HostError for settings that do not go together."""
    hosting = how_open(os.environ, host=host)
    own, seats = local(), Seats(local() if hosting.kind == "local" else None)
    # Uploads pass through here; Gradio's own default is one folder for everybody on the machine.
    os.environ.setdefault("GRADIO_TEMP_DIR", str(own.root / "gradio"))
    uploads = os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(os.environ["GRADIO_TEMP_DIR"])
    if hosting.kind == "visitors":
        # Nobody's downloads, and nobody's runs, speak with the owner's login.
        os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
        os.environ.pop("HF_TOKEN", None)
        fence.watch(lambda: asking().get(WORKSPACE))
    pump = Pump(hosting)
    pages = build(seats, hosting, pump)
    pages.pump = pump
    pump.start()
    keeping.start(hosting.oauth.secret if hosting.oauth else hosting.password)
    pages.queue(max_size=200, default_concurrency_limit=4)
    os.environ.pop("GRADIO_DEBUG", None)  # with it Gradio waits inside launch, and what comes after never does
    middleware = [
        Middleware(guard.SameOrigin, hosts=hosting.hosts, public=hosting.public),
        Middleware(Door, hosting=hosting, signs=SignIn(hosting), uploads=uploads, shared=lambda: shelf.published(own)),
    ]
    app, _, _ = pages.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        show_error=False,
        quiet=True,
        max_file_size="2gb",
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        theme=theme.theme(),
        css=theme.CSS,
        prevent_thread_lock=True,
        app_kwargs={"middleware": middleware, "openapi_url": None},
    )
    routes.add_to(app, seats)
    if hosting.password_is_made:
        print(f"Whoever comes from outside signs in with the password {hosting.password} (set LORA_STUDIO_PASSWORD for one of your own).", flush=True)
    if block:
        pages.block_thread()
    return pages
