"""The audit says what is known, and never that all is well when nobody could be asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.audit import CLEAN, HOLES, UNKNOWN, main

SOUND = {"name": "sound", "version": "1.0", "vulns": []}
HOLED = {"name": "holed", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
STAND_IN = """
import json, sys
answers = json.loads({!r})
options = dict(zip(sys.argv[1:-1], sys.argv[2:]))
dependencies = answers[options["--requirement"]]
if dependencies is None:
    sys.exit("ERROR:pip_audit: no route to the database")
open(options["--output"], "w").write(json.dumps({{"dependencies": dependencies, "fixes": []}}))
sys.exit(any(found["vulns"] for found in dependencies))
"""


@pytest.mark.parametrize(
    ("answers", "code", "words"),
    [
        ({"a.lock": [SOUND]}, CLEAN, "a.lock: 1 packages, 0 known vulnerabilities"),
        ({"a.lock": [SOUND, HOLED]}, HOLES, "holed 2.0: CVE-1, fixed in 2.1"),
        ({"a.lock": None}, UNKNOWN, "a.lock was not audited"),
        ({"a.lock": None, "b.lock": [HOLED]}, HOLES, "a.lock was not audited"),
        ({"a.lock": [HOLED], "b.lock": None}, HOLES, "no route to the database"),
        ({"a.lock": [SOUND], "b.lock": None}, UNKNOWN, "b.lock was not audited"),
    ],
)
def test_the_worst_outcome_counts(
    answers: dict[str, Any], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "pip_audit.py"
    script.write_text(STAND_IN.format(json.dumps(answers)))
    assert main(list(answers), [sys.executable, str(script)]) == code
    assert words in capsys.readouterr().out
