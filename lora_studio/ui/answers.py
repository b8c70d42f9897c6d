"""Answers side by side, as the Playground and the try-out show them: how they look, and how a turn of them fills as the bench speaks."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import library
from lora_studio.ui import theme
from lora_studio.weights import in_words
from lora_studio.workspace import Workspace

ANSWERS = """<div class="talk" aria-live="polite" aria-busy="{{value.busy}}">{{#each value.turns}}<article><p class="prompt">{{prompt}}</p>
<div class="sides">{{#each answers}}<section data-side="{{side}}"><h4>{{label}}</h4>{{#if picture}}<a href="{{picture}}" target="_blank"><img src="{{picture}}" alt="{{label}}"{{#if old}} class="old"{{/if}}></a>{{else}}<div class="text">{{text}}</div>{{/if}}<footer>{{foot}}</footer></section>{{/each}}</div></article>
{{/each}}{{#unless value.turns}}<p class="none">{{value.none}}</p>{{/unless}}</div>"""
ANSWERS_CSS = """
.talk{display:flex;flex-direction:column;gap:14px;color:var(--body-text-color)}
.talk .none{color:var(--body-text-color-subdued);margin:18px 0;text-align:center}
.talk article{display:flex;flex-direction:column;gap:8px;min-width:0}
.talk .prompt{margin:0 0 0 auto;max-width:85%;padding:7px 12px;border-radius:12px 12px 3px 12px;background:var(--color-accent-soft);white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px;color:var(--body-text-color)}
.talk .sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,190px),1fr));gap:10px}
.talk section{border:1px solid var(--border-color-primary);border-radius:10px;padding:8px 12px;background:var(--background-fill-primary);min-width:0;display:flex;flex-direction:column;gap:5px}
.talk h4{margin:0;font-size:12px;font-weight:700;color:var(--color-accent);overflow-wrap:anywhere}
.talk .text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px;line-height:1.5;flex:1;min-height:1.5em}
.talk img{width:100%;max-width:320px;border-radius:8px;display:block;margin:0}.talk .old{opacity:.45}
.talk footer{font-size:12px;color:var(--body-text-color-subdued);overflow-wrap:anywhere}
"""
EVERY_SECONDS = 0.1
ENDS = {"end": "ended by itself", "longest": "cut at the longest answer", "context": "cut: the model has no more room"}


@dataclass
class Heard:
    """What has come of a turn so far beside its texts and pictures: sentences, what the bench does, and its last event."""

    told: list[dict] = field(default_factory=list)
    doing: str = "Asking the bench…"
    ended: dict = field(default_factory=dict)
    is_over: bool = False


def begun(prompt: str, labels: dict[str, str]) -> dict:
    """A turn in which nothing was said yet; `labels` names its sides."""
    return {"prompt": prompt, "answers": [{"side": side, "label": label, "text": "", "picture": "", "foot": "", "lost": False} for side, label in labels.items()]}


def shown(said: list[dict], *, busy: bool = True, none: str = "") -> dict:
    """Turns as the component takes them."""
    return {"busy": "true" if busy else "false", "turns": said, "none": none}


def names_of(workspace: Workspace, ids) -> dict[str, str]:
    """The names of adapters by the folders that the bench reports."""
    return {str(library.adapter_folder(workspace, id)): library.card(workspace, id)["name"] for id in ids}


def listen(events: Iterator[dict], turn: dict, names: dict[str, str], is_void: Callable[[], bool]) -> Iterator[Heard]:
    """Fill a turn as its answers come, up to their end or until nobody wants them any more; gives what was heard, ten times a second at
    most, and once at the end. Raises StudioError."""
    by_side, heard, last = {answer["side"]: answer for answer in turn["answers"]}, Heard(), 0.0
    with contextlib.closing(events):
        for event in events:
            if is_void():
                break
            _take(event, by_side, heard)
            if time.monotonic() - last >= EVERY_SECONDS:
                last = time.monotonic()
                yield heard
    heard.is_over = True
    for side, answer in by_side.items():
        answer["foot"] = foot(heard.ended["sides"][side], names) if heard.ended else "stopped" if _is_said(answer) else "stopped before the first word"
    yield heard


def _take(event: dict, by_side: dict[str, dict], heard: Heard) -> None:
    """Put what an event tells where it belongs."""
    kind = event["event"]
    if kind == "piece":
        by_side[event["side"]]["text"] += event["text"]
        heard.doing = "Answering…"
    elif kind == "step":
        by_side[event["side"]]["foot"] = f"step {event['step']} of {event['steps']}"
        heard.doing = "Drawing…"
    elif kind == "picture":
        by_side[event["side"]] |= {"picture": f"/studio/picture/{Path(event['path']).name}", "old": False}
    elif kind == "note":
        heard.told.append(theme.said("note", event["sentence"]))
    elif kind == "waiting":
        heard.doing = event["doing"][:1].upper() + event["doing"][1:] + "…"
    elif kind == "done":
        heard.ended = event


def broken(turn: dict) -> bool:
    """Mark a turn that an error ended. Returns whether anything had been said of it, so that it is worth keeping."""
    kept = any(_is_said(answer) for answer in turn["answers"])
    if kept:
        for answer in turn["answers"]:
            answer |= {"lost": True, "foot": "broken off"}
    return kept


def _is_said(answer: dict) -> bool:
    """Whether anything has come of an answer; a picture of the one before does not count."""
    return bool(answer["text"] or (answer["picture"] and not answer.get("old")))


def foot(told: dict, names: dict[str, str]) -> str:
    """How an answer ended, and which adapters were on while it was spoken: what the bench reports, not what was asked for."""
    on = ", ".join(f"{names.get(path, Path(path).parent.name)} × {in_words(weight)}" for path, weight in told["active"]) or "all adapters off"
    if "path" in told:
        return on
    count = told["tokens"]
    return f"{count} token{'' if count == 1 else 's'} · {ENDS.get(told['ended'], told['ended'])} · {on}"
