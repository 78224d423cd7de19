"""LAION's aesthetic predictor v2: a linear head on CLIP ViT-L/14's image vector; it reads no prompt.

Shape suffixes: B batch, C channels, H/W pixels, D feature width.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import CLIPModel

from rewards.checkpoint import State, check_names, tensors
from rewards.clip import CLIP_L, ImageTower, open_clip_model
from rewards.files import Published, locate

_OWNER = "christophschuhmann/improved-aesthetic-predictor"
HEAD = Published(
    _OWNER,
    ("sac+logos+ava1-l14-linearMSE.pth",),
    f"https://github.com/{_OWNER}/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)


class Head(nn.Module):
    """Five linear layers with nothing in between (dropout in training); ImageReward has the same head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sides = (width, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(a, b) for a, b in zip(sides, sides[1:], strict=False)]
        # Where the published ones have dropout, so that the names of the weights agree.
        gaps = [[nn.Identity()]] * 3 + [[], []]
        self.layers = nn.Sequential(*(part for a, b in zip(linear, gaps, strict=True) for part in (a, *b)))

    def forward(self, x_BD: Tensor) -> Tensor:
        """Features -> (B,)."""
        value_B1: Tensor = self.layers(x_BD)
        return value_B1[:, 0]

    @staticmethod
    def of(width: int, state: State, source: str) -> Head:
        """A head with these weights.

        Raises:
            RewardError: a weight is missing, unknown or of another shape.
        """
        head = Head(width)
        check_names(head.state_dict(), state, source)
        head.load_state_dict(state)
        return head


class AestheticReward(ImageTower):
    """How pleasing a picture is, about 1 to 10."""

    def __init__(self, clip: CLIPModel, head: Head) -> None:
        super().__init__(clip)
        self.head = head
        self.freeze()

    def judge(self, pixels_BCHW: Tensor, *words_BL: Tensor) -> Tensor:
        """Raw scores (B,)."""
        score_B: Tensor = self.head(self.embed_images(pixels_BCHW).to(self.dtype))
        return score_B


def aesthetic(files: Path) -> AestheticReward:
    """The predictor that was trained on SAC, LOGOS and AVA."""
    clip = open_clip_model(locate(CLIP_L, files))
    head = Head.of(clip.visual_projection.out_features, tensors(HEAD, files), HEAD.names[0])
    return AestheticReward(clip, head)
