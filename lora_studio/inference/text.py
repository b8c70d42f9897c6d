"""A language model with weighted adapters in memory: `W0·x + Σ w_t·s_t·B_t·(A_t·x)`, with other weights for every answer.

The adapters hang on the base's layers as hooks and are never merged into it. A hook computes in the dtype of its factors (fp32 or
wider), adds to the layer's output and rounds once; with nothing active it returns the output untouched, so that a bare answer is the
base's own, bit for bit. The active weights are set around each forward pass and taken away after it, so several answers with
different weights can be spoken in turns.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_studio import bases
from lora_studio.blend import WEIGHT_LIMIT
from lora_studio.errors import AdapterError, BenchError, BlendError
from lora_studio.lowrank import LowRank
from lora_studio.spec import Base
from lora_studio.training import chat, encode
from lora_studio.training import text as training

# Tokens that end a turn in templates whose models do not always list them as ends.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>")
UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Manner:
    """How an answer is drawn. At temperature 0 the likeliest token is taken each time, and the seed plays no part."""

    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    longest: int = 256

    def __post_init__(self):
        rules = {
            "seed": (isinstance(self.seed, int) and 0 <= self.seed < 2**63, "it must be a whole number from 0 on"),
            "temperature": (_is_number(self.temperature) and 0 <= self.temperature <= 10, "it must be a number from 0 to 10"),
            "top_p": (_is_number(self.top_p) and 0 < self.top_p <= 1, "it must be a number above 0 and at most 1"),
            "longest": (isinstance(self.longest, int) and 1 <= self.longest <= 1 << 20, "it must be a whole number of tokens, at least 1"),
        }
        for name, (is_right, rule) in rules.items():
            if not is_right:
                raise BenchError("bench.setting", name=name, value=repr(getattr(self, name))[:40], rule=rule)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass
class Answer:
    """An answer as it is spoken: iterating gives its pieces, one for each token ("" where a character is not whole yet). Afterwards
    `tokens` holds them all and `ended` says why it ended: end, longest, or context (no room left)."""

    pieces: Iterator[str]
    active: dict[str, float]
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    ended: str = ""

    def __iter__(self) -> Iterator[str]:
        return self.pieces


class Shelf:
    """One base and any number of adapters on its layers. Not safe for several threads at once."""

    def __init__(self, base: Base, *, device: str = "cpu", precision: str = "auto"):
        """Load the base. Raises StudioError with the way out."""
        folder = bases.fetch(base)
        self.base, self.device = base, torch.device(device)
        self.dtype = training.choose_dtype(precision, device)
        self.tokenizer = encode.load_tokenizer(folder, base.id)
        self.model = training.load_model(folder, base.id, self.dtype).to(self.device).eval()
        self.layers = dict(self.model.named_modules())
        self.ids: set[str] = set()
        self.active: tuple[tuple[str, float], ...] = ()
        self._parts: dict[torch.nn.Module, dict[str, _Part]] = {}
        self._takes_few = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    # ---- adapters

    def put(self, id: str, modules: dict[str, LowRank], *, label: str = "The adapter") -> None:
        """Hang an adapter on the layers; it has no weight yet. Raises AdapterError, and then nothing was hung."""
        places = {name: self._layer(name) for name in modules}
        strangers = [name for name, layer in places.items() if layer is None]
        count, base = len(strangers), self.base.id
        if strangers and count == len(modules):
            raise AdapterError("adapter.fits_nothing", path=label, count=count, base=base, name=strangers[0], own="another base")
        if strangers:
            raise AdapterError("adapter.unknown_layers", path=label, count=count, total=len(modules), base=base, name=strangers[0])
        for name, module in modules.items():
            self._check(label, name, module, places[name])
        self.take(id)
        self.ids.add(id)
        for name, module in modules.items():
            layer = places[name]
            if layer not in self._parts:
                self._parts[layer] = {}
                layer.register_forward_hook(self._hook(self._parts[layer]))
            A = module.A.T if module.kind == "embedding" else module.A
            A, B = (tensor.to(self.device, module.dtype).contiguous() for tensor in (A, module.B))
            self._parts[layer][id] = _Part(A, B, module.scale, module.kind == "embedding")

    def take(self, id: str) -> None:
        """Take an adapter off the layers."""
        self.ids.discard(id)
        for parts in self._parts.values():
            parts.pop(id, None)

    def _layer(self, name: str) -> torch.nn.Module | None:
        """The layer an adapter means; checkpoints and models may differ in the first words of a name."""
        if name in self.layers:
            return self.layers[name]
        words = name.split(".")
        for cut in (1, 2):
            end = ".".join(words[cut:])
            found = [known for known in self.layers if end and (known == end or known.endswith("." + end))]
            if len(found) == 1:
                return self.layers[found[0]]
        return None

    def _check(self, label: str, name: str, module: LowRank, layer: torch.nn.Module) -> None:
        kind = type(layer)
        if isinstance(layer, torch.nn.Linear | Conv1D) and module.kind == "linear":
            there = (layer.out_features, layer.in_features) if isinstance(layer, torch.nn.Linear) else (layer.nf, layer.nx)
        elif kind is torch.nn.Embedding and module.kind == "embedding":
            there = tuple(layer.weight.shape)
        else:
            raise AdapterError("bench.layer", path=label, name=name, here=module.kind, there=kind.__name__)
        if module.shape != there:
            raise AdapterError(
                "adapter.other_shapes", path=label, name=name, here=list(module.shape), there=list(there), base=self.base.id, count=1, own="another base"
            )

    def _hook(self, parts: dict[str, "_Part"]):
        def add(_layer, given, output):
            update = None
            for id, weight in self.active:
                part = parts.get(id)
                if part is not None:
                    found = part.update(given[0], weight)
                    update = found if update is None else update + found
            return None if update is None else (output + update).to(output.dtype)

        return add

    @contextmanager
    def using(self, weights: dict[str, float]) -> Iterator[None]:
        """Give adapters their weights for a while. What is not named has none. Raises BlendError."""
        for weight in weights.values():
            if not _is_number(weight) or not abs(weight) <= WEIGHT_LIMIT:
                raise BlendError("blend.weight", weight=repr(weight)[:40], limit=f"{WEIGHT_LIMIT:,.0f}")
        missing = set(weights) - self.ids
        if missing:
            raise KeyError(f"not on the shelf: {sorted(missing)}")
        before, self.active = self.active, tuple((id, weight) for id, weight in weights.items() if weight)
        try:
            yield
        finally:
            self.active = before

    # ---- answers

    def logits(self, ids: list[int], *, weights: dict[str, float]) -> torch.Tensor:
        """The logits (tokens, vocabulary) of a row of token ids."""
        with self.using(weights), torch.inference_mode():
            return self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0]

    def answer(
        self, messages: list[dict] | str, *, weights: dict[str, float] | None = None, manner: Manner = Manner(), template: str = "auto"
    ) -> Answer:
        """Speak: messages are a conversation, or a text to go on with. Stopping to iterate cancels it. The same shelf, messages, weights
        and manner give the same answer. Raises StudioError."""
        weights = {id: float(weight) for id, weight in (weights or {}).items() if weight}
        with self.using(weights):
            pass  # only to check them before the first word
        prompt, ends = self.prompt(messages, template)
        room = (self._context() or len(prompt) + manner.longest) - len(prompt)
        if room < 1:
            raise BenchError("bench.too_long", tokens=len(prompt), room=self._context(), base=self.base.id)
        answer = Answer(iter(()), weights, len(prompt))
        answer.pieces = self._speak(answer, prompt, ends, manner, room)
        return answer

    def _speak(self, answer: Answer, prompt: list[int], ends: set[int], manner: Manner, room: int) -> Iterator[str]:
        draw, cache, given, said, text = torch.Generator().manual_seed(manner.seed), None, prompt, 0, ""
        few = {"logits_to_keep": 1} if self._takes_few else {}
        for _ in range(min(manner.longest, room)):
            with self.using(answer.active), torch.inference_mode():
                ids = torch.tensor([given], device=self.device)
                found = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **few)
                token = choose(found.logits[0, -1], manner, draw)
            cache = found.past_key_values
            if token in ends:
                answer.ended = "end"
                break
            answer.tokens.append(token)
            given = [token]
            # Decoded whole each time: what a token looks like depends on those before it. The rest of a character may be yet to come.
            text = self.decode(answer.tokens)
            ready = max(said, len(text.rstrip(UNFINISHED)))
            piece, said = text[said:ready], ready
            yield piece
        answer.ended = answer.ended or ("longest" if manner.longest <= room else "context")
        if text[said:]:
            yield text[said:]

    def decode(self, tokens: list[int]) -> str:
        """Tokens as text, without the special ones."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt(self, messages: list[dict] | str, template: str = "auto") -> tuple[list[int], set[int]]:
        """Token ids of what comes before the answer, and the tokens that end it. Raises BenchError."""
        ends = {self.tokenizer.eos_token_id, *_listed(self.model.generation_config.eos_token_id)} - {None}
        if isinstance(messages, str):
            ids = list(self.tokenizer(messages)["input_ids"])
            ids = ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids
        else:
            _check_messages(messages)
            chosen = chat.choose(self.tokenizer, template)
            try:
                written = chat.render(self.tokenizer, chosen, messages, prompt=True)
            except chat.TemplateError as error:
                raise BenchError("bench.template", base=self.base.id, reason=error) from None
            ids = list(self.tokenizer(written, add_special_tokens=False)["input_ids"])
            vocabulary = self.tokenizer.get_vocab()
            ends |= {vocabulary[token] for token in TURN_ENDS if token in vocabulary and token in chosen.text}
        if not ids:
            raise BenchError("bench.nothing_asked")
        return ids, ends

    def _context(self) -> int | None:
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)


@dataclass(frozen=True)
class _Part:
    """One adapter on one layer, on the device. An embedding's A is kept as a table, (vocabulary, r)."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    is_embedding: bool

    def update(self, given: torch.Tensor, weight: float) -> torch.Tensor:
        """`weight · scale · B · A · x`; the factor goes to the narrowest place."""
        inner = functional.embedding(given, self.A) if self.is_embedding else functional.linear(given.to(self.A.dtype), self.A)
        return functional.linear(inner * (weight * self.scale), self.B)


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _check_messages(messages) -> None:
    if not isinstance(messages, list) or not messages:
        raise BenchError("bench.nothing_asked")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BenchError("bench.messages", found=repr(message)[:80])


def choose(logits: torch.Tensor, manner: Manner, draw: torch.Generator) -> int:
    """One token from the logits of a vocabulary: the likeliest, or one drawn from the likeliest that together have `top_p`. Drawing is
    one uniform number through the inverse of the distribution, on the CPU and in fp64. Raises BenchError when a logit is NaN."""
    logits = logits.cpu().double()
    if bool(torch.isnan(logits).any()) or bool((logits == float("inf")).any()):
        raise BenchError("bench.not_finite")
    if manner.temperature == 0:
        return int(logits.argmax())
    chances, order = torch.softmax(logits / manner.temperature, dim=0).sort(descending=True, stable=True)
    total = chances.cumsum(0)
    kept = int((total - chances < manner.top_p).sum().clamp_min(1))
    at = torch.searchsorted(total[:kept], torch.rand((), generator=draw, dtype=torch.float64) * total[kept - 1], right=True)
    return int(order[min(int(at), kept - 1)])
