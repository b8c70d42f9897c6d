"""Names that nobody should be able to do anything with, and the places that they try to reach."""

import json
from pathlib import Path

MARK = "zq9x"  # stands in every name that would run as code, a command, a template or a module
SECRET = "nobody-may-read-this"
SCRIPT = f"window.hacked='{MARK}'"


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
