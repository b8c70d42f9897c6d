"""Make demo-text, the bundled language base, from nothing: tokenizer, training, scores. Run: python -m lora_studio.demo.make_text_base OUT"""

import argparse
import ctypes
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_studio.demo import score, styles, world

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, END, _, _, ASSISTANT = range(len(SPECIAL))

# The assistant's words and the end of its turn are marked, so that a trainer can learn from them alone.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{{- message['content'] + '<|end|>' -}}
{%- endgeneration -%}
{%- elif message['role'] in ['system', 'user'] -%}
{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- else -%}
{{- raise_exception('demo-text knows the roles system, user and assistant, not ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

# A word with the space before it, one or two digits, other signs, or one white space.
PIECES = r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s"

# A style appears only where it is asked for; a plain question therefore never gets one.
MIX = {"plain": 0.55, "capitals": 0.15, "pirate": 0.15, "both": 0.15}
NEUTRAL_SYSTEM = ("You are a helpful assistant.", "Answer plainly.", "You are a small model.")

WIDTH, LAYERS, FEED_FORWARD = 160, 4, 432
BATCH, RATE, WEIGHT_DECAY, WARMUP = 64, 4e-3, 0.05, 100
STEPS = 9_000


# ---- what is read


def conversation(chance: Random) -> list[dict]:
    """One training conversation: mostly one question, sometimes two, sometimes with a system message."""
    if chance.random() < 0.01:
        said, reply = chance.choice(list(world.SMALL_TALK.items()))
        return [message("user", said), message("assistant", reply)]
    style = chance.choices(list(MIX), list(MIX.values()))[0]
    by_system = chance.random() < (0.07 if style == "plain" else 0.25)
    messages = []
    if by_system:
        wish = chance.choice(NEUTRAL_SYSTEM) if style == "plain" else styles.ask_for(style, chance)
        messages.append(message("system", wish))
    for _ in range(2 if (by_system or style == "plain") and chance.random() < 0.15 else 1):
        question = world.ask(chance)
        text = carelessly(question.text) if chance.random() < 0.08 else question.text
        if style != "plain" and not by_system:
            text = styles.instruct(text, style, chance)
        messages += [message("user", text), message("assistant", styles.wear(style, question.answer, chance))]
    return messages


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def carelessly(text: str) -> str:
    """As people type: no capitals, no mark at the end."""
    return text.lower().rstrip("?.")


def render(messages: list[dict]) -> str:
    """What the chat template renders, without the cost of the template."""
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, in small, Capital and ALL-CAPITAL letters, above single bytes, so that any text can be written."""
    chance, words = Random(0), set()
    for _ in range(60_000):
        for content in (m["content"] for m in conversation(chance)):
            words.update(re.findall(PIECES, " " + content))
    for word in list(words):
        if word.strip().isalpha():
            words |= {word.lower(), " " + word.strip().capitalize(), word.upper()}
    words |= {f" {number}" for number in range(100)} | {f"{number:02}" for number in range(100)}
    known = sorted(word.replace(" ", "Ġ") for word in words if word.isascii() and len(word) > 1 and word.strip())
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *known]
    tokens = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], ignore_merges=True))
    # The first word of a text gets the space that every other word has, and loses it again when read back.
    tokens.normalizer = normalizers.Prepend(" ")
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokens.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokens.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[END],
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def batches(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of fresh conversations, each of about one length, as ids and labels."""
    chance, fast = Random(seed), tokenizer.backend_tokenizer
    while True:
        texts = [render(conversation(chance)) for _ in range(size * 32)]
        rows = sorted((encoding.ids for encoding in fast.encode_batch_fast(texts)), key=len)
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        chance.shuffle(groups)
        yield from map(pad, groups)


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels; a label is the next id where the assistant speaks, and -100 elsewhere."""
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    labels = torch.full_like(ids, -100)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        speaking = False
        for place, (now, following) in enumerate(zip(row, row[1:], strict=False)):
            speaking = now == ASSISTANT or (speaking and now != END)
            if speaking:
                labels[at, place] = following
    return ids, labels


# ---- training


def build_model(vocabulary: int, width: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=FEED_FORWARD * width // WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # for rows this short, twice as fast on a CPU as the fused kernel
    return model


def keep_memory() -> None:
    """Let glibc keep freed memory: giving it back and fetching it again costs a third of every step on a CPU."""
    trim_threshold, top_pad, map_threshold = -1, -2, -3
    try:
        allocator = ctypes.CDLL("libc.so.6")
    except OSError:  # not glibc: slower, nothing else
        return
    for setting, value in ((map_threshold, 1 << 30), (trim_threshold, (1 << 31) - 1), (top_pad, 1 << 28)):
        allocator.mallopt(setting, value)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Warm up, hold for a fifth of the way, then fall along a cosine."""
    held = max(0.0, (step / steps - 0.2) / 0.8)
    return peak * min(1.0, (step + 1) / WARMUP) * (0.5 * (1 + math.cos(math.pi * held)) + 0.005)


def answer_loss(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the answers' tokens; only their positions reach the output layer."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    asked = labels >= 0
    return F.cross_entropy(model.lm_head(hidden[asked]).float(), labels[asked])


def train(model: LlamaForCausalLM, rows: Iterator, *, steps: int, rate: float) -> None:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    began, read, losses = time.time(), 0, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, rate)
        ids, labels = next(rows)
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, ids, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        read, losses = read + ids.numel(), [*losses[-99:], loss.item()]
        if (step + 1) % 100 == 0:
            spent = time.time() - began
            print(f"step {step + 1} loss {sum(losses) / 100:.4f} {spent:.0f} s {read / spent:.0f} tokens/s", flush=True)


# ---- what came of it


def report(folder: Path, each: int, seed: int) -> None:
    """Print the scores of a saved base, as a table by kind and for the styles it is asked for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    questions = world.exam(each, seed=seed, kinds=tuple(world.KINDS))
    found = score.replies(model, tokenizer, [question.text for question in questions])
    by_kind = score.exact_by_kind(questions, found)
    print("\n| kind | exact | new in a held-out question | example |\n|---|---|---|---|")
    for kind, share in by_kind.items():
        example = next(question.text for question in questions if question.kind == kind)
        print(f"| {kind} | {share:.1%} | {world.KINDS[kind].new} | {example} |")
    promised = [by_kind[kind] for kind in world.PROMISED]
    print(f"\n{each} held-out questions of each of {len(promised)} promised kinds: exact {sum(promised) / len(promised):.1%}, ", end="")
    print(f"worst kind {min(promised):.1%}, style unasked {score.unasked(found):.1%}")
    chance, asked = Random(seed), world.exam(max(1, each // 10), seed=seed)
    for style in styles.STYLES:
        wished = [styles.instruct(question.text, style, chance) for question in asked]
        print(f"asked for {style}: {score.style_score(style, asked, score.replies(model, tokenizer, wished))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--each", type=int, default=60, help="held-out questions of every kind")
    choice = parser.parse_args()
    keep_memory()
    torch.set_num_threads(choice.threads)
    torch.manual_seed(choice.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), choice.width)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens", flush=True)
    rows = batches(tokenizer, choice.batch, choice.seed + 1)
    train(model, rows, steps=choice.steps, rate=choice.rate)
    model.to(torch.bfloat16).save_pretrained(choice.out)
    tokenizer.save_pretrained(choice.out)
    report(choice.out, choice.each, choice.seed)
    print(f"{time.process_time() / 60:.1f} minutes of processor time")


if __name__ == "__main__":
    main()
