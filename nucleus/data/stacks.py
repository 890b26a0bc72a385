"""Images of several planes: times and depths of one field, each plane with all its channels."""

from collections.abc import Callable
from dataclasses import dataclass

from nucleus.data.pixel_files import PixelFile

__all__ = ["Stack"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """An image of T times and Z depths, whose planes are read one at a time.

    A file that holds several images gives several stacks. An image of one plane is a stack of one time and one depth.

    Attributes:
        name: Name of the image in messages and tables; what follows the name of its file tells the images of one file
            apart.
        times: Number of times, T.
        depths: Number of depths, Z.
        plane: Function from a time and a depth, each from 0, to that plane. Its shape, type and channels are those of
            every plane.
        channels: Names of the channels, in order; empty if they have none.
    """

    name: str
    times: int
    depths: int
    plane: Callable[[int, int], PixelFile]
    channels: tuple[str, ...] = ()
