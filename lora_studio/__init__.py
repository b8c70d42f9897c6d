"""LoRA Studio: train, blend and publish low-rank adapters for language and image models."""

__version__ = "0.1.0"
