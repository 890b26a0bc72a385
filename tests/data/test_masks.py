"""What mask files hold: each form gives the right nuclei, or is refused with the reason."""

import io
import re
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nucleus.data.masks import MaskFacts, labels_from_mask, labels_from_masks, mask_warnings
from nucleus.errors import ImageError

Writer = Callable[[np.ndarray], bytes]
DISCS = 14


def scene(seed: int = 0, discs: int = DISCS, side: tuple[int, int] = (160, 220)) -> np.ndarray:
    """Return labels of separate discs."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(side, np.uint16)
    placed = 0
    while placed < discs:
        centre, radius = (int(rng.integers(side[1])), int(rng.integers(side[0]))), int(rng.integers(6, 12))
        room, disc = (cv2.circle(np.zeros(side, np.uint8), centre, r, 1, -1) > 0 for r in (radius + 8, radius))
        if not labels[room].any():
            placed += 1
            labels[disc] = placed
    return labels


def tif(pixels: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def pil(pixels: np.ndarray, suffix: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix, **options)
    return file.getvalue()


def indexed(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    image, file = Image.fromarray(pixels.astype(np.uint8)), io.BytesIO()
    image = image.convert("P") if image.mode != "P" else image
    image.putpalette(np.resize(palette, (256, 3)).astype(np.uint8).ravel().tolist())
    image.putdata(pixels.astype(np.uint8).ravel().tolist())
    image.save(file, "png")
    return file.getvalue()


def byte(labels: np.ndarray) -> np.ndarray:
    return (255 * (labels > 0)).astype(np.uint8)


def soft(labels: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(byte(labels), (0, 0), 1.5)


def with_hot_pixel(labels: np.ndarray) -> np.ndarray:
    mask = (labels > 0).astype(np.uint8)
    away = cv2.dilate(mask, np.ones((9, 9))) == 0
    away[:4] = away[:, :4] = False
    mask[tuple(np.argwhere(away)[0])] = 255
    return mask


def classes(labels: np.ndarray) -> np.ndarray:
    return np.where(labels > 0, 1 + labels % 2, 0).astype(np.uint8)


def borders(labels: np.ndarray) -> np.ndarray:
    mask = (labels > 0).astype(np.uint8)
    return mask + (mask - cv2.erode(mask, np.ones((3, 3), np.uint8)))


def squares(shape: tuple[int, ...]) -> np.ndarray:
    """Return labels of squares on the grid of JPEG's blocks, whose values it keeps."""
    labels = np.zeros(shape, np.uint8)
    for number in range(1, 9):
        labels[32:48, 16 * number : 16 * number + 8] = 20 * number
    return labels


def pasted(colour: tuple[int, int, int], ground: tuple[int, int, int], labels: np.ndarray) -> np.ndarray:
    return np.where(labels[..., np.newaxis] > 0, colour, ground).astype(np.uint8)


COLOURS = np.vstack(
    [[[0, 0, 0]], np.random.default_rng(1).permutation(5**3)[:DISCS, np.newaxis] // [25, 5, 1] % 5 * 50 + 40]
)
"""A colour per label, black for the background."""
FEW = np.vstack([[[0, 0, 0]], np.resize(COLOURS[1:5], (DISCS, 3))])
NOISE = np.random.default_rng(2)

BINARY: dict[str, Writer] = {
    "0 and 255": lambda labels: pil(byte(labels)),
    "0 and 1": lambda labels: pil((labels > 0).astype(np.uint8)),
    "1 bit, PNG": lambda labels: pil(labels > 0),
    "1 bit, TIFF of tifffile, where 0 is white": lambda labels: tif(labels > 0, photometric="miniswhite"),
    "8 bits, where 0 is white": lambda labels: tif(byte(labels), photometric="miniswhite"),
    "16 bits": lambda labels: tif((labels > 0).astype(np.uint16) * 65535),
    "float, 0 and 1": lambda labels: tif((labels > 0).astype(np.float32)),
    "float, soft": lambda labels: tif(soft(labels).astype(np.float32) / 255),
    "float, soft, probabilities of 0.02 to 0.98": lambda labels: tif(soft(labels).astype(np.float32) / 266 + 0.02),
    "signed, -1 and 1": lambda labels: tif(np.where(labels > 0, 1, -1).astype(np.int8)),
    "JPEG": lambda labels: pil(byte(labels), "jpeg", quality=60),
    "JPEG, strong compression": lambda labels: pil(byte(labels), "jpeg", quality=25),
    "JPEG, red": lambda labels: pil(pasted((255, 0, 0), (0, 0, 0), labels), "jpeg", quality=85),
    "JPEG, saved as PNG": lambda labels: pil(np.asarray(Image.open(io.BytesIO(pil(byte(labels), "jpeg"))))),
    "JPEG within TIFF": lambda labels: tif(byte(labels), compression="jpeg"),
    "soft": lambda labels: pil(soft(labels)),
    "one hot pixel": lambda labels: pil(with_hot_pixel(labels)),
    "palette": lambda labels: indexed(labels > 0, np.array([[0, 0, 0], [128, 0, 0]])),
    "palette, white and black": lambda labels: indexed(labels > 0, np.array([[255, 255, 255], [0, 0, 0]])),
    "red": lambda labels: pil(pasted((255, 0, 0), (0, 0, 0), labels)),
    "red, soft": lambda labels: pil(np.dstack([soft(labels), 0 * soft(labels), 0 * soft(labels)])),
    "grey in three channels": lambda labels: pil(np.dstack([byte(labels)] * 3)),
    "only in alpha": lambda labels: pil(np.dstack([0 * byte(labels)] * 3 + [byte(labels)])),
    "white, only in alpha": lambda labels: pil(np.dstack([0 * byte(labels) + 255] * 3 + [byte(labels)])),
    "soft, only in alpha": lambda labels: pil(np.dstack([0 * byte(labels)] * 3 + [soft(labels)])),
    "red on transparent white": lambda labels: pil(
        np.dstack([pasted((255, 0, 0), (255, 255, 255), labels), byte(labels)])
    ),
    "opaque": lambda labels: pil(np.dstack([byte(labels)] * 3 + [0 * byte(labels) + 255])),
}
LABELS: dict[str, Writer] = {
    "uint8, PNG": lambda labels: pil(labels.astype(np.uint8)),
    "uint16, PNG": pil,
    "uint16, TIFF": tif,
    "uint16, where 0 is white": lambda labels: tif(labels, photometric="miniswhite"),
    "int32": lambda labels: tif(labels.astype(np.int32)),
    "int64": lambda labels: tif(labels.astype(np.int64)),
    "uint32, large": lambda labels: tif(labels.astype(np.uint32) * 70_000),
    "consecutive, large": lambda labels: tif(np.where(labels > 0, labels + 300, 0).astype(np.uint16)),
    "float": lambda labels: tif(labels.astype(np.float32)),
    "the background is -1": lambda labels: tif(labels.astype(np.int16) - 1),
    "palette": lambda labels: indexed(labels, COLOURS),
    "a colour each": lambda labels: pil(COLOURS[labels].astype(np.uint8)),
    "a colour each, 16 bits": lambda labels: tif((COLOURS[labels] * 200).astype(np.uint16), photometric="rgb"),
    "a colour each, transparent ground": lambda labels: pil(
        np.dstack([np.where(labels[..., np.newaxis] > 0, COLOURS[labels], 255), byte(labels)]).astype(np.uint8)
    ),
}
REFUSED: dict[str, tuple[Writer, str]] = {
    "inverted": (lambda labels: pil(255 - byte(labels)), "inverted"),
    "inverted, JPEG": (lambda labels: pil(255 - byte(labels), "jpeg"), "inverted"),
    "inverted, soft": (lambda labels: pil(255 - soft(labels)), "inverted"),
    "labels, JPEG": (lambda labels: pil((labels * 15).astype(np.uint8), "jpeg", quality=90), "lossy"),
    "labels, once JPEG": (
        lambda labels: pil(np.asarray(Image.open(io.BytesIO(pil((labels * 15).astype(np.uint8), "jpeg"))))),
        "neither",
    ),
    "labels, smoothed": (lambda labels: pil(cv2.GaussianBlur((labels * 15).astype(np.uint8), (0, 0), 1.5)), "neither"),
    "classes": (lambda labels: pil(classes(labels)), "classes"),
    "classes 0, 127, 255": (lambda labels: pil(np.array([0, 127, 255], np.uint8)[classes(labels)]), "classes"),
    "interior and border": (lambda labels: pil(borders(labels)), "classes"),
    "classes in colours": (lambda labels: pil(COLOURS[classes(labels)].astype(np.uint8)), "classes"),
    "colours that repeat": (lambda labels: pil(FEW[labels].astype(np.uint8)), "separate areas"),
    "colours of which some repeat": (
        lambda labels: pil(COLOURS[np.where(labels > 10, labels - 10, labels)].astype(np.uint8)),
        "separate areas",
    ),
    "values of which some repeat": (lambda labels: tif(np.where(labels > 8, labels, (labels + 1) // 2)), "separate"),
    "classes, one of them frequent": (lambda labels: tif(np.where(labels > 10, labels, labels > 0)), "classes"),
    "a thin border of 128": (
        lambda labels: pil(np.where(borders(labels) > 1, 128, byte(labels)).astype(np.uint8)),
        "classes",
    ),
    "labels, JPEG, exact by chance": (lambda labels: pil(squares(labels.shape), "jpeg", quality=100), "lossy"),
    "a colour each, smoothed": (
        lambda labels: pil(cv2.GaussianBlur(COLOURS[labels].astype(np.uint8), (0, 0), 1.5)),
        "neither",
    ),
    "on white": (
        lambda labels: pil(np.where(labels[..., np.newaxis] > 0, COLOURS[labels], 255).astype(np.uint8)),
        "black",
    ),
    "background 1": (lambda labels: tif(labels + 1), "no pixel of 0"),
    "all 255": (lambda labels: pil(0 * byte(labels) + 255), "no pixel of 0"),
    "the background is 65535": (lambda labels: tif(labels - 1), "background"),
    "0 and -1": (lambda labels: tif(np.where(labels == 1, -1, labels).astype(np.int16)), "-1"),
    "several negative values": (lambda labels: tif(-labels.astype(np.int16)), "values from -14"),
    "noise": (lambda labels: pil(NOISE.integers(0, 3, labels.shape).astype(np.uint8)), "neither"),
    "noise of 8 bits": (lambda labels: pil(NOISE.integers(0, 256, labels.shape).astype(np.uint8)), "neither"),
    "noise of two values": (lambda labels: pil((NOISE.random(labels.shape) < 0.1).astype(np.uint8)), "noise"),
    "a photograph": (
        lambda labels: pil(
            np.clip(soft(labels) * 0.6 + 20 + NOISE.normal(0, 3, labels.shape), 0, 255).astype(np.uint8)
        ),
        "neither|no pixel of 0",
    ),
    "NaN": (lambda labels: tif(np.where(labels > 0, np.nan, 0).astype(np.float32)), "NaN"),
    "pages": (lambda labels: tif(np.stack([byte(labels)] * 3), photometric="minisblack"), "one page"),
    "two channels": (
        lambda labels: tif(np.dstack([labels, classes(labels)]), photometric="minisblack", planarconfig="contig"),
        "one channel",
    ),
    "another size": (lambda labels: pil(labels[:-1]), "220 x 160 px .* found 220 x 159"),
    "no image": (lambda _: b"hello", "something else"),
    "empty file": (lambda _: b"", "empty"),
}


def read(data: bytes, labels: np.ndarray) -> np.ndarray:
    found = labels_from_mask(("m", data), labels.shape).labels
    assert found.dtype == np.uint16
    return found


def same_nuclei(found: np.ndarray, truth: np.ndarray, pixels_off: float = 0.0) -> bool:
    """Whether the labels are the same up to their numbers, but for a fraction of the foreground."""
    pairs = {(int(f), int(t)) for f, t in zip(found.ravel(), truth.ravel(), strict=True) if f and t}
    off = np.count_nonzero((found > 0) != (truth > 0))
    one_to_one = (
        len(pairs) == len({f for f, _ in pairs}) == len({t for _, t in pairs}) == len(np.unique(truth[truth > 0]))
    )
    return one_to_one and found.max() == len(pairs) and off <= pixels_off * np.count_nonzero(truth)


@pytest.mark.parametrize("form", BINARY)
def test_binary_masks_become_components(form: str) -> None:
    labels = scene()
    exact = not ("JPEG" in form or "soft" in form)
    assert same_nuclei(read(BINARY[form](labels), labels), labels, 0.0 if exact else 0.1)
    assert labels_from_mask(("m", BINARY[form](labels)), labels.shape).components


@pytest.mark.parametrize("form", LABELS)
def test_labels_keep_their_order(form: str) -> None:
    labels = scene()
    found = labels_from_mask(("m", LABELS[form](labels)), labels.shape)
    assert not found.components
    assert same_nuclei(found.labels, labels)
    if "colour" not in form:
        assert (found.labels == labels).all()


@pytest.mark.parametrize("form", REFUSED)
def test_what_no_mask_can_be_is_refused(form: str) -> None:
    writer, reason = REFUSED[form]
    labels = scene()
    with pytest.raises(ImageError, match=reason):
        read(writer(labels), labels)


def test_touching_labels_stay_apart_and_components_join() -> None:
    labels = np.zeros((20, 20), np.uint16)
    labels[2:8, 2:8], labels[8:14, 2:8], labels[14:18, 8:12] = 1, 2, 3  # 3 touches 2 by a corner
    assert (read(tif(labels), labels) == labels).all()
    assert read(pil(byte(labels)), labels).max() == 1


def test_empty_masks_have_no_nuclei() -> None:
    for empty in (np.zeros((8, 9), np.uint8), np.full((8, 9), -1, np.int16), np.zeros((8, 9), np.float32)):
        assert read(tif(empty), empty).max() == 0
    assert read(pil(np.zeros((8, 9, 3), np.uint8)), np.zeros((8, 9))).max() == 0


def test_a_divided_label_is_one_nucleus_and_told() -> None:
    labels = scene()
    labels[labels == 5] = 4
    found = labels_from_mask(("m", tif(labels)), labels.shape)
    assert (found.count, found.divided) == (DISCS - 1, 1)


def test_masks_of_single_nuclei_merge_and_the_first_keeps_the_overlap() -> None:
    a, b, empty = (np.zeros((20, 20), np.uint8) for _ in range(3))
    a[:6], b[3:9] = 255, 1  # 0/255 and 0/1 masks
    parts = a.copy()
    parts[16:] = 255  # in two parts
    files = [("a", pil(a)), ("empty", pil(empty)), ("b", pil(b)), ("parts", pil(parts))]
    merged = labels_from_masks(files, (20, 20))
    labels = merged.labels
    assert merged.divided == 1
    assert labels.dtype == np.uint16
    assert [labels[row, 0] for row in (0, 5, 8, 12, 18)] == [1, 1, 2, 0, 3]


@pytest.mark.parametrize("form", BINARY)
def test_each_form_of_binary_mask_can_hold_one_nucleus(form: str) -> None:
    labels = scene()
    files = [(str(number), BINARY[form](np.where(labels == number, 1, 0))) for number in range(1, DISCS + 1)]
    assert same_nuclei(labels_from_masks(files, labels.shape).labels, labels, 0.1)


def test_labels_among_masks_of_single_nuclei() -> None:
    labels = scene()
    assert same_nuclei(labels_from_masks([("all", tif(labels))], labels.shape).labels, labels)
    with pytest.raises(ImageError, match="14 labels"):
        labels_from_masks([("all", tif(labels)), ("one", pil(byte(labels)))], labels.shape)
    with pytest.raises(ImageError, match="inverted"):
        labels_from_masks([("inverted", pil(255 - byte(labels)))], labels.shape)


def test_a_size_that_differs_by_an_orientation_tag_is_explained() -> None:
    labels = scene()
    turned = tif(labels.T, extratags=[(274, "H", 1, 6, True)])
    with pytest.raises(ImageError, match=r"Orientation tags \(image 1, mask 6\)"):
        read(turned, labels)
    with pytest.raises(ImageError, match=r"Orientation tags \(image 8, mask 1\)"):
        labels_from_mask(("m", tif(labels.T)), labels.shape, orientation=8)


def test_an_orientation_tag_that_only_the_image_or_only_the_mask_has_is_remarked() -> None:
    labels, turned = scene(), [(274, "H", 1, 3, True)]
    plain, tagged = ("plain", tif(labels)), ("tagged", tif(labels, extratags=turned))
    single = [(name, tif(byte(labels == number), extratags=turned)) for number, name in ((1, "a"), (2, "b"))]
    for mask, orientation, named in ((plain, 1, []), (plain, 3, ["plain"]), (tagged, 3, []), (tagged, 1, ["tagged"])):
        found = labels_from_mask(mask, labels.shape, orientation)
        assert [name for _, names in found.remarks for name in names] == named
        assert (found.labels == labels).all()
    ((said, names),) = labels_from_masks(single, labels.shape).remarks
    assert "orientation tag" in said
    assert names == ("a", "b")


@st.composite
def random_scenes(draw: st.DrawFn) -> np.ndarray:
    """Labels of rectangles, which may touch and hide each other, and have any values."""
    height, width = draw(st.integers(12, 40)), draw(st.integers(12, 40))
    labels = np.zeros((height, width), np.uint16)
    values = draw(st.lists(st.integers(1, 255), max_size=8, unique=True))
    for value in values:
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        labels[top : top + draw(st.integers(2, 9)), left : left + draw(st.integers(2, 9))] = value
    return labels


@pytest.mark.parametrize("form", [form for form in LABELS if "colour" not in form and form != "palette"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(labels=random_scenes())
def test_any_labels_are_read_or_refused(form: str, labels: np.ndarray) -> None:
    values = np.unique(labels[labels > 0])
    try:
        found = labels_from_mask(("m", LABELS[form](labels)), labels.shape)
    except ImageError:
        return
    if len(values) > 1:
        assert same_nuclei(found.labels, labels)
    else:  # one value is a binary mask
        assert ((found.labels > 0) == (labels > 0)).all()


@pytest.mark.parametrize("form", [form for form in BINARY if not re.search("JPEG|soft|hot", form)])
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(labels=random_scenes())
def test_any_binary_mask_is_read_or_refused(form: str, labels: np.ndarray) -> None:
    try:
        found = read(BINARY[form](labels), labels)
    except ImageError:
        return
    assert ((found > 0) == (labels > 0)).all()
    assert found.max() == cv2.connectedComponents(byte(labels))[0] - 1


def facts(nuclei: int = 9, **others: float) -> MaskFacts:
    return MaskFacts(**{"nuclei": nuclei, "coverage": 0.2, "specks": 0, "divided": 0, "components": False, **others})


def test_what_is_unlikely_is_told() -> None:
    assert mask_warnings([facts()] * 5, []) == []
    assert mask_warnings([facts(1)] * 2 + [facts()] * 2, []) == []  # half of the images, not most
    (none,) = mask_warnings([facts(0)] * 5, ["train", "val", "test"])
    assert "5 images" in none
    (split,) = mask_warnings([facts()] * 3 + [facts(0)], ["val"])
    assert "val" in split
    for case, number in (
        ([facts(1)] * 3 + [facts()], "3 of 4"),
        ([facts(coverage=0.95)] + [facts()] * 3, "1 of 4"),
        ([facts(components=True)] * 4, "4 of 4"),
        ([facts(divided=3), facts()], "1 of 2"),
        ([facts(specks=2), facts()], "1 of 2"),
    ):
        (warning,) = mask_warnings(case, [])
        assert number in warning
