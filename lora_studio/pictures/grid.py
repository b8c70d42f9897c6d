"""Many small pictures as one: a block for each prompt, a row for each adapter, a column for each strength, with their names."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

MOST_PIXELS = 64_000_000
LARGEST_CELL, SMALLEST_CELL = 512, 48
GAP, INK, PAPER, QUIET = 8, (17, 24, 39), (255, 255, 255), (100, 116, 139)


@dataclass(frozen=True)
class Block:
    """The pictures of one prompt: a label and one file for each column in every row. None leaves a cell empty."""

    title: str
    rows: list[tuple[str, list[Path | None]]]


def compose(blocks: list[Block], columns: list[str]) -> Image.Image:
    """All blocks one below the other, in RGB. Cells keep the shape of the first picture; a large grid is scaled down to 64 megapixels."""
    first = next(path for block in blocks for _, row in block.rows for path in row if path is not None)
    with Image.open(first) as found:
        width, height = found.size
    scale = min(1.0, LARGEST_CELL / max(width, height))
    count = max(1, sum(len(block.rows) for block in blocks)) * len(columns)
    scale = min(scale, (MOST_PIXELS / (count * (width + GAP) * (height + GAP))) ** 0.5)
    scale = max(scale, SMALLEST_CELL / min(width, height)) if max(width, height) * scale < SMALLEST_CELL else scale
    cell = max(1, round(width * scale)), max(1, round(height * scale))
    font = ImageFont.load_default(max(12, min(22, cell[0] // 8)))
    line = round(font.size * 1.5)
    side = round(max((font.getlength(label) for block in blocks for label, _ in block.rows), default=0)) + 2 * GAP
    total = side + len(columns) * (cell[0] + GAP) + GAP
    titles = [_wrapped(block.title, font, total - 2 * GAP) for block in blocks]
    tall = sum(len(title) * line + line + GAP + len(block.rows) * (cell[1] + GAP) for title, block in zip(titles, blocks)) + GAP
    sheet = Image.new("RGB", (total, tall), PAPER)
    pen, y = ImageDraw.Draw(sheet), GAP
    for title, block in zip(titles, blocks):
        for words in title:
            pen.text((GAP, y), words, font=font, fill=INK)
            y += line
        for number, label in enumerate(columns):
            pen.text((side + number * (cell[0] + GAP), y), label, font=font, fill=QUIET)
        y += line
        for label, row in block.rows:
            pen.text((GAP, y + cell[1] // 2 - line // 2), label, font=font, fill=QUIET)
            for number, path in enumerate(row):
                if path is not None:
                    with Image.open(path) as found:
                        small = found.convert("RGB").resize(cell, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
                    sheet.paste(small, (side + number * (cell[0] + GAP), y))
            y += cell[1] + GAP
        y += GAP
    return sheet.crop((0, 0, total, min(tall, y)))


def _wrapped(text: str, font, width: float) -> list[str]:
    """Words in lines that fit; at most four."""
    lines, here = [], ""
    for word in text.split():
        longer = f"{here} {word}".strip()
        if here and font.getlength(longer) > width:
            lines.append(here)
            here = word
        else:
            here = longer
    lines = [*lines, here]
    return lines if len(lines) <= 4 else [*lines[:3], lines[3] + " …"]
