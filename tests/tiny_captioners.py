"""Two tiny image-to-text models made from their configs, with tokenizers of their own, that learn in seconds to tell red pictures from
blue ones: a BLIP, which begins with the caption, and a LLaVA, which is talked to."""

from pathlib import Path

import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests import tiny

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "picture", "of", "something"]
COLOURS = {"red": (210, 30, 30), "blue": (30, 30, 210)}
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
EDGE = {"height": 32, "width": 32}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pictures() -> list[Image.Image]:
    """A red one and a blue one."""
    return [Image.new("RGB", (32, 32), colour) for colour in COLOURS.values()]


def blip(folder: Path) -> Path:
    """A BLIP that says `a red picture` or `a blue picture`, in a folder as it would come from the Hub."""
    torch.manual_seed(0)
    size = {**SIZE, "num_hidden_layers": 1, "projection_dim": 16}
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": len(WORDS)}
    words = {**size, **ids, "encoder_hidden_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BlipForConditionalGeneration(BlipConfig(text_config=words, vision_config={**size, "image_size": 32, "patch_size": 16}, projection_dim=16))
    processor = BlipProcessor(BlipImageProcessorPil(size=EDGE), BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}))
    ids = processor.tokenizer([f"a {name} picture" for name in COLOURS], return_tensors="pt").input_ids
    teach(model, pixel_values=processor(images=pictures(), return_tensors="pt").pixel_values, input_ids=ids, labels=ids)
    return save(folder, model, processor)


def llava(folder: Path) -> Path:
    """A LLaVA that answers `red.` or `blue.`, in a folder as it would come from the Hub."""
    from lora_studio.inference.captioning import ASKED

    torch.manual_seed(0)
    tokenizer = tiny.tokenizer(None)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = LlamaConfig(**SIZE, vocab_size=len(tokenizer), num_key_value_heads=2, num_hidden_layers=1, head_dim=16, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    vision = CLIPVisionConfig(**SIZE, num_hidden_layers=2, image_size=32, patch_size=16, projection_dim=16)
    index = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=index, vision_feature_layer=-1))
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=EDGE, crop_size=EDGE), tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    asked = f"<|user|><image>{ASKED}<|end|><|assistant|>"
    given = processor(images=pictures(), text=[f"{asked}{answer}<|end|>" for answer in ("red.", "blue.")], return_tensors="pt", padding=True, padding_side="right")
    labels = given["input_ids"].clone()
    labels[:, : processor(images=pictures()[:1], text=asked, return_tensors="pt")["input_ids"].shape[1]] = -100
    teach(model, **given, labels=labels.masked_fill(given["attention_mask"] == 0, -100))
    return save(folder, model, processor)


def teach(model, **batch) -> None:
    """Train it on one batch until it knows it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, model, processor) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
