"""Where a model fails, for its card: measured on images that training has not seen, and said in sentences."""

from collections.abc import Mapping, Sequence

from nucleus.data.kinds import Kind
from nucleus.metrics.sizes import SIZES
from nucleus.registry.markdown import paragraph, table

__all__ = ["limit_lines"]

Scores = Mapping[str, float]

_FEW_IMAGES = 5
"""Of a kind with fewer images nothing is concluded."""
_FEW_NUCLEI = 30
"""Nor of a size with fewer nuclei."""
_SIZE_TITLES = dict(zip(SIZES, ("under 12 px", "12 to 24 px", "24 to 48 px", "over 48 px"), strict=True))
_COUNTED = "nuclei_missed"
"""Runs of older versions of this package have no such metric, nor its like."""


def limit_lines(metrics: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    """Markdown on where a model fails, from its metrics by split, kind of image and name."""
    split = next((name for name in ("test", "val") if metrics.get(name, {}).get("all", {}).get("images")), None)
    if split is None:
        return ["Not measured: there were no images to test the model on."]
    found = {kind: scores for kind, scores in metrics[split].items() if scores["images"]}
    if _COUNTED not in found["all"]:
        return ["Not measured: the version of this package that trained the model did not count mistakes."]
    seen = "which training did not use" if split == "test" else "by which weights and thresholds were also chosen"
    few = [kind for kind, scores in found.items() if kind != "all" and scores["images"] < _FEW_IMAGES]
    none = [kind.value for kind in Kind if kind.value not in found]
    total = found["all"]["images"]
    return [
        *paragraph(
            f"Measured on {_count(total, 'image')} of the {split} split, {seen}. A nucleus is found if its predicted "
            "outline and the true one share at least half of the area that they cover together (IoU 0.5); one whose "
            "outline is further off counts as missed, and what was drawn in its place as extra."
        ),
        *([f"**{_count(total, 'image')}: too few to tell.**"] if total < _FEW_IMAGES else []),
        "",
        *paragraph(*_overall(found["all"]), *_weakest(found, few)),
        "",
        *_mistakes_table(found),
        "",
        *paragraph(
            "Found one for one, missed, merged and in pieces: of the true nuclei; extra: of the predicted ones. "
            "Merged: in one with a neighbour; in pieces: one nucleus as several. Count off by: nuclei, mean over "
            "images.",
            *([f"Too few images to tell (under {_FEW_IMAGES}): {', '.join(few)}."] if few else []),
            *([f"No images to tell by: {', '.join(none)}."] if none else []),
        ),
        "",
        *_by_size(found),
    ]


def _overall(scores: Scores) -> list[str]:
    """The mistakes, in sentences."""
    total = scores["nuclei_true"]
    if not total:
        return ["These images hold no nuclei."]
    sentences = [
        f"Of {_count(total, 'true nucleus', 'true nuclei')}, {_percent(_found(scores), total)} were found one for one, "
        f"{_percent(scores['nuclei_missed'], total)} were missed, {_percent(scores['nuclei_merged'], total)} came out "
        f"merged with a neighbour and {_percent(scores['nuclei_split'], total)} in pieces."
    ]
    if scores["nuclei_predicted"]:
        extra = _percent(scores["nuclei_extra"], scores["nuclei_predicted"])
        sentences.append(f"Of those that the model reports, {extra} are extra: no true nucleus matches them.")
    sentences.append(f"The count of an image is off by {scores['count_error']:.1f} nuclei on average.")
    if scores["ap_50"]:
        sentences.append(
            f"Outlines are less sure than counts: AP falls from {scores['ap_50']:.2f} at IoU 0.5 to "
            f"{scores['ap_70']:.2f} at 0.7 and {scores['ap_90']:.2f} at 0.9."
        )
    return sentences


def _weakest(found: Mapping[str, Scores], few: Sequence[str]) -> list[str]:
    """Which kind of image the model does worst on, of those with enough images."""
    scores = {kind: scores["map"] for kind, scores in found.items() if kind not in {"all", *few}}
    if len(scores) < 2:
        return []
    worst, best = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    return [f"It is weakest on **{worst}** images: mAP {scores[worst]:.2f}, against {scores[best]:.2f} on {best} ones."]


def _mistakes_table(found: Mapping[str, Scores]) -> list[str]:
    rows = []
    for kind, scores in found.items():
        total = scores["nuclei_true"]
        shares = [_percent(count, total) for count in (_found(scores), *_wrong(scores))]
        extra = _percent(scores["nuclei_extra"], scores["nuclei_predicted"])
        rows.append((kind, f"{scores['images']:.0f}", f"{total:,.0f}", *shares, extra, f"{scores['count_error']:.1f}"))
    titles = ("images", "true nuclei", "found one for one", "missed", "merged", "in pieces", "extra", "count off by")
    return table(("kind", *titles), rows)


def _by_size(found: Mapping[str, Scores]) -> list[str]:
    """Which share of the true nuclei is found, by their size."""
    overall = found["all"]
    enough = {
        title: overall[f"recall_50_{size}"]
        for size, title in _SIZE_TITLES.items()
        if overall[f"nuclei_true_{size}"] >= _FEW_NUCLEI
    }
    sentences = ["By size (diameter of the circle of the same area):"]
    if len(enough) > 1:
        worst, best = min(enough, key=enough.__getitem__), max(enough, key=enough.__getitem__)
        sentences = [
            f"By size (diameter of the circle of the same area), nuclei of {worst} are found least often: "
            f"{100 * enough[worst]:.1f} %, against {100 * enough[best]:.1f} % of those of {best}."
        ]
    rows = [(title, *(_recall(scores, size) for scores in found.values())) for size, title in _SIZE_TITLES.items()]
    return [
        *paragraph(*sentences),
        "",
        *table(("diameter", *found), rows),
        "",
        *paragraph(
            "Found (matched at IoU 0.5, also where it is merged or in pieces), of how many; where there are fewer than "
            f"{_FEW_NUCLEI}, little can be said."
        ),
    ]


def _recall(scores: Scores, size: str) -> str:
    count = scores[f"nuclei_true_{size}"]
    return f"{100 * scores[f'recall_50_{size}']:.1f} % of {count:,.0f}" if count else "none there"


def _wrong(scores: Scores) -> list[float]:
    """True nuclei missed, merged and split; each counts once."""
    return [scores[f"nuclei_{name}"] for name in ("missed", "merged", "split")]


def _found(scores: Scores) -> float:
    """True nuclei found one for one."""
    return scores["nuclei_true"] - sum(_wrong(scores))


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none there"


def _count(number: float, one: str, many: str | None = None) -> str:
    return f"{number:,.0f} {one if number == 1 else many or f'{one}s'}"
