"""Adapters baked into the weights of a base: planned and checked in whole, then streamed tensor by tensor.

    W' = round(W + Σ weight · scale · B @ A)        the sum in fp32 (or wider where W is), rounded once

    plan.py       what will be written, from headers alone; everything that is wrong is said here
    writing.py    what no adapter touches byte for byte, the rest by rows, so that memory does not grow with the model
    whole.py      updates of full rank, which have no factors
    rescaled.py   DoRA's, OFT's and IA3's, which are made from the base's own rows
    numbers.py    the rows, and how much of the update the rounding takes
    extract.py    the other way: the adapter between two models
"""

from lora_studio.checkpoints.extract import Extracted, extract
from lora_studio.checkpoints.numbers import Loss, loss
from lora_studio.checkpoints.plan import DTYPES, Plan, plan
from lora_studio.checkpoints.writing import apply

__all__ = ["DTYPES", "Extracted", "Loss", "Plan", "apply", "extract", "loss", "plan"]
