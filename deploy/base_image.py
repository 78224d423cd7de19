"""A base image without an image registry, from Debian's packages by debootstrap."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from deploy.engine import Engine, NoEngine

BASE, BUILD_BASE = "fewstep-base:bookworm", "fewstep-build-base:bookworm"
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


def make_base_images(docker: Engine, cache: Path | None) -> tuple[str, str]:
    """(base, build base); the second one also has the certificates that this host trusts, and is never shipped.

    With a ``cache``, the packages' file system is kept there, and images that are there already are used again.

    Raises:
        NoEngine: debootstrap is not installed.
    """
    if not shutil.which("debootstrap"):
        raise NoEngine("debootstrap is not installed")
    if (
        cache
        and docker.run("docker", "images", "--quiet", BASE)
        and docker.run("docker", "images", "--quiet", BUILD_BASE)
    ):
        return BASE, BUILD_BASE
    with tempfile.TemporaryDirectory(prefix="fewstep-base-") as folder:
        archive = (cache or Path(folder)) / f"{SUITE}.tar"
        if not archive.exists():
            _bootstrap(Path(folder) / "root", archive)
        docker.run("docker", "import", "--change", 'CMD ["/bin/bash"]', str(archive), BASE)
        _add_certificates(docker, Path(folder) / "context")
    return BASE, BUILD_BASE


def _bootstrap(root: Path, archive: Path) -> None:
    try:
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root)], check=True)
    finally:  # debootstrap mounts the host's; nothing may be deleted below one
        for mounted in (root / "proc", root / "sys"):
            if mounted.is_mount():
                subprocess.run(["umount", str(mounted)], check=True)
    for path in (*(root / "var/cache/apt/archives").glob("*.deb"), *(root / "var/lib/apt/lists").glob("*_*")):
        path.unlink()
    unfinished = archive.with_suffix(".part")
    subprocess.run(["tar", "-C", str(root), "-cf", str(unfinished), "."], check=True)
    unfinished.replace(archive)


def _add_certificates(docker: Engine, context: Path) -> None:
    context.mkdir()
    known = Path("/") / CERTIFICATES
    lines = [f"FROM {BASE}", f"ENV PIP_CERT=/{CERTIFICATES}"]
    if known.exists():
        shutil.copyfile(known, context / known.name)
        lines.append(f"COPY {known.name} /{CERTIFICATES}")
    (context / "Dockerfile").write_text("\n".join(lines) + "\n", "utf-8")
    docker.run("docker", "build", "--quiet", "--tag", BUILD_BASE, str(context))
