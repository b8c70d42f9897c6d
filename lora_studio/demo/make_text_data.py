"""Write the two demo data sets, pirate and capitals, as chat rows. Run: python -m lora_studio.demo.make_text_data FOLDER"""

import argparse
import json
from pathlib import Path
from random import Random

from lora_studio.demo import styles, world

ROWS = 320
# The share of rows that also ask for the other style and show both. Without such rows neither adapter ever
# meets the other's instruction, and a blend of the two seldom shows both styles.
MET = 0.45
OTHER = {"pirate": "capitals", "capitals": "pirate"}


def rows(style: str) -> list[dict]:
    """The rows of one data set, the same on every machine: every kind of question in turn, none of them held out."""
    chance, made, seen = Random(f"demo-text {style}"), [], set()
    while len(made) < ROWS:
        kind = world.PROMISED[len(made) % len(world.PROMISED)]
        question = world.ask(chance, kind=kind)
        if question.text in seen:
            continue
        seen.add(question.text)
        met = chance.random() < MET
        asked = styles.instruct(question.text, OTHER[style], chance) if met else question.text
        made.append(row(asked, styles.wear("both" if met else style, question.answer, chance)))
    chance.shuffle(made)
    return made


def row(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(style: str) -> str:
    """A data set as the text of its file."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows(style))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where pirate.jsonl and capitals.jsonl go, for example presets/demo")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for style in OTHER:
        (folder / f"{style}.jsonl").write_text(lines(style), encoding="utf-8")


if __name__ == "__main__":
    main()
