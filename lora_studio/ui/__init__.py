"""The pages: one Blocks with tabs, each a file of its own. They call studio's verbs and nothing below; torch is never loaded."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import threading
import time

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import FileResponse, PlainTextResponse, Response

from lora_studio import studio
from lora_studio.errors import StudioError
from lora_studio.ui import guard, theme
from lora_studio.ui.runs import Runs
from lora_studio.ui.train import Train
from lora_studio.workspace import Workspace, local

PUMP_SECONDS = 2.0
PAGES = ("train", "runs")
# Tabs say that they were selected while the page loads too; the address follows only once it has been read.
ADDRESS = "() => { if(!window.studioIsReady) return; const url = new URL(location); url.searchParams.set('tab', '%s'); history.replaceState(null, '', url); }"
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def build(workspace: Workspace | None = None) -> gr.Blocks:
    """The studio's pages over a workspace."""
    workspace = workspace or local()
    train, run = Train(workspace), Runs(workspace)
    with gr.Blocks(title="LoRA Studio", fill_width=True, delete_cache=(3600, 86400)) as pages:
        gr.HTML(studio.hardware(), html_template=theme.BRAND, css_template=theme.BRAND_CSS, elem_classes="flush")
        with gr.Tabs(selected="train", overflow_behavior="menu") as tabs:
            with gr.Tab("Train", id="train") as train_tab:
                train.build()
            with gr.Tab("Runs", id="runs") as runs_tab:
                run.build()
        train.connect((lambda id: _opened(run, id), [tabs, *run.opened]))
        run.connect(train, tabs)
        _connect_tabs(pages, tabs, {"train": train_tab, "runs": runs_tab}, run)
        pages.load(lambda: train.fill(train.first), None, [*train.form.values(), train.data, train.plus], **QUIET)
        pages.load(lambda: train.first, None, train.preset, **QUIET)
    return pages


def _opened(run: Runs, id: str | None) -> list:
    """Updates that go to a run that was started; none without one."""
    if id is None:
        return [gr.skip()] * (1 + len(run.opened))
    return [gr.Tabs(selected="runs"), *run.open(id)]


def _connect_tabs(pages: gr.Blocks, tabs: gr.Tabs, by_name: dict, run: Runs) -> None:
    """Deep links (?tab=&run=), the address that follows, and a timer that ticks only while its page is open."""

    def route(request: gr.Request):
        wanted, id = request.query_params.get("tab"), request.query_params.get("run")
        if wanted not in by_name and id is None:
            return [gr.skip()] * (2 + len(run.opened))
        return [gr.Tabs(selected=wanted if wanted in by_name else "runs"), gr.Timer(active=True), *run.open(id)]

    pages.load(route, None, [tabs, run.timer, *run.opened], **QUIET).then(None, None, None, js="() => { window.studioIsReady = true; }", **QUIET)
    for name, tab in by_name.items():
        tab.select(None, None, None, js=ADDRESS % name, api_visibility="private")
        tab.select(lambda name=name: gr.Timer(active=name == "runs"), None, run.timer, queue=False, **QUIET)
    by_name["runs"].select(lambda id, asking: run.open(id) if id is None else [gr.skip()] * 5 + run.refresh(id, asking), [run.chosen, run.asking], run.opened, **QUIET)


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
    app.add_api_route("/studio/adapter/{id}", lambda id: _download(workspace, id), methods=["GET"])
    if block:
        pages.block_thread()
    return pages


def _download(workspace: Workspace, id: str) -> Response:
    """The adapter of a run as a .zip; whatever is not such a run is not found."""
    try:
        archive = studio.adapter_archive(workspace, id)
    except StudioError as error:
        return PlainTextResponse(str(error), status_code=404)
    return FileResponse(archive, filename=archive.name, media_type="application/zip")


def _pump_forever() -> None:
    """Start what waits, every other second; the runs themselves do not need the server."""
    while True:
        time.sleep(PUMP_SECONDS)
        studio.pump()
