"""How wide the layers of an adapter are, where its file leaves that out: VeRA, MiSS, OFT and IA3 as PEFT saves them. The base says it; once
it is noted in the header, where PEFT looks at nothing, nobody has to ask again."""

import json
from pathlib import Path

from lora_studio.adapters import config as configs
from lora_studio.adapters import multiplying, natives
from lora_studio.adapters.checks import Shapes, place
from lora_studio.adapters.dialects import PREFIX
from lora_studio.adapters.files import BESIDE, CONFIG, WEIGHTS, Header, locate, read_header, reheaded
from lora_studio.errors import AdapterError

NOTED = {**dict.fromkeys(("VERA", "MISS"), natives.WIDTHS), **dict.fromkeys(multiplying.METHODS, multiplying.SHAPES)}


def base_to_ask(source: Path | str, *, config: dict | None = None) -> str | None:
    """The base that an adapter names, where its file leaves out how wide its layers are; "" where it names none, and None where nothing is
    left out. Raises AdapterError when the file cannot be read as an adapter at all."""
    _, header, said = _opened(source, config)
    if said is None or NOTED[said.peft_type] in header.metadata:
        return None
    return said.base_model_name_or_path


def noted(source: Path | str, shapes: Shapes, *, config: dict | None = None) -> dict[str, bytes]:
    """The files of such an adapter with the sides of every layer noted that is in a base of these `shapes` (see checks.base_shapes). Packed
    weights hide their sides; what stays unknown is for whoever reads the files to name. Raises AdapterError."""
    files, header, said = _opened(source, config)
    found = {}
    for layer in sorted({_layer(name, said.peft_type) for name in header.tensors}):
        there = place(layer, shapes)
        if there is not None and len(shapes[there]) == 2 and shapes[there][1] > 1:
            out, width = shapes[there][::-1] if said.fan_in_fan_out else shapes[there]
            found[layer] = [out, width] if NOTED[said.peft_type] == multiplying.SHAPES else width
    return {**files, WEIGHTS: reheaded(files[WEIGHTS], metadata={NOTED[said.peft_type]: json.dumps(found, sort_keys=True)})}


def _layer(name: str, peft_type: str) -> str:
    """The layer that a tensor belongs to."""
    own = name.removeprefix(PREFIX)
    if peft_type in multiplying.METHODS:
        return own.removesuffix(multiplying.ENDS[multiplying.METHODS[peft_type]])
    match = natives.NAME.match(own)
    return match["layer"] if match else own


def _opened(source: Path | str, config: dict | None) -> tuple[dict[str, bytes], Header, configs.PeftConfig | None]:
    """The files of an adapter by one of these methods, its header, and its configuration; of any other nothing but the header."""
    where = locate(source)
    with where.open() as (file, size):
        header = read_header(where.label, file, size)
        said = None if where.config is None and config is None else configs.read(where.config, config)[0]
        if said is None or said.peft_type not in NOTED:
            return {}, header, None
        file.seek(0)
        try:
            beside = {name: path.read_bytes() for name in (CONFIG, *BESIDE) if (path := where.weights.with_name(name)).is_file()}
            return {WEIGHTS: file.read(), **beside}, header, said
        except OSError as error:
            raise AdapterError("adapter.unreadable", path=where.label, reason=error.strerror or str(error)) from None
