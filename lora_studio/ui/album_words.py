"""What the Pictures page says: how many, which captions the tools act on, and what a button would undo."""

import gradio as gr

from lora_studio import albums


def pictures(count: int) -> str:
    """A number of pictures in words."""
    return "1 picture" if count == 1 else f"{count:,} pictures"


def told_of(kind: str, count: int, change: albums.Edit) -> str:
    """What a change did."""
    if not count and kind == "replace":
        return f"No caption holds {change.find!r}, so nothing was changed."
    return f"{count:,} caption{' was' if count == 1 else 's were'} changed." if count else "Every caption is like that already, so nothing was changed."


def scope(chosen: list[str], total: int) -> str:
    """Which captions the tools act on."""
    if chosen:
        return f"Acts on the **{pictures(len(chosen))}** chosen."
    return f"Acts on **all {pictures(total)}**. Choose some to narrow it." if total else ""


def undoing(view: albums.View) -> list:
    """The two buttons, which say what they would do."""
    undo = gr.update(value=f"Undo: {view.undo}", interactive=True) if view.undo else gr.update(value="Nothing to undo", interactive=False)
    return [undo, gr.update(value=f"Redo: {view.redo}" if view.redo else "Redo", interactive=bool(view.redo))]
