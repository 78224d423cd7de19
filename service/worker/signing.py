"""Image files that can be checked: C2PA manifests, signed as the last step after encoding (extra ``c2pa``).

The manifest says what the XMP beside it says, that a model drew the picture and which, and binds it to the bytes by a
signature. A signature holds a moment and a random number, so signed files of the same seed differ; their pixels do not.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import StartupError
from service.results.formats import MEDIA_TYPES
from service.settings import Settings
from service.worker.pictures import encode
from service.worker.provenance import SOURCE_TYPE, Provenance


class SigningError(Exception):
    """A picture could not be signed."""


class ImageSigner:
    """Signs image files with one certificate and key."""

    def __init__(self, signer: Any) -> None:
        self._signer = signer

    def sign(self, data: bytes, output_format: str, made_by: Provenance) -> bytes:
        """The image file with a signed manifest in it.

        Raises:
            SigningError: the library refuses, with its reason.
        """
        from c2pa import Builder, C2paError  # type: ignore[import-untyped]

        signed = io.BytesIO()
        try:
            with Builder(json.dumps(manifest(made_by))) as builder:
                builder.sign(self._signer, MEDIA_TYPES[output_format], io.BytesIO(data), signed)
        except C2paError as error:
            raise SigningError(str(error)) from error
        return signed.getvalue()


def manifest(made_by: Provenance) -> dict[str, Any]:
    """What is signed: created by a trained algorithm, by which model and version (C2PA 2.1, action c2pa.created)."""
    created = {
        "action": "c2pa.created",
        "digitalSourceType": SOURCE_TYPE,
        "softwareAgent": {"name": made_by.model, "version": made_by.version},
    }
    return {
        "claim_generator_info": [{"name": "fewstep"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def open_signer(settings: Settings) -> ImageSigner | None:
    """The signer of the settings, tried once; None if there is none.

    Raises:
        StartupError: it cannot sign, and why.
    """
    if settings.c2pa_cert is None and settings.c2pa_key is None:
        return None
    if settings.c2pa_cert is None or settings.c2pa_key is None:
        missing = "FEWSTEP_C2PA_CERT" if settings.c2pa_cert is None else "FEWSTEP_C2PA_KEY"
        raise StartupError(f"{missing} is missing: signing needs a certificate and its key.")
    try:
        import c2pa
    except ImportError:
        raise StartupError("FEWSTEP_C2PA_CERT needs c2pa-python: pip install 'fewstep[c2pa]'.") from None
    certificates, key = _read(settings.c2pa_cert, "CERT"), _read(settings.c2pa_key, "KEY")
    try:
        info = c2pa.C2paSignerInfo(_algorithm(key), certificates, key, None)
        signer = ImageSigner(c2pa.Signer.from_info(info))
        signer.sign(encode(np.zeros((3, 8, 8), np.float32), "png"), "png", Provenance("fewstep", "0"))
    except (c2pa.C2paError, SigningError) as error:
        raise StartupError(f"FEWSTEP_C2PA_CERT and FEWSTEP_C2PA_KEY cannot sign: {error}.") from None
    return signer


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"FEWSTEP_C2PA_{name} {path} cannot be read: {error.strerror}.") from None


def _algorithm(key: bytes) -> str:
    """C2PA's name for how this key signs."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise StartupError("FEWSTEP_C2PA_KEY is not an unencrypted private key in PEM.") from None
    if isinstance(private, ec.EllipticCurvePrivateKey):
        names = {256: "es256", 384: "es384", 521: "es512"}
        if private.curve.key_size in names:
            return names[private.curve.key_size]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    raise StartupError(
        "FEWSTEP_C2PA_KEY is of a type that C2PA does not support: accepted are P-256, P-384, P-521, Ed25519 and RSA."
    )
