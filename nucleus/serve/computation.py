"""The computation of requests: images in memory to labels and tables, by the code of `nucleus predict`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nucleus.data.stacks import ChosenPlane
from nucleus.errors import ModelError, RequestError
from nucleus.predict.blocks import AssembledLabels, LabelledBlock, assembled_labels
from nucleus.predict.measurement import Frame, NucleiSummary, frame_of, image_row, measure_blocks
from nucleus.predict.model import Model
from nucleus.predict.scaled_image import ScaledImage
from nucleus.predict.source import ImageSource
from nucleus.serve.uploads import OpenedUpload, SegmentOptions

__all__ = ["SMALL_PIXELS", "Found", "FoundImage", "Ticket", "segment_alone", "segment_together"]

SMALL_PIXELS = 1 << 22
"""Images of more pixels, of the file or of the network, are computed alone."""
_TURNS = 8


@dataclass(frozen=True)
class FoundImage:
    """The nuclei of one image of a request.

    Attributes:
        image: The image, whose pixels `image.rgb(rows, columns)` gives for display.
        frame: Its name, size, depth and time.
        output: Name that it would have as a file of its own, such as `a.z3.tif`.
        labels: Its labels, H x W, int32: 0 background, 1..K nuclei.
        rows: One dictionary per nucleus, with the columns of `nuclei.csv`.
        row: The row of the image, with the columns of `images.csv`.
    """

    image: ScaledImage
    frame: Frame
    output: str
    labels: AssembledLabels
    rows: list[dict[str, Any]]
    row: dict[str, Any]


@dataclass(frozen=True)
class Found:
    """The result of a request.

    Attributes:
        model: The model that computed it.
        images: Its images: one, or the chosen planes of a stack, by image, then time, then depth.
    """

    model: Model
    images: list[FoundImage]

    @property
    def nuclei(self) -> int:
        """Number of nuclei in all images."""
        return sum(len(image.rows) for image in self.images)


@dataclass(eq=False)
class Ticket:
    """A request on its way through a lane.

    Attributes:
        opened: What is to be segmented.
        sources: The decoded images of a small request.
        started: Whether its computation has begun.
        given_up: Whether nobody waits for it any more; its computation ends at the next block.
    """

    opened: OpenedUpload
    sources: list[ImageSource] = field(default_factory=list)
    started: bool = False
    given_up: bool = False

    def check(self) -> None:
        """Raise `RequestError` if nobody waits for the ticket."""
        if self.given_up:
            raise RequestError("Expected someone who waits for the answer; found nobody. Ask again.", 504)
        self.started = True


def segment_together(model: Model, tickets: Sequence[Ticket]) -> list[Found | Exception | None]:
    """Compute tickets of one small image each, together.

    Args:
        model: The model.
        tickets: Tickets whose `sources` are decoded.

    Returns:
        For each ticket its result; or what its computation raised; or None for an image that is large for the network,
        which must be computed alone.
    """
    found: list[Found | Exception | None] = [None] * len(tickets)
    alike: dict[SegmentOptions, list[int]] = {}
    for number, ticket in enumerate(tickets):
        alike.setdefault(replace(ticket.opened.options, channel=None, z=None, t=None), []).append(number)
    for options, numbers in alike.items():
        for number, result in zip(numbers, _alike(model, options, [tickets[i] for i in numbers]), strict=True):
            found[number] = result
    return found


def _alike(model: Model, options: SegmentOptions, tickets: Sequence[Ticket]) -> list[Found | Exception | None]:
    """Compute tickets whose options the network sees are the same."""
    found: list[Found | Exception | None] = [None] * len(tickets)
    scaled: dict[int, ScaledImage] = {}
    try:
        variant = model.with_options(options.prediction)
    except ModelError as error:
        return [error] * len(tickets)
    for number, ticket in enumerate(tickets):
        try:
            ticket.check()
            image = variant.scaled_image(ticket.sources[0])
        except Exception as error:  # it is the answer to this ticket alone
            found[number] = error
            continue
        if _cost(image, options) <= SMALL_PIXELS:
            scaled[number] = image
    for (number, image), blocks in zip(scaled.items(), variant.segment_blocks(list(scaled.values())), strict=True):
        try:
            found[number] = Found(
                variant, [_found(variant, tickets[number], tickets[number].opened.chosen[0], image, blocks)]
            )
        except Exception as error:  # it is the answer to this ticket alone
            found[number] = error
    return found


def segment_alone(model: Model, ticket: Ticket) -> Found:
    """Compute a ticket of any size, plane by plane and block by block.

    Raises:
        ImageError: A plane is damaged, or does not fit the options.
        ModelError: The options do not fit the model.
        RequestError: Nobody waits for the ticket any more.
    """
    variant = model.with_options(ticket.opened.options.prediction)
    images = []
    for chosen in ticket.opened.chosen:
        ticket.check()
        image = variant.scaled_image(ticket.opened.source(chosen))
        (blocks,) = variant.segment_blocks([image])
        images.append(_found(variant, ticket, chosen, image, blocks))
    return Found(variant, images)


def _cost(image: ScaledImage, options: SegmentOptions) -> int:
    """Return the number of pixels that the network computes."""
    return image.shape[0] * image.shape[1] * (_TURNS if options.tta else 1)


def _found(
    model: Model, ticket: Ticket, chosen: ChosenPlane, image: ScaledImage, blocks: Iterable[LabelledBlock]
) -> FoundImage:
    """Return the nuclei of an image, as `nucleus.predict.write_results` writes them."""
    frame, summary, rows = frame_of(image.source), NucleiSummary(), []
    with assembled_labels(frame.shape, Path(tempfile.gettempdir())) as labels:
        for part in measure_blocks(frame, _watched(ticket, blocks), labels):
            rows += part.rows
            summary.add(part.rows)
    row = image_row(frame, summary, labels.pixels, image, model.doubt(summary, labels.left_out))
    return FoundImage(image, frame, ticket.opened.output(chosen), labels, rows, row)


def _watched(ticket: Ticket, blocks: Iterable[LabelledBlock]) -> Iterator[LabelledBlock]:
    """Yield blocks as long as someone waits for the ticket. Raises `RequestError`."""
    for block in blocks:
        ticket.check()
        yield block
