"""What the bench does: check adapters, preview and save blends, answer. Keeps what it has read, and one model.

    verb      arguments                                           last event
    check     path, [base], [config]                              result: card, problems, usable
    convert   path, target, [base]                                result: layers
    preview   parts                                               result: norms, sizes, cosines, acting, norm, losses, rank, layers
    blend     parts, [rank], target, [dtype], [files], [replace]  result: loss, rank, layers, bytes, parents
    bake      base, parts, [target], [dtype], [files]             result or done: bytes, changed, loss, worst, notes, parents
    extract   tuned, base, [rank], [loss], target                 done: loss, layers, ranks, left_out, bytes
    export    path, target, form, [base], [dtype], [name]         result: modules, layers, worst, bytes, by, lost, target
    resize    path, rank or loss, [per_layer], [slice] or size, target     result: loss, rank, ranks, clamped, left_out, bytes, parents
    merge     how, parts, [rank], target, [density], [seed], ...  result: loss, rank, layers, bytes, parents
    judge     parts                                               result: what conflicts.judge says
    load      base, device, lock, [precision]                     result: what status says
    answer    like load, and messages, parts or sides,            done: sides (text, tokens, ended, active), seconds
              [seed, temperature, top_p, longest, template]
    draw      like load, and prompt, target, parts or sides,      done: sides (path, active), seconds
              [seed, steps, guidance, width, height, source]
    measure   like load, and parts, [rounds]                      result: base, unmerged, merged (ms), rounds, of, off
    unload    [run, device, hold, reason]                         result: unloaded

`parts` is a list of [path, weight] or [path, weight, name]; a weight is a number, or numbers by layer pattern (weights.py). `sides` is {name: parts}: several answers to the same messages with the
same seed, spoken in turns, a piece each; no parts are the bare base. `messages` may be {side: messages} too: each its own conversation.
"""

import gc
import logging
import time
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import torch

from lora_studio import bases, durable, fence
from lora_studio.adapters import multiplying, virtual
from lora_studio.errors import BenchError
from lora_studio.inference import baking, exporting, judging, reshaping, room, timing
from lora_studio.inference.blends import Part, Reader, other_base
from lora_studio.inference.requests import argument, base_of, one_of
from lora_studio.training import crew
from lora_studio.weights import Weight, acts, plus

KEPT_ON_SHELF = 8
TRIED = ("dora", *multiplying.METHODS.values(), *virtual.WORDS)  # methods that are tried beside those that add a product


class Desk:
    """What the bench has read and loaded. Everything but `status` and `make_room` is done by one thread."""

    def __init__(self):
        self.reader = Reader()
        self.shelf, self.shelved = None, OrderedDict()
        self.key, self.device, self.place = None, "", None
        self.room, self.loads = room.Room(), 0

    def do(self, job) -> tuple[str, dict]:
        """One request. Returns its last event. Raises StudioError."""
        verb = job.request.get("verb")
        if verb not in VERBS:
            raise BenchError("bench.request", reason=f"there is no verb {str(verb)[:40]!r}; known: {', '.join(VERBS)}")
        act, known = VERBS[verb]
        strange = job.request.keys() - {"verb", "asker", *known.split()}
        if strange:
            raise BenchError("bench.request", reason=f"{verb} knows no {min(strange)[:40]}; known: {known}")
        try:
            with fence.working_for(job.request.get("asker")):
                return act(self, job, job.request)
        except (torch.OutOfMemoryError, MemoryError):
            self._drop()
            raise BenchError("bench.memory", device=job.request.get("device", "the computer")) from None

    # ---- the model

    def load(self, job, request: dict) -> tuple[str, dict]:
        """Load a base and hold its device's lock; nothing when it is loaded already."""
        self._ready(job, request)
        self.room.look()
        return "result", self.status()

    def answer(self, job, request: dict) -> tuple[str, dict]:
        """Answers, spoken in turns."""
        from lora_studio.inference.text import Manner

        sides, template = _sides(request), request.get("template", "auto")
        messages = request.get("messages")
        if isinstance(messages, dict) and messages.keys() != sides.keys():
            raise BenchError("bench.request", reason=f"messages are for {', '.join(messages)[:60] or 'nobody'}, the sides are {', '.join(sides)[:60]}")
        conversation = messages if isinstance(messages, dict) else dict.fromkeys(sides, messages)
        one_of("template", template, ("auto", "chatml"))
        manner = Manner(**{name: request[name] for name in ("seed", "temperature", "top_p", "longest") if name in request})
        parts = self.prepared(job, request, sides, "language")
        started = time.perf_counter()
        weights = {side: self.hang(found) for side, found in parts.items()}
        applied = time.perf_counter() - started
        with crew.Crew(1, crew.worth(self.shelf.model)):  # small models speak more than twice as fast on one thread
            spoken = {
                side: self.shelf.answer(conversation[side], weights=weights[side], manner=manner, template=template)
                for side in sides
            }
            print(f"answering, {len(sides)} at a time", flush=True)
            job.doing, texts, first = "answering", dict.fromkeys(sides, ""), None
            pieces = {side: iter(answer) for side, answer in spoken.items()}
            while pieces:
                for side in list(pieces):
                    job.check()
                    self.room.look()
                    piece = next(pieces[side], None)
                    first = first or time.perf_counter() - started
                    if piece is None:
                        del pieces[side]
                    elif piece:
                        texts[side] += piece
                        job.send("piece", side=side, text=piece)
        seconds = time.perf_counter() - started
        told = {
            side: {"text": texts[side], "tokens": len(answer.tokens), "ended": answer.ended, "active": _active(parts, answer.active)}
            for side, answer in spoken.items()
        }
        return "done", {"sides": told, "seconds": seconds, "apply_ms": 1000 * applied, "first_ms": 1000 * first, "loads": self.loads}

    def draw(self, job, request: dict) -> tuple[str, dict]:
        """Pictures, one side after the other, with the same prompt and seed."""
        from lora_studio.inference.draw import Brush

        sides, prompt, target = _sides(request), argument(request, "prompt", str), Path(argument(request, "target", str))
        brush = Brush(**{name: request[name] for name in ("seed", "steps", "guidance", "width", "height") if name in request})
        source = Path(argument(request, "source", str)) if request.get("source") else None
        parts = self.prepared(job, request, sides, "image")
        started, told, job.doing = time.perf_counter(), {}, "drawing"
        for side in sides:
            weights = {id: weight for id, weight in self.hang(parts[side]).items() if acts(weight)}

            def step(number: int, side=side) -> None:
                job.check()
                self.room.look()
                job.send("step", side=side, step=number, steps=brush.steps)

            path = self.shelf.draw(prompt, brush, target, weights=weights, step=step, source=source)
            told[side] = {"path": str(path), "active": _active(parts, weights)}
            job.send("picture", side=side, path=str(path))
        return "done", {"sides": told, "seconds": time.perf_counter() - started, "loads": self.loads}

    def prepared(self, job, request: dict, sides: dict, kind: str, takes: Collection[str] = TRIED) -> dict[str, list[Part]]:
        """The adapters of every side, read, and the model, loaded; what is worth a word is said. `takes`: see `Reader.parts`. Raises StudioError."""
        parts = {side: self.reader.parts(job, rows, takes=takes) for side, rows in sides.items()}
        is_image = bool(bases.inspect(base_of(request.get("base"))).pipeline)
        if is_image != (kind == "image"):
            raise BenchError("bench.kind", base=base_of(request.get("base")).id, is_a="an image" if is_image else "a language", wanted=f"{'an' if kind == 'image' else 'a'} {kind}")
        if self._ready(job, request):
            job.send("note", sentence=f"{self.key[0].id} is loaded on {self.device}.")
        for sentence in dict.fromkeys(other_base(part, self.key[0].id) for found in parts.values() for part in found):
            if sentence:
                job.send("note", sentence=sentence)
        return parts

    def hang(self, parts: list[Part]) -> dict[str, Weight]:
        """Put what is missing on the shelf, and take off what was not used for long. Returns the weights."""
        weights: dict[str, Weight] = {}
        for part in parts:
            if part.id not in self.shelved:
                self.shelf.hang(part.id, part.adapter, label=part.name)
                self.shelved[part.id] = None
            self.shelved.move_to_end(part.id)
            weights[part.id] = plus(weights[part.id], part.weight, part.adapter.modules) if part.id in weights else part.weight
        return weights

    def _ready(self, job, request: dict) -> bool:
        """See to it that the model is loaded. Returns whether it had to be."""
        device, lock = argument(request, "device", str), Path(argument(request, "lock", str))
        key = (base_of(request.get("base")), device, request.get("precision", "auto"))
        one_of("precision", key[2], ("auto", "fp32", "bf16"))
        self.room.refuse(device)
        if self.shelf is not None and self.key == key:
            while len(self.shelved) > KEPT_ON_SHELF:
                self.shelf.take(self.shelved.popitem(last=False)[0])
            return False
        job.doing = f"fetching {key[0].id}"
        bases.fetch(key[0])  # before the device is taken: this may be a long way
        job.check()
        self._drop()
        place = durable.Lock(lock)
        room.take(place, device, job.check)
        self.place, self.device, self.key = place, device, key
        job.doing = f"loading {key[0].id}"
        try:
            from transformers.utils import logging as transformers_logging

            # Notes about optional packages and bars would be the last line of the log when somebody asks how it ended.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            transformers_logging.disable_progress_bar()
            if bases.inspect(key[0]).pipeline:
                from lora_studio.inference.draw import Easel as Model
            else:
                from lora_studio.inference.text import Shelf as Model
            self.shelf = Model(key[0], device=device, precision=key[2])
        finally:
            if self.shelf is None:
                self._drop()
        self.loads += 1
        print(f"loaded {key[0].id} on {device}", flush=True)
        return True

    def _drop(self) -> None:
        """Forget the model and let go of the device."""
        self.shelf, self.key = None, None
        self.shelved.clear()
        if self.device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()
        self.device = ""
        if self.place is not None:
            self.place.release()
            self.place = None

    def close(self) -> None:
        """Let go of everything."""
        self._drop()

    # ---- room for a run

    def make_room(self, request: dict) -> bool:
        """Note that somebody needs the device; the answer being spoken ends at its next token. Returns whether a model is there (or being
        loaded), so that there is something to unload. Called from any thread."""
        device = self.device
        if not device or request.get("device", device) != device:
            return False
        self.room.ask(request, device)
        return True

    def unload(self, job, request: dict) -> tuple[str, dict]:
        """Unload the model; with `run`, none is loaded again before that run has had its chance to start and has ended."""
        was_there = self.shelf is not None
        self._drop()
        self.room.give()
        return "result", {"unloaded": was_there}

    def status(self) -> dict:
        """What is loaded and, when nothing is because a run needs the device, the sentence that says so."""
        key = self.key
        told = {"state": "loaded" if self.shelf is not None else ("loading" if key else "empty"), "device": self.device, "loads": self.loads}
        told |= {"base": key[0].id if key else "", "precision": key[2] if key else "", "adapters": len(self.shelved)}
        return {**told, "note": self.room.sentence()}


def _sides(request: dict) -> dict[str, list]:
    """The sides of a request: {name: parts}. Raises BenchError."""
    sides = request.get("sides", {"answer": request.get("parts") or []})
    if not isinstance(sides, dict) or not sides or ("sides" in request and "parts" in request):
        raise BenchError("bench.request", reason=f"{request['verb']} needs parts, or sides as {{name: parts}}")
    return sides


def _active(parts: dict[str, list[Part]], weights: dict[str, Weight]) -> list[list]:
    """The adapters that were on, as [path, weight]."""
    paths = {part.id: str(part.path) for found in parts.values() for part in found}
    return [[paths[id], weight] for id, weight in weights.items()]


def _of_reader(verb):
    """A verb of the reader as one of the desk."""
    return lambda desk, job, request: verb(desk.reader, job, request)


ANSWER = "base device lock precision messages parts sides seed temperature top_p longest template"
VERBS = {
    "check": (_of_reader(Reader.check), "path base config"),
    "convert": (_of_reader(Reader.convert), "path target base"),
    "preview": (_of_reader(Reader.preview), "parts"),
    "blend": (_of_reader(Reader.blend), "parts rank target dtype files replace"),
    "bake": (_of_reader(baking.bake), "base parts target dtype files merge"),
    "extract": (_of_reader(baking.extract), "tuned base rank loss target"),
    "export": (_of_reader(exporting.export), "path base target form dtype name"),
    "resize": (_of_reader(reshaping.resize), "path rank loss per_layer size slice target"),
    "merge": (_of_reader(reshaping.merge), "how parts rank density seed gamma epsilon space target"),
    "judge": (_of_reader(judging.judge), "parts"),
    "load": (Desk.load, "base device lock precision"),
    "answer": (Desk.answer, ANSWER),
    "draw": (Desk.draw, "base device lock precision prompt target parts sides seed steps guidance width height source"),
    "measure": (timing.measure, "base device lock precision parts rounds"),
    "unload": (Desk.unload, "run device hold reason"),
}
