"""``python -m benchmarks.serving_memory``: what the torch runtime holds on a GPU, by stage, at full published size.

The runtime's own model (``student.runtimes.torch.TorchModel``) draws on a device that is not there, over networks of
the published sizes whose tensors have shapes and no memory (benchmarks/make_believe.py). A tensor that lies elsewhere,
or has another type than its weights, raises as on a real one. Every allocation is counted while it lives; what a
driver, CUDA's libraries and a fragmented heap take is not: about 1 GB more. ``--write`` puts it into docs/models.md.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from benchmarks.full_size import MODELS, Model, without_weights
from benchmarks.make_believe import DEVICE, Peak, fake_device, num_bytes, put, unread
from benchmarks.serving.report import write_between
from benchmarks.train_step import words
from rewards.clip import ClipReward
from rewards.hps import vit_h_14
from rewards.interface import scored
from student.families.family import Family
from student.runtimes.placement import OFFLOADS, Placement
from student.runtimes.torch import TorchModel
from student.tokens import CHATS

GB = 1e9
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- serving memory: begin -->", "<!-- serving memory: end -->"
STAGES = ("encode", "draw", "decode")
DTYPE = torch.bfloat16
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
XXL = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
QWEN3_4B = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN25_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "tokens_per_second": 2,
}  # fmt: skip


def _clip(sizes: Mapping[str, int]) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, projection_dim=sizes["hidden_size"]))


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=32128, **XXL))


def _umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL))


def _qwen25() -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=QWEN25_7B, vision_config=VISION))


@dataclass(frozen=True)
class Case:
    """One row: a published model with its encoders and the lengths of what they read, and the size that is drawn."""

    name: str
    model: Model
    encoders: tuple[Callable[[], nn.Module], ...]
    ids: tuple[int, ...]
    height: int = 1024
    width: int = 1024
    frames: int = 1

    @property
    def size(self) -> str:
        frames = f", {self.frames} frames" if self.frames > 1 else ""
        return f"{self.width}x{self.height}{frames}"


@dataclass(frozen=True)
class Row:
    """Bytes: each part's weights, and by offload and stage the most that was alive on the device."""

    case: Case
    weights: Mapping[str, int]
    peak: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def most(self, offload: str) -> int:
        return max(self.peak[offload].values())


def _chat(family: str, length: int = 512) -> tuple[int, int]:
    return (length + CHATS[family].dropped,) * 2


FLUX = MODELS["flux-dev"]
SCHNELL = replace(FLUX, transformer=lambda: FluxTransformer2DModel(guidance_embeds=False), tokens=(256, 4096))
CLIPS = (lambda: _clip(CLIP_L), lambda: _clip(CLIP_G))
FLUX_ENCODERS = (lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L)), _t5)
CASES = (
    Case("FLUX.1-dev", FLUX, FLUX_ENCODERS, (77, 512)),
    Case("FLUX.1-schnell", SCHNELL, FLUX_ENCODERS, (77, 256)),
    Case("Stable Diffusion 3.5 medium", MODELS["sd35-medium"], (*CLIPS, _t5), (77, 77, 256)),
    Case(
        "FLUX.2 klein 4B", MODELS["flux2-klein"], (lambda: Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B)),), _chat("flux2")
    ),
    Case("Qwen-Image", MODELS["qwen-image"], (_qwen25,), _chat("qwen_image")),
    Case("Z-Image", MODELS["z-image-turbo"], (lambda: Qwen3Model(Qwen3Config(**QWEN3_4B)),), _chat("z_image")),
    Case("Wan 2.1 1.3B", MODELS["wan-1.3b"], (_umt5,), (512, 512), 480, 832, 81),
    Case("Wan 2.2 5B", MODELS["wan-2.2-5b"], (_umt5,), (512, 512), 704, 1280, 121),
)


def measure(case: Case, offloads: Sequence[str] = OFFLOADS[1:], batch: int = 1, steps: int = 2) -> Row:
    """Draw ``batch`` pictures in as many steps with each offload; what comes out is held to its shape and type."""
    row = Row(case, {}, {})
    for offload in offloads:
        with fake_device() as mode, unread(), kernels(), Peak() as peak:
            model = opened(case, offload, mode)
            row.weights.update(_weights(model.family))  # type: ignore[attr-defined]
            for part in (model.family.transformer, model.family.vae, *_encoders(model.family)):
                peak.hold(part)
            row.peak[offload] = _drawn(case, model, peak, batch, steps)  # type: ignore[index]
    return row


def opened(case: Case, offload: str, mode: FakeTensorMode) -> TorchModel:
    """The family as ``TorchRuntime`` opens it: types as the placement says, encoders where they wait."""
    family = without_weights(case.model)
    for name, make in zip(family.encoders, case.encoders, strict=True):
        with torch.device("meta"):
            setattr(family, name, make().requires_grad_(False).eval())
    place = DEVICE if offload == "off" else "cpu"
    for name in ("transformer", "vae", *family.encoders):
        dtype = torch.float32 if name in family.in_float32 else DTYPE
        _put(getattr(family, name), mode, dtype, place if name in family.encoders else DEVICE)
    return TorchModel(family, Placement(DEVICE, "bfloat16", offload))


def _put(part: nn.Module, mode: FakeTensorMode, dtype: torch.dtype, device: str) -> None:
    """Place a part; weights that it holds under two names stay one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in part.modules():
        for name, value in module._parameters.items():
            places.setdefault(id(value), []).append((module, name))
    shared = [found for key, found in places.items() if len(found) > 1 and key != id(None)]
    put(part, mode, dtype, device)
    for (owner, own), *others in shared:
        for module, name in others:
            module._parameters[name] = owner._parameters[own]


def _encoders(family: Family) -> tuple[nn.Module, ...]:
    return tuple(getattr(family, name) for name in family.encoders)


def _weights(family: Family) -> dict[str, int]:
    return {
        "encoders": sum(num_bytes(encoder) for encoder in _encoders(family)),
        "transformer": num_bytes(family.transformer),
        "autoencoder": num_bytes(family.vae),
    }


def _drawn(case: Case, model: TorchModel, peak: Peak, batch: int, steps: int) -> dict[str, int]:
    family, found = model.family, dict.fromkeys(STAGES, 0)

    def watched(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            peak.restart()
            answer = call(*args)
            found[stage] = max(found[stage], peak.most)
            return answer

        return run

    ids_BL = [torch.ones(batch, length, dtype=torch.int64) for length in case.ids]
    x = torch.ones(batch, *family.latent_shape(case.height, case.width, case.frames))
    names = {"encode": model, "draw": family, "decode": family}
    calls = {"encode": "encode", "draw": "velocity", "decode": "decode"}
    with contextlib.ExitStack() as stack:
        for stage, owner in names.items():
            call = getattr(owner, calls[stage])
            stack.enter_context(patch.object(owner, calls[stage], watched(stage, call)))
        images = model.draw(ids_BL, x, tuple(1 - k / steps for k in range(steps)))
    frames = (case.frames,) if case.frames > 1 or family.name == "wan" else ()
    expected = (batch, *frames, 3, case.height, case.width)
    if tuple(images.shape) != expected or images.dtype != torch.float32 or images.device.type != DEVICE:
        raise AssertionError(f"{case.name}: {tuple(images.shape)} {images.dtype} on {images.device}, not {expected}")
    return found


def scored_with(side: int = 1024, batch: int = 1) -> dict[str, int]:
    """Weights and peak of a published reward of CLIP ViT-H/14 (HPS v2.1, PickScore) beside nothing else."""
    with fake_device() as mode, unread(), kernels(), Peak() as peak:
        with torch.device("meta"):
            clip = CLIPModel(vit_h_14()).requires_grad_(False).eval()
        put(clip, mode, torch.float32)
        reward = ClipReward(clip, words, fit="pad")
        peak.hold(clip)
        with torch.inference_mode(False), torch.no_grad():
            score_B = scored("hpsv2.1", reward, torch.ones(batch, 3, side, side), ["a prompt"] * batch, DEVICE)
        if tuple(score_B.shape) != (batch,) or score_B.dtype != torch.float32:
            raise AssertionError(f"scores are {tuple(score_B.shape)} {score_B.dtype}")
        return {"weights": num_bytes(clip), "peak": peak.most}


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Attention as a GPU's kernels compute it: none keeps a square of the tokens."""
    with (
        patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention),
        patch.object(torch, "as_tensor", functools.partial(_unknown, torch.as_tensor)),
        patch.object(torch, "tensor", functools.partial(_unknown, torch.tensor)),
    ):
        yield


def _unknown(make: Callable[..., Tensor], data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """A fake tensor of one number remembers it, and would compute with it on a device that cannot."""
    found = make(data, **options)
    if isinstance(found, FakeTensor):
        found.constant = None
    return found if device is None else found.to(device)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    q, k, v = query, key, value
    if {q.dtype, k.dtype, v.dtype} != {q.dtype}:
        raise RuntimeError(f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
    if enable_gqa and q.shape[-3] != k.shape[-3]:
        times = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(times, -3), v.repeat_interleave(times, -3)
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        return out
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    found: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, False, 0.0, is_causal, scale=scale
    )[0]
    return found


def table(rows: Sequence[Row], reward: Mapping[str, int]) -> str:
    """The rows as a table of docs/models.md, in GB."""
    head = (
        "| model, one picture | encoders | transformer | autoencoder | all on the GPU: encode, draw, decode "
        "| encoders visit | encoders on the CPU |\n| --- | --: | --: | --: | --: | --: | --: |"
    )
    lines = [head, *(line(row) for row in rows)]
    said = f"A reward of ViT-H/14 in float32 (HPS v2.1, PickScore) adds {reward['weights'] / GB:.1f} GB and takes "
    lines += [
        "",
        said + f"{(reward['peak'] - reward['weights']) / GB:.2f} more while it looks at a picture of 1024 px.",
    ]
    return "\n".join(lines)


def line(row: Row) -> str:
    """One row of the table."""
    weights = " | ".join(f"{row.weights[part] / GB:.1f}" for part in ("encoders", "transformer", "autoencoder"))
    stages = ", ".join(f"{row.peak['off'][stage] / GB:.1f}" for stage in STAGES)
    rest = " | ".join(f"**{row.most(offload) / GB:.1f}**" for offload in OFFLOADS[2:])
    return f"| {row.case.name}, {row.case.size} | {weights} | {stages}: **{row.most('off') / GB:.1f}** | {rest} |"


def main(arguments: Sequence[str]) -> None:
    """Measure every case, print the table, and with ``--write`` put it into the document."""
    rows = []
    for case in CASES:
        rows.append(measure(case))
        print(line(rows[-1]), flush=True)
    text = table(rows, scored_with())
    print(text)
    if "--write" in arguments:
        write_between(DOCUMENT, text, BEGIN, END)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # see benchmarks/make_believe.py
