"""Signed pictures (C2PA), read again with the library's own Reader; certificates are made on the spot."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.errors import StartupError
from service.results.formats import MEDIA_TYPES
from service.settings import Settings
from service.worker.pictures import encode
from service.worker.provenance import SOURCE_TYPE, Provenance
from service.worker.signing import SigningError, open_signer
from service.worker.videos import encode_video
from student.runtimes.fake import fake_video
from tests.service.support import eventually, expected_pixels, pixels, post, running_service, start_worker
from tests.service.video_files import decode_mp4, decode_webp

c2pa = pytest.importorskip("c2pa", reason="c2pa-python has no wheel here")
x509 = pytest.importorskip("cryptography.x509")

from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa  # noqa: E402

MADE_BY = Provenance("shapes", "3")
KEYS: dict[str, Callable[[], Any]] = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
}


def name(text: str) -> Any:
    organisation = x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Fewstep tests")
    return x509.Name([organisation, x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def certificate(subject: str, key: Any, issuer: str, issuer_key: Any, leaf: bool) -> Any:
    """What C2PA asks of a certificate: X.509 v3, a purpose, its issuer's and its own key's names."""
    now = datetime.now(UTC)
    usage = {
        "digital_signature": leaf, "key_cert_sign": not leaf, "crl_sign": not leaf, "content_commitment": False,
        "key_encipherment": False, "data_encipherment": False, "key_agreement": False, "encipher_only": False,
        "decipher_only": False,
    }  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=not leaf, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if leaf:
        purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def pem(made: Any) -> bytes:
    return bytes(made.public_bytes(serialization.Encoding.PEM))


def key_pem(key: Any) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


class Papers:
    """A certificate chain and its key in files, and the authority that it goes back to."""

    def __init__(self, folder: Path, key: Any) -> None:
        root_key = ec.generate_private_key(ec.SECP256R1())
        root = certificate("root", root_key, "root", root_key, leaf=False)
        leaf = certificate("signer", key, "root", root_key, leaf=True)
        self.root = pem(root).decode()
        self.cert, self.key = folder / "chain.pem", folder / "key.pem"
        self.cert.write_bytes(pem(leaf) + pem(root))
        self.key.write_bytes(key_pem(key))

    def settings(self, **changes: Any) -> Settings:
        return Settings(**{"c2pa_cert": self.cert, "c2pa_key": self.key, **changes})


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path, KEYS["P-256"]())


def read(data: bytes, media_type: str, root: str | None = None) -> tuple[str, dict[str, Any]]:
    """What the library says of a file: its validation state, and its active manifest."""
    trust = {"trust": {"trust_anchors": root}, "verify": {"verify_trust": True}} if root else {}
    with c2pa.Context.from_dict(trust) as context, c2pa.Reader(media_type, io.BytesIO(data), context=context) as reader:
        return str(reader.get_validation_state()), dict(reader.get_active_manifest())


def image() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).random((3, 64, 64), np.float32)


@pytest.mark.parametrize("kind", KEYS)
def test_a_signed_picture_says_which_model_drew_it(tmp_path: Path, kind: str) -> None:
    papers = Papers(tmp_path, KEYS[kind]())
    signer = open_signer(papers.settings())
    assert signer is not None
    plain = encode(image(), "png", made_by=MADE_BY)
    state, manifest = read(signer.sign(plain, "png", MADE_BY), "image/png", papers.root)
    assert state == "Trusted"
    (actions,) = [one["data"]["actions"] for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")]
    (created,) = actions
    assert created["action"] == "c2pa.created" and created["digitalSourceType"] == SOURCE_TYPE
    assert created["softwareAgent"] == {"name": "shapes", "version": "3"}
    assert manifest["claim_generator_info"][0]["name"] == "fewstep"


@pytest.mark.parametrize("format", ["mp4", "webp"])
def test_videos_can_be_signed_and_keep_their_frames_and_their_xmp(papers: Papers, format: str) -> None:
    signer = open_signer(papers.settings())
    assert signer is not None
    plain = encode_video(fake_video("p", 1, 4, 5), 8, format, None, MADE_BY)
    signed = signer.sign(plain, format, MADE_BY)
    state, manifest = read(signed, MEDIA_TYPES[format], papers.root)
    assert state == "Trusted" and manifest["claim_generator_info"][0]["name"] == "fewstep"
    decode = decode_mp4 if format == "mp4" else decode_webp
    assert np.array_equal(decode(signed).frames_FHWC, decode(plain).frames_FHWC)
    assert SOURCE_TYPE.encode() in signed


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_every_format_can_be_signed_and_keeps_its_pixels_and_its_xmp(papers: Papers, format: str) -> None:
    signer = open_signer(papers.settings())
    assert signer is not None
    plain = encode(image(), format, made_by=MADE_BY)
    signed = signer.sign(plain, format, MADE_BY)
    assert read(signed, f"image/{format}", papers.root)[0] == "Trusted"
    assert np.array_equal(pixels(signed), pixels(plain))
    with Image.open(io.BytesIO(signed)) as opened:
        assert SOURCE_TYPE in str(opened.info.get("XML:com.adobe.xmp", opened.info.get("xmp")))


def test_a_picture_that_was_changed_is_found_out(papers: Papers) -> None:
    signer = open_signer(papers.settings())
    assert signer is not None
    signed = bytearray(signer.sign(encode(image(), "png"), "png", MADE_BY))
    at = signed.rindex(b"IDAT") + 40
    signed[at] ^= 1
    assert read(bytes(signed), "image/png", papers.root)[0] == "Invalid"


def test_a_signer_that_nobody_knows_is_valid_and_not_trusted(papers: Papers, tmp_path: Path) -> None:
    signer = open_signer(papers.settings())
    assert signer is not None
    (tmp_path / "other").mkdir()
    other = Papers(tmp_path / "other", KEYS["P-256"]())
    assert read(signer.sign(encode(image(), "png"), "png", MADE_BY), "image/png", other.root)[0] != "Trusted"


def test_a_picture_that_cannot_be_signed_is_an_error(papers: Papers) -> None:
    signer = open_signer(papers.settings())
    assert signer is not None
    with pytest.raises(SigningError):
        signer.sign(b"this is no picture", "png", MADE_BY)


def test_without_a_certificate_nothing_is_signed() -> None:
    assert open_signer(Settings()) is None


def test_a_seal_that_cannot_sign_is_refused_at_once(papers: Papers, tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(StartupError) as caught:
            open_signer(papers.settings(**changes))
        text = str(caught.value)
        assert "\n" not in text and "PRIVATE KEY" not in text
        return text

    assert refused(c2pa_key=None) == "FEWSTEP_C2PA_KEY is missing: signing needs a certificate and its key."
    assert refused(c2pa_cert=None).startswith("FEWSTEP_C2PA_CERT is missing")
    assert "cannot be read: No such file or directory" in refused(c2pa_key=tmp_path / "none.pem")
    assert refused(c2pa_key=papers.cert) == "FEWSTEP_C2PA_KEY is not an unencrypted private key in PEM."
    (tmp_path / "dsa.pem").write_bytes(key_pem(dsa.generate_private_key(2048)))
    assert "of a type that C2PA does not support" in refused(c2pa_key=tmp_path / "dsa.pem")
    (tmp_path / "other.pem").write_bytes(key_pem(KEYS["P-256"]()))
    assert "cannot sign" in refused(c2pa_key=tmp_path / "other.pem")
    assert "cannot sign" in refused(c2pa_cert=papers.key)


def test_a_service_signs_what_it_draws(papers: Papers, tmp_path: Path) -> None:
    settings = {"C2PA_CERT": str(papers.cert), "C2PA_KEY": str(papers.key)}
    with running_service(tmp_path / "data", **settings) as service:
        answer = post(service.url, prompt="a red heart", seed=7, n=2).json()
        for drawn in answer["data"]:
            data = base64.b64decode(drawn["b64_json"])
            state, manifest = read(data, "image/png", papers.root)
            assert state == "Trusted" and '"fake"' in json.dumps(manifest)
            assert np.array_equal(pixels(data), expected_pixels("a red heart", drawn["seed"]))


def test_a_worker_with_a_wrong_certificate_does_not_start(redis_url: str, tmp_path: Path) -> None:
    worker = start_worker(redis_url, tmp_path, C2PA_CERT=str(tmp_path / "none"), C2PA_KEY=str(tmp_path / "none"))
    try:
        assert eventually(lambda: worker.poll() is not None)
        assert worker.returncode == 1
    finally:
        worker.kill()
        worker.wait()
