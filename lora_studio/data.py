"""Where rows come from: files, folders and Hub data sets, read strictly, with the line of whatever is wrong. Loads no torch."""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from lora_studio import fence
from lora_studio.errors import DataError
from lora_studio.home import presets_folder
from lora_studio.spec import Source

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Table:
    """Rows as they stand in their files: `rows[i]` came from `places[i]`, a (file, line or row number) pair."""

    path: str
    columns: tuple[str, ...]
    rows: list[dict]
    places: list[tuple[str, int]]

    def place(self, index: int) -> str:
        """Where row `index` stands, in words."""
        name, number = self.places[index]
        return f"{name}, row {number}"


def locate(path: str) -> Path | str:
    """The file or folder a source's path means, or the Hub id as it stands. Raises DataError."""
    if path.startswith("demo/"):
        bundled = presets_folder() / f"{path}.jsonl"
        if re.fullmatch(r"demo/[a-z0-9_-]+", path) and bundled.is_file():
            return bundled
    here = fence.place(path)
    if here is not None:
        return here
    if HUB_ID.fullmatch(path) and not path.startswith((".", "/", "~")) and Path(path).suffix not in SUFFIXES:
        fence.refuse_data(path)
        return path
    raise DataError("data.missing", path=path)


def read(source: Source, *, limit: int | None = None) -> Table:
    """The rows of a source, at most `limit` (and at most its cap). Raises DataError naming file and line."""
    limit = min((number for number in (limit, source.cap) if number is not None), default=None)
    place = locate(source.path)
    if isinstance(place, str):
        found = [(place, number, row) for number, row in enumerate(_hub_rows(source, limit), 1)]
    else:
        found = []
        for file in files_of(place):
            left = None if limit is None else limit - len(found)
            if left is not None and left <= 0:
                break
            found += [(file.name, number, row) for number, row in _file_rows(file, left)]
    if not found:
        raise DataError("data.empty", path=source.path)
    columns = tuple(dict.fromkeys(key for _, _, row in found for key in row))
    return Table(source.path, columns, [row for *_, row in found], [(name, number) for name, number, _ in found])


def files_of(place: Path) -> list[Path]:
    """The data files at a place: itself, or all of a folder's, in the order of their names. Raises DataError."""
    if place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
        if not files:
            raise DataError("data.folder_empty", path=place, known=", ".join(SUFFIXES))
        return files
    if place.suffix.lower() not in SUFFIXES:
        raise DataError("data.file_kind", path=place.name, suffix=place.suffix or "nameless", known=", ".join(SUFFIXES))
    return [place]


def _file_rows(file: Path, limit: int | None) -> list[tuple[int, dict]]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return list(enumerate(_parquet_rows(file, limit), 1))
    text = _text_of(file)
    if suffix in (".csv", ".tsv"):
        rows = _csv_rows(file, text)
    elif suffix == ".json" and not _is_lines(text):
        rows = _json_rows(file, text)
    else:
        rows = _jsonl_rows(file, text, limit)
    return rows[:limit]


def _text_of(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("data.not_text", path=file.name, position=error.start) from None
    if not text.strip():
        raise DataError("data.empty", path=file.name)
    return text


def _is_lines(text: str) -> bool:
    """Whether a .json file holds one object a line rather than one array or object."""
    first = text.lstrip().split("\n", 1)
    if not first[0].startswith("{") or len(first) == 1:
        return False
    try:
        return isinstance(json.loads(first[0]), dict)
    except ValueError:
        return False


def _jsonl_rows(file: Path, text: str, limit: int | None) -> list[tuple[int, dict]]:
    rows, lines = [], text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and len(rows) >= limit:
            break
        try:
            row = _parse(file, number, line)
        except json.JSONDecodeError as error:
            cut = number == len(lines) and rows and error.pos >= len(line.rstrip()) - 1
            if cut or (number == len(lines) and rows and error.msg.startswith("Unterminated")):
                raise DataError("data.cut_line", path=file.name, line=number) from None
            raise _bad_line(file, number, error.colno, error.msg.lower(), line) from None
        if not isinstance(row, dict):
            raise DataError("data.not_object", path=file.name, row=number, kind=_kind(row))
        rows.append((number, row))
    return rows


def _json_rows(file: Path, text: str) -> list[tuple[int, dict]]:
    try:
        value = _parse(file, 1, text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise _bad_line(file, error.lineno, error.colno, error.msg.lower(), line) from None
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list) and item and isinstance(item[0], dict)]
        value = lists[0] if len(lists) == 1 and "messages" not in value and "conversations" not in value else [value]
    if not isinstance(value, list):
        raise DataError("data.not_object", path=file.name, row=1, kind=_kind(value))
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise DataError("data.not_object", path=file.name, row=number, kind=_kind(row))
    return list(enumerate(value, 1))


def _parse(file: Path, number: int, text: str):
    """One JSON value; a key given twice and a NaN are errors, where the json module would keep one or invent a number."""

    def pairs(items):
        names = [key for key, _ in items]
        twice = next((key for key in names if names.count(key) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise DataError("data.duplicate_column", path=file.name, row=number, name=twice)
        return dict(items)

    def constant(name):
        raise _bad_line(file, number, text.find(name) + 1, f"{name} is not JSON", text)

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise _bad_line(file, number, 1, "it is nested too deeply", text) from None


def _bad_line(file: Path, line: int, column: int, reason: str, text: str) -> DataError:
    return DataError("data.bad_line", path=file.name, line=line, column=column, reason=reason, start=text.strip()[:40])


def _csv_rows(file: Path, text: str) -> list[tuple[int, dict]]:
    """Every field stays text: `001`, `NA` and `1e5` are what they say."""
    csv.field_size_limit(64 << 20)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, header = [], None
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = [field.strip() for field in fields]
                continue
            if len(fields) != len(header):
                raise DataError("data.fields", path=file.name, row=len(rows) + 1, found=len(fields), expected=len(header))
            rows.append((len(rows) + 1, dict(zip(header, fields))))
    except csv.Error as error:
        raise DataError("data.bad_file", path=file.name, kind="CSV", reason=f"line {reader.line_num}: {error}") from None
    return rows


def _delimiter(text: str) -> str:
    header = text.split("\n", 1)[0]
    return max(",;\t|", key=lambda mark: (header.count(mark), mark == ","))


def _parquet_rows(file: Path, limit: int | None) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    rows: list[dict] = []
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            rows += batch.to_pylist()
            if limit is not None and len(rows) >= limit:
                break
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError("data.bad_file", path=file.name, kind="Parquet", reason=str(error).splitlines()[0]) from None
    return rows[:limit]


def _hub_rows(source: Source, limit: int | None) -> list[dict]:
    """The rows of a Hub data set."""
    found = load_hub(source)
    return list(found if limit is None else found.select(range(min(limit, len(found)))))


def load_hub(source: Source):
    """A Hub data set, through the datasets library (which runs no code of the repository). Raises DataError."""
    import datasets
    import httpx2
    import huggingface_hub.errors as hub

    _ask_first(source)
    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision, token=fence.lent())
    except ValueError as error:
        splits = re.search(r"Should be one of (.*)", str(error))
        if splits:
            raise DataError("data.no_split", path=source.path, split=source.split, known=splits[1][:200]) from None
        raise DataError("data.hub", path=source.path, reason=_first_line(error)) from None
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, hub.RepositoryNotFoundError) as error:
        if _refuses_token(error):
            raise DataError("data.bad_token", path=source.path) from None
        reason = "it is not there, or your account may not see it (sign in with `hf auth login`)"
        raise DataError("data.hub", path=source.path, reason=reason) from None
    except (datasets.exceptions.DatasetsError, httpx2.HTTPError, OSError) as error:
        if _refuses_token(error):
            raise DataError("data.bad_token", path=source.path) from None
        raise DataError("data.hub", path=source.path, reason=_first_line(error)) from None


def _ask_first(source: Source) -> None:
    """For a visitor ask the Hub whether their token opens the data set: the datasets library gives out what others fetched before, also
    after a refusal. Raises DataError."""
    import httpx2
    import huggingface_hub
    import huggingface_hub.errors as hub

    if fence.lent() is None and fence.visitor() is None:
        return
    try:
        huggingface_hub.HfApi(token=fence.lent() or False).auth_check(source.path, repo_type="dataset")
    except hub.HfHubHTTPError as error:
        if _refuses_token(error):
            raise DataError("data.bad_token", path=source.path) from None
        missing, gated = "it is not there, or your account may not see it", "it is gated, and your account has not been let in"
        reason = {401: missing, 404: missing, 403: gated}.get(getattr(error.response, "status_code", None), _first_line(error))
        raise DataError("data.hub", path=source.path, reason=reason) from None
    except (OSError, httpx2.HTTPError) as error:
        raise DataError("data.hub", path=source.path, reason=_first_line(error)) from None


def _refuses_token(error: BaseException | None) -> bool:
    """Whether the Hub answered 401 somewhere behind an error, to a token that was shown to it."""
    import huggingface_hub

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            return bool(fence.lent() or (fence.visitor() is None and huggingface_hub.get_token()))
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]


def _kind(value) -> str:
    return {list: "list", str: "text", int: "number", float: "number", bool: "true or false", type(None): "null"}.get(type(value), "value")
