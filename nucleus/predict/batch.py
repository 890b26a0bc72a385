"""Predict a batch of images that lie in a bucket, and write there what they leave."""

import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from nucleus.errors import ImageError, ObjectNotFoundError
from nucleus.predict.images import write_image
from nucleus.predict.inputs import LABELS_ENDING, OVERLAY_ENDING
from nucleus.predict.parts import new_part
from nucleus.predict.predictor import LabelledBlock, Predictor
from nucleus.predict.sources import channel_count, open_source
from nucleus.predict.stored import ImageOutcome, PredictionSettings, StoredImage
from nucleus.predict.view import NetworkView
from nucleus.storage.bucket import Bucket
from nucleus.storage.uri import parse_uri

__all__ = ["BatchPredictor"]


@dataclass(frozen=True)
class _Work:
    """An image with the folder that it is worked on in."""

    image: StoredImage
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"image{PurePosixPath(self.image.key).suffix}"

    @property
    def part(self) -> Path:
        return self.folder / "nuclei.parquet"


class BatchPredictor:
    """Predicts batches of images.

    Args:
        settings: Where the images are and where their results go.
        predictor: Of the settings' model and options.
    """

    def __init__(self, settings: PredictionSettings, predictor: Predictor) -> None:
        self._settings = settings
        self._predictor = predictor
        self._images = Bucket(parse_uri(settings.images))
        self._out = Bucket(parse_uri(settings.out))

    def predict(self, images: Sequence[StoredImage]) -> list[ImageOutcome]:
        """Predict a batch; images that cannot be read are told, and the others go on.

        Raises:
            StorageError: The bucket cannot be read or written.
        """
        with tempfile.TemporaryDirectory(prefix="nucleus-batch-") as temporary, ThreadPoolExecutor() as pool:
            works = [_Work(image, Path(temporary) / str(number)) for number, image in enumerate(images)]
            fetched = list(pool.map(self._fetch, works))
            opened = [
                self._view(work) if failure is None else failure for work, failure in zip(works, fetched, strict=True)
            ]
            segmented = self._predictor.segment([view for view in opened if isinstance(view, NetworkView)])
            uploads: list[Future[None]] = []
            outcomes = [
                ImageOutcome(work.image.key, failure=found)
                if isinstance(found, str)
                else self._write(work, found, next(segmented), pool, uploads)
                for work, found in zip(works, opened, strict=True)
            ]
            for upload in uploads:
                upload.result()
        return outcomes

    def _fetch(self, work: _Work) -> str | None:
        """Bring an image here; a message if it is gone."""
        try:
            self._images.download(work.image.key, work.file)
        except ObjectNotFoundError as error:
            return str(error)
        return None

    def _view(self, work: _Work) -> NetworkView | str:
        """An image as the network sees it, or a message."""
        try:
            source = replace(open_source(work.file, self._settings.channel), name=work.image.key)
            return self._predictor.view(source)
        except ImageError as error:
            return self._told(error, work)

    def _write(
        self,
        work: _Work,
        view: NetworkView,
        blocks: Iterable[LabelledBlock],
        pool: Executor,
        uploads: list[Future[None]],
    ) -> ImageOutcome:
        """Write an image's files and begin to upload them."""
        try:
            with new_part(work.part, channel_count(work.file)) as part:
                row = write_image(self._predictor, view, blocks, work.folder / "image", part)
                part.set_image(row)
        except ImageError as error:  # a part of a large image may be damaged
            return ImageOutcome(work.image.key, failure=self._told(error, work))
        uploads.append(pool.submit(self._upload, work))
        return ImageOutcome(work.image.key, row["nuclei"])

    def _upload(self, work: _Work) -> None:
        """Upload an image's files; last the part, with which it is done."""
        for ending in (LABELS_ENDING, OVERLAY_ENDING):
            self._out.put(f"{work.image.stem}{ending}", work.folder / f"image{ending}")
        self._out.put(self._settings.part(work.image), work.part)

    def _told(self, error: ImageError, work: _Work) -> str:
        return str(error).replace(str(work.file), str(self._images.uri / work.image.key))
