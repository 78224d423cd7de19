"""Features of pictures for diversity: the autoencoder's latents; and DINOv2's (Oquab et al. 2023, arXiv 2304.07193) of
what real models' pictures show.

Shape suffixes: B batch, F frames, C channels, H/W pixels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Dinov2Model

from rewards.files import FILES, Published, locate
from rewards.interface import RewardError, named
from rewards.preprocess import Preprocess
from student.families.family import Family
from training.evaluate import FeaturesFn, add_weights

MODEL = ("config.json", "model.safetensors")
# As the published processor does it: the shorter side becomes 256 pixels, and of that the middle 224 are seen.
RESIZED, SEEN = Preprocess(256, normalise=False, in_bytes=True), 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PIXELS_AT_ONCE = 16 * 512 * 512  # that the autoencoder reads in one call: a video's frames are many and large
AT_ONCE = 64  # pictures that DINOv2 reads in one call


def open_dinov2(name: str, files: Path = FILES) -> Any:
    """The network of a folder, or of an id on the hub such as facebook/dinov2-base.

    Raises:
        RewardError: its files are missing, or are those of something else.
    """
    folder = Path(name) if Path(name).is_dir() else locate(Published(name, MODEL), files)
    with named(f"validation.dinov2 {name!r} cannot be opened"):
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != "dinov2":
            raise RewardError(f"validation.dinov2 {name!r} is a model of type {kind!r}: accepted is 'dinov2'")
        loaded: Any = Dinov2Model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    network, report = loaded
    if report["missing_keys"]:
        raise RewardError(f"validation.dinov2 {name!r} lacks {min(report['missing_keys'])}: it is not complete")
    return network.eval().requires_grad_(False)


def dinov2_features(network: Any, model: Family) -> FeaturesFn:
    """The class token of pictures (B, C, H, W) in [0, 1], or of a video's frames (B, F, C, H, W), side by side.

    The network is on the family's device while it computes, and in main memory otherwise.
    """

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        flat = images.flatten(0, 1) if images.ndim == 5 else images
        network.to(model.device)
        try:
            found = [network(_pixels(part).to(model.device)).pooler_output for part in flat.split(AT_ONCE)]
        finally:
            network.to("cpu")
        return torch.cat(found).reshape(len(images), -1).float().cpu()

    return features


def _pixels(images_BCHW: Tensor) -> Tensor:
    margin = (RESIZED.size - SEEN) // 2
    seen = RESIZED(images_BCHW)[..., margin : margin + SEEN, margin : margin + SEEN]
    mean, std = (torch.tensor(values, device=seen.device)[:, None, None] for values in (MEAN, STD))
    return (seen - mean) / std


def source(network: nn.Module) -> str:
    """A hash of its weights, on which the figures depend."""
    digest = hashlib.sha256()
    add_weights(digest, network.state_dict())
    return f"dinov2 {digest.hexdigest()}"


def latent_features(model: Family) -> FeaturesFn:
    """Autoencoder latents as features for diversity: no reward was trained on them."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        flat = images.flatten(0, 1) if images.ndim == 5 else images
        at_once = min(64, max(1, PIXELS_AT_ONCE // (flat.shape[-2] * flat.shape[-1])))
        latents = torch.cat([_latents(model, part * 2 - 1) for part in flat.split(at_once)])
        return latents.reshape(len(images), -1)

    return features


def _latents(model: Family, x_BCHW: Tensor) -> Tensor:
    """The latents of pictures in [-1, 1]."""
    x = x_BCHW.to(model.device, model.vae.dtype)
    out = model.vae.encode(x[:, :, None] if "temperal_downsample" in model.vae.config else x)
    latents: Tensor = out.latents if hasattr(out, "latents") else out.latent_dist.mode()
    return latents.float().cpu()
