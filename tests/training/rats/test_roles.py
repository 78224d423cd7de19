"""Student, teacher and start on a real small FLUX transformer, with weights of their own and as LoRA adapters."""

import copy

import pytest
import torch
from torch import Tensor

from student.families.flux import Flux
from student.pipeline import open_pipeline
from tests.training.shapes import small
from training.rats.roles import Lora, Roles

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
