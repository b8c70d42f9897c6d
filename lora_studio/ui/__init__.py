"""The pages: one Blocks with tabs, each a file of its own. They call studio's verbs and nothing below; torch is never loaded."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import shutil
import tempfile
import threading
import time
from pathlib import Path

import gradio as gr
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.responses import FileResponse, PlainTextResponse, Response

from lora_studio import albums, exports, shelf, studio
from lora_studio.errors import StudioError
from lora_studio.ui import guard, theme
from lora_studio.ui.blend import Blend
from lora_studio.ui.how import How
from lora_studio.ui.library import Library
from lora_studio.ui.pictures import Pictures
from lora_studio.ui.playground import Playground
from lora_studio.ui.publish import Publish
from lora_studio.ui.runs import Runs
from lora_studio.ui.train import Train
from lora_studio.workspace import Workspace, local

PUMP_SECONDS = 2.0
PAGES = {"train": Train, "pictures": Pictures, "runs": Runs, "library": Library, "blend": Blend, "playground": Playground, "publish": Publish, "how": How}
# Tabs say that they were selected while the page loads too; the address follows only once it has been read.
ADDRESS = "() => { if(!window.studioIsReady) return; const url = new URL(location); url.searchParams.set('tab', '%s'); history.replaceState(null, '', url); }"
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def build(workspace: Workspace | None = None) -> gr.Blocks:
    """The studio's pages over a workspace."""
    workspace = workspace or local()
    found = {name: kind(workspace) for name, kind in PAGES.items()}
    by_name = {}
    with gr.Blocks(title="LoRA Studio", fill_width=True, delete_cache=(3600, 86400)) as pages:
        gr.HTML(studio.hardware(), html_template=theme.BRAND, css_template=theme.BRAND_CSS, elem_classes="flush")
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
        return [gr.Tabs(selected=tab), gr.Timer(active=tab == "runs"), *run.open(id), *shown]

    outputs = [tabs, run.timer, *run.opened, *library.opened, *pictures.opened]
    pages.load(route, None, outputs, **QUIET).then(None, None, None, js="() => { window.studioIsReady = true; }", **QUIET)
    for name, tab in by_name.items():
        tab.select(None, None, None, js=ADDRESS % name, api_visibility="private")
        tab.select(lambda name=name: gr.Timer(active=name == "runs"), None, run.timer, queue=False, **QUIET)
    by_name["runs"].select(lambda id, asking: run.open(id) if id is None else [gr.skip()] * 5 + run.refresh(id, asking), [run.chosen, run.asking], run.opened, **QUIET)
    by_name["pictures"].select(pictures.fresh, [*pictures.asked, pictures.revision], pictures.opened, **QUIET)
    by_name["library"].select(library.search, [*library.asked, library.chosen], library.listed, **QUIET)


def serve(*, host: str = "127.0.0.1", port: int = 7860, block: bool = True):
    """Serve the studio. Anything but a loopback address is for networks you trust: there is no sign-in yet."""
    workspace = local()
    # Uploads pass through here; Gradio's own default is one folder for everybody on the machine.
    os.environ.setdefault("GRADIO_TEMP_DIR", str(workspace.root / "gradio"))
    pages = build(workspace)
    hosts = guard.LOOPBACK if host in guard.LOOPBACK else ()
    studio.pump()
    threading.Thread(target=_pump_forever, daemon=True, name="pump").start()
    pages.queue(max_size=200, default_concurrency_limit=4)
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
        app_kwargs={"middleware": [Middleware(guard.SameOrigin, hosts=hosts)], "openapi_url": None},
    )
    app.add_api_route("/studio/adapter/{id}", lambda id: _download(lambda place: studio.adapter_archive(workspace, id, place)), methods=["GET"])
    app.add_api_route("/studio/library/{id}", lambda id: _download(lambda place: shelf.archive(workspace, id, place)), methods=["GET"])
    app.add_api_route("/studio/sample/{id}/{name}", lambda id, name: _picture(lambda: studio.sample(workspace, id, name)), methods=["GET"])
    app.add_api_route("/studio/picture/{name}", lambda name: _picture(lambda: studio.picture(workspace, name)), methods=["GET"])
    app.add_api_route("/studio/album/{album}/{name:path}", lambda album, name, size="small": _picture(lambda: albums.thumbnail(workspace, album, name, size), "image/jpeg"), methods=["GET"])
    app.add_api_route("/studio/export/{token}/{name}", lambda token, name: _exported(workspace, token, name), methods=["GET"])
    if block:
        pages.block_thread()
    return pages


def _download(pack) -> Response:
    """What `pack` writes into a folder, as a .zip that is gone once it was sent; what is not there is not found."""
    place = Path(tempfile.mkdtemp(prefix="lora-studio-"))
    try:
        archive = pack(place)
    except StudioError as error:
        shutil.rmtree(place, ignore_errors=True)
        return PlainTextResponse(str(error), status_code=404)
    return FileResponse(archive, filename=archive.name, media_type="application/zip", background=BackgroundTask(shutil.rmtree, place, True))


def _exported(workspace: Workspace, token: str, name: str) -> Response:
    """An exported file; one that is not there (any more) is not found."""
    try:
        return FileResponse(exports.file(workspace, token, name), filename=name, media_type="application/octet-stream")
    except StudioError as error:
        return PlainTextResponse(str(error), status_code=404)


def _picture(find, kind: str = "image/png") -> Response:
    """A picture, which never changes under its name."""
    try:
        return FileResponse(find(), media_type=kind, headers={"Cache-Control": "private, max-age=86400, immutable"})
    except StudioError as error:
        return PlainTextResponse(str(error), status_code=404)


def _pump_forever() -> None:
    """Start what waits, every other second; the runs themselves do not need the server."""
    while True:
        time.sleep(PUMP_SECONDS)
        studio.pump()
