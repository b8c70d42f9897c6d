"""Pictures as rows of 2x2 patches, which is how some transformers read them."""

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(b, c, h, w) as tokens (b, h/2 * w/2, c * 4)."""
    return fold(latents).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (b, h/2 * w/2, c * 4) as latents (b, c, h, w)."""
    return unfold(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)))


def fold(latents: Tensor) -> Tensor:
    """(b, c, h, w) as (b, c * 4, h/2, w/2): each channel's four pixels become channels."""
    found = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return found.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unfold(folded: Tensor) -> Tensor:
    """The reverse of fold."""
    found = folded.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)
    return found.flatten(4, 5).flatten(2, 3)
