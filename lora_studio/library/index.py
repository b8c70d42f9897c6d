"""The search index of the library: an SQLite table over the cards, brought up to date from the folders at every question."""

import contextlib
import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_studio.library import cards

VERSION = 2
BROKEN = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)
FOLDER, FILE = ".index", "library.sqlite"
ORDERS = {
    "newest": "created DESC, id", "oldest": "created, id", "name": "sorted, id", "size": "bytes DESC, id", "rank": "rank DESC, id",
}  # fmt: skip
SHOWN = ("id", "name", "base", "method", "rank", "alpha", "bytes", "trigger", "tags", "favourite", "created", "run", "damage")
SCHEMA = """
CREATE TABLE items (
  id TEXT PRIMARY KEY, stamp TEXT NOT NULL, name TEXT, base TEXT, method TEXT, rank INTEGER, alpha REAL, bytes INTEGER,
  trigger TEXT, tags TEXT, favourite INTEGER, created REAL, run TEXT, damage TEXT, sorted TEXT, words TEXT, tag_keys TEXT, parents TEXT
) WITHOUT ROWID
"""
_turns: dict[str, threading.RLock] = defaultdict(threading.RLock)


@dataclass(frozen=True)
class Question:
    """What is looked for: every word of `text` anywhere, and exact filters. `name` is exact too."""

    text: str = ""
    base: str | None = None
    tag: str | None = None
    method: str | None = None
    favourite: bool | None = None
    order: str = "newest"
    limit: int | None = None
    offset: int = 0
    name: str | None = None


@dataclass(frozen=True)
class Survey:
    """An answer with what a page of the library shows around it: the items, how many fit, how many there are, and what all of them
    can be filtered by."""

    items: list[cards.Item]
    count: int
    total: int
    bases: list[str]
    tags: list[str]
    methods: list[str]


def find(top: Path, question: Question) -> list[cards.Item]:
    """The items of the library in `top` that fit."""
    with _opened(top) as connection:
        return _find(connection, question)


def count(top: Path, question: Question) -> int:
    """How many items fit."""
    with _opened(top) as connection:
        return _count(connection, question)


def survey(top: Path, question: Question) -> Survey:
    """Everything a page of the library shows, after one look at the folders."""
    with _opened(top) as connection:
        distinct = {column: [row[0] for row in connection.execute(f"SELECT DISTINCT {column} FROM items ORDER BY 1")] for column in ("base", "method", "tags")}
        tags = {tag.casefold(): tag for row in distinct["tags"] if row for tag in row.split("\n")}
        found, total = _find(connection, question), _count(connection, Question())
        return Survey(found, _count(connection, question), total, distinct["base"], sorted(tags.values(), key=str.casefold), distinct["method"])


def _find(connection: sqlite3.Connection, question: Question) -> list[cards.Item]:
    where, values = _where(question)
    limit = -1 if question.limit is None else question.limit
    statement = f"SELECT {', '.join(SHOWN)} FROM items{where} ORDER BY {ORDERS[question.order]} LIMIT ? OFFSET ?"
    return [_item(row) for row in connection.execute(statement, [*values, limit, question.offset])]


def _count(connection: sqlite3.Connection, question: Question) -> int:
    where, values = _where(question)
    return connection.execute(f"SELECT count(*) FROM items{where}", values).fetchone()[0]


def children(top: Path, id: str) -> list[str]:
    """The items that name this one among their parents."""
    with _opened(top) as connection:
        return [row[0] for row in connection.execute("SELECT id FROM items WHERE instr(parents, ?) ORDER BY id", (id,))]


def _item(row: tuple) -> cards.Item:
    values = dict(zip(SHOWN, row))
    return cards.Item(
        **{**values, "tags": tuple(values["tags"].split("\n")) if values["tags"] else (), "favourite": bool(values["favourite"])}
    )


def _where(question: Question) -> tuple[str, list]:
    terms = [("instr(words, ?)", word) for word in question.text.casefold().split()]
    exact = {"base": question.base, "method": question.method, "name": question.name}
    terms += [(f"{column} = ?", value) for column, value in exact.items() if value is not None]
    if question.tag is not None:
        terms.append(("instr(tag_keys, ?)", f"\n{question.tag.strip().casefold()}\n"))
    if question.favourite is not None:
        terms.append(("favourite = ?", int(question.favourite)))
    return (" WHERE " + " AND ".join(term for term, _ in terms) if terms else ""), [
        _plain(value) if isinstance(value, str) else value for _, value in terms
    ]


# ---- keeping up with the folders


@contextlib.contextmanager
def _opened(top: Path) -> Iterator[sqlite3.Connection]:
    """The index, level with the folders. A broken or foreign one is made anew; where none can be written, it lives in memory.

    One thread at a time: SQLite shares memory among a process's connections to a file, and a file that is made anew beneath them ends the process.
    """
    with _turns[str(top)], contextlib.closing(_level(top)) as connection:
        yield connection


def _level(top: Path) -> sqlite3.Connection:
    folder = top / FOLDER
    for _ in range(2):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _synced(sqlite3.connect(folder / FILE, timeout=10), top)
        except (sqlite3.DatabaseError, OSError) as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF not in BROKEN:
                break  # another process is at it, or the disk is full: it is not the file that is wrong
            for path in folder.glob(f"{FILE}*") if folder.is_dir() else ():
                with contextlib.suppress(OSError):
                    path.unlink()
    return _synced(sqlite3.connect(":memory:"), top)


def _synced(connection: sqlite3.Connection, top: Path) -> sqlite3.Connection:
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
            with connection:
                connection.execute("DROP TABLE IF EXISTS items")
                connection.execute(SCHEMA)
                connection.execute(f"PRAGMA user_version={VERSION}")
        there, known = stamps(top), dict(connection.execute("SELECT id, stamp FROM items"))
        changed = [id for id, stamp in there.items() if known.get(id) != stamp]
        gone = [id for id in known if id not in there]
        if changed or gone:
            with connection:
                connection.executemany("DELETE FROM items WHERE id = ?", [(id,) for id in gone])
                rows = (_row(id, there[id], cards.read(top / id)) for id in changed)
                connection.executemany(f"INSERT OR REPLACE INTO items VALUES ({', '.join('?' * 18)})", rows)
    except BaseException:
        connection.close()
        raise
    return connection


def stamps(top: Path) -> dict[str, str]:
    """For each item a text that changes with its card. A card is replaced, never written over, so its inode changes too."""
    try:
        handle = os.open(top, os.O_RDONLY)
    except FileNotFoundError:
        return {}
    found = {}
    try:
        for name in filter(cards.ID.fullmatch, os.listdir(handle)):
            try:
                stat = os.stat(f"{name}/card.json", dir_fd=handle)  # from the open folder: the path above is not walked each time
                found[name] = f"{stat.st_mtime_ns}-{stat.st_ino}-{stat.st_size}"
            except FileNotFoundError:
                if (top / name).is_dir():
                    found[name] = "no card"
    finally:
        os.close(handle)
    return found


def _row(id: str, stamp: str, card: dict) -> tuple:
    tags = [str(tag) for tag in card["tags"]]
    run, damage = (None if card[key] is None else str(card[key]) for key in ("run", "damage"))
    words = [card["name"], card["base"], card["method"], card["trigger"], card["notes"], id, run or "", *tags]
    row = (
        id, stamp, card["name"], card["base"], card["method"], _whole(card["rank"]), _number(card["alpha"]), _whole(card["bytes"]),
        card["trigger"], "\n".join(tags), int(card["favourite"]), _number(card["created"]) or 0.0, run, damage, card["name"].casefold(),
        "\n".join(words).casefold(), "\n" + "".join(f"{tag.casefold()}\n" for tag in tags),
        "\n".join(str(one.get("id", "")) for one in card["parents"] if isinstance(one, dict)),
    )  # fmt: skip
    return tuple(_plain(value) if isinstance(value, str) else value for value in row)


def _plain(text: str) -> str:
    """Text that SQLite takes: no lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def _number(value) -> float | None:
    """A finite number, or nothing; a card edited by hand may hold anything."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**62
    return float(value) if fits else None


def _whole(value) -> int:
    return int(_number(value) or 0)
