"""``make audit``: looks for known vulnerabilities in the lock files. Needs pip-audit and its database.

Exit codes: 0 none are known, 1 some are, 2 unknown, because the database could not be reached.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLEAN, HOLES, UNKNOWN = 0, 1, 2
PATIENCE_S = 600


def holes(report: dict[str, Any]) -> list[str]:
    """One line for each vulnerability in pip-audit's report: the package, its id, and the versions without it."""
    return [
        f"{found['name']} {found['version']}: {hole['id']}, {_cure(hole['fix_versions'])}"
        for found in report["dependencies"]
        for hole in found.get("vulns", ())
    ]


def _cure(versions: Sequence[str]) -> str:
    return f"fixed in {', '.join(versions)}" if versions else "not fixed yet"


def ask(lock: Path, command: Sequence[str] = (sys.executable, "-m", "pip_audit")) -> dict[str, Any] | str:
    """pip-audit's report on a lock file, or the reason in its own words why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json"]
        try:
            done = subprocess.run(
                [*command, *options, "--output", str(report), "--requirement", str(lock)],
                capture_output=True, text=True, timeout=PATIENCE_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no response within {PATIENCE_S} s"
        if report.exists() and (text := report.read_text("utf-8")):
            return dict(json.loads(text))
        return (done.stderr.strip().splitlines() or ["pip-audit printed nothing"])[-1]


def main(locks: Sequence[str], command: Sequence[str] = (sys.executable, "-m", "pip_audit")) -> int:
    """Audit each lock file; the worst outcome counts."""
    worst = CLEAN
    for lock in map(Path, locks):
        report = ask(lock, command)
        if isinstance(report, str):
            print(f"{lock.name} was not audited, because the vulnerability database cannot be reached: {report}")
            worst = worst or UNKNOWN
            continue
        found = holes(report)
        counted = f"{len(report['dependencies'])} packages, {len(found)} known vulnerabilities"
        print("\n".join([f"{lock.name}: {counted}", *found]))
        worst = HOLES if found else worst
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
