"""Prompt files: what is read, what is refused by line number, and that nothing is trained on and measured."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from student.families.find import family_of
from tests.student.families import tiny
from training.config import ConfigError, changed
from training.experiment.setup import _prompts
from training.prompts import copies, cut_lines, from_files, read, same
from training.rats.config import RatsConfig


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_text_and_json_lines_say_the_same(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "a red heart", "  ein Schloß am See ")
    rows = write(tmp_path / "a.jsonl", '{"prompt": "a red heart"}', '{"id": 7, "prompt": "ein Schloß am See"}')
    assert read(text) == read(rows) == ["a red heart", "ein Schloß am See"]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (("a", "", "b"), "line 2 is empty"),
        (("a", "b", "a"), "line 3 is the same as line 1"),
        (("a", "x" * 2001), "line 2 has 2001 characters"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, lines: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read(write(tmp_path / "a.txt", *lines))


@pytest.mark.parametrize("line", ["red heart", '{"text": "red heart"}', '["red heart"]', '{"prompt": 3}'])
def test_a_json_line_without_a_prompt_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match="line 2 is not a JSON object with a string"):
        read(write(tmp_path / "a.jsonl", '{"prompt": "a"}', line))


def test_all_bad_lines_are_named_up_to_ten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\n\na\nSchlo\xdf\n" + b"x" * 2001 + b"\n")
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path} line 3 is empty, line 4 is the same as line 1, line 5 is not UTF-8, "
        "line 6 has 2001 characters, where up to 2000 are accepted: accepted is one prompt per line, each only once"
    )
    with pytest.raises(ConfigError, match="line 11 is the same as line 1 and 7 more: accepted"):
        read(write(path, *["a"] * 18))


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    """JSON allows U+2028, U+2029 and U+0085 inside a text, and Windows ends its lines and begins its files its way."""
    texts = ["one\u2028line", "one\u2029more", "and\x85this", "plain"]
    rows = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" for text in texts)
    path = tmp_path / "a.jsonl"
    path.write_bytes(rows.encode("utf-8-sig"))
    assert read(path) == texts
    path.with_suffix(".txt").write_bytes("\r\n".join(texts).encode())
    assert read(path.with_suffix(".txt")) == texts


@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_prompts_that_the_model_does_not_read_to_their_end_are_named(family: str, tmp_path: Path) -> None:
    """The tiny T5 reads letter by letter: with the start's mark and the end, 22 letters are 24 tokens."""
    model = family_of({"flux": tiny.flux, "sd3": tiny.sd3, "wan": tiny.wan}[family](), max_tokens=tiny.MAX_TOKENS)
    fits = "".join("abcdefghij"[i % 10] for i in range(tiny.MAX_TOKENS - 2))
    path = write(tmp_path / "a.txt", "a heart", fits, fits + "k", "b", fits + "klm")
    assert cut_lines(model.cuts, path) == "lines 3, 5"
    assert cut_lines(model.cuts, write(path, "a heart", fits)) == "" and model.max_tokens == tiny.MAX_TOKENS
    assert cut_lines(model.cuts, write(path, fits + "k")) == "line 1"


def test_lines_are_counted_on_where_a_long_file_is_read_in_parts(tmp_path: Path) -> None:
    asked: list[int] = []

    def cuts(prompts: Sequence[str]) -> list[bool]:
        asked.append(len(prompts))
        return [prompt in ("prompt 0", "prompt 999", "prompt 1000", "prompt 2001") for prompt in prompts]

    path = write(tmp_path / "a.txt", *(f"prompt {i}" for i in range(2002)))
    assert cut_lines(cuts, path) == "lines 1, 1000, 1001, 2002" and asked == [1000, 1000, 2]


def test_a_missing_file_a_folder_and_too_few_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="which is a folder"):
        read(tmp_path)
    for lines in ((), ("a",), ("a", "b", "c")):
        with pytest.raises(ConfigError, match=f"a.txt has {len(lines)} prompts.*accepted are 12 or more"):
            from_files(write(tmp_path / "a.txt", *lines), None, 1)
    with pytest.raises(ConfigError, match=r"b.txt has 1 prompts to evaluate on: accepted are 6 or more"):
        from_files(write(tmp_path / "a.txt", "a", "b", "c"), write(tmp_path / "b.txt", "d"), 1)


def test_the_home_folder_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "p.txt", "a red heart")
    assert read(Path("~/p.txt")) == ["a red heart"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_editors_write_is_read(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a red heart\r\nSchloß\r\n".encode(encoding))
    assert read(path) == ["a red heart", "Schloß"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "a red heart\nb\n".encode("utf-16-le"),
            r"line 1 contains the character U\+0000.*UTF-16 without a byte order mark",
        ),
        (b"\xff\xfea", "begins like UTF-16 but is not valid"),
        (b"a\rb\rc\r", "ends its lines with carriage returns alone"),
        (b"a\nb\n\x1a", r"line 3 contains the character U\+001A"),
        (b"a\nb\0c\n", r"line 2 contains the character U\+0000"),
        (b"a\nb\x0bc\n", r"line 2 contains the character U\+000B"),
        ("a\n\u200b\u2060\n".encode(), "line 2 is empty"),
        ("a\n\u2028\n".encode(), "line 2 is empty"),
        ("a\n\ufeff\n".encode(), "line 2 is empty"),
    ],
)
def test_what_nobody_sees_is_refused_by_line(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        read(tmp_path / "a.txt")


def test_marks_of_files_that_were_joined_are_taken_out_and_joiners_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        "\ufeffa red heart\n\ufeffa blue star\n\U0001f469\u200d\U0001f680 in space\n".encode()
    )
    assert read(tmp_path / "a.txt") == ["a red heart", "a blue star", "\U0001f469\u200d\U0001f680 in space"]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json", "a.jsonl"])
def test_json_lines_are_known_by_any_of_their_endings(name: str, tmp_path: Path) -> None:
    assert read(write(tmp_path / name, '{"prompt": "a"}', '{"prompt": "b"}')) == ["a", "b"]


def test_a_json_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[\n  "a red heart",\n  {"prompt": "a blue star"}\n]\n')
    assert read(path) == ["a red heart", "a blue star"]
    path.write_text('["a", 3, "a"]')
    with pytest.raises(ConfigError, match="entry 2 is not a JSON object with a string.*entry 3 is the same as line 1"):
        read(path)
    path.write_text('["a",')
    with pytest.raises(ConfigError, match="begins like a JSON list but is not valid JSON"):
        read(path)


@pytest.mark.parametrize("name", ["a.csv", "a.TSV"])
def test_tables_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"which is a table: accepted are .txt, .jsonl and .json files"):
        read(write(tmp_path / name, "prompt,seed", "a,1"))


def test_json_that_python_chokes_on_is_one_sentence(tmp_path: Path) -> None:
    rows = ('{"prompt": "a"}', '{"prompt": "\\ud800 heart"}', "[" * 100_000)
    with pytest.raises(ConfigError, match=r"line 2 contains the character U\+D800.*line 3 is not a JSON object"):
        read(write(tmp_path / "a.jsonl", *rows))
    with pytest.raises(ConfigError, match="begins like a JSON list but is not valid JSON"):
        read(write(tmp_path / "b.json", "[" * 100_000))


def test_a_prompt_in_another_normal_form_or_case_is_the_same_prompt(tmp_path: Path) -> None:
    forms = ["Café at  NIGHT", "Cafe\u0301 at night"]
    training = write(tmp_path / "a.txt", *(f"p{i}" for i in range(10)), forms[0])
    with pytest.raises(ConfigError, match="share 1 prompts"):
        from_files(training, write(tmp_path / "b.txt", *(f"q{i}" for i in range(8)), forms[1]), 1)
    for start in range(20):  # whichever side of the split it falls on, both forms do
        names = [f"{start} {form}" for form in forms] + [f"{start} {i}" for i in range(12)]
        sets = from_files(write(tmp_path / "c.txt", *names), None, 1)
        trained = {same(prompt) for step in range(20) for prompt in sets.train(step, 5)}
        measured = [same(prompt) for prompt in (*sets.calibration, *sets.validation, *sets.test)]
        assert not trained & set(measured) and len(measured) == len(set(measured))


def test_one_file_is_split_into_disjoint_sets_that_a_new_line_hardly_changes(tmp_path: Path) -> None:
    lines = [f"prompt {i}" for i in range(60)]
    sets = from_files(write(tmp_path / "a.txt", *lines), None, 1)
    trained = {prompt for step in range(20) for prompt in sets.train(step, 7)}
    measured = [*sets.calibration, *sets.validation, *sets.test]
    assert len(measured) == len(set(measured)) == 30 and min(map(len, (sets.calibration, sets.validation))) >= 2
    assert trained == set(lines) - set(measured) and sets.of_file
    more = from_files(write(tmp_path / "b.txt", *lines, "one more"), None, 1)
    again = {*more.calibration, *more.validation, *more.test}
    assert len(again & set(measured)) >= 29


def test_every_prompt_is_trained_on_once_a_pass_in_a_new_order(tmp_path: Path) -> None:
    sets = from_files(write(tmp_path / "a.txt", *(f"p{i}" for i in range(40))), None, 3)
    one, two = ([prompt for step in steps for prompt in sets.train(step, 5)] for steps in (range(4), range(4, 8)))
    assert sorted(one) == sorted(two) and len(set(one)) == 20 and one != two
    assert sets.train(3, 5) == one[15:20]
    assert from_files(tmp_path / "a.txt", None, 4).train(0, 20) != one


def test_a_second_file_is_measured_on_and_must_share_nothing(tmp_path: Path) -> None:
    training = write(tmp_path / "a.txt", *(f"p{i}" for i in range(10)))
    sets = from_files(training, write(tmp_path / "b.txt", *(f"q{i}" for i in range(8))), 1)
    assert {*sets.calibration, *sets.validation, *sets.test} == {f"q{i}" for i in range(8)}
    assert set(sets.train(0, 10)) == {f"p{i}" for i in range(10)}
    with pytest.raises(ConfigError, match="share 1 prompts, such as 'p3'"):
        from_files(training, write(tmp_path / "c.txt", "p3", *(f"q{i}" for i in range(8))), 1)


def test_a_run_measures_on_as_many_prompts_as_it_asks_for(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(64)))
    found = from_files(path, None, 1)
    few = found.first(2, 3, 5)
    assert (few.calibration, few.validation, few.test) == (found.calibration[:2], found.validation[:3], found.test[:5])
    assert few.train(3, 4) == found.train(3, 4) and few.of_file
    assert found.first(1000, 1000, 1000) == found


def test_what_ranks_low_comes_more_often_in_each_pass(tmp_path: Path) -> None:
    rows = [
        {"prompt": "lowest", "percentile": 0}, {"prompt": "half", "percentile": 50.0}, {"prompt": "usual"},
        {"prompt": "disliked", "percentile": 40, "rejected": 1, "rerolled": 1, "chosen": 1},
        {"prompt": "liked", "percentile": 100, "rejected": 1, "chosen": 1},
    ]  # fmt: skip
    path = write(tmp_path / "feedback.jsonl", *(json.dumps(row) for row in rows))
    whole = tmp_path / "feedback.json"
    whole.write_text(json.dumps(rows))
    assert copies(path) == copies(whole) == [10, 1 + 4, 1, 1 + 7, 1]  # 4.5 is rounded to the even 4, 7.2 to 7
    measuring = write(tmp_path / "measuring.txt", *(f"m{k}" for k in range(6)))
    prompts = from_files(path, measuring, seed=1)
    for turn in range(2):
        turns = prompts.train(turn, 25)
        assert Counter(turns) == {"lowest": 10, "half": 5, "usual": 1, "disliked": 8, "liked": 1}
    assert prompts.train(0, 25) != prompts.train(1, 25)
    assert copies(path, 3) == [3, 1 + 1, 1, 1 + 2, 1] and copies(path, 1) == [1] * 5
    assert Counter(from_files(path, measuring, 1, most=1).train(0, 5)) == Counter(row["prompt"] for row in rows)


def test_a_run_draws_what_ranks_low_as_often_as_its_configuration_says(tmp_path: Path) -> None:
    write(tmp_path / "feedback.jsonl", '{"prompt": "lowest", "percentile": 0}', '{"prompt": "usual"}')
    files = {
        "data.prompts": str(tmp_path / "feedback.jsonl"),
        "data.measuring": str(write(tmp_path / "measuring.txt", *(f"m{k}" for k in range(6)))),
    }
    for most in (1, 4):
        prompts = _prompts(changed(RatsConfig(), {**files, "data.copies": most}))
        assert Counter(prompts.train(0, most + 1)) == {"lowest": most, "usual": 1}


def test_what_users_asked_for_is_not_trained_on_if_it_is_measured(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"m{k}", "percentile": 1.0}) for k in range(3)]
    path = write(tmp_path / "feedback.jsonl", *rows, '{"prompt": "free", "percentile": 100}')
    measuring = write(tmp_path / "measuring.txt", *(f" M{k} " for k in range(6)))
    assert set(from_files(path, measuring, seed=1).train(0, 30)) == {"free"}


@pytest.mark.parametrize("wrong", ["-1", "101", '"low"', "true", "null"])
def test_a_percentile_that_is_none_is_named(tmp_path: Path, wrong: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}', f'{{"prompt": "b", "percentile": {wrong}}}')
    with pytest.raises(ConfigError, match="line 2 has the percentile .*: accepted is a number from 0 to 100"):
        copies(path)
