"""What the page shows: pyramids, tiles, and channels in their colours and ranges."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from nucleus.errors import UsageError
from nucleus.page.display import TILE, ChannelView, Pyramid, default_views, parse_views, pyramid_of, thumbnail
from nucleus.predict.source import array_source

GREY = [ChannelView(0, 0, 255, "#ffffff")]


def pixels_of(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])


def pyramid_from(pixels: NDArray[np.generic]) -> Pyramid:
    stored = pixels if pixels.ndim == 3 else pixels[..., np.newaxis]
    return Pyramid(lambda rows, columns: stored[rows, columns], stored.shape[:2])


def test_levels_are_means_of_two_by_two_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 60_000, (515, 700), np.uint16)
    pyramid = pyramid_from(pixels)
    assert [pyramid.whole(level).shape[:2] for level in range(len(pyramid.levels))] == [
        (515, 700),
        (258, 350),
        (129, 175),
    ]
    even = pixels[:514].astype(float).reshape(257, 2, 350, 2).mean(axis=(1, 3))
    assert np.abs(pyramid.whole(1)[:257, :, 0] - even).max() <= 1
    last = pixels[514:].astype(float).reshape(1, 350, 2).mean(axis=2)
    assert np.abs(pyramid.whole(1)[257:, :, 0] - last).max() <= 1


def test_tiles_cover_a_level_once() -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (300, 520), np.uint8)
    pyramid = pyramid_from(pixels)
    rows = [
        np.concatenate([pixels_of(pyramid.tile(0, x, y, GREY)) for x in range(-(-520 // TILE))], axis=1)
        for y in range(-(-300 // TILE))
    ]
    assert np.array_equal(np.concatenate(rows)[..., 0], pixels)
    for place in ((0, 3, 0), (0, 0, 2), (0, -1, 0), (9, 0, 0), (-1, 0, 0)):
        with pytest.raises(UsageError):
            pyramid.tile(*place, GREY)


def test_images_of_one_bit_are_shown() -> None:
    pixels = np.zeros((300, 300), np.bool_)
    pixels[:100] = True
    source = array_source(pixels[..., np.newaxis])
    pyramid = pyramid_of(source, stored=False)
    assert pixels_of(thumbnail(pyramid, default_views(pyramid, stored=False), None, 300))[[0, -1], 0, 0].tolist() == [
        255,
        0,
    ]


def test_channels_are_stretched_coloured_and_added() -> None:
    pixels = np.zeros((1, 3, 2), np.float32)
    pixels[0, :, 0], pixels[0, :, 1] = [0, 0.5, 2], [10, 0, 10]
    views = [ChannelView(0, 0, 1, "#ff0000"), ChannelView(1, 0, 20, "#00ff80")]
    shown = pixels_of(pyramid_from(pixels).tile(0, 0, 0, views))
    assert shown[0].tolist() == [[0, 128, 64], [128, 0, 0], [255, 128, 64]]
    assert pixels_of(pyramid_from(pixels).tile(0, 0, 0, [])).max() == 0
    with pytest.raises(UsageError):
        pyramid_from(pixels).tile(0, 0, 0, [ChannelView(2, 0, 1, "#ffffff")])


@pytest.mark.parametrize(
    "text", ["0:1", "a:0:1:ffffff", "0:nan:1:ffffff", "0:0:1:fff", "0:0:1:gggggg", "0:0:1:ffffff," * 65]
)
def test_views_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_views(text)


def test_views_are_parsed() -> None:
    assert parse_views("1:2.5:1e3:00FF10,") == [ChannelView(1, 2.5, 1000, "#00ff10")]


def test_how_an_image_is_shown_at_first() -> None:
    rng = np.random.default_rng(2)
    grey = rng.integers(100, 900, (64, 64), np.uint16)
    (view,) = default_views(pyramid_of(array_source(grey), stored=False), stored=False)
    assert view.colour == "#ffffff"
    assert 100 <= view.low < 120
    assert 880 < view.high <= 900
    stain = rng.integers(0, 255, (64, 64, 3), np.uint8)
    views = default_views(pyramid_of(array_source(stain), stored=False), stored=False)
    assert [(each.low, each.high, each.colour) for each in views] == [
        (0, 255, c) for c in ("#ff0000", "#00ff00", "#0000ff")
    ]
    same = np.repeat(stain[..., :1], 3, axis=2)
    assert len(default_views(pyramid_of(array_source(same), stored=False), stored=False)) == 1
    several = rng.integers(0, 255, (64, 64, 5), np.uint8)
    views = default_views(pyramid_of(array_source(several, channel=1), stored=True), stored=True)
    assert [each.channel for each in views] == list(range(5))
    assert len({each.colour for each in views}) == 5


def test_thumbnails_have_outlines() -> None:
    pixels = np.full((400, 800), 40, np.uint8)
    labels = np.zeros(pixels.shape, np.int32)
    labels[100:300, 200:600] = 7
    small = pixels_of(thumbnail(pyramid_from(pixels), GREY, labels, 100))
    assert small.shape == (50, 100, 3)
    assert small[5, 5].tolist() == [40, 40, 40]
    assert (small[12:14, 50] != 40).any()
    assert small[25, 50].tolist() == [40, 40, 40]
