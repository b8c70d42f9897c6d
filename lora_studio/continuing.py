"""An adapter to go on from, judged before anything is loaded: whether it is there, is one that can be gone on from, and fits the base, the
layers and the rank of the run. From headers alone."""

from lora_studio import adapters, fence, library
from lora_studio.adapters import experts
from lora_studio.bases import BaseInfo
from lora_studio.errors import Problem, StudioError, TrainingError
from lora_studio.spec import TrainSpec
from lora_studio.workspace import Workspace

PATH = "method.start"


def problems(workspace: Workspace, spec: TrainSpec, info: BaseInfo | None) -> list[Problem]:
    """Everything that stands in the way of going on from method.start; nothing where a run starts afresh."""
    given = getattr(spec.method, "start", None)
    if not given:
        return []
    try:
        here = fence.place(given)
        card = adapters.inspect(here if here is not None and here.is_dir() else library.adapter_folder(workspace, given))
        if not card.is_usable:
            return [Problem(PATH, problem.sentence) for problem in card.problems if problem.level == "error"]
        adapters.refuse_blend({given: card})
    except StudioError as error:
        return [Problem(PATH, str(error))]
    found = []
    if info is not None and info.folder is not None:
        fits = adapters.check(card, adapters.base_shapes(info.folder), label=given, base=spec.base.id)
        found = [Problem(PATH, problem.sentence, "error" if problem.level == "error" else "note") for problem in fits]
        if any(problem.level == "error" for problem in found):
            return found
        targets = info.targets(spec.method.targets)
        stacks = info.experts if spec.method.experts else ()
        strangers = [name for name in card.layers if not (stacks and experts.SLOT.match(name)) and not any(name == end or name.endswith("." + end) for end in targets)]
        if strangers and not getattr(spec.task, "text_encoder", False):
            found.append(Problem(PATH, str(TrainingError("training.start_layers", adapter=given, name=strangers[0], count=len(strangers)))))
    if card.rank > spec.method.rank:
        name = next(name for name, layer in card.layers.items() if layer.rank == card.rank)
        words = str(TrainingError("training.start_rank", adapter=given, name=name, rank=card.rank, there=spec.method.rank))
        found.append(Problem("method.rank", words))
    return found
