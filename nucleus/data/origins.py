"""Where the images of a dataset are from, and their licences: stated at each import, carried to the model's card."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from pydantic import BaseModel, ConfigDict, Field

from nucleus.config.recipe import CardOptions, OneLine
from nucleus.errors import RecipeError, UsageError
from nucleus.text import NOT_STATED, plural

__all__ = [
    "UNSTATED",
    "DataOrigin",
    "DataSource",
    "check_licenses",
    "described_sources",
    "licenses_text",
    "stated_origin",
]


class DataOrigin(BaseModel):
    """What was stated about the images and labels of a source when they were imported.

    Attributes:
        license: SPDX identifier or expression of their licence, such as `CC0-1.0`; None if it was not stated.
        origin: Where they are from, and how to cite them: a text or URL; None if it was not stated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    license: OneLine | None = None
    origin: OneLine | None = None


UNSTATED = DataOrigin()


class DataSource(DataOrigin):
    """A source of a dataset, and what of the dataset is from it.

    Attributes:
        name: Name of the imported folder or zip.
        images: Number of images of the dataset that are from it; None if it is unknown.
        labels: Number of images from other sources whose labels are from this one.
    """

    name: str
    images: Annotated[int, Field(ge=0)] | None
    labels: Annotated[int, Field(ge=0)] = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.amount}. Licence: {self.license or NOT_STATED}. Source: {self.origin or NOT_STATED}"

    @property
    def amount(self) -> str:
        """What is from this source, as text."""
        if self.images is None:
            return "an unknown number of images"
        labels = f"labels of {plural(self.labels, 'image')}"
        if not self.labels:
            return plural(self.images, "image")
        return f"{plural(self.images, 'image')}, {labels}" if self.images else labels


def stated_origin(license: str | None, origin: str | None) -> DataOrigin:  # noqa: A002  as the option is called
    """Return what a user states about a source.

    Args:
        license: SPDX identifier or expression, in any letter case; None to state none.
        origin: A text or URL of one line; None to state none.

    Raises:
        UsageError: The licence is not one of SPDX, or the text is empty, too long or has several lines.
    """
    try:
        known = None if license is None else str(canonicalize_license_expression(license))
    except InvalidLicenseExpression as error:
        raise UsageError(
            "Expected an identifier of SPDX (https://spdx.org/licenses) for the licence, such as CC0-1.0, CC-BY-4.0 or "
            f"CC-BY-NC-SA-4.0, or LicenseRef-NAME for one that is not listed there; found {license!r}."
        ) from error
    if origin is not None and not (origin.isprintable() and origin == origin.strip() and 0 < len(origin) <= 500):
        raise UsageError(
            f"Expected one line of at most 500 characters that says where the images are from; found {origin[:80]!r}."
        )
    return DataOrigin(license=known, origin=origin)


def described_sources(sources: Iterable[DataSource], card: CardOptions) -> list[DataSource]:
    """Return sources with what the recipe says in place of what was not stated when they were imported.

    Args:
        sources: The sources of a dataset.
        card: The recipe's statements; they are about the source `data_import` alone, if that is set.
    """
    return [
        source.model_copy(
            update={"license": source.license or card.data_license, "origin": source.origin or card.data_source}
        )
        if _is_about(card, source)
        else source
        for source in sources
    ]


def check_licenses(sources: Iterable[DataSource], card: CardOptions, dataset: str) -> None:
    """Check that the recipe and the dataset do not state different licences of the same images.

    Args:
        sources: The sources of the dataset.
        card: The recipe's statements.
        dataset: Name of the dataset in the message.

    Raises:
        RecipeError: They do.
    """
    stated = card.data_license
    for source in sources:
        if stated and source.license and _is_about(card, source) and not _same(stated, source.license):
            raise RecipeError(
                f"Expected one licence of the images of {source.name!r} in {dataset}; found {source.license!r}, stated "
                f"when they were imported, and {stated!r} in the recipe. Remove card.data_license from the recipe: the "
                "card has the licence of each source anyway. Or import the images again with the right --license."
            )


def licenses_text(sources: Sequence[DataSource]) -> str:
    """Return all licences, each with the number of images.

    >>> licenses_text([DataSource(name="a", images=3, license="CC0-1.0"), DataSource(name="b", images=1)])
    'CC0-1.0 (3 images), not stated (1 image)'
    """
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for source in sources:
        amounts = found[source.license or NOT_STATED]
        amounts[0] += source.images or 0
        amounts[1] += source.labels
    return ", ".join(f"{name} ({_amount(*amounts)})" for name, amounts in found.items())


def _amount(images: int, labels: int) -> str:
    return DataSource(name="", images=images, labels=labels).amount


def _is_about(card: CardOptions, source: DataSource) -> bool:
    """Return whether the recipe's statements about data are about a source."""
    return card.data_import is None or card.data_import in {source.name, source.name.rpartition(".")[0]}


def _same(first: str, second: str) -> bool:
    """Return whether two licences are the same; those of recipes may be written in any way."""
    return first.casefold().replace(" ", "-") == second.casefold().replace(" ", "-")
