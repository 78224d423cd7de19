"""How a student is used, in code that runs as it stands: with this repository, and with diffusers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from student.bundle import Student

PROMPT = "a red heart above a blue star"
FPS = 16  # of Wan's training videos


def usage(student: Student, index: Mapping[str, Any], weights: str) -> str:
    """Markdown; ``index`` is the pipeline's model_index.json, ``weights`` the type that it was measured in."""
    return f"""{_served(student)}
The picture that belongs to a seed, drawn by diffusers' own loop:

```python
from pathlib import Path
from student.bundle import read_student
from student.pipeline import open_pipeline, reproduce

path = Path("models/{student.id}")
images = reproduce(open_pipeline(path), read_student(path), [{json.dumps(PROMPT)}], [7], {student.steps[0]})
```

With diffusers alone (the sigmas of its other step counts, if any, are in `student.json`{_magic(student)}):

```python
{plain(student, index, weights)}
```
"""


def _magic(student: Student) -> str:
    """FluxPipeline's defaults are constants of its class, FLUX.1's: no file of a bundle can say others."""
    if student.family != "flux" or (student.image.height == 1024 and student.max_tokens == 512):
        return ""
    return (
        "; `height`, `width` and `max_sequence_length` must be said, since diffusers' FluxPipeline has FLUX.1's, 1024 "
        "pixels and 512 tokens, in its code, where no model can set others"
    )


def plain(student: Student, index: Mapping[str, Any], weights: str) -> str:
    """Lines of Python that draw with diffusers alone."""
    steps, is_video = student.steps[0], student.image.frames is not None
    sigmas = list(student.sigmas[steps])
    call = {
        "num_inference_steps": steps,
        **({"num_frames": student.image.frames} if is_video else {"sigmas": sigmas}),
        "height": student.image.height,
        "width": student.image.width,
        "max_sequence_length": student.max_tokens,
        **student.baked,
    }
    arguments = [f"    prompt={json.dumps(PROMPT)},", *(f"    {name}={value}," for name, value in call.items())]
    before = ["import torch"] if weights == "bf16" else []
    draw = ["image = pipe(", *arguments, ").images[0]", 'image.save("picture.png")']
    if is_video:
        before = ["from functools import partial", "", *before]
        draw = [
            "# WanPipeline has no argument for sigmas, and its scheduler's own ones are others.",
            f"pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas={sigmas})",
            "frames = pipe(",
            *arguments,
            ").frames[0]",
            f'export_to_video(frames, "video.mp4", fps={student.image.fps or FPS})',
        ]
    uses = ["from diffusers import DiffusionPipeline", *(["from diffusers.utils import export_to_video"] * is_video)]
    return "\n".join([*before, *uses, "", *_opening(student, index, weights), *draw])


def _opening(student: Student, index: Mapping[str, Any], weights: str) -> Sequence[str]:
    """diffusers needs to know which of Stable Diffusion's encoders were left out."""
    absent = [name for name, kind in index.items() if kind == [None, None] and name.endswith("_3")]
    options = [f"{name}=None" for name in absent]
    if weights == "bf16":
        in_fp32 = '{"default": torch.bfloat16, "vae": torch.float32}'
        options.append(f"dtype={in_fp32 if student.family == 'wan' else 'torch.bfloat16'}")
    return [f"pipe = DiffusionPipeline.from_pretrained({', '.join([json.dumps(f'models/{student.id}'), *options])})"]


def _served(student: Student) -> str:
    if student.image.frames is not None:
        return "fewstep's service draws single pictures; a student of videos is used from Python."
    return f'Served by fewstep: `POST /generate` with `{{"prompt": "{PROMPT}", "seed": 7}}`.'
