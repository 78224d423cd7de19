"""A decoder that takes less memory: at full size its activations are what a step keeps.

Its blocks are computed again for their gradient; or it works on one tile of the picture after the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CACHE = "feat_cache"  # of the causal autoencoders (Wan, Qwen-Image), which go from frame to frame


def recompute_blocks(vae: Any) -> None:
    """Keep the inputs of a decoder's blocks alone: by diffusers' own means, or where it has none, block by block."""
    if getattr(vae, "_supports_gradient_checkpointing", False):
        vae.enable_gradient_checkpointing()
        return
    blocks = [part for part in vae.decoder.modules() if _keeps_frames(part)]
    for block in blocks:
        if not any(_keeps_frames(part) for part in block.modules() if part is not block):
            block.forward = partial(_again, block.forward)
    for norm in (part for part in vae.decoder.modules() if hasattr(part, "gamma")):  # each would keep four of its input
        norm.forward = partial(checkpoint, norm.forward, use_reentrant=False)


def decode_tiles(vae: Any, side_px: int) -> None:
    """Decode (and encode) in tiles of this side that overlap by a quarter, by diffusers' own means; 0: as it is.

    Each tile is computed again for its gradient, so that the activations of one are there at a time. Call it after
    ``recompute_blocks``.
    """
    if not side_px:
        return
    if hasattr(vae, "tile_sample_min_height"):
        vae.enable_tiling(side_px, side_px, side_px * 3 // 4, side_px * 3 // 4)
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size = side_px
        vae.tile_latent_min_size = side_px // 2 ** (len(vae.config.block_out_channels) - 1)
    decode = vae.decoder.forward
    keeps_frames = _keeps_frames(vae.decoder)
    vae.decoder.forward = partial(_again, decode) if keeps_frames else partial(checkpoint, decode, use_reentrant=False)


def _keeps_frames(module: Any) -> bool:
    return CACHE in inspect.signature(module.forward).parameters


def _again(
    forward: Callable[..., Tensor], x: Tensor, feat_cache: Any = None, feat_idx: Any = None, **options: Any
) -> Tensor:
    """``forward``, which reads and writes what it keeps of the frames before: the second time from the same state."""
    if not (torch.is_grad_enabled() and x.requires_grad) or feat_cache is None:
        return forward(x, feat_cache, feat_idx, **options)
    before, at = list(feat_cache), list(feat_idx)

    def run(x: Tensor) -> tuple[Tensor, list[Any], list[int]]:
        kept, place = list(before), list(at)
        return forward(x, kept, place, **options), kept, place

    found: tuple[Tensor, list[Any], list[int]] = checkpoint(run, x, use_reentrant=False)
    y, feat_cache[:], feat_idx[:] = found
    return y
