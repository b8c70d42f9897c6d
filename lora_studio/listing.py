"""README.md of a repository that holds several adapters, each in a folder of its own: a list of them, kept beside what others wrote."""

import re
from dataclasses import replace

import yaml

from lora_studio import card

BEGIN, END = "<!-- adapters -->", "<!-- end of adapters -->"
HEAD = re.compile(r"\A---\n(.*?\n)---\n", re.DOTALL)
ROW = re.compile(r"^\| \[([\w.-]+)\]", re.ASCII)
COLUMNS = ("folder", "adapter", "base", "method", "licence")
ABOUT = "Each adapter is in a folder of its own. To load one, give its folder:"


def write(facts: card.Facts, *, repo_id: str, folder: str, before: str = "") -> str:
    """README.md with the adapter of `facts` in its list. `before` is the one that is there (none: ""): its words and the other adapters
    stay as they are."""
    begin, end = before.find(BEGIN), before.find(END)
    old = before[begin:end] if 0 <= begin < end else ""
    rows = {match.group(1): line for line in old.splitlines() if (match := ROW.match(line))}
    rows[folder] = _row(facts, repo_id, folder)
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    found = "\n".join([BEGIN, *head, *(rows[name] for name in sorted(rows)), END])
    if old:
        text = before[:begin] + found + before[end + len(END) :]
    else:
        title = "" if before.strip() else f"# {card.escape(repo_id.rpartition('/')[2])}\n\n"
        text = f"{before.rstrip()}\n\n{title}{ABOUT}\n\n{_loading(facts, repo_id, folder)}\n{found}\n".lstrip()
    return _with_base(text, facts)


def _row(facts: card.Facts, repo_id: str, folder: str) -> str:
    rank = f" r{facts.method['rank']}" if facts.method.get("rank") else ""
    cells = [facts.name, card.shown(facts.base), f"{facts.method.get('kind') or 'blend'}{rank}", facts.license or ""]
    return f"| [{folder}](https://huggingface.co/{repo_id}/tree/main/{folder}) | " + " | ".join(card.escape(cell) for cell in cells) + " |"


def _loading(facts: card.Facts, repo_id: str, folder: str) -> str:
    line = f'model = PeftModel.from_pretrained(model, "{repo_id}", subfolder="{folder}")'
    if facts.pipeline_file:
        line = f'pipeline.load_lora_weights("{repo_id}", subfolder="{folder}", weight_name="{facts.pipeline_file}")'
    return card.fence(line, "python")


def _with_base(text: str, facts: card.Facts) -> str:
    """The text with front matter that names the base of every adapter."""
    own = yaml.safe_load(card.front_matter(replace(facts, trigger="", pictures=(), data=())))
    match = HEAD.match(text)
    if match is None:
        return f"---\n{yaml.safe_dump(own, sort_keys=False, allow_unicode=False, width=1 << 20)}---\n{text}"
    try:
        there = yaml.safe_load(match.group(1))
    except yaml.YAMLError:
        return text  # the Hub says what is wrong with it
    base = own.get("base_model")
    if not isinstance(there, dict) or not base:
        return text
    known = there.get("base_model") or []
    known = known if isinstance(known, list) else [known]
    if base in known:
        return text
    there |= {"base_model": [*known, base], "base_model_relation": "adapter"}
    return f"---\n{yaml.safe_dump(there, sort_keys=False, allow_unicode=True, width=1 << 20)}---\n{text[match.end() :]}"
