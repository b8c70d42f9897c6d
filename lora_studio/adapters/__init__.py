"""Adapters as files: recognise them, inspect their headers, read and check them, write them so that every loader reads the same."""

from lora_studio.adapters.card import Adapter, Card, Layer
from lora_studio.adapters.checks import base_shapes, check, place, refuse_blend
from lora_studio.adapters.files import CONFIG, PICKLED, WEIGHTS, shown
from lora_studio.adapters.reading import inspect, read
from lora_studio.adapters.writing import with_modules, write

__all__ = [
    "CONFIG", "PICKLED", "WEIGHTS", "Adapter", "Card", "Layer", "base_shapes", "check", "inspect", "place", "read", "refuse_blend", "shown",
    "with_modules", "write",
]  # fmt: skip
