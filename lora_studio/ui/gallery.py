"""The gallery: pictures with their captions under them, chosen by click and keys, each caption saved where it stands."""

import json
import secrets
from collections.abc import Callable
from urllib.parse import quote

import gradio as gr

from lora_studio import albums
from lora_studio.errors import DataError, StudioError
from lora_studio.ui import theme
from lora_studio.workspace import Workspace

TEMPLATE = """<div class="shots" role="group" aria-label="Pictures of the album" data-album="{{value.album}}" data-turn="{{value.turn}}">{{#each value.items}}
<figure data-name="{{name}}"><button type="button" class="pick" tabindex="-1" aria-pressed="{{chosen}}" aria-label="Select {{name}}"><img src="{{small}}" alt="" loading="lazy"><i aria-hidden="true">✓</i></button>
<figcaption><a href="{{large}}" target="_blank" tabindex="-1" title="{{name}}">{{name}}</a></figcaption>
<textarea rows="3" aria-label="Caption of {{name}}" placeholder="no caption yet">{{text}}</textarea><p class="told" aria-live="polite"></p></figure>{{/each}}</div>
{{#unless value.items}}<p class="none">{{value.none}}</p>{{/unless}}"""
CSS = """
.shots{display:grid;grid-template-columns:repeat(auto-fill,minmax(158px,1fr));gap:12px;padding:2px}
.shots figure{margin:0;min-width:0;display:flex;flex-direction:column;border:1px solid var(--border-color-primary);border-radius:10px;background:var(--background-fill-primary);overflow:hidden}
.shots figure:focus-within{border-color:var(--color-accent)}
.pick{position:relative;display:block;width:100%;padding:0;border:none;background:var(--background-fill-secondary);cursor:pointer;aspect-ratio:1}
.pick img{width:100%;height:100%;object-fit:contain;display:block;margin:0}
.pick i{position:absolute;top:7px;right:7px;width:22px;height:22px;border-radius:99px;line-height:20px;font-style:normal;font-size:13px;text-align:center;color:transparent;border:1.5px solid #fff;background:#0006}
.pick[aria-pressed=true] i{background:var(--color-accent);color:#fff}
.pick[aria-pressed=true]{box-shadow:inset 0 0 0 3px var(--color-accent)}.pick[aria-pressed=true] img{padding:3px;box-sizing:border-box}
.pick:focus-visible{outline:3px solid var(--color-accent);outline-offset:-3px}
.shots figcaption{margin:0;text-align:left;padding:5px 9px 0;font-size:11.5px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.shots figcaption a{margin:0;padding:0;color:var(--body-text-color-subdued);text-decoration:none}.shots figcaption a:hover{text-decoration:underline}
.shots textarea{width:100%;box-sizing:border-box;border:none;background:transparent;color:var(--body-text-color);font:inherit;font-size:13px;line-height:1.4;padding:3px 9px 6px;resize:vertical;min-height:64px;flex:1;outline:none;field-sizing:content;max-height:220px}
.shots textarea::placeholder{color:var(--body-text-color-subdued);font-style:italic;opacity:1}
.shots textarea:focus{background:var(--background-fill-secondary)}
.shots .told{margin:0;padding:0 9px;font-size:11.5px;line-height:1.35;color:var(--body-text-color-subdued);overflow-wrap:anywhere}.shots .told:not(:empty){padding-bottom:6px}
.shots .bad .told{color:var(--studio-bad)}
.none{color:var(--body-text-color-subdued);text-align:center;padding:34px 12px;margin:0;border:1px dashed var(--border-color-primary);border-radius:10px}
@media (max-width:480px){.shots{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}}
"""
# Gradio patches the page place by place where a new value reads differently from the last one, and leaves what was typed as it is: so each
# value carries a turn of its own, and the boxes are put right afterwards. `plain` is a text without theme.disarm's joiner.
SCRIPT = """
const plain = text => (text || '').replaceAll('$\\u2060{', '$' + '{');
let chosen = new Set(), last = null, turn = Date.now();
const drafts = new Map(), kept = new Map(), STAYS = 4000, key = box => [box.closest('.shots').dataset.album, figure(box).dataset.name].join('|');
const picks = () => [...element.querySelectorAll('.pick')], figure = part => part.closest('figure'), name = part => plain(figure(part).dataset.name);
function mark(){ for(const pick of picks()) pick.setAttribute('aria-pressed', chosen.has(name(pick))); }
function tell(){ mark(); trigger('choose', {names: [...chosen], turn: ++turn}); }
function fresh(){ chosen = new Set((props.value.chosen || []).map(plain)); last = null;
  const first = picks()[0]; if(first) first.tabIndex = 0; mark();
  for(const box of element.querySelectorAll('textarea')){ const draft = drafts.get(key(box));
    box.value = draft ? draft.text : box.defaultValue; say(box, draft ? draft.why : Date.now() - (kept.get(key(box)) || 0) < STAYS ? 'saved' : '', !!(draft && draft.why)); } }
function focus(pick){ if(!pick) return; for(const other of picks()) other.tabIndex = -1; pick.tabIndex = 0; pick.focus(); pick.scrollIntoView({block: 'nearest'}); }
function say(box, text, bad){ const shot = figure(box); shot.classList.toggle('bad', !!bad); shot.querySelector('.told').textContent = text; }
// What was typed is a draft until it is on disk: it outlives every new value, with the caption that stood there when it was begun.
function draft(box){ const own = key(box), before = drafts.get(own); drafts.set(own, {seen: before ? before.seen : plain(box.defaultValue), text: plain(box.value), why: '', held: false}); }
async function save(box){
  const own = key(box), mine = drafts.get(own), album = plain(box.closest('.shots').dataset.album), picture = name(box);
  if(!mine || mine.saving) return;
  if(mine.text.trim() === mine.seen.trim()){ drafts.delete(own); return; }
  mine.saving = true; say(box, 'saving…');
  let answer;
  try { answer = JSON.parse(await server.save([album, picture, mine.text, mine.seen])); }
  catch(error) { answer = {sentence: 'Not saved: the studio did not answer. Keep your text here, and try again.'}; }
  const held = 'now' in answer, why = (answer.sentence || '') + (held ? ' (Ctrl+Enter writes yours, Escape takes the other.)' : ''), now = drafts.get(own);
  if(why) drafts.set(own, {...now, seen: held ? answer.now : mine.seen, why: why, held: held, saving: false});
  else if(now && now.text !== mine.text) drafts.set(own, {...now, seen: answer.text});
  else drafts.delete(own);
  if(!why) kept.set(own, Date.now());
  if(box.isConnected && key(box) === own){
    if(held) box.defaultValue = answer.now;
    if(!why){ box.defaultValue = answer.text; if(!drafts.has(own)) box.value = answer.text; }
    say(box, why || 'saved', !!why);
    if(!why) setTimeout(() => { if(box.isConnected && figure(box).querySelector('.told').textContent === 'saved') say(box, ''); }, STAYS);
  }
  trigger('saved', {before: answer.before || '', after: answer.after || ''});
}
element.addEventListener('input', event => { if(event.target.matches('textarea')) draft(event.target); });
element.addEventListener('click', event => { const pick = event.target.closest('.pick'); if(!pick) return;
  const all = picks(), here = all.indexOf(pick), on = !chosen.has(name(pick));
  const from = event.shiftKey && last !== null && all[last] ? last : here;
  for(const other of all.slice(Math.min(from, here), Math.max(from, here) + 1)) on ? chosen.add(name(other)) : chosen.delete(name(other));
  last = here; focus(pick); tell(); });
element.addEventListener('focusout', event => { const box = event.target; if(!box.matches('textarea')) return;
  const mine = drafts.get(key(box)); if(mine && !mine.held) save(box); });
document.addEventListener('visibilitychange', () => { const box = document.activeElement; if(document.hidden && box && element.contains(box) && box.matches('textarea')) save(box); });
element.addEventListener('keydown', event => {
  const all = picks(), target = event.target;
  if(target.matches('textarea')){
    if(event.key === 'Escape'){ drafts.delete(key(target)); target.value = target.defaultValue; say(target, ''); focus(figure(target).querySelector('.pick')); event.preventDefault(); }
    else if(event.key === 'Enter' && (event.ctrlKey || event.metaKey)){ event.preventDefault();
      const next = all[all.indexOf(figure(target).querySelector('.pick')) + 1]; save(target); if(next) figure(next).querySelector('textarea').focus(); }
    return;
  }
  const pick = target.closest('.pick'); if(!pick) return;
  const here = all.indexOf(pick), across = all.filter(other => other.offsetTop === all[0].offsetTop && figure(other).offsetTop === figure(all[0]).offsetTop).length || 1;
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across}[event.key];
  if(step){ const from = here, to = all[here + step]; event.preventDefault(); focus(to);
    if(to && event.shiftKey){ chosen.add(name(pick)); chosen.add(name(to)); last = here + step; tell(); } }
  else if(event.key === 'Home' || event.key === 'End'){ event.preventDefault(); focus(all[event.key === 'Home' ? 0 : all.length - 1]); }
  else if(event.key === 'Enter'){ event.preventDefault(); const box = figure(pick).querySelector('textarea'); box.focus(); box.setSelectionRange(box.value.length, box.value.length); }
  else if(event.key === 'a' && (event.ctrlKey || event.metaKey)){ event.preventDefault(); for(const other of all) chosen.add(name(other)); tell(); }
  else if(event.key === 'Escape'){ chosen.clear(); tell(); }
});
watch('value', () => setTimeout(fresh, 0)); fresh();
"""


class Gallery(theme.Shown):
    """Pictures and captions. Value: {album, items: [{name, text, small, large, chosen}], chosen: [name], none, turn}."""

    def __init__(self, value=None, *, seats: Callable[[], Workspace] | None = None, **options):
        functions = [saver(seats)] if seats else None
        options = {"elem_classes": "flush", **options}
        super().__init__(value or empty(), html_template=TEMPLATE, css_template=CSS, js_on_load=SCRIPT, server_functions=functions, **options)


def empty(none: str = "") -> dict:
    """The gallery without pictures."""
    return {"album": "", "items": [], "chosen": [], "none": none, "turn": ""}


def shown(view: albums.View, names: list[str], chosen: list[str]) -> dict:
    """Some pictures of an album as the gallery shows them."""
    items = [_item(view, name, set(chosen)) for name in names]
    return {"album": view.name, "items": items, "chosen": chosen, "none": "", "turn": secrets.token_hex(4)}


def _item(view: albums.View, name: str, chosen: set[str]) -> dict:
    address = f"/studio/album/{quote(view.name, safe='')}/{quote(name)}"
    return {
        "name": name, "text": view.captions[name], "small": f"{address}?v={view.stamps[name]}",
        "large": f"{address}?size=large&v={view.stamps[name]}", "chosen": "true" if name in chosen else "false",
    }  # fmt: skip


def saver(seats: Callable[[], Workspace]):
    """The function by which the page of who asks saves one caption."""

    def save(asked) -> str:
        """[album, picture, text, the text that was there] to {text} as it is on disk now and the album's revision before and after,
        or to {sentence, now}."""
        try:
            album, name, text, seen = (str(part) for part in asked)
            workspace = seats()
            before = albums.view(workspace, album).revision
            albums.write(workspace, album, {name: text}, seen={name: seen})
            view = albums.view(workspace, album)
            return json.dumps({"text": view.captions[name], "before": before, "after": view.revision})
        except (TypeError, ValueError):
            return json.dumps({"sentence": "This is no caption."})
        except DataError as error:
            now = {"now": albums.view(workspace, album).captions.get(name, "")} if error.key == "album.caption_changed" else {}
            return json.dumps({"sentence": str(error), **now})
        except StudioError as error:
            return json.dumps({"sentence": str(error)})

    return save


def chosen_of(event: gr.EventData) -> list[str]:
    """The names that the page says are chosen."""
    found = event.names
    return [str(name) for name in found] if isinstance(found, list) else []


def is_newer(event: gr.EventData, turn: int) -> bool:
    """Whether a choice was made after the one of that turn: two that follow each other closely may arrive the other way round."""
    return isinstance(event.turn, int) and event.turn > turn
