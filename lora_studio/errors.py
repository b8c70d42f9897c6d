"""Every error a person can meet, and its sentence.

    StudioError                 reaches the user as one sentence: what, where, what next
    ├─ SpecError                one or many problems of a spec, each with the path of its field
    ├─ DataError                rows, columns, files
    ├─ BaseModelError           the model an adapter is trained on
    ├─ MachineError             disk, device, missing packages
    ├─ TrainingError            a run that cannot go on
    └─ RunError                 runs and their folders

To add one: write its sentence in SENTENCES and raise the class with the key and the values.
Anything that is not a StudioError is a bug: it goes to the log with its traceback.
"""

from dataclasses import dataclass
from typing import Literal

SENTENCES = {
    # spec
    "spec.problems": "{problems}",
    "spec.not_yaml": "{source} is not readable as YAML: {reason}. Check the indentation and the colons on that line.",
    "spec.not_mapping": "{source} holds a {kind}, not settings. Write `key: value` lines.",
    "spec.duplicate_key": "{source} sets {name} twice (line {line}). Keep one of them.",
    "spec.no_file": "There is no file {path}. Give the path of a spec, or --preset NAME (see `presets`).",
    "spec.bad_override": "{text} is not of the form path=value. Write for example --set method.rank=8.",
    "spec.unknown_preset": "There is no preset {name}. Known: {known}.",
    "spec.too_new": "This spec has version {version}; this studio reads up to version {newest}. Update the studio.",
    # data
    "data.missing": "{path} is not there. Give a file or folder on this machine, or a Hub data set as owner/name.",
    "data.empty": "{path} has no rows. Choose another file, or check that the upload finished.",
    "data.bad_line": "{path}, line {line}, column {column}: {reason}. The line begins {start!r}. Correct it or delete it.",
    "data.cut_line": "{path}, line {line} is cut off; the upload may be incomplete. Upload the file again.",
    "data.bad_file": "{path} cannot be read as {kind}: {reason}. Open it in its own program and save it again.",
    "data.fields": "{path}, row {row} has {found} fields, but the header has {expected}. Quote texts that hold a comma.",
    "data.not_object": "{path}, row {row} is a {kind}, not an object with named columns. Write one JSON object a row.",
    "data.duplicate_column": "{path}, row {row} has the key {name} twice. Keep one of them.",
    "data.file_kind": "{path} is a {suffix} file; rows are read from {known}. Convert it to one of these.",
    "data.folder_empty": "The folder {path} holds none of {known}. Choose the folder that holds the rows.",
    "data.not_text": "{path} is not UTF-8 text (byte {position}). Save it again with the encoding UTF-8.",
    "data.unknown_shape": "{path}: its columns ({columns}) are not those of a known kind of row for the task {task}. "
    "Map them, for example columns: {example}.",
    "data.no_column": "{path} has no column {column} (it has {columns}). Change columns.{role}, or choose another file.",
    "data.unknown_role": "{path}: columns.{role} is not a part of a {task} row. Known: {known}.",
    "data.nothing_left": "No row of {path} is left to train on: {reasons}. Correct the rows, the columns or the limits.",
    "data.too_few": "{rows} row is too few to train and validate on. Add rows, or set validation.size to 0.",
    "data.all_masked": "No token of any row would be learnt: {reason}.",
    "data.hub": "The data set {path} could not be fetched: {reason}.",
    "data.no_split": "{path} has no split {split}; it has {known}. Change split.",
    # base model
    "base.missing": "There is no base model {id}: it is neither a folder here nor a Hub id. {hint}",
    "base.not_found": "The Hub has no model {id}, or your account may not see it. Check the name; sign in with `hf auth login` "
    "if it is private.",
    "base.gated": "{id} is gated. Open https://huggingface.co/{id}, accept its terms, then sign in with `hf auth login`.",
    "base.bad_token": "The Hub refused your token while fetching {id}. Sign in again with `hf auth login`.",
    "base.offline": "{id} is not on this machine and the Hub cannot be reached ({reason}). Connect, or use demo-text.",
    "base.no_weights": "{id} has no .safetensors weights. Pickled weights are never opened; use a base saved as safetensors.",
    "base.no_config": "{id} has no readable config.json. Choose the folder that holds the model.",
    "base.not_causal": "{id} is a {model_type} model, which is not a causal language model. Choose another base.",
    "base.remote_code": "{id} needs code of its own to load, and the studio never runs such code. "
    "Choose a base that transformers supports itself.",
    "base.broken": "{id} could not be loaded: {reason}. Fetch it again.",
    "base.targets": "No layer of {id} is called {targets}. It has: {known}.",
    "base.template": "The chat template of {id} fails on row {row} of {path}: {reason}. Set task.template to chatml, "
    "or change the row.",
    # machine
    "machine.disk": "{path} has {free} free, and this needs about {needed}. Free some space, or set LORA_STUDIO_HOME elsewhere.",
    "machine.write": "{path} cannot be written: {reason}. Set LORA_STUDIO_HOME to a folder of yours.",
    "machine.no_device": "This machine has no {device}. It has: {known}. Set compute.device to one of these, or auto.",
    "machine.no_bf16": "{device} has no bf16. Set compute.precision to fp32, or auto.",
    "machine.package": "The package {name} is missing, which {use} needs. Run: pip install {name}",
    "machine.memory": "{device} ran out of memory at step {step}. {advice}",
    # training
    "training.not_finite": "The {what} became {value} at step {step}; the last good step is {good}. "
    "Nothing broken was saved. Try a lower optim.lr (now {lr:g}) or a longer schedule.warmup.",
    "training.resume_changed": "The run cannot go on from its checkpoint: {changes}. Start a new run with these settings.",
    # runs
    "run.unknown": "There is no run {id}. See `runs` for those that are here.",
    "run.ambiguous": "{id} fits several runs: {known}. Give more of the id.",
    "run.not_running": "The run {id} is {state}, so there is nothing to stop.",
    "run.live": "The run {id} is {state}. Stop it first.",
    "run.finished": "The run {id} is done; there is nothing to go on with. Start a new run, or raise schedule.steps there.",
    "run.vanished": "The process vanished without a word, as after a power cut or kill -9. Its last log line: {line}",
    "run.ended": "The process {words}. Its last log line: {line}",
    "run.failed": "The run {id} failed. {reason}",
    "run.no_adapter": "The run {id} has no adapter yet: it is {state}.",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a spec or its data: where (the path of a field, or "") and what, as a sentence."""

    path: str
    sentence: str
    level: Literal["error", "warning", "note"] = "error"


class StudioError(Exception):
    """An error with a sentence for the user. `key` names the sentence, `values` fill it."""

    def __init__(self, key, **values):
        self.key, self.values = key, values
        super().__init__(SENTENCES[key].format(**values))


class SpecError(StudioError):
    """What is wrong with a spec; `problems` lists all of it, each with its field."""

    def __init__(self, key, *, problems=(), **values):
        self.problems = tuple(problems) or (Problem("", SENTENCES[key].format(**values)),)
        super().__init__(key, problems="\n".join(problem.sentence for problem in self.problems), **values)


class DataError(StudioError):
    """Rows, columns or files that cannot be used."""


class BaseModelError(StudioError):
    """A base model that cannot be found, fetched or used."""


class MachineError(StudioError):
    """Disk, device or packages that do not suffice."""


class TrainingError(StudioError):
    """A run that cannot go on."""


class RunError(StudioError):
    """A run that is not there, or not in the state that was asked for."""
