"""From arrays to files."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from service.results.formats import MEDIA_TYPES, PICTURES
from service.worker.pictures import encode
from service.worker.provenance import Provenance
from student.runtimes.fake import fake_image
from tests.service.support import expected_pixels, pixels


def test_png_keeps_every_pixel() -> None:
    assert np.array_equal(pixels(encode(fake_image("a", 1, 4), "png")), expected_pixels("a", 1))


@pytest.mark.parametrize(("output_format", "error"), [("jpeg", 12.0), ("webp", 12.0)])
def test_the_others_come_close(output_format: str, error: float) -> None:
    seen = pixels(encode(fake_image("a", 1, 4), output_format)).astype(float)
    assert np.abs(seen - expected_pixels("a", 1)).mean() < error


@pytest.mark.parametrize("output_format", PICTURES)
def test_the_file_is_of_the_format_that_it_is_called_and_always_the_same(output_format: str) -> None:
    data = encode(fake_image("a", 1, 4), output_format)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size, Image.MIME[output_format.upper()]) == (
            output_format.upper(), (64, 64), MEDIA_TYPES[output_format],
        )  # fmt: skip
    assert encode(fake_image("a", 1, 4), output_format) == data


def test_values_are_rounded_to_the_nearest_and_clipped() -> None:
    image_CHW = np.array([[[-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.7]]] * 3, np.float32)
    assert pixels(encode(image_CHW, "png"))[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_height_and_width_are_not_swapped() -> None:
    assert pixels(encode(np.zeros((3, 8, 24), np.float32), "png")).shape == (8, 24, 3)


MADE_BY = Provenance('a <"model"> & more', "1.0")


def described(data: bytes) -> dict[str, str]:
    """The properties in a file's XMP packet, found by a reader of XML that knows nothing of how it was written."""
    with Image.open(io.BytesIO(data)) as image:
        root = ElementTree.fromstring(image.info["xmp"])
    [description] = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return {name.rpartition("}")[2]: value for name, value in description.attrib.items()}


@pytest.mark.parametrize("output_format", PICTURES)
def test_every_file_says_that_a_model_drew_it(output_format: str) -> None:
    report = described(encode(fake_image("a secret prompt", 1, 4), output_format, made_by=MADE_BY))
    assert report == {
        "about": "",
        "CreatorTool": "fewstep",
        "DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
        "AISystemUsed": MADE_BY.model,
        "AISystemVersionUsed": "1.0",
    }


@pytest.mark.parametrize("output_format", PICTURES)
def test_what_a_file_says_changes_no_pixel_and_can_be_left_out(output_format: str) -> None:
    image_CHW = fake_image("a", 1, 4)
    plain, marked = encode(image_CHW, output_format), encode(image_CHW, output_format, made_by=MADE_BY)
    assert np.array_equal(pixels(plain), pixels(marked)) and b"fewstep" not in plain


def test_png_says_it_in_plain_text_too() -> None:
    with Image.open(io.BytesIO(encode(fake_image("a", 1, 4), "png", made_by=Provenance("shapes", "2")))) as image:
        image.load()
        assert (image.info["Software"], image.info["Source"]) == ("fewstep", "shapes 2")
