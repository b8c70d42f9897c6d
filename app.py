"""The entry: `python app.py` serves the studio on 127.0.0.1:7860. Spaces and the Docker image start the same file."""

import os
import signal
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # before torch, which comes with the next import here and nowhere else in the server

    from lora_studio import zerogpu
    from lora_studio.jobs import bench, devices

    bench.carry(zerogpu.VERBS, zerogpu.serve(spaces, devices.device_lock("cuda:0")))

from lora_studio import keeping, studio, ui
from lora_studio.errors import StudioError

STOP_SECONDS, KEEP_SECONDS = 25.0, 20.0


def main() -> None:
    """Serve on loopback; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT change where. In a container whose end is near, runs are saved first."""
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    try:
        ui.how_open(os.environ, host=host)
    except StudioError as error:
        sys.exit(str(error))
    print(f"LoRA Studio is on http://{host}:{port} (Ctrl-C ends it; runs go on).", flush=True)
    try:
        pages = ui.serve(host=host, port=port, block=False)
    except StudioError as error:
        sys.exit(str(error))
    # Where the machine goes with its files, or the container with its processes, the end of the server is the end of the runs.
    if os.environ.get("LORA_STUDIO_CONTAINER") or pages.pump.storage or pages.pump.hosting.space:
        signal.signal(signal.SIGTERM, lambda *_: _save_and_leave(pages.pump))
    pages.block_thread()


def _save_and_leave(pump: ui.Pump) -> None:
    """End as a container does: every run here dies with it, so each is asked to save, and waited for; then what is new is kept."""
    print("Ending: runs are saved first.", flush=True)
    told = studio.save_all(seconds=STOP_SECONDS)
    print(f"{told} run{' was' if told == 1 else 's were'} saved." if told else "No run was at work.", flush=True)
    if pump.storage:
        print("All files are kept." if pump.keep(everything=True) else "Not all files are kept.", flush=True)
    whole, of = keeping.last(seconds=KEEP_SECONDS)
    if of:
        print(f"{whole} of {of} workspaces are whole in their repositories.", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
