"""GenEval as a reward: 1 where a picture shows all that its prompt asks for, 0 otherwise (rewards/geneval.py).

What GenEval uses, of transformers' classes: Mask2Former with a small Swin on COCO, for objects, and CLIP ViT-L/14, for
their colours. GenEval's own detector is another training of that network (mmdetection's), so that figures by this one
are close to published ones, and not the same.
Shape suffixes: B batch, C channels, H/W pixels, Q queries, K classes, N detections, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, Mask2FormerConfig, Mask2FormerImageProcessorPil, Mask2FormerModel

from rewards.clip import CLIP_L, CLIP_L_VOCABULARY, MODEL, ClipReward, open_clip_model
from rewards.files import Published, locate
from rewards.geneval import COLOURS, OBJECTS, Found, read, right
from rewards.interface import Network, RewardError
from rewards.preprocess import Preprocess

MASK2FORMER = Published("facebook/mask2former-swin-small-coco-instance", MODEL)
SIZE, DIVISOR = {"shortest_edge": 800, "longest_edge": 1333}, 32  # pixels; what is padded to
DETECTIONS = 100  # the likeliest of a picture
GREY = (153, 153, 153)  # around an object whose colour is asked
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
_MODEL, _CLASSES, _LOSS = "model.", "class_predictor.", "criterion."


class Detector(Network):
    """Mask2Former's objects in a picture.

    transformers' class with a head has a loss that wants scipy; its two parts that detect are these.
    """

    differentiable = False

    def __init__(self, network: Mask2FormerModel, classes: nn.Linear) -> None:
        super().__init__()
        self.network, self.classes = network, classes
        # As GenEval's detector reads pictures: the published processor makes them smaller, and stretches in place of
        # padding.
        self.processor = Mask2FormerImageProcessorPil(size=SIZE, size_divisor=0, ignore_index=255)
        self.freeze()

    def found(self, picture_HWC: np.ndarray) -> list[Found]:
        """The likeliest objects of a picture in bytes, by any confidence."""
        pixels = self.processor([picture_HWC], return_tensors="pt")["pixel_values"]
        rows, columns = pixels.shape[2:]
        pixels = F.pad(pixels, (0, -columns % DIVISOR, 0, -rows % DIVISOR))
        out = self.network(pixels.to(self.device, self.dtype), output_hidden_states=True)
        scores_QK = self.classes(out.transformer_decoder_intermediate_states[-1].transpose(0, 1))[0]
        masks_QHW = F.interpolate(out.masks_queries_logits[-1].float(), pixels.shape[2:], mode="bilinear")[0]
        own = F.interpolate(masks_QHW[None, :, :rows, :columns], picture_HWC.shape[:2], mode="bilinear")[0]
        return detections(scores_QK.float(), own)


def detections(scores_QK: Tensor, masks_QHW: Tensor) -> list[Found]:
    """The likeliest pairs of query and class, whose masks are where the logits ``masks_QHW`` are above 0.

    The confidence is that of the class times the mean of the mask's; the last class is "nothing".
    """
    chances_QK = scores_QK.softmax(-1)[:, :-1]
    chance_N, at_N = chances_QK.flatten().topk(min(DETECTIONS, chances_QK.numel()))
    found = []
    for chance, at in zip(chance_N.tolist(), at_N.tolist(), strict=True):
        query, kind = divmod(at, chances_QK.shape[1])
        mask_HW = masks_QHW[query] > 0
        if mask_HW.any():
            sure = float(masks_QHW[query].sigmoid()[mask_HW].mean())
            found.append(Found(OBJECTS[kind], chance * sure, _box(mask_HW), mask_HW.cpu().numpy()))
    return found


def _box(mask_HW: Tensor) -> tuple[float, float, float, float]:
    rows, columns = (mask_HW.any(axis).nonzero().flatten() for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class GenEval(Network):
    """The reward; it has no gradient, and reads GenEval's prompts alone."""

    differentiable = False

    def __init__(self, detector: Detector, clip: ClipReward) -> None:
        super().__init__()
        self.detector, self.clip = detector, clip
        self.crop = Preprocess(clip.preprocess.size, in_bytes=True)
        self._colours: dict[str, Tensor] = {}
        self.freeze()

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """1 or 0 (B,).

        Raises:
            RewardError: a prompt that is none of GenEval's.
        """
        tasks = [read(prompt) for prompt in prompts]
        pictures_BHWC = (images_BCHW.float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        with torch.autocast(self.device.type, enabled=False):
            shown = [
                right(task, self.detector.found(picture), lambda one, picture=picture: self.colour(picture, one))  # type: ignore[misc]
                for task, picture in zip(tasks, pictures_BHWC, strict=True)
            ]
        return torch.tensor(shown, dtype=torch.float32)

    def colour(self, picture_HWC: np.ndarray, one: Found) -> str:
        """The colour whose sentences are nearest to the object before grey, as GenEval crops it."""
        picture = Image.fromarray(picture_HWC)
        if one.mask is not None:
            picture = Image.composite(picture, Image.new("RGB", picture.size, GREY), Image.fromarray(one.mask))
        crop_HWC = np.array(picture.crop(one.box))
        crop_BCHW = torch.from_numpy(crop_HWC).permute(2, 0, 1)[None].float() / 255
        seen_BD = self.clip.embed_images(self.crop(crop_BCHW).to(self.device))
        return COLOURS[int((seen_BD @ self._of_colours(one.name).T).argmax())]

    def _of_colours(self, name: str) -> Tensor:
        """The mean direction of each colour's sentences about objects of a class, (10, D)."""
        if name not in self._colours:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            assert self.clip.words is not None
            embedded = self.clip.embed_texts(*(ids.to(self.device) for ids in self.clip.words.read(texts)))
            mean = embedded.view(len(COLOURS), len(TEMPLATES), -1).mean(1)
            self._colours[name] = F.normalize(mean, dim=-1).cpu()
        return self._colours[name].to(self.device)


def geneval(files: Path) -> GenEval:
    """GenEval's tasks, judged by Mask2Former and CLIP."""
    clip = ClipReward(
        open_clip_model(locate(CLIP_L, files)), CLIPTokenizer.from_pretrained(locate(CLIP_L_VOCABULARY, files))
    )
    return GenEval(open_detector(locate(MASK2FORMER, files)), clip)


def open_detector(folder: Path) -> Detector:
    """A Mask2Former of transformers' format, with COCO's 80 classes.

    Raises:
        RewardError: it is another model.
    """
    config = Mask2FormerConfig.from_pretrained(folder)
    if config.num_labels != len(OBJECTS):
        raise RewardError(f"{folder} has {config.num_labels} classes: accepted are COCO's {len(OBJECTS)}")
    state = load_file(folder / MODEL[1])
    loaded: Any = Mask2FormerModel.from_pretrained(
        None, config=config, state_dict=_below(state, _MODEL), dtype=torch.float32, output_loading_info=True
    )
    network, report = loaded
    odd = [name for name in state if not name.startswith((_MODEL, _CLASSES, _LOSS))]
    for names, what in ((report["missing_keys"], "missing"), ([*odd, *report["unexpected_keys"]], "unknown")):
        if names:
            raise RewardError(f"{MASK2FORMER.names[1]}: {min(names)} is {what}")
    classes = nn.Linear(config.hidden_dim, config.num_labels + 1)
    classes.load_state_dict(_below(state, _CLASSES))
    return Detector(network, classes)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
