"""Which student a request gets, by what it names and what is served at that moment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.errors import InvalidRequest, NotFound, ServiceError
from service.models.choice import Choice, Served
from service.models.folder import Name
from student.runtimes.fake import fake_student


def serving(*names: str, **promoted: str) -> Choice:
    found = [Name.of(name) for name in names]
    students = {name: replace(fake_student(), id=name.id, version=name.version) for name in found}
    return Choice({name: Served(student, len) for name, student in students.items()}, promoted)


TWO = serving("cats/1", "cats/2", "dogs/7", cats="1")


@pytest.mark.parametrize(
    ("choice", "id", "version", "found"),
    [
        (TWO, "cats", None, "cats/1"),
        (TWO, "cats", "latest", "cats/1"),
        (TWO, "cats", "2", "cats/2"),
        (TWO, "dogs", None, "dogs/7"),
        (serving("cats/1", "cats/2"), None, None, "cats/2"),
        (serving("cats/1", "cats/2", cats="1"), None, None, "cats/1"),
        (serving("cats/1", "cats/2"), None, "1", "cats/1"),
    ],
)
def test_a_request_gets_the_version_that_it_names_and_else_the_latest(
    choice: Choice, id: str | None, version: str | None, found: str
) -> None:
    assert str(choice.pick(id, version).name) == found


@pytest.mark.parametrize(
    ("choice", "id", "version", "kind", "param", "code", "message"),
    [
        (TWO, None, None, InvalidRequest, "model", "invalid_request",
         "model is required, as several are served: cats, dogs."),
        (TWO, "cows", None, NotFound, "model", "model_not_found",
         "The model 'cows' is not served: accepted are cats, dogs."),
        (TWO, "cats", "9", NotFound, "model_version", "model_not_found",
         "Version '9' of model cats is not served: accepted are 1, 2."),
        (TWO, "dogs", "9", NotFound, "model_version", "model_not_found",
         "Version '9' of model dogs is not served: accepted is 7."),
        (serving(), "cats", None, NotFound, "model", "model_not_found", "The model 'cats' is not served: none is."),
        (serving("cats/1"), "x" * 200, None, NotFound, "model", "model_not_found",
         f"The model '{'x' * 80}' is not served: accepted is cats."),
    ],
)  # fmt: skip
def test_what_is_not_served_is_refused_with_what_is(
    choice: Choice, id: str | None, version: str | None, kind: type[ServiceError], param: str, code: str, message: str
) -> None:
    with pytest.raises(kind) as caught:
        choice.pick(id, version)
    assert (caught.value.param, caught.value.code, str(caught.value)) == (param, code, message)


def test_the_default_is_the_first_models_latest() -> None:
    assert str(TWO.ids) == "['cats', 'dogs']" and TWO.versions("cats") == ["1", "2"] and TWO.versions("cows") == []
    found = TWO.default()
    assert found and str(found.name) == "cats/1" and serving().default() is None
