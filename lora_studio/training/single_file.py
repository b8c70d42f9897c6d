"""A model in one file: its parts by diffusers' own conversion, each from the tensors that are its own; its tokenizers from CLIP's merges.

diffusers' from_single_file would read the whole file once for every part, and fetch its configurations from the Hub; here they ship.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lora_studio import single_files
from lora_studio.errors import BaseModelError
from lora_studio.single_files import names
from lora_studio.training.encode import first_line


def told(file: Path) -> dict:
    """What the scheduler of a model in one file must know besides its shipped settings."""
    return single_files.recognise(file.name, file).scheduler


def load_part(file: Path, component: str, kind: type, dtype: torch.dtype, id: str, **more) -> torch.nn.Module:
    """One part of a model in one file, converted; `more` goes to diffusers' own loading. Raises BaseModelError, also when a tensor of
    the part is not in the file."""
    sizes = single_files.recognise(id, file).sizes
    try:
        with safe_open(file, "pt") as opened:
            own = [name for name in list(opened.keys()) if names.owners(name) == component]
            found = {names.with_text_model(name): opened.get_tensor(name) for name in own}
        model = _converted(found, component, kind, dtype, sizes, more)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise BaseModelError("base.broken", id=id, reason=first_line(error)) from None
    missing = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if missing:
        raise BaseModelError("base.broken", id=id, reason=f"{len(missing)} tensors of its {component} are missing, for example {missing[0]}")
    return model


def _converted(found: dict, component: str, kind: type, dtype: torch.dtype, sizes: Path, more: dict) -> torch.nn.Module:
    if not component.startswith("text_encoder"):
        return kind.from_single_file(found, config=str(sizes), subfolder=component, torch_dtype=dtype, local_files_only=True, **more)
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    return create_diffusers_clip_model_from_ldm(
        kind, found, subfolder=component, config=str(sizes), torch_dtype=dtype, local_files_only=True
    )


def load_tokenizer(file: Path, name: str, kind: type):
    """A tokenizer: as it lies beside the sizes, else CLIP's, made from the merges that ship."""
    folder = single_files.recognise(file.name, file).sizes / name
    if (folder / "tokenizer.json").is_file():
        return kind.from_pretrained(folder, local_files_only=True)
    return clip_tokenizer(kind, pad="!" if '"!"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8") else "<|endoftext|>")


def clip_tokenizer(kind: type, *, pad: str):
    """CLIP's tokenizer: 256 bytes, the same at the end of a word, what the merges make, and two marks."""
    from tokenizers import pre_tokenizers

    merges = (single_files.HERE / "clip" / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split()) for line in merges]
    letters = _byte_letters()
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs), "<|startoftext|>", "<|endoftext|>"]
    return kind(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs, model_max_length=77, pad_token=pad)


def _byte_letters() -> list[str]:
    """A printable letter for every byte, in the order of CLIP's vocabulary: printable bytes first, as themselves (Radford et al. 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(rest))]
