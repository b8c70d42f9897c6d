"""Masks: how much each place of a picture counts in the loss."""

import numpy
import torch
from torch import Tensor

from lora_studio import pictures
from lora_studio.training.showing import Shown


def weights_of(shown: Shown, like: Tensor, outside: float) -> Tensor | None:
    """The weight (h, w) of each place of latents (..., h, w): 1 where the mask is white, `outside` where it is black, between them by the
    share of white; the mask is placed as its picture is. None for a picture without a mask."""
    found = pictures.load_mask(shown.picture, size=shown.size, crop=shown.crop, seed=shown.crop_seed, flip=shown.flip)
    if found is None:
        return None
    white = torch.from_numpy(numpy.asarray(found).copy()).float() / 255
    share = torch.nn.functional.adaptive_avg_pool2d(white[None], like.shape[-2:])[0]
    return outside + (1 - outside) * share


def mean(errors: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean (b,) of errors (b, ..., h, w) by weights (b, h, w). It is divided by the weights' sum, so that a small face counts
    as much as one that fills the picture; a picture that is masked altogether counts nothing."""
    places = errors.flatten(1, -3).mean(1)
    return (places * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1e-12)
