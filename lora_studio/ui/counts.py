"""The statistics of an album as the Pictures page shows them: tiles, sentences about what may be wrong, and bars."""

import gradio as gr

from lora_studio.ui import theme

BARS = """<div class="bars">{{#each value}}<section><h4>{{title}}</h4>{{#each rows}}<div><span title="{{label}}">{{label}}</span><b style="width:{{share}}%"></b><small>{{count}}</small></div>{{/each}}</section>{{/each}}</div>"""
BARS_CSS = """
.bars{display:flex;flex-direction:column;gap:12px}
.bars h4{margin:0 0 4px;font-size:12.5px;font-weight:700;color:var(--body-text-color)}
.bars div div,.bars section>div{display:grid;grid-template-columns:96px 1fr auto;gap:8px;align-items:center;font-size:12px;color:var(--body-text-color);padding:1px 0}
.bars span{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.bars b{height:9px;border-radius:3px;background:var(--color-accent);min-width:3px;max-width:100%}
.bars small{color:var(--body-text-color-subdued);font-size:12px}
"""
MOST_BARS = 8


def bars(**options) -> gr.HTML:
    """Bars under titles. Value: [{title, rows: [{label, count, share}]}]."""
    return theme.Shown([], html_template=BARS, css_template=BARS_CSS, elem_classes="flush", **options)


def tiles_of(found: dict) -> list[dict]:
    """The numbers of a set of pictures."""
    words = found["words"]
    told = [
        ("pictures", f"{found['pictures']:,}"),
        ("sizes" if found["size_count"] > 1 else "size", str(found["size_count"]) if found["size_count"] > 1 else found["smallest"]),
        ("smallest", found["smallest"] if found["size_count"] > 1 else ""),
        ("largest", found["largest"] if found["size_count"] > 1 else ""),
        ("without caption", f"{found['missing']['count']:,}"),
        ("words a caption", f"{words['least']} to {words['most']}" if words["most"] else ""),
    ]
    return [{"label": label, "value": value} for label, value in told if value]


def bars_of(found: dict) -> list[dict]:
    """Buckets, lengths and tags as bars."""
    parts = [
        (f"Trained at (resolution {found['resolution']})", found["buckets"]),
        ("Words in a caption", found["words"]["lengths"]),
        ("Most frequent parts between commas", {one["tag"]: one["count"] for one in found["tags"]}),
    ]
    return [{"title": title, "rows": rows_of(counts)} for title, counts in parts if counts]


def rows_of(counts: dict[str, int]) -> list[dict]:
    """Counts as bars; many of them end in one for the rest."""
    named, most = list(counts.items())[:MOST_BARS], max(counts.values())
    rest = sum(counts.values()) - sum(count for _, count in named)
    rows = [{"label": label, "count": f"{count:,}", "share": round(100 * count / most)} for label, count in named]
    return rows + ([{"label": "others", "count": f"{rest:,}", "share": min(100, round(100 * rest / most))}] if rest else [])


def sentences_of(found: dict) -> list[dict]:
    """What may be wrong, each with the names that are meant and what to do."""
    told = []

    def warn(part: dict, words: str, advice: str) -> None:
        if part["count"]:
            told.append(theme.said("warning", f"{_pictures(part['count'])} {words}: {_names(part['names'], part['count'])}. {advice}"))

    warn(found["missing"], "without a caption", "Write them, or set a trigger word on the Train page.")
    warn(found["enlarged"], f"smaller than what is trained at {found['resolution']}", "Use larger ones, or a lower resolution.")
    warn(found["narrow"], "narrower than 1:4, so much is cut off", "Crop them yourself.")
    warn(found["over_clip"], f"whose caption has more than CLIP's {found['over_clip']['tokens']} tokens", "Stable Diffusion reads only the beginning.")
    for names in found["copies"][:4]:
        told.append(theme.said("warning", f"The same file {len(names)} times: {_names(names, len(names))}. Take the copies out."))
    for names in found["alike"][:4]:
        told.append(theme.said("warning", f"Nearly the same picture: {_names(names, len(names))}. Keep the best one."))
    for one in found["same_caption"][:3]:
        told.append(theme.said("note", f"{one['count']} pictures share the caption “{one['caption']}”: {_names(one['names'], one['count'])}."))
    if found["unreadable"]:
        told.append(theme.said("error", f"These cannot be read: {_names(found['unreadable'], len(found['unreadable']))}. Take them out, or save them again."))
    return told or [theme.said("ok", "Nothing stands out: every picture has a caption, is large enough and is there once.")]


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count:,} pictures"


def _names(names: list[str], count: int) -> str:
    shown = ", ".join(names[:5])
    return shown if count <= 5 else f"{shown} and {count - 5:,} more"
