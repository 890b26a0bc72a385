"""Outlines of other programs become labels: made here, and compared with the labels that they came from."""

import gzip
import json
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roifile
import tifffile
from numpy.typing import NDArray
from pycocotools import mask as coco_mask  # type: ignore[import-untyped]

from nucleus.data.annotations import read_geojson, read_rois
from nucleus.data.coco import coco_shapes, read_coco
from nucleus.data.images import decode_image, encode_png
from nucleus.data.intake import read_items, read_source
from nucleus.data.layouts import find_images
from nucleus.data.masks import MaskForm
from nucleus.data.shapes import Ellipse, Polygons, Shape, labels_from_shapes
from nucleus.data.shards import decode_record
from nucleus.data.sources import open_source
from nucleus.data.synthetic import generated_image
from nucleus.errors import DataError, ImageError
from nucleus.predict.outlines import outlines_of
from nucleus.progress import no_progress

SIDE = 96
Labels = NDArray[np.uint16]


def polygon(*points: tuple[float, float], name: str = "p") -> Polygons:
    return Polygons(name, ((np.array(points, np.float64),),))


def box(left: float, top: float, right: float, bottom: float, name: str = "box") -> Polygons:
    return polygon((left, top), (right, top), (right, bottom), (left, bottom), name=name)


def square(left: float, top: float, side: float) -> list[list[float]]:
    right, bottom = left + side, top + side
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(geometry: dict[str, Any], **properties: Any) -> dict[str, Any]:
    return {"type": "Feature", "id": "x", "geometry": geometry, "properties": properties}


def area(*rings: list[list[float]]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": list(rings)}


def geojson_of(labels: Labels) -> dict[str, Any]:
    features = []
    for outline in outlines_of(labels):
        parts = [[[*ring.tolist(), ring[0].tolist()] for ring in part] for part in outline.parts]
        shape = {"type": "MultiPolygon", "coordinates": parts} if len(parts) > 1 else area(*parts[0])
        features.append(feature(shape, objectType="detection"))
    return {"type": "FeatureCollection", "features": features}


def rois_of(labels: Labels, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for outline in outlines_of(labels, simplified=False):
            roi = roifile.ImagejRoi.frompoints(outline.rings[0].astype(np.int32))
            roi.roitype = roifile.ROI_TYPE.TRACED
            archive.writestr(f"{outline.label:04d}.roi", roi.tobytes())
    return path


def coco_of(images: dict[str, Labels], form: str) -> dict[str, Any]:
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "nucleus"}]}
    for number, (name, labels) in enumerate(images.items(), 1):
        height, width = labels.shape
        document["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        for label in range(1, int(labels.max()) + 1):
            item = {"id": len(document["annotations"]), "image_id": number, "category_id": 1, "iscrowd": 0}
            document["annotations"].append({**item, "segmentation": segmentation(labels == label, form)})
    return document


def segmentation(mask: NDArray[np.bool_], form: str) -> Any:
    if form == "polygon":
        (outline,) = outlines_of(mask.astype(np.uint8))
        return [ring.ravel().tolist() for ring in outline.rings]
    packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if form == "compressed":
        return {"size": list(mask.shape), "counts": packed["counts"].decode()}
    pixels = mask.T.ravel()
    changes = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff([0, *([0] if pixels[0] else []), *changes, pixels.size])
    return {"size": list(mask.shape), "counts": counts.tolist()}


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Labels]:
    """Three images in `source/`; their labels have no holes and no second parts."""
    (tmp_path / "source").mkdir()
    found = {}
    for number in range(3):
        image, labels = generated_image(number, SIDE, SIDE)
        (tmp_path / "source" / f"a{number}.png").write_bytes(encode_png(image))
        found[f"a{number}.png"] = labels
    return found


def imported(folder: Path, spool: Path) -> tuple[dict[str, Labels], dict[str, str], list[str]]:
    """Labels by title, reasons of what was left out, and the decisions about parts."""
    spool.mkdir(exist_ok=True)
    read = read_source(folder, partial(read_items, spool), no_progress)
    labels = {image.title: decode_record(Path(image.record.file).read_bytes())[2] for image in read.images}
    reasons = {item.title: item.reason for item in read.left_out}
    return labels, reasons, [text for image in read.images for text, _ in image.masks.remarks]


@pytest.mark.parametrize("form", ["polygon", "compressed", "uncompressed"])
@pytest.mark.parametrize("place", ["annotations.json", "annotations/instances_default.json"])
def test_coco_gives_back_the_labels(form: str, place: str, pictures: dict[str, Labels], tmp_path: Path) -> None:
    path = tmp_path / "source" / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco_of(pictures, form)))
    labels, reasons, remarks = imported(tmp_path / "source", tmp_path / "spool")
    assert (reasons, remarks) == ({}, [])
    for name, truth in pictures.items():
        assert (labels[name[:-4]] == truth).all()


@pytest.mark.parametrize("form", ["collection", "list", "gzip"])
def test_geojson_gives_back_the_labels(form: str, pictures: dict[str, Labels], tmp_path: Path) -> None:
    for name, truth in pictures.items():
        document = geojson_of(truth)
        text = json.dumps(document["features"] if form == "list" else document).encode()
        path = tmp_path / "source" / f"{name[:-4]}.geojson"
        if form == "gzip":
            path.with_suffix(".geojson.gz").write_bytes(gzip.compress(text))
        else:
            path.write_bytes(text)
    labels, reasons, _ = imported(tmp_path / "source", tmp_path / "spool")
    assert reasons == {}
    for name, truth in pictures.items():
        assert (labels[name[:-4]] == truth).all()


def test_outlines_of_an_image_with_an_orientation_tag_are_remarked(pictures: dict[str, Labels], tmp_path: Path) -> None:
    """Programs that turn images by the tag draw outlines in another frame than that of the stored pixels."""
    for number, (name, truth) in enumerate(pictures.items()):
        image = decode_image((tmp_path / "source" / name).read_bytes(), name)
        (tmp_path / "source" / name).unlink()
        tags = [(274, "H", 1, 3, True)] if number else []
        tifffile.imwrite(tmp_path / "source" / f"a{number}.tif", image, photometric="rgb", extratags=tags)
        (tmp_path / "source" / f"a{number}.geojson").write_text(json.dumps(geojson_of(truth)))
    _, _, remarks = imported(tmp_path / "source", tmp_path / "spool")
    assert [remark for remark in remarks if "orientation tag" in remark] == remarks
    assert len(remarks) == 2


@pytest.mark.parametrize("name", ["{}_RoiSet.zip", "{}.zip", "{}.rois.zip", "RoiSet_{}.zip"])
def test_roi_sets_give_back_the_labels(name: str, pictures: dict[str, Labels], tmp_path: Path) -> None:
    for image, truth in pictures.items():
        rois_of(truth, tmp_path / "source" / name.format(image[:-4]))
    layout = find_images(open_source(tmp_path / "source"))
    assert {image.form for image in layout.images} == {MaskForm.ROIS}
    labels, reasons, _ = imported(tmp_path / "source", tmp_path / "spool")
    assert reasons == {}
    for image, truth in pictures.items():
        assert (labels[image[:-4]] == truth).all()


def filled(shapes: Sequence[Shape], side: int = 8) -> Labels:
    return labels_from_shapes(shapes, (side, side), "f").labels


def test_pixel_centres_decide_and_those_on_an_edge_as_in_imagej() -> None:
    """ImageJ: a centre on a left or lower edge is outside, on a right or upper edge inside."""
    assert (filled([box(1, 2, 3, 4)])[2:4, 1:3] == 1).all()
    assert filled([box(1, 2, 3, 4)]).sum() == 4
    halves = filled([box(1.5, 1.5, 3.5, 3.5)])
    assert list(zip(*np.nonzero(halves), strict=True)) == [(1, 2), (1, 3), (2, 2), (2, 3)]
    triangle = filled([polygon((0, 0), (2, 0), (0, 2))])  # its long side runs through two centres
    assert list(zip(*np.nonzero(triangle), strict=True)) == [(0, 0), (0, 1), (1, 0)]
    assert filled([Ellipse("o", 0, 0, 4, 4)])[:4, :4].tolist() == [[0, 1, 1, 0], [1] * 4, [1] * 4, [0, 1, 1, 0]]


def test_an_overlap_belongs_to_the_smaller_nucleus_and_much_loss_is_said() -> None:
    found = labels_from_shapes(
        [box(0, 0, 4, 4, "large"), box(2, 0, 5, 4, "small"), box(6, 6, 6.2, 6.2, "dot")], (8, 8), "f"
    )
    assert np.bincount(found.labels.ravel())[1:].tolist() == [8, 12]
    said = dict(found.remarks)
    assert sorted(names for names in said.values()) == [("dot",), ("large",)]
    twice = labels_from_shapes([box(0, 0, 4, 4, "one"), box(0, 0, 4, 4, "two")], (8, 8), "f")
    assert twice.count == 1
    assert list(dict(twice.remarks).values()) == [("two",)]


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([box(0, 0, 12, 4)], "8 x 8 px"),
        ([box(-5, 0, 3, 4)], "-5, 0"),
        ([polygon((0, 0), (np.nan, 3), (3, 3))], "NaN"),
        ([polygon((0, 0), (1e300, 3), (3, 3))], "1e\\+300"),
        ([box(0.1, 0.1, 0.2, 0.2)], "fractions"),
        ([box(0, 0, 6, 4, "tissue"), box(1, 1, 2, 2), box(3, 1, 4, 2)], "tissue has 2 others"),
    ],
)
def test_outlines_that_cannot_be_those_of_the_image(shapes: list[Shape], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        filled(shapes)


def test_outlines_of_a_smaller_image_are_said() -> None:
    shapes = [box(3 * n, 0, 3 * n + 2, 2) for n in range(10)]
    assert labels_from_shapes(shapes, (80, 80), "small").remarks[0][1] == ("small",)
    assert labels_from_shapes(shapes, (80, 40), "small").remarks == ()


def test_hostile_outlines_end_soon() -> None:
    zigzag = np.stack([np.arange(1_000_000) % 90, (np.arange(1_000_000) % 2) * 90.0], axis=1)
    with pytest.raises(ImageError, match="32 times"):
        filled([Polygons("zigzag", ((zigzag,),))], 96)
    circle = np.exp(2j * np.pi * np.arange(1_000_000) / 1_000_000)
    ring = np.stack([40 + 20 * circle.real, 40 + 20 * circle.imag], axis=1)
    assert filled([Polygons("circle", ((ring,),))], 96).sum() == filled([Ellipse("c", 20, 20, 40, 40)], 96).sum()


def read(document: Any) -> tuple[list[Shape], Any]:
    return read_geojson(json.dumps(document).encode(), "f.geojson")


def test_objects_of_qupath() -> None:
    cell = {**feature(area(square(0, 0, 6)), objectType="cell"), "nucleusGeometry": area(square(1, 1, 3))}
    hole = feature(area(square(0, 0, 5), square(1, 1, 2)), objectType="detection")
    tissue = feature(area(square(0, 0, 8)), objectType="annotation")
    assert filled(read(cell)[0]).sum() == 9
    assert filled(read([hole])[0]).sum() == 21
    shapes, remarks = read([tissue, hole])
    assert (len(shapes), len(remarks)) == (1, 1)
    shapes, remarks = read([tissue])  # outlines drawn by hand are annotations
    assert (len(shapes), remarks) == (1, ())
    ignored = feature(area(square(0, 0, 8)), objectType="annotation", classification={"name": "Ignore*"})
    shapes, remarks = read([tissue, ignored])
    assert (len(shapes), ["ignored class" in text for text, _ in remarks]) == (1, [True])
    old = {**cell, "id": "PathCellObject", "properties": {}}
    assert filled(read(old)[0]).sum() == 9
    point = feature({"type": "Point", "coordinates": [1, 2]})
    assert [len(part) for part in read([point, feature(area(square(0, 0, 5)))])] == [1, 1]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (feature(area(square(0, 0, 6)), objectType="cell"), "nucleusGeometry"),
        (feature({"type": "Point", "coordinates": [1, 2]}, objectType="detection"), "is Point"),
        (feature({**area(square(0, 0, 6)), "plane": {"c": -1, "z": 3, "t": 0}}, objectType="detection"), "z 3"),
        (feature(area([[0, 0], [1, 1]])), "2 points"),
        ([feature({"type": "Point", "coordinates": [1, 2]})] * 3, "3 objects of other"),
        (feature(area(square(0, 0, 8)), objectType="tile"), "1 object of other"),
        (feature({"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [2, 2]]]}), "pairs of numbers"),
        (feature({"type": "Polygon", "coordinates": 5}), "lists"),
        ({"shapes": []}, "FeatureCollection"),
        ([1, 2], "FeatureCollection"),
    ],
)
def test_geojson_that_is_refused(document: Any, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        read(document)


@pytest.mark.parametrize(
    "data", [b"{", b"[" * 200_000, b"\x1f\x8b" + b"x" * 20, gzip.compress(b"{}" * 999)[:-9], b"\xff\xfe\x00", b""]
)
def test_damaged_json_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="Expected"):
        read_geojson(data, "f.geojson")


def test_a_gzip_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nucleus.data.annotations.LARGEST_JSON", 1 << 20)
    with pytest.raises(ImageError, match="1 MiB"):
        read_geojson(gzip.compress(b" " * (50 << 20)), "bomb")


def made(kind: roifile.ROI_TYPE, change: Callable[[roifile.ImagejRoi], None] | None = None) -> bytes:
    roi = roifile.ImagejRoi.frompoints(np.array([[1, 1], [5, 1], [5, 4], [1, 4]], np.int32))
    roi.roitype = kind
    if change is not None:
        change(roi)
    return roi.tobytes()


def boxed(roi: roifile.ImagejRoi) -> None:
    roi.integer_coordinates = None
    roi.right, roi.bottom, roi.n_coordinates = 5, 4, 0


def in_plane(number: int) -> Callable[[roifile.ImagejRoi], None]:
    def change(roi: roifile.ImagejRoi) -> None:
        roi.position = number

    return change


def composite(roi: roifile.ImagejRoi) -> None:
    path = [(0, 0, 0), (1, 6, 0), (1, 6, 6), (1, 0, 6), (4,), (0, 2, 2), (1, 4, 2), (1, 4, 4), (1, 2, 4), (4,)]
    roi.multi_coordinates = np.array([value for step in path for value in step], np.float32)
    roi.shape_roi_size = len(roi.multi_coordinates)
    roi.integer_coordinates = None
    roi.n_coordinates = 0


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (made(roifile.ROI_TYPE.POLYGON), 12),
        (made(roifile.ROI_TYPE.FREEHAND), 12),
        (made(roifile.ROI_TYPE.TRACED), 12),
        (made(roifile.ROI_TYPE.RECT, boxed), 12),
        (made(roifile.ROI_TYPE.OVAL, boxed), 8),
        (made(roifile.ROI_TYPE.RECT, composite), 32),
    ],
)
def test_regions_of_imagej(data: bytes, pixels: int) -> None:
    shapes, _ = read_rois(data, "a.roi")
    assert filled(shapes).sum() == pixels


@pytest.mark.parametrize("kind", ["LINE", "POINT", "POLYLINE", "FREELINE", "ANGLE"])
def test_lines_and_points_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ImageError, match=f"a.roi is a region of type {kind}"):
        read_rois(made(roifile.ROI_TYPE[kind]), "a.roi")


@pytest.mark.parametrize(
    "data", [b"", b"PK\3\4", b"Iout" + b"\xff" * 60, b"Iout" + b"\0" * 90, made(roifile.ROI_TYPE.POLYGON)[:70]]
)
def test_damaged_regions_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="Expected"):
        filled(read_rois(data, "a.roi")[0])


def test_regions_of_several_planes_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        for plane in (1, 2):
            archive.writestr(f"{plane}.roi", made(roifile.ROI_TYPE.POLYGON, in_plane(plane)))
    with pytest.raises(ImageError, match=r"1.roi .* 2.roi"):
        read_rois((tmp_path / "r.zip").read_bytes(), "r.zip")


def coco(**changes: Any) -> dict[str, Any]:
    item = {"id": 7, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 4, 1, 4]], **changes}
    image = {"id": 1, "file_name": "a.png", "height": 8, "width": 8}
    return {"images": [image], "annotations": [item], "categories": [{"id": 1, "name": "nucleus"}]}


def coco_labels(document: dict[str, Any]) -> tuple[Labels, list[str]]:
    (record,) = read_coco(json.dumps(document).encode(), "c.json") or []
    shapes, remarks = coco_shapes(record, (8, 8))
    return filled(shapes), [text for text, _ in remarks]


def test_polygons_of_one_object_are_one_nucleus_and_their_overlap_is_inside() -> None:
    labels, _ = coco_labels(coco(segmentation=[[0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]]))
    assert (labels.max(), labels.sum()) == (1, 28)


def test_an_object_in_parts_is_one_nucleus_and_counted_as_divided() -> None:
    """An outline of all nuclei of an image at once is one object; the import warns of it."""
    apart = Polygons("p", ((np.array(square(0, 0, 3)),), (np.array(square(4, 4, 3)),)))
    found = labels_from_shapes([apart, box(0, 5, 2, 7)], (8, 8), "f")
    assert (found.count, found.divided) == (2, 1)


def test_sizes_of_coco_may_be_floats() -> None:
    document = coco()
    document["images"][0] |= {"height": 8.0, "width": 8.0}
    assert coco_labels(document)[0].max() == 1


def test_crowds_of_one_part_are_nuclei_and_others_are_refused() -> None:
    one, two = np.zeros((8, 8), np.bool_), np.zeros((8, 8), np.bool_)
    one[1:3, 1:3] = two[1:3, 1:3] = two[5:7, 5:7] = True
    labels, remarks = coco_labels(coco(iscrowd=1, segmentation=segmentation(one, "uncompressed")))
    assert (labels.sum(), len(remarks)) == (4, 1)
    with pytest.raises(ImageError, match="crowd"):
        coco_labels(coco(iscrowd=1, segmentation=segmentation(two, "uncompressed")))


@pytest.mark.parametrize(
    "changes",
    [
        {"segmentation": []}, {"segmentation": [[1, 1, 2]]}, {"segmentation": [["x"] * 6]},
        {"segmentation": {"size": [8, 9], "counts": [72]}}, {"segmentation": {"size": [8, 8], "counts": [10, 2]}},
        {"segmentation": {"size": [8, 8], "counts": [70, -6]}}, {"segmentation": {"size": [8, 8], "counts": "~~"}},
        {"segmentation": {"size": [8, 8], "counts": "o" * 99}}, {"segmentation": {"size": [8, 8], "counts": None}},
    ],
)  # fmt: skip
def test_coco_objects_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ImageError, match=r"object 7 of c\.json"):
        coco_labels(coco(**changes))


def test_coco_that_contradicts_itself_or_its_image() -> None:
    with pytest.raises(DataError, match="image_id 5"):
        coco_labels(coco(image_id=5))
    document = coco()
    document["images"][0]["width"] = 16
    with pytest.raises(ImageError, match=r"8 x 8 px .* found 16 x 8"):
        coco_labels(document)
    document["images"].append(document["images"][0])
    with pytest.raises(DataError, match="once"):
        coco_labels(document)


def test_categories_that_are_no_nuclei_are_passed_over() -> None:
    document = coco(category_id=2)
    document["categories"].append({"id": 2, "name": "cell"})
    labels, remarks = coco_labels(document)
    assert (labels.max(), len(remarks)) == (0, 2)


def test_two_annotations_of_one_image_are_named(pictures: dict[str, Labels], tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, truth in pictures.items():
        (source / f"{name[:-4]}_masks.png").write_bytes(encode_png(truth))
    (source / "a0.geojson").write_text(json.dumps(geojson_of(pictures["a0.png"])))
    layout = find_images(open_source(source))
    problems = {image.title: image.problem for image in layout.images}
    assert problems["a1"] is None
    assert all(name in str(problems["a0"]) for name in ("a0_masks.png", "a0.geojson"))


def test_a_file_name_leads_to_no_file_outside(pictures: dict[str, Labels], tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((tmp_path / "source" / "a0.png").read_bytes())
    names = {"../secret.png": pictures["a0.png"], "/etc/a1.png": pictures["a1.png"]}
    (tmp_path / "source" / "coco.json").write_text(json.dumps(coco_of(names, "polygon")))
    labels, reasons, _ = imported(tmp_path / "source", tmp_path / "spool")
    assert set(labels) == {"a1"}  # found by the last part of its name, within the folder
    assert "../secret.png" in reasons
