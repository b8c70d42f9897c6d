"""Every error a person can meet, and its sentence.

    StudioError                 reaches the user as one sentence: what, where, what next
    ├─ SpecError                one or many problems of a spec, each with the path of its field
    ├─ DataError                rows, columns, files
    ├─ BaseModelError           the model an adapter is trained on
    ├─ MachineError             disk, device, missing packages
    ├─ TrainingError            a run that cannot go on
    ├─ RunError                 runs and their folders
    ├─ AdapterError             adapter files and items of the library
    ├─ BlendError               adapters that do not go together
    ├─ BakeError                adapters that cannot be baked into a base
    ├─ BenchError               the process that checks, previews, blends and answers
    ├─ HubError                 publishing to the Hub and pulling from it
    └─ HostError                how a studio is open to others, and what a visitor may do there

To add one: write its sentence in sentences/ and raise the class with the key and the values.
Anything that is not a StudioError is a bug: it goes to the log with its traceback.
"""

from dataclasses import dataclass
from typing import Literal

from lora_studio.sentences import SENTENCES


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


class HubError(StudioError):
    """What the Hub, the way to it, or a file for it does not allow."""


class HostError(StudioError):
    """How a studio is open to others, and what a visitor may do there."""


class AdapterError(StudioError):
    """An adapter file, or an item of the library, that cannot be used."""


class BlendError(StudioError):
    """Adapters that cannot be put together, or not like that."""


class BakeError(StudioError):
    """Adapters that cannot be baked into a base, or not there."""


class BenchError(StudioError):
    """The bench: starting it, asking it, and what a model in it cannot do."""
