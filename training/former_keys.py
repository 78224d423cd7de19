"""Keys of the flat configuration of earlier releases, and their names now: an old key is refused with the new one."""

from __future__ import annotations

from collections.abc import Mapping

FORMER_KEYS: Mapping[str, str] = {
    **{f"{name}_prompts": f"data.{name}" for name in ("measuring", "calibration", "validation", "test")},
    **{"watched_prompts": "data.validation_diversity", "diversity_prompts": "data.test_diversity"},
    **{name: f"data.{name}" for name in ("prompts", "max_tokens")},
    **{name: f"image.{name}" for name in ("height_px", "width_px", "frames")},
    **{"student_id": "student.id", "version": "student.version", "nfe": "student.nfe"},
    **{"teacher_nfe": "teacher.nfe"},
    **{name: f"teacher.{name}" for name in ("reference_nfe", "guidance", "negative_prompt", "guided_steps", "ema")},
    **{"reward": "reward.trained", "heldout": "reward.heldout"},
    **{f"reward_{name}": f"reward.{name}" for name in ("weight", "hinge", "frames")},
    **{name: f"shaping.{name}" for name in ("alpha", "steer", "horizons", "l2_weight", "cosine_weight")},
    **{"velocity_hinge": "shaping.velocity_hinge"},
    **{"gate": "gate.kind", "tau": "gate.tau", "tau_in_spreads": "gate.tau_in_std"},
    **{"gradient": "gradient.mode", "last_k": "gradient.last_k"},
    **{name: f"optim.{name}" for name in ("batch", "accumulate", "lr", "warmup", "clip_norm")},
    **{"lr_decay": "optim.decay", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha"},
    **{name: f"compute.{name}" for name in ("device", "weights", "precision", "checkpointing", "shard")},
    **{"validate_every": "validation.every", "draw_batch": "validation.batch"},
    **{name: f"validation.{name}" for name in ("patience", "min_diversity")},
}
