"""What the export command asks for, in which order, and what it leaves alone; without a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from export import compile as compiling
from export import preflight, scorers, verify
from export import run as command
from export.compile import Outcome, compile_student
from export.errors import ExportError
from export.request import EngineOptions, Request
from export.select import find_target
from export.store import Stored
from export.targets import Converted
from student.bundle import BundleError, ImageSize, Scorer, Student, rewrite_student
from student.files import sha256
from student.probe import Measured, Probe
from student.runtimes.buckets import Bucket
from student.runtimes.manifest import Graph, Parity, RuntimeManifest, write_manifest
from tests import tiny

PICTURE = tiny.student({})
VIDEO = replace(PICTURE, family="wan", latents=replace(PICTURE.latents, frames=2), image=ImageSize(64, 64, 5, 16))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    for name in ("_compile", "_plan"):
        monkeypatch.setattr(
            command, name, lambda request, target, name=name: found.append((name, request, target.name))
        )
    return found


def bundle_of(folder: Path, student: Student) -> Path:
    folder.mkdir()
    rewrite_student(folder, student)
    return folder


def test_without_options_a_student_is_compiled_staged_in_the_targets_first_precision(
    tmp_path: Path, asked: list[Any]
) -> None:
    bundle = bundle_of(tmp_path / "one", PICTURE)
    for to, precision in (("onnx", "fp32"), ("openvino", "bf16"), ("tensorrt", "bf16"), ("tensorrt_rtx", "bf16")):
        asked.clear()
        command.run(student=bundle, to=to)
        ((name, request, target),) = asked
        assert (name, target, request.form, request.precision) == ("_compile", to, "staged", precision)
        assert (request.bundle, request.student, request.threads, request.force) == (bundle, PICTURE, 1, False)
        assert request.engine == EngineOptions() and request.buckets == ()
    shipped = sorted((Path(command.__file__).parents[1] / "models").glob("*-scorers"))
    assert request.scorers == (tmp_path / "one-scorers", *shipped) and shipped
    assert request.prompts == verify.MORE_PROMPTS
    command.run(student=bundle, to="onnx")
    assert asked[-1][1].prompts == verify.PROMPTS


def test_every_option_reaches_the_request(tmp_path: Path, asked: list[Any]) -> None:
    bundle = bundle_of(tmp_path / "one", VIDEO)
    (tmp_path / "p.txt").write_text("a\nb\n")
    command.run(
        student=bundle, to="tensorrt", precision="fp8", scorers=tmp_path, prompts=tmp_path / "p.txt", size=["96x32"],
        frames="9", threads=3, force=True, dry_run=True, batches="8, 1,8,2", memory_gb=1.5, portable=True,
        batch_invariant=True,
    )  # fmt: skip
    ((name, request, target),) = asked
    assert (name, target, request.precision, request.scorers) == ("_plan", "tensorrt", "fp8", (tmp_path,))
    assert (request.prompts, request.threads, request.force) == (("a", "b"), 3, True)
    assert request.buckets == (Bucket((64, 64), 9), Bucket((32, 96)), Bucket((32, 96), 9))
    assert request.engine == EngineOptions((1, 2, 8), 3 * 2**29, 4 * 2**30, 3, True, True)
    for one in ("portable", "batch_invariant"):
        command.run(student=bundle, to="tensorrt", **{one: True})  # type: ignore[arg-type]
        assert asked[-1][1].engine == replace(EngineOptions(), **{one: True})  # type: ignore[arg-type]
    for wrong in ("64", "0", "", "1,,2", "a", "-1"):
        with pytest.raises(ExportError, match="accepted are numbers from 1 to 63, separated by commas"):
            command._batches(wrong)
    assert command._batches("63") == (63,)


INTERRUPTED = "interrupted; finished stages are kept, and the same command resumes from there"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, f"export: {INTERRUPTED}\n"),
        (ExportError("no"), 1, "export: no\n"),
        (BundleError("bad"), 1, "export: bad\n"),
        (OSError("disk"), 1, "export: disk\n"),
    ],
)
def test_an_end_is_a_sentence_and_a_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fails(request: Request, target: Any) -> None:
        raise error

    monkeypatch.setattr(command, "_compile", fails)
    with pytest.raises(typer.Exit) as stopped:
        command.run(student=bundle_of(tmp_path / "one", PICTURE), to="onnx")
    assert (stopped.value.exit_code, capsys.readouterr().err) == (code, said)


def request_of(bundle: Path, student: Student = PICTURE, **changes: Any) -> Request:
    return replace(Request(bundle, student, "staged", "fp32", say=changes.pop("say", print)), **changes)


def test_what_cannot_be_made_is_refused_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def step(name: str, answer: Any = None) -> Any:
        return lambda *given: (order.append(name), answer)[1]

    monkeypatch.setattr(command, "verify_files", step("files"))
    monkeypatch.setattr(preflight, "estimates", step("estimates", ["rows"]))
    monkeypatch.setattr(preflight, "check_disk", step("disk"))
    monkeypatch.setattr(command, "_compile_scorers", step("scorers"))
    monkeypatch.setattr(compiling, "compile_student", step("compile", "outcome"))
    monkeypatch.setattr(command, "_probe", step("probe"))
    monkeypatch.setattr("export.card.update_card", step("card"))
    monkeypatch.setattr(command, "_summary", step("summary"))
    target: Any = SimpleNamespace(refuse=lambda request: "there is no GPU")
    with pytest.raises(ExportError, match="^there is no GPU$"):
        command._compile(request_of(tmp_path), target)
    assert order == []
    command._compile(request_of(tmp_path), SimpleNamespace(refuse=lambda request: None))  # type: ignore[arg-type]
    assert order == ["files", "estimates", "disk", "scorers", "compile", "probe", "card", "summary"]


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ({}, True),
        ({"made": ()}, False),
        ({"made": (), "known": None}, True),
        ({"made": (), "known": "another machine"}, True),
        ({"made": (), "known": "another runtime"}, True),
        ({"parity": {}}, False),
        ({"student": VIDEO}, False),
    ],
)
def test_the_golden_probe_is_measured_where_the_runtime_is_new_or_the_machine_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], measured: bool
) -> None:
    state: dict[str, Any] = {"made": ("step",), "known": "here", "parity": {4: 1}, "student": PICTURE, **change}
    known = {
        "here": {"onnx": {"this kind": Measured(())}}, "another machine": {"onnx": {"that kind": Measured(())}},
        "another runtime": {"torch": {"this kind": Measured(())}},
    }  # fmt: skip
    probe = None if state["known"] is None else Probe("0", (), known[state["known"]])
    updated: list[Any] = []
    monkeypatch.setattr("student.probe.read_probe", lambda bundle, student: probe)
    monkeypatch.setattr("student.runtimes.machine.machine_kind", lambda name: "this kind")
    monkeypatch.setattr("student.runtimes.load.load", lambda *given: given)
    monkeypatch.setattr("export.probe.update_probe", lambda *given: updated.append(given))
    outcome: Any = SimpleNamespace(
        folder=tmp_path / "onnx", manifest=SimpleNamespace(parity=state["parity"]), made=state["made"]
    )
    command._probe(request_of(tmp_path, state["student"], threads=3, prompts=("a", "b")), outcome)
    assert len(updated) == measured
    for bundle, runtime, prompts in updated:
        assert (bundle, runtime[:3], prompts) == (tmp_path, (tmp_path, "onnx", 3), ("a", "b"))
        assert runtime[3].open_reward is not None, "the scores of rewards in torch are part of it"


def test_a_scorer_is_compiled_once_at_every_size_and_in_units_of_its_deviation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Compilable:
        pass

    rows = {
        name: Scorer(f"scorers/{name}.onnx", 0.0, 0.25, "heldout", f"sha {name}", reward)
        for name, reward in (("there", None), ("graph", None), ("torch", "own:R"), ("away", "gone:R"))
    }
    student, exported, said = replace(PICTURE, scorers=rows), list[Any](), list[str]()
    (tmp_path / "scorers").mkdir()

    def open_scorer(bundle: Path, student: Student, name: str, folders: Any) -> Any:
        if name == "away":
            raise ExportError("it is away")
        return Compilable() if name in ("graph", "there") else object()

    def export_scorer(file: Path, reward: Any, source: str, sizes: Any, std: float) -> float:
        exported.append((file.name, source, sizes, std))
        file.write_bytes(bytes(100_000))
        return 1e-5

    monkeypatch.setattr("rewards.twostage.TwoStage", Compilable)
    monkeypatch.setattr(scorers, "is_compiled", lambda bundle, student, name: name == "there")
    monkeypatch.setattr(scorers, "open_scorer", open_scorer)
    monkeypatch.setattr(scorers, "export_scorer", export_scorer)
    request = request_of(tmp_path, student, sizes=((32, 96),), say=said.append)
    command._compile_scorers(request)
    one = ("sha graph", ((64, 64), (32, 96)), 0.25)
    assert exported == [("graph.onnx", *one)]
    assert said == [
        "graph.onnx: 0.1 MB in 0 s, at most 1.0e-05 from torch",
        "the scorer 'torch' (own:R) runs in torch, which must be installed to serve it",
        "it is away; pictures are served without it until it is available",
    ]
    command._compile_scorers(replace(request, force=True))
    assert [name for name, *_ in exported[1:]] == ["there.onnx", "graph.onnx"]
    lost = replace(student, scorers={"away": replace(rows["away"], reward=None)})
    with pytest.raises(ExportError, match="^it is away$"):
        command._compile_scorers(replace(request, student=lost))


class Nothing:
    """A target of one folder that may be refused."""

    name, refusal = "onnx", None

    def folder(self, request: Request) -> str:
        return "onnx-staged-fp32"

    def refuse(self, request: Request) -> str | None:
        return self.refusal

    def requires(self, request: Request) -> dict[str, str]:
        return {}


def test_a_runtime_that_would_come_out_the_same_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runtimes" / "onnx-staged-fp32"
    folder.mkdir(parents=True)
    (tmp_path / "model_index.json").write_text("{}")
    proven = dict.fromkeys((4, 2), Parity({1: 0.0}, 1e-3))
    manifest = RuntimeManifest(
        folder.name, "staged", "fp32", "tiny 1", PICTURE.fingerprint(), {}, proven, 20, {}, cache_key="k"
    )
    made: list[Any] = []

    class Compilation:
        def __init__(self, request: Request, target: Any, store: Any) -> None:
            self.store = store

        def run(self, folder: Path, keys: Any, whole_key: str) -> Outcome:
            assert whole_key == "k"
            self.store.get("graph", lambda path: path.write_bytes(b"x"))
            made.append(folder)
            return Outcome(folder, manifest, ())

    monkeypatch.setattr(compiling, "_Compilation", Compilation)
    monkeypatch.setattr(compiling, "cache_key", lambda *given: "k")
    target: Any = Nothing()
    request = request_of(tmp_path)
    for written, again in (
        (manifest, False),
        (replace(manifest, cache_key="other"), True),
        (replace(manifest, source_sha256="0"), True),
        (replace(manifest, parity={4: proven[4]}), True),
    ):
        made.clear()
        write_manifest(folder, written)
        outcome = compile_student(request, target)
        assert bool(made) is again and outcome.made == () and outcome.folder == folder
    write_manifest(folder, manifest)
    compile_student(replace(request, force=True), target)
    assert made == [folder] * 2 and not (tmp_path / "runtimes" / ".work").exists(), (
        "work is cleared once all is written"
    )
    Nothing.refusal = "not here"  # type: ignore[assignment]
    assert compile_student(request, target).made == ()
    with pytest.raises(ExportError, match="^not here$"):
        compile_student(replace(request, force=True), target)
    Nothing.refusal = None


@pytest.mark.parametrize("kind", ["same", "narrowed", "engine", "data", "own data"])
def test_a_row_names_its_files_and_has_a_key_only_if_it_is_the_float32_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (stored := tmp_path / "key.onnx").write_bytes(b"graph")
    file = tmp_path / ("step.engine" if kind == "engine" else "step.onnx")
    file.write_bytes(b"graph" if kind != "narrowed" else b"narrow")
    data = {"data": "key.onnx.data", "own data": "step.onnx.data"}.get(kind, "")
    if data:
        (tmp_path / data).write_bytes(b"weights")
    shapes = {"latents": ("batch", 4)}, {"velocity": ("batch", 4)}
    monkeypatch.setattr(compiling, "shapes_of", lambda path: shapes if path == stored else ({}, {}))
    one: Any = compiling._Compilation.__new__(compiling._Compilation)
    for form, stage, sigmas in (("staged", "step", ()), ("fused", "2-steps", PICTURE.sigmas[2])):
        one._request, one._student = request_of(tmp_path, form=form), PICTURE
        assert one._row(stage, Stored(stored, "the key", False), file) == Graph(
            file.name, sha256(file), sigmas, *shapes, key="the key" if kind in ("same", "data", "own data") else "",
            data=data, data_sha256=sha256(tmp_path / data) if data else "",
        )  # fmt: skip


def test_of_eight_bits_the_steps_are_quantised_and_the_rest_is_converted(tmp_path: Path) -> None:
    one: Any = compiling._Compilation.__new__(compiling._Compilation)
    quantised: list[str] = []
    for precision in ("fp32", "fp16", "bf16", "int8", "fp8"):
        one._request, one._made = request_of(tmp_path, precision=precision), []
        one._target = SimpleNamespace(convert=lambda request, name, graph, target: Converted(graph, graph))
        one._quantise = lambda name, graph, folder: (quantised.append(name), Converted(graph, graph))[1]
        for name in ("text", "step", "step_2", "step-96x32", "decoder", "decoder-96x32"):
            (tmp_path / "graph.onnx").touch()
            one._convert(name, Stored(tmp_path / "graph.onnx", "k", False), tmp_path)
        assert quantised == (["step", "step_2", "step-96x32"] if precision in ("int8", "fp8") else [])
        quantised.clear()
    assert find_target("onnx").name == "onnx"
