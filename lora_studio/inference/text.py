"""A language model with weighted adapters in memory, and its answers. How adapters hang on a model is in hooks.py."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from lora_studio import adapters, bases
from lora_studio.adapters import virtual
from lora_studio.errors import BenchError, BlendError
from lora_studio.inference.before import Before
from lora_studio.inference.hooks import Active, Hooks
from lora_studio.spec import Base
from lora_studio.training import chat, encode
from lora_studio.training import text as training
from lora_studio.weights import Weight, acts, is_number

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
            "temperature": (is_number(self.temperature) and 0 <= self.temperature <= 10, "it must be a number from 0 to 10"),
            "top_p": (is_number(self.top_p) and 0 < self.top_p <= 1, "it must be a number above 0 and at most 1"),
            "longest": (isinstance(self.longest, int) and 1 <= self.longest <= 1 << 20, "it must be a whole number of tokens, at least 1"),
        }
        for name, (is_right, rule) in rules.items():
            if not is_right:
                raise BenchError("bench.setting", name=name, value=repr(getattr(self, name))[:40], rule=rule)


@dataclass
class Answer:
    """An answer as it is spoken: iterating gives its pieces, one for each token ("" where a character is not whole yet). Afterwards
    `tokens` holds them all and `ended` says why it ended: end, longest, or context (no room left)."""

    pieces: Iterator[str]
    active: dict[str, Weight]
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    ended: str = ""

    def __iter__(self) -> Iterator[str]:
        return self.pieces


class Shelf(Hooks):
    """One language model and any number of adapters on its layers. Not safe for several threads at once."""

    def __init__(self, base: Base, *, device: str = "cpu", precision: str = "auto"):
        """Load the base. Raises StudioError with the way out."""
        folder = bases.fetch(base)
        self.base, self.device = base, torch.device(device)
        self.dtype = training.choose_dtype(precision, device)
        self.tokenizer = encode.load_tokenizer(folder, base.id)
        self.model = training.load_model(folder, base.id, self.dtype).to(self.device).eval()
        super().__init__(self.model, base.id, self.device)
        self.before: dict[str, Before] = {}
        takes = inspect.signature(self.model.forward).parameters
        self._takes_few, self._keeps = "logits_to_keep" in takes, "past_key_values" in takes  # Mamba and the like keep a state of their own

    # ---- adapters that are virtual tokens

    def hang(self, id: str, adapter: adapters.Adapter, *, label: str) -> None:
        if adapter.card.method not in virtual.WORDS:
            return super().hang(id, adapter, label=label)
        made = Before(self.model, adapter, label=label, base=self.id)
        self.take(id)
        self.names[id], self.before[id] = (), made

    def take(self, id: str) -> None:
        self.before.pop(id, None)
        super().take(id)

    def resolve(self, weights: dict[str, Weight]) -> Active:
        for id, weight in weights.items():
            if id in self.before and acts(weight) and weight != 1:
                before, told = self.before[id], f"{weight:g}" if is_number(weight) else "one by layer"
                raise BlendError("blend.half_before", name=before.label, what=before.words, weight=told)
        found = [self.before[id].label for id, weight in weights.items() if id in self.before and acts(weight)]
        if len(found) > 1:
            raise BlendError("blend.two_before", one=found[0], other=found[1])
        return super().resolve(weights)

    def _standing(self, active: Active) -> Before | None:
        """What stands before the input."""
        return next((self.before[id] for id, _ in active if id in self.before), None)

    # ---- answers

    def logits(self, ids: list[int], *, weights: dict[str, Weight]) -> torch.Tensor:
        """The logits (tokens, vocabulary) of a row of token ids."""
        before = self._standing(self.resolve(weights))
        with self.using(weights), torch.inference_mode():
            how = {"past_key_values": before.cache()} if before else {"use_cache": False}
            return self.model(input_ids=torch.tensor([ids], device=self.device), **how).logits[0]

    def answer(
        self, messages: list[dict] | str, *, weights: dict[str, Weight] | None = None, manner: Manner = Manner(), template: str = "auto"
    ) -> Answer:
        """Speak: messages are a conversation, or a text to go on with. Stopping to iterate cancels it. The same shelf, messages, weights
        and manner give the same answer. Raises StudioError."""
        weights = {id: weight for id, weight in (weights or {}).items() if acts(weight)}
        active = self.resolve(weights)
        before = self._standing(active)
        prompt, ends = self.prompt(messages, template)
        taken = len(prompt) + (before.tokens if before else 0)
        room = (self._context() or taken + manner.longest) - taken
        if room < 1:
            raise BenchError("bench.too_long", tokens=taken, room=self._context(), base=self.base.id)
        answer = Answer(iter(()), weights, len(prompt))
        answer.pieces = self._speak(answer, prompt, active, ends, manner=manner, room=room)
        return answer

    def _speak(self, answer: Answer, prompt: list[int], active: Active, ends: set[int], *, manner: Manner, room: int) -> Iterator[str]:
        draw, cache, given, said, text = torch.Generator().manual_seed(manner.seed), None, prompt, 0, ""
        before = self._standing(active)
        if before:
            with self.on(active), torch.inference_mode():
                cache = before.cache()
        few = {"logits_to_keep": 1} if self._takes_few else {}
        for _ in range(min(manner.longest, room)):
            with self.on(active), torch.inference_mode():
                ids = torch.tensor([given], device=self.device)
                kept = {"past_key_values": cache, "use_cache": True} if self._keeps else {"use_cache": False}
                found = self.model(input_ids=ids, **kept, **few)
                token = choose(found.logits[0, -1], manner, draw)
            cache = found.past_key_values if self._keeps else None
            if token in ends:
                answer.ended = "end"
                break
            answer.tokens.append(token)
            given = [token] if self._keeps else [*given, token]
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
