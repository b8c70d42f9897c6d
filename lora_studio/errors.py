"""Every error a person can meet, and its sentence.

    StudioError                 reaches the user as one sentence: what, where, what next
    ├─ SpecError                one or many problems of a spec, each with the path of its field
    ├─ DataError                rows, columns, files
    ├─ BaseModelError           the model an adapter is trained on
    ├─ MachineError             disk, device, missing packages
    ├─ TrainingError            a run that cannot go on
    ├─ RunError                 runs and their folders
    ├─ BenchError               the process that checks, previews, blends and answers
    └─ HubError                 publishing to the Hub and pulling from it

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
    "spec.bad_size": "{text} is no size. Write for example --size 512x768.",
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
    # pictures
    "picture.folder_empty": "{path} holds no picture ({known}). Choose the folder that holds them.",
    "picture.nothing_left": "No picture of {path} is left to train on: {reasons}.",
    "picture.file_kind": "{name} is a {suffix} file; pictures are read from a folder or a .zip. Choose the folder it is in.",
    "picture.closed": "{path} cannot be read: {reason}. Change its permissions, or copy it to a folder of yours.",
    "picture.changed": "{name} could be read before, and now it cannot: {reason}. Put it back, or start again without it.",
    "picture.archive": "{name} was not unpacked: {reason}. Pack the pictures again as a plain .zip.",
    "picture.hub_column": "{id} has no column of pictures (it has {columns}). Choose another data set, or set columns.picture.",
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
    "base.pipeline": "{id} is a {pipeline}, a kind of image model that is not known here yet. Known: {known}.",
    "base.not_image": "{id} is a language model, and task.kind is image. Choose an image model, or another kind of rows.",
    "base.not_text": "{id} is an image model, and task.kind is {kind}. Set task.kind to image, or choose a language model.",
    "base.remote_code": "{id} needs code of its own to load, and the studio never runs such code. "
    "Choose a base that transformers supports itself.",
    "base.broken": "{id} could not be loaded: {reason}. Fetch it again.",
    "base.targets": "No layer of {id} is called {targets}. It has: {known}.",
    "base.template": "The chat template of {id} fails on row {row} of {path}: {reason}. Set task.template to chatml, "
    "or change the row.",
    # image families
    "image.two_parts": "{id} shares its work between two parts ({part} and {part}_2), which is not known here yet. Choose a base with one {part}.",
    "image.weighting": "{name} learns by flow matching, where {weighting} weighs nothing. Set task.weighting to none.",
    "image.multiple": "Pictures for {name} need edges that are multiples of {multiple}, and {field} is {value}. Change {field}.",
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
    "run.no_sample": "The run {id} has no sample picture {name}.",
    "run.no_picture": "There is no picture {name}; it may have been deleted.",
    "run.no_adapter": "The run {id} has no adapter yet: it is {state}.",
    # hub
    "hub.id": "{id} cannot be the name of a repository: {rule}. Try {suggestion}.",
    "hub.no_token": "You are not signed in to the Hub. Sign in with `hf auth login`.",
    "hub.bad_token": "The Hub refused your token while {doing}: it is wrong or has expired. {outcome} "
    "Sign in again with `hf auth login --force` (a token in HF_TOKEN goes before that).",
    "hub.read_token": "The token of {name} may only read. Nothing was published. Make one that may write at "
    "https://huggingface.co/settings/tokens, then sign in with `hf auth login --force`.",
    "hub.namespace": "You cannot publish as {owner}: your token knows {known}. Nothing was published. Publish as {suggestion}, "
    "or sign in with a token that may see {owner}.",
    "hub.foreign": "{id} is there already and you may not write to it ({reason}). Nothing was published. Choose another name.",
    "hub.public": "{id} is there already and is public, and you asked for private. Nothing was published. "
    "Choose another name, such as {suggestion}, or make it private in its settings on the Hub.",
    "hub.missing": "The Hub has no {id}, or your account may not see it. Check the name; sign in with `hf auth login` if it is private.",
    "hub.no_revision": "{id} has no such branch, tag or commit. Check the revision.",
    "hub.gated": "{id} is gated. Open {address}, accept its terms, then sign in with `hf auth login`.",
    "hub.denied": "The Hub does not allow this for {id} ({doing}): {reason}. {outcome} Check what your token may do at "
    "https://huggingface.co/settings/tokens.",
    "hub.refused": "The Hub answered {status} while {doing} for {id}: {reason}. {outcome} If it goes on, "
    "see https://status.huggingface.co.",
    "hub.offline": "The Hub is switched off here (HF_HUB_OFFLINE is set). {outcome} Unset it and try again.",
    "hub.wait": "The Hub asks to wait {wait} while {doing}. {outcome} Try again then.",
    "hub.silent": "The Hub gave no sign while {doing} ({reason}). {outcome} Check the connection and try again.",
    "hub.down": "The Hub failed while {doing} ({status}), several times. {outcome} Try again in a few minutes.",
    "hub.cut": "The connection broke while {doing} ({reason}). {outcome} Check the connection and try again.",
    "hub.proxy": "What answered while {doing} was not the Hub but perhaps a proxy or a sign-in page. {outcome} "
    "Check the connection in a browser, and HF_ENDPOINT if it is set.",
    "hub.card": "The Hub refuses the model card: {reason}. Nothing was published. Correct the lines at the top of README.md.",
    "hub.scan": "Nothing was sent, because of what would have become public: {findings}. Remove it and publish again.",
    "hub.unwanted": "{path} is not published: {reason}. Nothing was sent. Take it out of the folder.",
    "hub.empty": "{path} holds no .safetensors file, so there is nothing to publish. Choose the folder of an adapter.",
    "hub.file": "{path} cannot be used: {reason}. {outcome} Check the file and try again.",
    "hub.moved": "{id} was changed by someone else at the same moment. It is not published yet. Look at it on the Hub, then publish again.",
    "hub.not_whole": "The Hub took the commit, but {files} of {id} is not there as it is here. It is not published yet. Publish again; "
    "only what is missing is sent. See whether a .gitignore there leaves it out.",
    "hub.unknown": "The last answer of the Hub did not arrive, and {id} cannot be looked at ({reason}) "
    "It may be published or not. Publish again when the Hub answers: it looks first and sends only what is missing.",
    "hub.target": "{path} is there already. Nothing was pulled. Choose another name.",
    "hub.bad_name": "{id} holds a file with the name {name}, which no adapter needs. Nothing was pulled. Do not use this repository.",
    "hub.pickle": "{id} has its weights in {name}, which may be a pickle, and pickles run code. Nothing was pulled. "
    "Ask its author for a .safetensors file.",
    "hub.no_weights": "{id} holds no .safetensors file ({known}). Nothing was pulled. Check the name and the subfolder.",
    "hub.damaged": "{file} of {id} arrived with other bytes than the Hub lists ({size} bytes of {expected}). Nothing was pulled. "
    "Pull again; a proxy on the way may have changed it.",
    # shelf
    "adapter.refused": "{name} was not taken into the library: {reason}",
    "adapter.target": "{path} is there already. Give another folder.",
    "adapter.no_upload": "No file was chosen. Choose the .safetensors file and its adapter_config.json, or a .zip of both.",
    "adapter.archive": "{path} cannot be unpacked: {reason}. Pack it again as a plain .zip.",
    "adapter.archive_twice": "{path} holds {name} in several folders. Pack the folder of one adapter.",
    # adapters, blend, library
    "adapter.missing": "{path} is not there. Give a PEFT folder, or a .safetensors file with its adapter_config.json beside it.",
    "adapter.unreadable": "{path} cannot be read: {reason}. Check the file and its permissions.",
    "adapter.no_weights": "{path} has no {wanted}. Choose the folder that holds the adapter's weights.",
    "adapter.many_files": "{path} holds several weight files: {known}. Give the one that is meant.",
    "adapter.pickle": "{path} is a pickle. Pickles can run code, so it is never opened; ask for a .safetensors file.",
    "adapter.stranger": "{path} is {what}. Download the .safetensors file itself.",
    "adapter.empty_file": "{path} is empty. Download it again.",
    "adapter.cut": "{path} is cut off: it has {there} bytes, and its header promises {promised}. Download it again.",
    "adapter.junk": "{path} has {extra} bytes after its end. Download it again, or ask for a clean file.",
    "adapter.not_safetensors": "{path} is not a safetensors file: {reason}. Download it again.",
    "adapter.not_json": "{path} has a broken text part: {reason}. Download it again.",
    "adapter.duplicate": "{path} holds the name {name} twice. Readers would disagree about it; ask for a clean file.",
    "adapter.entry": "{path}: the tensor {name} is described wrongly: {reason}. Download the file again.",
    "adapter.empty_tensor": "{path}: the tensor {name} is empty (shape {shape}), as when a sharded run is saved without gathering its "
    "parts. Save the adapter again.",
    "adapter.header_limit": "{path} has {what} than an adapter needs (limit {limit}). It is not opened; check where it comes from.",
    "adapter.no_tensors": "{path} holds no tensors. Save the adapter again.",
    "adapter.no_config": "{path} has no adapter_config.json beside it, so its strength is unknown. Put the file there, or give base and "
    "lora_alpha.",
    "adapter.config_lacks": "adapter_config.json lacks {name}. Save the adapter again with PEFT, or give the value.",
    "adapter.config_value": "adapter_config.json: {name} is {value}. {reason}.",
    "adapter.pattern": "adapter_config.json: the pattern {pattern} cannot be used: {reason}. Replace it by the layers' names.",
    "adapter.method": "{path} is a {method} adapter, which is not supported yet. LoRA adapters in PEFT's format are.",
    "adapter.image": "{path} is a {form} adapter for {family}. Adapters of image models are recognised, but cannot be used yet.",
    "adapter.whole_model": "{path} is a whole model, not an adapter. Use it as a base.",
    "adapter.unknown_names": "{path} holds no adapter that is known here; its first tensor is {name}. Convert it to PEFT's format.",
    "adapter.no_factors": "{path} holds no lora_A and lora_B; its first tensor is {name}. Save the adapter again.",
    "adapter.problems": "{reason}",
    "adapter.twice": "{path}: the layer {name} has its factors twice. Save one adapter to a file.",
    "adapter.half": "{path}: the layer {name} has {have} but no {lack}. The file is incomplete; save or download it again.",
    "adapter.not_floats": "{path}: the tensor {name} holds {dtype}, not floating-point numbers. Save the adapter again.",
    "adapter.shapes": "{path}: the factors of {name} do not fit each other (A {A}, B {B}). Save the adapter again.",
    "adapter.rank_differs": "{path}: {name} has rank {there}, but adapter_config.json says {said} ({count} layers differ). "
    "Use the configuration that was saved with it.",
    "adapter.no_alpha": "{path}: adapter_config.json has no lora_alpha, so its strength is unknown. Ask its author, and give lora_alpha.",
    "adapter.no_effect": "{path} changes nothing: {reason}. Train it first, or choose another file.",
    "adapter.beyond_targets": "{path}: {count} of {total} layers with weights are not among the targets of adapter_config.json, the first "
    "being {name}. Loaders would drop them; use the configuration that was saved with it.",
    "adapter.idle_targets": "{path}: adapter_config.json lists targets that have no weights: {names}. The file may be incomplete.",
    "adapter.dora_flag": "{path}: adapter_config.json says use_dora {said}, and there are {count} magnitude vectors. "
    "Use the configuration that was saved with it.",
    "adapter.stray": "{path}: {count} tensors are no factors and adapter_config.json does not mention them, the first being {name}. "
    "Loaders would drop them; use the configuration that was saved with it.",
    "adapter.not_finite": "{path}: the tensor {name} holds {what} ({count} such tensors). The training diverged; use an earlier checkpoint.",
    "adapter.fits_nothing": "None of the {count} layers of {path} is in {base}, the first being {name}. It was made for {own}; choose that base.",
    "adapter.unknown_layers": "{path}: {count} of {total} layers are not in {base}, the first being {name}. Choose the base it was made for.",
    "adapter.other_shapes": "{path}: {name} is for a weight of shape {here}, but in {base} it has {there} ({count} such layers). "
    "It was made for {own}; choose that base.",
    "adapter.missing_layers": "{path} has weights for {there} of the {total} layers it is meant for; the first without is {name}. "
    "The file may be incomplete.",
    "adapter.other_base": "{path} says it was made for {own}, not for {base}. Check that these are the same model.",
    "adapter.nothing_to_write": "There is nothing to save: every weight is 0. Give at least one adapter a weight.",
    "adapter.rewrite": "An adapter with {what} cannot be written in the common layout. Export the files it came with.",
    "adapter.overflow": "The update of {name} does not fit {dtype}. Save in float32, or lower the weights.",
    "blend.count": "There are {adapters} adapters and {weights} weights. Give one weight for each.",
    "blend.weight": "The weight {weight} is not a number from -{limit} to {limit}. Change it.",
    "mix.many": "There are {count} adapters in the mix, and it has room for {most}. Take some out, or save a part of them as a blend first.",
    "playground.sides": "There are {count} sides to show, and it must be 1 to {most}. Choose them under Sides to show.",
    "mix.weight": "The weight of {name} is {weight}, but it must be a number from {least:g} to {most:g}. Change it.",
    "blend.rank": "The rank {rank} is not a whole number of at least 1. Change it.",
    "blend.shapes": "The layer {name} is {left} in one adapter and {right} in another. Blend adapters of the same base only.",
    "blend.overflow": "The layer {name} becomes infinite with these weights. Lower them.",
    "blend.bases": "{left} was made for {left_base}, {right} for {right_base}. Blend adapters of the same base only.",
    "blend.dora": "{name} is a DoRA adapter: its magnitudes make the update more than low-rank. Blending it is not supported yet; train it "
    "without DoRA.",
    "blend.method": "{name} is a {method} adapter, which cannot be blended yet. Convert it to LoRA with PEFT's convert_to_lora first.",
    "blend.mutates": "{name} was started with {init}, which changes the base itself. Save it as plain LoRA first (PEFT: save_pretrained with "
    "path_initial_model_for_weight_conversion).",
    "blend.variant": "{name} uses {variant}, which cannot be blended yet. Train it without.",
    "blend.bias": "{name} carries biases, which cannot be blended yet. Train it with bias none.",
    "blend.extras": "{name} carries whole tensors ({tensor}), which cannot be blended yet. Train it without modules_to_save and new tokens.",
    "library.unknown": "There is no adapter {id} in the library. See `library` for those that are here.",
    "library.ambiguous": "{id} fits several adapters: {known}. Give the id.",
    "library.damaged": "The files of {id} are damaged: {reason}. Import it again; its card keeps your notes.",
    "adapter.taken": "There is an adapter called {name} already ({id}). Choose another name, such as {suggestion}.",
    "library.name": "The name {name} cannot be used. Use 1 to 80 characters that can be printed.",
    "library.tag": "The tag {tag} cannot be used. Use 1 to 40 characters that can be printed.",
    "library.not_removed": "{id} is not among the removed adapters. They are kept for 30 days.",
    "library.back_already": "The adapter {id} is in the library again, so there is nothing to bring back.",
    # bench
    "bench.request": "The bench was asked for something it cannot do: {reason}. Update the studio, or start it again.",
    "bench.cancelled": "The answer was stopped.",
    "bench.bug": "The bench failed at {verb}: {reason}. The whole story is in {log}.",
    "bench.died": "The bench ended before it had answered. Its last log line: {line}. Ask again; it is started anew.",
    "bench.not_started": "The bench could not be started. Its last log line: {line}.",
    "bench.silent": "The bench gave no sign for {seconds:g} seconds while {doing}, so it was ended. Ask again; it is started anew.",
    "bench.slow": "The bench was not done within {seconds:g} seconds ({doing}). Ask again later.",
    "bench.made_room": "The run {run} needs the device ({device}); the model was unloaded and is loaded again when it ends.",
    "bench.device_taken": "{run} works on {device}, so no model can be loaded there now. Ask again when it has ended, or stop it.",
    "bench.unloaded": "The model was unloaded ({reason}). Ask again; it is loaded again.",
    "bench.memory": "The memory of {device} does not suffice. Choose a smaller base, fewer adapters or a shorter answer.",
    "bench.setting": "{name} is {value}, but {rule}. Change it.",
    "bench.kind": "{base} is {is_a} model, and this needs {wanted} model. Choose another base.",
    "bench.nothing_asked": "There is nothing to answer. Write a message.",
    "bench.messages": "{found} is not a message. Give each message a role and a content.",
    "bench.template": "The chat template of {base} fails on this conversation: {reason}. Try the template chatml.",
    "bench.too_long": "The conversation has {tokens} tokens, and {base} has room for {room}. Start a new one, or shorten it.",
    "bench.not_finite": "The answer broke off: a logit became NaN or infinite. Lower the weights.",
    "bench.layer": "{path}: {name} is a {there} in the base, and a {here} update cannot be tried there. Choose another adapter.",
    "bench.target": "{path} is there already. Choose another name.",
    "bench.not_compared": "{base} is not on this machine, so the adapter was not compared with it.",
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


class HubError(StudioError):
    """What the Hub, the way to it, or a file for it does not allow."""


class AdapterError(StudioError):
    """An adapter file, or an item of the library, that cannot be used."""


class BlendError(StudioError):
    """Adapters that cannot be put together, or not like that."""


class BenchError(StudioError):
    """The bench: starting it, asking it, and what a model in it cannot do."""
