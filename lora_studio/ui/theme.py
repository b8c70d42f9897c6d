"""How the studio looks: one theme for light and dark, few rules of CSS, and the small HTML pieces the pages share."""

import gradio as gr

ACCENT_DARK = "#fb923c"


def theme() -> gr.themes.Base:
    """The theme: white inputs, thin borders, no shadows, orange for what matters."""
    text = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    code = [gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"]
    return gr.themes.Base(primary_hue="orange", neutral_hue="slate", radius_size="md", font=text, font_mono=code).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_border_width="1px",
        block_shadow="none",
        block_background_fill_dark="*neutral_900",
        border_color_primary_dark="*neutral_700",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        block_label_text_color="*neutral_600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_border_color="*neutral_300",
        button_secondary_background_fill_dark="*neutral_800",
        button_border_width="1px",
        button_cancel_background_fill="white",
        button_cancel_background_fill_hover="#fef2f2",
        button_cancel_border_color="#fca5a5",
        button_cancel_text_color="#b91c1c",
        button_cancel_background_fill_dark="*neutral_900",
        button_cancel_border_color_dark="#7f1d1d",
        button_cancel_text_color_dark="#fca5a5",
        slider_color="*primary_600",
        color_accent="*primary_700",
        color_accent_soft="*primary_100",
        color_accent_soft_dark="*neutral_700",
        table_odd_background_fill="white",
        table_even_background_fill="*neutral_50",
        table_odd_background_fill_dark="*neutral_900",
        table_even_background_fill_dark="*neutral_950",
    )


# Colours of states live here, as variables: the CSS of a component is scoped and cannot see whether the page is dark.
CSS = f"""
:root{{--studio-ok:#15803d;--studio-bad:#b91c1c;--studio-bad-edge:#fca5a5;--studio-bad-soft:#fef2f2;--studio-warn:#92400e;--studio-warn-edge:#fcd34d;--studio-warn-soft:#fffbeb;--studio-size:#f59e0b;--studio-alike:#3b82f6;--studio-fight:#ef4444;--studio-line-0:#0072b2;--studio-line-1:#c2410c;--studio-line-2:#047857;--studio-line-3:#a21caf;--studio-line-4:#854d0e;--studio-line-5:#334155;--studio-line-6:#be123c;--studio-line-7:#4338ca}}
.dark{{--studio-ok:#4ade80;--studio-bad:#fca5a5;--studio-bad-edge:#7f1d1d;--studio-bad-soft:#2a1215;--studio-warn:#fcd34d;--studio-warn-edge:#78350f;--studio-warn-soft:#2a1f0b;--studio-line-0:#56b4e9;--studio-line-1:#fb923c;--studio-line-2:#34d399;--studio-line-3:#e879f9;--studio-line-4:#fde047;--studio-line-5:#e2e8f0;--studio-line-6:#fda4af;--studio-line-7:#a5b4fc}}
.gradio-container{{width:100%!important;max-width:1320px!important;margin:0 auto!important}}
.dark{{--color-accent:{ACCENT_DARK}}}
.tabitem{{border:none!important;padding:14px 0!important;background:transparent!important}}
.flush .html-container{{padding:0!important}}
.flush{{border:none!important;background:transparent!important;box-shadow:none!important}}
#stop-box{{border:1px solid var(--studio-bad-edge);border-radius:10px;padding:12px}}
@media (min-width:900px){{#pictures-left{{position:sticky;top:8px;align-self:flex-start;max-height:calc(100vh - 16px);overflow-y:auto;scrollbar-width:thin;flex-wrap:nowrap!important}}#pictures-left>*{{flex-shrink:0}}}}
li[role=option][aria-label^="✗"]{{opacity:.6;cursor:not-allowed}}
.mono textarea{{font-family:var(--font-mono);font-size:12.5px;line-height:1.45}}
"""

BRAND = """<div class="brand"><svg width="26" height="26" viewBox="0 0 26 26" aria-hidden="true">
<rect width="26" height="26" rx="7" fill="var(--color-accent)"/>
<path d="M6 18 L13 6 L20 18 M9.5 13.5 H16.5" stroke="#fff" stroke-width="2.2" fill="none" stroke-linecap="round"/></svg>
<h1>LoRA Studio</h1><span>{{value}}</span></div>"""
BRAND_CSS = """
.brand{display:flex;gap:10px;align-items:center;padding:4px 0}
.brand h1{font-size:18px;margin:0;color:var(--body-text-color)}
.brand span{margin-left:auto;font-size:12px;color:var(--body-text-color-subdued);border:1px solid var(--border-color-primary);padding:2px 8px;border-radius:99px}
"""

TILES = '<div class="tiles">{{#each value}}<div><b>{{value}}</b><span>{{label}}</span></div>{{/each}}</div>'
TILES_CSS = """
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(112px,1fr));gap:8px}
.tiles div{border:1px solid var(--border-color-primary);border-radius:10px;padding:7px 11px;background:var(--background-fill-primary);min-width:0}
.tiles b{font-size:17px;display:block;white-space:nowrap;overflow:hidden;text-overflow:ellipsis;color:var(--body-text-color)}
.tiles span{font-size:12px;color:var(--body-text-color-subdued)}
"""

SENTENCES = """<ul class="sentences" aria-live="polite">{{#each value}}<li class="{{level}}"><i aria-hidden="true">{{sign}}</i>
<div>{{#if path}}<code>{{path}}</code> {{/if}}{{sentence}}</div></li>{{/each}}</ul>"""
SENTENCES_CSS = """
.sentences{list-style:none;margin:0;padding:0;display:flex;flex-direction:column;gap:6px}
.sentences li{display:flex;gap:9px;padding:8px 11px;border-radius:8px;font-size:13.5px;line-height:1.4;border:1px solid var(--border-color-primary);color:var(--body-text-color);overflow-wrap:anywhere}
.sentences i{font-style:normal;font-weight:700}
.sentences code{font-size:12px;padding:1px 5px;border-radius:5px;background:var(--background-fill-secondary)}
.sentences .error{border-color:var(--studio-bad-edge);background:var(--studio-bad-soft)}.sentences .error i{color:var(--studio-bad)}
.sentences .warning{border-color:var(--studio-warn-edge);background:var(--studio-warn-soft)}.sentences .warning i{color:var(--studio-warn)}
.sentences .ok i{color:var(--studio-ok)}.sentences .note i{color:var(--color-accent)}
"""
SIGNS = {"error": "✗", "warning": "!", "note": "i", "ok": "✓"}


class Shown(gr.HTML):
    """HTML whose values come from people: handlebars escapes them, and they are disarmed before.

    Gradio fills a handlebars template and then evaluates the result as a JavaScript template literal, so a value that
    holds `${...}` would run as a script. Every component that shows someone's words is made from this class.
    """

    def postprocess(self, value):
        """The value with every text in it disarmed."""
        return super().postprocess(disarm(value))

    def api_info(self):
        """What the value is, for Gradio's description of itself."""
        return {"type": "object"}


def disarm(value):
    """The same value, in whose texts no `${` begins a script (an invisible word joiner stands between the two signs) and no
    backslash an escape (it is doubled; the literal halves it again)."""
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("${", "$\u2060{")
    if isinstance(value, dict):
        return {key: disarm(inner) for key, inner in value.items()}
    return [disarm(inner) for inner in value] if isinstance(value, list) else value


def tiles(**options) -> gr.HTML:
    """A row of numbers. Value: [{label, value}]."""
    return Shown([], html_template=TILES, css_template=TILES_CSS, elem_classes="flush", **options)


def sentences(**options) -> gr.HTML:
    """A list of sentences with a sign each. Value: [{level, path, sentence, sign}]; everything is escaped."""
    return Shown([], html_template=SENTENCES, css_template=SENTENCES_CSS, elem_classes="flush", **options)


def said(level: str, sentence: str, path: str = "") -> dict:
    """One entry of `sentences`; the path stands before it unless the sentence begins with it."""
    return {"level": level, "path": "" if sentence.startswith(path) else path, "sentence": sentence, "sign": SIGNS[level]}


def plain(text: str) -> str:
    """A name inside Markdown, with nothing that Markdown or HTML would act on."""
    return "".join(letter if letter.isalnum() or letter in " .,-_" else " " for letter in text)
