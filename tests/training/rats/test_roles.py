"""Student, teacher and start on a real small FLUX transformer, with weights of their own and as LoRA adapters."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from student.families.find import family_of, open_family
from student.families.flux import Flux
from student.families.two_experts import joined, networks
from student.pipeline import open_pipeline
from tests.student.families import tiny
from tests.training.shapes import small
from training.config import changed
from training.rats import roles as module
from training.rats.config import RatsConfig, TeacherConfig
from training.rats.roles import ROLES, Lora, Roles, Sharding

LORA = Lora(rank=2, alpha=4.0)


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    path = tmp_path_factory.mktemp("models")
    small.write_models(path)
    return Flux(open_pipeline(path / "shapes-teacher"), max_tokens=12)


def look(roles: Roles, role: str) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with roles.role(role) as model, torch.no_grad():
        return model.velocity(x, 0.5, model.encode(["a red heart", "a blue star"]))


def disturb(roles: Roles) -> None:
    gen = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in roles.trainable:
            parameter += 0.3 * torch.randn(parameter.shape, generator=gen)


@pytest.mark.parametrize("lora", [None, LORA])
def test_all_roles_begin_alike_and_only_the_student_learns(model: Flux, lora: Lora | None) -> None:
    roles = Roles(model, 0.9, lora)
    before = look(roles, "start")
    assert all(torch.equal(look(roles, role), before) for role in ("student", "teacher"))
    disturb(roles)
    assert not torch.allclose(look(roles, "student"), before)
    assert torch.equal(look(roles, "teacher"), before) and torch.equal(look(roles, "start"), before)
    learns = {id(p) for p in roles.trainable}
    assert {id(p) for p in model.parameters() if p.requires_grad} == learns


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_teacher_follows_as_an_exponential_average(model: Flux, lora: Lora | None) -> None:
    roles = Roles(model, 0.9, lora)
    start = [p.detach().clone() for p in roles.trainable]
    disturb(roles)
    moved = [p.detach().clone() for p in roles.trainable]
    for _ in range(3):
        roles.follow()
    for slow, a, b in zip(roles._following, start, moved, strict=True):
        torch.testing.assert_close(slow.detach(), 0.9**3 * a + (1 - 0.9**3) * b, atol=1e-5, rtol=1e-5)
    assert not torch.equal(look(roles, "teacher"), look(roles, "student"))
    roles.restart_teacher()
    assert torch.equal(look(roles, "teacher"), look(roles, "student"))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # as training.progress.quiet does
@pytest.mark.parametrize("begun", [False, True])
def test_a_start_in_bf16_takes_half_the_memory_and_draws_almost_the_same(model: Flux, begun: bool) -> None:
    begin = copy.deepcopy(model.transformer) if begun else None
    config = RatsConfig(teacher=TeacherConfig(weights="bf16"))
    before = look(Roles(copy.deepcopy(model), 0.9), "start")
    roles = Roles.of(config, model, begin)
    types = {name: {p.dtype for p in getattr(roles, f"_{name}").parameters()} for name in ROLES}
    assert types == {"student": {torch.float32}, "teacher": {torch.float32}, "start": {torch.bfloat16}}
    with torch.autocast("cpu", torch.bfloat16):
        start, student = look(roles, "start"), look(roles, "student")
    assert (start - before).norm() < 0.02 * before.norm() and (student - before).norm() < 0.02 * before.norm()
    assert torch.equal(start, student), "autocast rounds the weights of FLUX's products anyway"
    assert all(p.dtype == torch.float32 for p in roles.trainable), "what is trained is what it was"


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # as training.progress.quiet does
@pytest.mark.parametrize("name", tiny.MAKERS)
def test_a_start_in_bf16_draws_in_every_family(name: str, tmp_path: Path) -> None:
    tiny.MAKERS[name]().save_pretrained(tmp_path)
    model = open_family(tmp_path, max_tokens=tiny.MAX_TOKENS)
    shape = model.geometry(32, 64, 5 if name.startswith("wan") else 1).shape
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    roles = Roles.of(RatsConfig(teacher=TeacherConfig(weights="bf16")), model)
    drawn = {}
    for role in ("start", "student"):
        with roles.role(role), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            condition = model.encode(["a red heart", "a blue star"])
            drawn[role] = torch.stack([model.velocity(x, sigma, condition).float() for sigma in (1.0, 0.3)])
    assert (drawn["start"] - drawn["student"]).norm() < 0.03 * drawn["student"].norm()


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_frozen_teacher_never_moves(model: Flux, lora: Lora | None) -> None:
    roles = Roles(model, 1.0, lora)
    before = look(roles, "teacher")
    disturb(roles)
    roles.follow()
    assert torch.equal(look(roles, "teacher"), before)


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_state_brings_back_student_and_teacher(model: Flux, lora: Lora | None) -> None:
    roles = Roles(model, 0.9, lora)
    disturb(roles)
    roles.follow()
    state, seen = roles.state(), [look(roles, role) for role in ("student", "teacher")]
    disturb(roles)
    roles.follow()
    roles.load_state(state)
    assert all(torch.equal(look(roles, role), a) for role, a in zip(("student", "teacher"), seen, strict=True))


def test_gradient_reaches_the_student_after_the_teacher_has_drawn(model: Flux) -> None:
    roles = Roles(model, 0.9, LORA)
    disturb(roles)
    x = torch.randn(1, 4, 8, 8)
    v = roles.model.velocity(x, 0.5, roles.model.encode(["a red heart"]))
    look(roles, "teacher")
    v.square().sum().backward()
    assert all(p.grad is not None for p in roles.trainable)
    assert all(p.grad is None for p in roles._following)


def test_lora_holds_no_second_copy(model: Flux) -> None:
    before = sum(p.numel() for p in model.transformer.parameters())
    roles = Roles(model, 0.9, LORA)
    assert roles._teacher is roles._student is roles._start
    after = sum(p.numel() for p in model.transformer.parameters())
    assert after == before + 2 * sum(p.numel() for p in roles.trainable)


def test_adapters_begin_as_their_seed_says_whatever_was_drawn_before(model: Flux) -> None:
    def begin(seed: int) -> tuple[list[Tensor], Tensor]:
        other = copy.deepcopy(model)
        return [p.detach() for p in Roles(other, 0.9, Lora(2, 4.0, seed)).trainable], torch.rand(1)

    torch.manual_seed(1)
    first, drawn = begin(7)
    again, drawn_again = begin(7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(drawn, drawn_again), "the run's other random numbers began again"
    assert not all(torch.equal(a, b) for a, b in zip(first, begin(8)[0], strict=True))


def test_adapters_of_a_bf16_base_keep_small_updates(model: Flux) -> None:
    model.transformer.to(torch.bfloat16)
    roles = Roles(model, 0.9, LORA)
    assert {p.dtype for p in (*roles.trainable, *roles._following)} == {torch.float32}
    assert model.transformer.dtype == torch.bfloat16
    optimizer = torch.optim.SGD(roles.trainable, 1e-5)
    before = [p.detach().clone() for p in roles.trainable]
    for _ in range(100):
        for p in roles.trainable:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, a in zip(roles.trainable, before, strict=True):
        torch.testing.assert_close(p.detach(), a - 1e-3, atol=1e-5, rtol=0)
    assert look(roles, "student").isfinite().all()


def test_what_a_run_begins_from_is_what_is_checkpointed() -> None:
    model = family_of(tiny.flux(), max_tokens=tiny.MAX_TOKENS)
    begin = copy.deepcopy(model.transformer)
    roles = Roles.of(changed(RatsConfig(), {"compute.checkpointing": True}), model, begin)
    assert roles._student is begin and begin.is_gradient_checkpointing


class Noted(Roles):
    """Keeps what it is made of."""

    def __init__(self, *given: Any) -> None:
        self.given = given


@pytest.mark.parametrize(
    ("settings", "place", "expected"),
    [
        ({}, 3, 1),
        ({"teacher.ema": 0.25}, 1, 0.25),
        ({"lora.rank": 3, "lora.alpha": 5.0, "seed": 9}, 2, Lora(3, 5.0, 9)),
        ({}, 2, None),
        ({"compute.shard": True}, 3, 2),
        ({"compute.compile": "eager"}, 4, "eager"),
        ({"compute.precision": "bf16"}, 5, Sharding(True, False)),
        ({"compute.precision": "fp32", "compute.shard": True, "compute.shard_frugal": True}, 5, Sharding(False, True)),
        ({}, 8, None),
        ({"teacher.weights": "bf16", "compute.precision": "bf16"}, 8, torch.bfloat16),
    ],
)
def test_roles_are_made_as_the_configuration_says(
    settings: dict[str, Any], place: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Processes", lambda: SimpleNamespace(size=2))
    done: list[Any] = []
    for name in ("recompute_blocks", "decode_tiles"):
        monkeypatch.setattr(module, name, lambda *given, name=name: done.append((name, *given)))
    family: Any = SimpleNamespace(transformer=tiny.flux().transformer, vae="vae")
    config = changed(RatsConfig(), {"compute.tile_px": 128, **settings})
    given = Noted.of(config, family, None, ("transformer",)).given
    assert len(given) == 9 and given[0] is family and given[6:8] == (None, ("transformer",))
    assert given[place] == expected
    assert done == [("decode_tiles", "vae", 128)] and not family.transformer.is_gradient_checkpointing
    done.clear()
    Noted.of(changed(config, {"compute.checkpointing": True}), family)
    assert done == [("recompute_blocks", "vae"), ("decode_tiles", "vae", 128)], "tiles wrap what the blocks have become"
    assert family.transformer.is_gradient_checkpointing


def test_a_network_without_a_role_is_in_the_family_only_for_as_long_as_it_is_used(model: Flux) -> None:
    roles, critic = Roles(model, 0.9), copy.deepcopy(model.transformer)
    own = model.transformer
    with pytest.raises(RuntimeError, match="a step fails"), roles.using(critic) as used:
        assert used.transformer is critic
        raise RuntimeError("a step fails")
    assert model.transformer is own
    with pytest.raises(RuntimeError, match="a step fails"), roles.role("start") as start:
        assert start.transformer is not own and not torch.is_grad_enabled()
        raise RuntimeError("a step fails")
    assert model.transformer is own and torch.is_grad_enabled()


@pytest.mark.parametrize("lora", [None, LORA])
def test_only_a_start_with_weights_of_its_own_leaves_the_device(
    model: Flux, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[bool, str]] = []
    roles = Roles(model, 0.9, lora)
    monkeypatch.setattr(
        type(model.transformer), "to", lambda self, device: moved.append((self is roles._student, str(device)))
    )
    roles.offload_start()
    look(roles, "teacher")
    assert moved == ([] if lora else [(False, "cpu")])
    moved.clear()
    look(roles, "start")
    assert moved == ([] if lora else [(False, "cpu")]), "and comes back to where the student is"
    roles.sharded = True
    moved.clear()
    roles.offload_start()
    assert not moved, "slices stay where they are"


def of_two_experts() -> Any:
    return joined(family_of(tiny.wan_14b(), max_tokens=tiny.MAX_TOKENS))


@pytest.mark.parametrize("begun", [False, True])
def test_both_experts_are_checkpointed(begun: bool) -> None:
    """Of what the run begins from, where that is another pair: the start is never differentiated."""
    model, begin = of_two_experts(), of_two_experts().transformer if begun else None
    Roles.of(changed(RatsConfig(), {"compute.checkpointing": True, "lora.rank": 2}), model, begin)
    assert all(part.is_gradient_checkpointing for part in networks(model.transformer).values())
    assert not begun or model.transformer is begin


@pytest.mark.parametrize(("lora", "each"), [(None, 3), (LORA, 1)])
def test_the_blocks_of_both_experts_are_compiled_in_every_role(
    lora: Lora | None, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each: adapters share one base."""
    model, compiled = of_two_experts(), list[tuple[Any, str]]()
    kind = type(networks(model.transformer)["transformer"])
    monkeypatch.setattr(kind, "compile_repeated_blocks", lambda self, backend: compiled.append((self, backend)))
    roles = Roles(model, 0.9, lora, compile_with="inductor")
    parts = [part for name in ROLES for part in networks(getattr(roles, f"_{name}")).values()]
    assert len(compiled) == 2 * each and {backend for _, backend in compiled} == {"inductor"}
    assert {id(part) for part, _ in compiled} == {id(part) for part in parts}
