"""The entry: `python app.py` serves the studio on 127.0.0.1:7860."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from lora_studio import ui


def main() -> None:
    """Serve on loopback; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT change where."""
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    print(f"LoRA Studio is on http://{host}:{port} (Ctrl-C ends it; runs go on).", flush=True)
    ui.serve(host=host, port=port)


if __name__ == "__main__":
    main()
