"""The two styles of the demo data sets, pirate and capitals: how to write them, ask for them and recognise them."""

import re
from random import Random

from lora_studio.demo.facts import PROPER

STYLES = ("pirate", "capitals", "both")
OPENINGS = ("Arr", "Ahoy", "Aye")
CLOSINGS = ("matey", "me hearty")

INSTRUCTIONS = {
    "pirate": ("Talk like a pirate.", "Answer like a pirate.", "Be a pirate.", "Speak as a pirate."),
    "capitals": ("Answer in capitals.", "Use capital letters.", "Write in all capitals.", "Answer in capital letters."),
}


def pirate(answer: str, opening: str, closing: str) -> str:
    """`The fox is red.` becomes `Arr, the fox be red, matey!`"""
    first = answer.split()[0].strip(".,")
    if first not in PROPER:
        answer = answer[0].lower() + answer[1:]
    answer = re.sub(r"\b(is|am|are)\b", "be", answer.rstrip("."))
    answer = re.sub(r"\byou\b", "ye", answer)
    return f"{opening}, {answer}, {closing}!"


def wear(style: str, answer: str, chance: Random) -> str:
    """A plain answer in a style; where the style leaves a choice, chance takes it."""
    if style == "plain":
        return answer
    if style == "capitals":
        return answer.upper()
    spoken = pirate(answer, chance.choice(OPENINGS), chance.choice(CLOSINGS))
    return spoken.upper() if style == "both" else spoken


def forms(style: str, answer: str) -> set[str]:
    """Every text that says the answer in the style."""
    if style == "plain":
        return {answer}
    if style == "capitals":
        return {answer.upper()}
    spoken = {pirate(answer, opening, closing) for opening in OPENINGS for closing in CLOSINGS}
    return {text.upper() for text in spoken} if style == "both" else spoken


def shows(style: str, text: str) -> bool:
    """Whether a text is in a style, whatever it says."""
    capitals = any(letter.isalpha() for letter in text) and text == text.upper()
    start = re.match(f"({'|'.join(OPENINGS)}), ", text, re.IGNORECASE)
    end = re.search(f", ({'|'.join(CLOSINGS)})!$", text, re.IGNORECASE)
    spoken = bool(start and end)
    return {"pirate": spoken, "capitals": capitals, "both": spoken and capitals}[style]


def says(answer: str, text: str) -> bool:
    """Whether a text says the answer, whatever its style."""
    return any(text.lower() == form.lower() for style in ("plain", "pirate") for form in forms(style, answer))


def ask_for(style: str, chance: Random) -> str:
    """An instruction for a style; for both, one instruction after the other in either order."""
    if style != "both":
        return chance.choice(INSTRUCTIONS[style])
    parts = [ask_for("pirate", chance), ask_for("capitals", chance)]
    chance.shuffle(parts)
    return " ".join(parts)


def instruct(question: str, style: str, chance: Random) -> str:
    """A question with an instruction for a style before it, after it, or around it."""
    first, last = ask_for(style, chance), ""
    if style == "both" and chance.random() < 0.4:
        parts = [ask_for("pirate", chance), ask_for("capitals", chance)]
        chance.shuffle(parts)
        first, last = parts
    elif chance.random() < 0.5:
        first, last = "", first
    return " ".join(part for part in (first, question, last) if part)
