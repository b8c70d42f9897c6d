"""Captions written by a model: a run like any other, and one step of its album that can be undone. Until it ends the album stays as it is.

    pictures.json     which pictures, and the captions that they had when it began
    captions.jsonl    what was written so far, from which a cut run goes on
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from PIL import Image

from lora_studio import bases, durable, runs
from lora_studio.errors import BaseModelError, DataError, StudioError
from lora_studio.pictures import album, decoding
from lora_studio.pictures.picture import Picture, Skip, shown
from lora_studio.spec.captions import CaptionSpec, parse

ASKED = "Describe this picture in one sentence."
LONGEST_EDGE = 1024
TRIES = 5


class Writer:
    """An image-to-text model on a device. `ended` is asked before every token whether to break off."""

    def __init__(self, spec: CaptionSpec, device: str, ended: Callable[[], bool]):
        self.spec, self.device = spec, torch.device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        known = {"local_files_only": True, "trust_remote_code": False}
        folder = bases.fetch(spec.model)
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(folder, **known)
            self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=self.dtype, use_safetensors=True, **known)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
            raise BaseModelError("caption.model", id=spec.model.id, reason=_first_line(error)) from None
        if not callable(getattr(self.processor, "batch_decode", None)) or getattr(self.processor, "image_processor", None) is None:
            raise BaseModelError("caption.model", id=spec.model.id, reason="it has no processor of pictures and words")
        self.model = self.model.to(self.device).eval()
        self.stop = transformers.StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), ended(), device=ids.device)])

    def write(self, image: Image.Image) -> str:
        """The caption of one picture."""
        given = self._asked(image).to(self.device)
        given = {name: value.to(self.dtype) if torch.is_floating_point(value) else value for name, value in given.items()}
        with torch.inference_mode():
            found = self.model.generate(**given, max_new_tokens=self.spec.tokens, do_sample=False, stopping_criteria=self.stop)
        # A model that speaks on repeats what it was asked; one that reads the picture through an encoder begins with the caption.
        begun = given["input_ids"].shape[1] if "input_ids" in given and self._talks else 0
        return " ".join(self.processor.batch_decode(found[:, begun:], skip_special_tokens=True)[0].split())

    @property
    def _talks(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def _asked(self, image: Image.Image):
        if not self._talks:
            words = {"text": self.spec.prompt} if self.spec.prompt.strip() else {}
            return self.processor(images=image, return_tensors="pt", **words)
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.spec.prompt.strip() or ASKED}]}]
        text = self.processor.apply_chat_template(asked, add_generation_prompt=True)
        return self.processor(images=[image], text=text, return_tensors="pt")


def run(folder: Path, desk) -> None:
    """Write the captions of the run in `folder`, from where it was cut off. Raises StudioError; then the album is as it was."""
    spec = spec_of(folder)
    device = durable.read_json(folder / "card.json", {}).get("device", "cpu")
    place = Path(spec.album)
    before = _begin(folder, spec, album.view(place).captions)
    made = _made(folder, before)
    began_before = any(event["kind"] == "started" for event in runs.read_all(folder))
    writer = Writer(spec, "cuda:0" if device.startswith("cuda") else device, lambda: desk.asked("stop") is not None)
    facts = {"steps": len(before), "device": str(writer.device), "precision": str(writer.dtype).removeprefix("torch."), "unit": "pictures"}
    desk.emit("started", **facts, words=f"{spec.model.id} writes captions for {_pictures(len(before))} on {writer.device}.")
    if began_before:
        desk.emit("resumed", step=len(made), words=f"{len(made)} of {len(before)} captions were there already.")
    stopped = _write_all(folder, desk, writer, before, made)
    request = desk.asked("stop") or {}
    kept = 0 if stopped and not request.get("save") else _keep(place, spec, before, made)
    if kept:
        desk.emit("saved", step=len(made), what=f"{kept} captions")
    told = f"{kept} caption{' is' if kept == 1 else 's are'} in {place.name}" + ("; they can be undone there." if kept else ".")
    if len(made) - kept and not (stopped and not request.get("save")):
        told += f" {len(made) - kept} more {'was' if len(made) - kept == 1 else 'were'} not written: changed or removed meanwhile, or like that already."
    desk.emit("stopped" if stopped else "done", step=len(made), steps=len(before), reason=f"Stopped on request. {told}" if stopped else told, saved=bool(kept))
    desk.answered("stop")


def spec_of(folder: Path) -> CaptionSpec:
    """The spec of a run that writes captions. Raises SpecError."""
    return parse(runs.settings.read_tree(folder / "spec.yaml"))


def _begin(folder: Path, spec: CaptionSpec, captions: dict[str, str]) -> dict[str, str]:
    """The captions that the chosen pictures had when the run began; on disk from its first start on. Raises DataError."""
    known = durable.read_json(folder / "pictures.json")
    if not isinstance(known, dict):
        chosen = spec.pictures if isinstance(spec.pictures, list) else list(captions)
        known = {name: captions[name] for name in chosen if name in captions and (spec.pictures != "missing" or not captions[name])}
        if not known:
            raise DataError("caption.none", album=shown(Path(spec.album).name))
        durable.write_json(folder / "pictures.json", known)
    return known


def _made(folder: Path, before: dict[str, str]) -> dict[str, str]:
    """What was written so far; a half-written last line is written again."""
    found = {}
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines() if (folder / "captions.jsonl").exists() else ():
        try:
            row = json.loads(line)
            found[row["file_name"]] = row["text"]
        except (ValueError, KeyError, TypeError):
            continue
    return {name: text for name, text in found.items() if name in before}


def _write_all(folder: Path, desk, writer: Writer, before: dict[str, str], made: dict[str, str]) -> bool:
    """Caption picture after picture into `made` and the run's file. Returns whether it was stopped."""
    began, fresh = time.monotonic(), 0
    with open(folder / "captions.jsonl", "a", encoding="utf-8") as file:
        for name in before:
            if desk.asked("stop"):
                return True
            if name in made:
                continue
            try:
                text = writer.write(_image(Path(writer.spec.album) / name))
            except (Skip, DataError) as error:
                desk.emit("note", text=f"{shown(name)} was passed over: {error}")
                text = None
            if desk.asked("stop"):
                return True  # this one may have been broken off
            if text:
                made[name] = text
                file.write("\n" * (fresh == 0) + json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                print(f"{shown(name)}: {text}", flush=True)
            fresh += 1
            pace = fresh / max(1e-9, time.monotonic() - began)
            desk.emit("step", step=len(made), steps=len(before), tokens_per_second=round(pace, 3), seconds_left=round((len(before) - len(made)) / pace, 1), memory=_memory(writer.device))
    return False


def _image(file: Path) -> Image.Image:
    """A picture as training would see it, at a size that models can use. Raises Skip and DataError."""
    if not file.is_file():
        raise Skip("it was taken out meanwhile")
    seen = decoding.look(file, decode=False)
    zoom = min(1.0, LONGEST_EDGE / max(seen.width, seen.height))
    size = max(1, round(seen.width * zoom)), max(1, round(seen.height * zoom))
    return decoding.load(Picture(file, file.name, "", seen.width, seen.height, seen.digest), size=size)


def _keep(place: Path, spec: CaptionSpec, before: dict[str, str], made: dict[str, str]) -> int:
    """Write the captions into the album, as one step; what someone changed or removed meanwhile stays. Returns how many."""
    for attempt in range(TRIES):
        now = album.view(place).captions
        fresh = {name: text for name, text in made.items() if now.get(name) == before[name]}
        try:
            return album.write(place, fresh, seen={name: before[name] for name in fresh}, words=f"captions by {shown(spec.model.id, 40)} for {_pictures(len(fresh))}") if fresh else 0
        except StudioError as error:
            if error.key not in ("album.caption_changed", "album.no_picture") or attempt == TRIES - 1:
                raise
    return 0


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
