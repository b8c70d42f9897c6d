"""Names that nobody should be able to do anything with, and the places that they try to reach."""

import contextlib
import json
from pathlib import Path

MARK = "zq9x"  # stands in every name that would run as code, a command, a template or a module
SECRET = "nobody-may-read-this"
SCRIPT = f"window.hacked='{MARK}'"
STEP = {"step": 1, "steps": 3, "loss": 1.0, "lr_A": 1e-4, "lr_B": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1.0, "memory": 1, "seconds_left": 9.0}


def outside(place: Path) -> Path:
    """A folder beside the studio's home in which everything is secret: rows, a picture's folder, a key and a base."""
    folder = place / "outside"
    (folder / ".ssh").mkdir(parents=True)
    (folder / "secret.jsonl").write_text(json.dumps({"prompt": SECRET, "completion": SECRET}) + "\n")
    (folder / ".ssh" / "id_rsa").write_text(SECRET)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "note": SECRET}))
    (folder / f"{MARK}_module.py").write_text(f"raise SystemExit('{SECRET}')\n")
    return folder


def names(folder: Path) -> list[str]:
    """Every hostile name; `folder` is the outside one."""
    rows, touch = folder / "secret.jsonl", f"touch {folder}/{MARK}"
    return [*_places(folder, rows), *_letters(), *_pages(), *_commands(touch, folder), *_addresses(), *_values(folder)]


def _places(folder: Path, rows: Path) -> list[str]:
    return [
        str(rows), str(folder), "../" * 16 + str(rows)[1:], f"demo/{'../' * 16}{str(rows)[1:]}", f"{'..%2f' * 8}etc%2fpasswd", "....//" * 8 + "etc/passwd",
        "/etc/passwd", "/proc/self/environ", "/dev/zero", "~/.ssh/id_rsa", "~root/.profile", "~no-such-person/rows.jsonl", f"demo-{'../' * 16}{str(folder)[1:]}", "..", "../..", "./", "users", "../users", "queue.json",
        "C:\\Windows\\win.ini", "..\\..\\..\\etc\\passwd", "\\\\203.0.113.9\\share\\rows.jsonl", "//203.0.113.9/share", "NUL", "CON.jsonl", "a" * 260 + ".jsonl", "x/" * 3000,
    ]  # fmt: skip


def _letters() -> list[str]:
    return [
        "rows\0.jsonl", "\0", "two\nlines", "name\r\nSet-Cookie: studio=1", " ", "\t\x1b[31mred\x07", "gnp\u202egnp.snoitpac", "d\u0435m\u043e-text", "e" + "\u0301" * 300,
        "de\u200bmo-text", "\uff0e\uff0e\uff0fetc\uff0fpasswd", "\ud800", "\ufeffdemo-text", "A" * 20_000,
    ]  # fmt: skip


def _pages() -> list[str]:
    return [
        f"<script>{SCRIPT}</script>", f'<img src=x onerror="{SCRIPT}">', f"<svg/onload={SCRIPT}>", f"\"'><iframe srcdoc='<script>parent.{SCRIPT}</script>'>", f"javascript:{SCRIPT}",
        f"[x](javascript:{SCRIPT})", f"${{{SCRIPT}}}", f"`${{{SCRIPT}}}`", "{{value}}{{#each value}}{{this}}{{/each}}", f"{{{{{{<b>{MARK}</b>}}}}}}",
    ]  # fmt: skip


def _commands(touch: str, folder: Path) -> list[str]:
    return [
        f"; {touch} {MARK}", f"$({touch} {MARK})", f"`{touch} {MARK}`", f"| {touch} {MARK}", f"--{MARK}", "--help", "-rf", f"__import__('os').system('{touch} {MARK}')", f"{MARK}_module", "antigravity",
        f"!!python/object/apply:os.system ['{touch} {MARK}']", f"- path: {folder}/secret.jsonl", f"{{0.__class__.__init__.__globals__}}{MARK}", "%s%n{path}{}", "' OR 1=1; DROP TABLE adapters; --", 'NEAR("',
    ]  # fmt: skip


def _addresses() -> list[str]:
    return ["file:///etc/passwd", "http://169.254.169.254/latest/meta-data/", "https://203.0.113.9/x.safetensors", "hf://datasets/nobody/none", "nobody/none", "git+ssh://203.0.113.9/x"]


def _values(folder: Path) -> list[str]:
    return ["__proto__", "NaN", "1e999", "9" * 5000, "[" * 5000, "&a [*a, *a]"]


def belongings(workspace, names: list[str], scratch: Path) -> dict[str, list[str]]:
    """Put every name into a workspace wherever somebody's words are kept: a run and an adapter of that name, an album with its captions, rows.
    Returns the ids of {runs, adapters, albums}. What a verb refuses as a name still stands in the texts."""
    from lora_studio import albums, durable, library, runs, studio
    from lora_studio.errors import StudioError
    from lora_studio.home import demo_base
    from lora_studio.spec import parse
    from tests import tiny
    from tests.hosted.belongings import picture

    made = {"runs": [], "adapters": [], "albums": []}
    for number, name in enumerate(names):
        called = {"name": name[:80], "data": [{"path": "demo/pirate"}], "output": {"sample_prompts": [name[:500]]}}
        try:
            run = runs.create(workspace, parse(called))
        except StudioError:
            run = runs.create(workspace, parse({**called, "name": f"hostile {number}", "output": {}}))
        made["runs"].append(run.name)
        for kind, fields in (
            ("started", {"steps": 3, "device": name[:60], "precision": "float32", "fast": name[:60], "targets": [name[:60]]}), ("step", STEP), ("note", {"text": name}),
            ("sample", {"step": 1, "prompt": name, "answer": name}), ("failed", {"reason": name}),
        ):  # fmt: skip
            runs.note(run, kind, **fields)
        (run / "log.txt").write_text(name)
        files = tiny.adapter_files(demo_base("demo-text"), seed=number, rank=1, size=0.05, ends=("q_proj",), name="demo-text")
        id = library.add(workspace, files, {"name": f"hostile {number}", "base": "demo-text"})
        made["adapters"].append(id)
        for fields in ({"name": name[:80]}, {"notes": name}, {"tags": [name[:40]]}, {"trigger": name[:200]}):
            with contextlib.suppress(StudioError):
                library.update(workspace, id, **fields)
        card = workspace.root / "library" / id / "card.json"
        durable.write_json(card, {**durable.read_json(card), "source": name, "targets": [name[:200]], "run": name[:200], "metrics": {name[:200]: 1.0}})
        picture(scratch / f"{number:03}.png")
        (scratch / f"{number:03}.txt").write_text(name)
    # The last of each holds all of them.
    run = runs.create(workspace, parse({"name": "hostile all", "data": [{"path": "demo/pirate"}], "output": {"sample_prompts": [name[:500] for name in _pages()]}}))
    runs.note(run, "started", steps=3, device="cpu", precision="float32", fast="x", targets=[name[:60] for name in names])
    for name in names:
        runs.note(run, "note", text=name)
        runs.note(run, "sample", step=1, prompt=name, answer=name)
    (run / "log.txt").write_text("\n".join(names))
    card = workspace.root / "library" / made["adapters"][-1] / "card.json"
    durable.write_json(card, {**durable.read_json(card), "targets": [name[:200] for name in names], "metrics": {name[:200]: 1.0 for name in names}, "notes": "\n".join(_pages())})
    made["runs"].append(run.name)
    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": name[:2000], "completion": name[:2000]}) + "\n" for name in names))
    studio.upload(workspace, rows, "rows.jsonl")
    album, _ = albums.create(workspace, sorted([*scratch.glob("*.png"), *scratch.glob("*.txt")]), name="hostile captions")
    made["albums"].append(album)
    for name in names[:: max(1, len(names) // 12)]:
        with contextlib.suppress(StudioError):
            made["albums"].append(albums.create(workspace, [scratch / "000.png"], name=name)[0])
    return made
