"""Summary at the top of the report: the model, its scores, its cost, and caveats."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from nucleus.data.dataset import DatasetManifest
from nucleus.data.samples import SPLITS
from nucleus.metrics.scores import Scores, amount, found_one_for_one
from nucleus.registry.manifest import before_and_after
from nucleus.runs.record import RunRecord
from nucleus.text import KINDS, SPLIT_NAMES, count, moment_text, percent, plural, score_text, seconds_between, time_text

__all__ = ["Headline", "Summary", "cost_of", "restarts_of", "scored_split", "summarize", "workers_of"]

_FEW_IMAGES = 20
_FEW_OF_KIND = 5
_HEADLINES = (
    ("map", "mAP", "how well nuclei are found and outlined: mean of AP over loose to strict matching"),
    ("ap_50", "AP.5", "nuclei found, if outlines need to overlap by half only"),
    ("iou", "IoU", "overlap of the predicted and the true area of all nuclei"),
    ("dice", "Dice", "the same overlap, as the Dice coefficient"),
)


@dataclass(frozen=True)
class Headline:
    """A score in large type."""

    value: str
    name: str
    meaning: str


@dataclass(frozen=True)
class Summary:
    """The top of the page.

    Attributes:
        title: Model and version, or model and run.
        split: Split of the headlines; None if no split was scored.
        headlines: The most important scores.
        sentence: The result in the words of a biologist.
        facts: Pairs of term and text.
        warnings: Caveats.
    """

    title: str
    split: str | None
    headlines: list[Headline]
    sentence: str
    facts: list[tuple[str, str]]
    warnings: list[str]


def scored_split(record: RunRecord) -> str | None:
    """Return the split that the model is judged on: test, or else validation; None if neither was scored."""
    for split in ("test", "val"):
        if record.metrics.get(split, {}).get("all", {}).get("images"):
            return split
    return None


def summarize(record: RunRecord, dataset: DatasetManifest) -> Summary:
    """Return the summary of a run."""
    split = scored_split(record)
    scores = record.metrics[split]["all"] if split else {}
    named = f"{record.model}, version {record.version}"
    return Summary(
        title=named if record.version is not None else f"{record.model}, run {record.run}",
        split=split and SPLIT_NAMES[split],
        headlines=[
            Headline(score_text(value, digits=3), name, meaning)
            for key, name, meaning in _HEADLINES
            if (value := scores.get(key)) is not None
        ],
        sentence=_sentence(split, scores),
        facts=_facts(record, dataset),
        warnings=_warnings(record, dataset, split),
    )


def cost_of(record: RunRecord) -> str:
    """Return the GPU-seconds and core-seconds of all workers, as text."""
    cores = f"{count(record.cpu_seconds)} CPU-core-seconds ({record.cpu_seconds / 3600:.2f} core-hours)"
    if not record.gpus_per_worker:
        return f"0 GPU-seconds; {cores}"
    return f"{count(record.gpu_seconds)} GPU-seconds ({record.gpu_seconds / 3600:.2f} GPU-hours); {cores}"


def workers_of(record: RunRecord) -> str:
    """Return the number of workers and its changes during the run, as text."""
    counted = [(int(entry["epoch"]), int(entry["workers"])) for entry in record.history if "workers" in entry]
    changes = [
        f"{before} to {after} in epoch {epoch}" for (_, before), (epoch, after) in pairwise(counted) if before != after
    ]
    said = f"{plural(record.workers, 'worker')}{', each' if record.workers > 1 else ''} on {record.device}"
    return f"{said}; their number changed from {', from '.join(changes)}" if changes else said


def restarts_of(record: RunRecord) -> list[str]:
    """Return, for each restart of the workers, when it was and what it cost, as text."""
    said = []
    for attempt, same_driver in record.restarts:
        when = f"after {plural(attempt.epochs_done, 'epoch')}" if attempt.epochs_done else "in the first epoch"
        cost = f"{time_text(attempt.lost)} from the last checkpoint to the next step"
        said.append(f"{when}: {cost}" if same_driver else f"{when}, the run was resumed: {cost}, pauses included")
    return said


def _sentence(split: str | None, scores: Scores) -> str:
    if split is None:
        return "This run was scored on no images, so the quality of its model is unknown."
    seen = "that it had not seen in training" if split == "test" else "of the validation split, which selected it"
    images = f"{plural(amount(scores, 'images'), 'image')} {seen}"
    if scores.get("nuclei_true") == 0:
        outlined = plural(amount(scores, "nuclei_predicted"), "nucleus", "nuclei")
        return f"In {images}, there is no nucleus, so the scores are undefined. The model outlined {outlined} there."
    found = found_one_for_one(scores)
    if found is not None:
        return f"In {images}, {_mistakes(scores, found)}"
    matched = _matched(scores)
    if matched is None:
        return f"The scores are for {images}."
    true, predicted = amount(scores, "nuclei_true"), amount(scores, "nuclei_predicted")
    return (
        f"In {images}, the model found {count(matched)} of {plural(true, 'nucleus', 'nuclei')}"
        f" ({percent(matched, true, digits=0)}). Of the {plural(predicted, 'nucleus', 'nuclei')} that it outlined, "
        f"{count(predicted - matched)} did not match a true one."
    )


def _mistakes(scores: Scores, found: float) -> str:
    """Return the nuclei found and the mistakes, as text; the numbers of true nuclei add up."""
    true = amount(scores, "nuclei_true")
    missed, merged, split = (amount(scores, f"nuclei_{name}") for name in ("missed", "merged", "split"))
    text = (
        f"the model found {count(found)} of {plural(true, 'nucleus', 'nuclei')} ({percent(found, true, digits=0)}) one "
        f"for one; it missed {count(missed)}, merged {count(merged)} with a neighbour and split {count(split)}."
    )
    if "nuclei_extra" in scores and "nuclei_predicted" in scores:
        outlined = plural(amount(scores, "nuclei_predicted"), "nucleus", "nuclei")
        extra = plural(amount(scores, "nuclei_extra"), "is", "are")
        text += f" Of the {outlined} that it outlined, {extra} extra: no true nucleus matches."
    return text


def _matched(scores: Scores) -> float | None:
    """Return the number of nuclei matched at IoU 0.5; None if unknown.

    It follows from F1 = 2 * matched / (true + predicted).
    """
    f1, true, predicted = (scores.get(key) for key in ("pooled_f1_50", "nuclei_true", "nuclei_predicted"))
    return None if f1 is None or true is None or predicted is None else round(f1 * (true + predicted) / 2)


def _facts(record: RunRecord, dataset: DatasetManifest) -> list[tuple[str, str]]:
    train = dataset.split_samples("train")
    seconds = seconds_between(record.begun, record.ended)
    facts = [
        ("Run", record.run),
        (
            "Trained on",
            f"{plural(len(train), 'image')} with {plural(train.nuclei, 'nucleus', 'nuclei')} ({dataset.name})",
        ),
        *((title.capitalize(), text) for title, text in before_and_after(record, "map").items()),
        ("Ended (UTC)", moment_text(record.ended)),
        ("Duration", "not known" if seconds is None else time_text(seconds)),
        ("Machine", workers_of(record)),
        ("Cost", cost_of(record)),
        *([("Restarts", "; ".join(restarts_of(record)))] if record.restarts else []),
        ("Published", _published(record)),
    ]
    if record.group:
        facts.insert(1, ("Part of", record.group))
    return facts


def _published(record: RunRecord) -> str:
    version = "no" if record.version is None else f"as {record.model}@{record.version}"
    return f"{version}; {record.gate}" if record.gate else version


def _warnings(record: RunRecord, dataset: DatasetManifest, split: str | None) -> list[str]:
    found = []
    if record.encoder_weights.source == "none":
        found.append("Trained without pretrained encoder weights, with which a model is usually better.")
    if split != "test":
        why = "This dataset has no test split" if not dataset.split_samples("test") else "The test split was not scored"
        found.append(f"{why}: the quality of the model on new images is unknown.")
    found += _few(record.metrics.get("test", {}))
    if record.version is None:
        found.append("Not published: this model has no version.")
    if record.commit and record.commit.endswith("-dirty"):
        found.append("The code had uncommitted changes, so the run cannot be repeated exactly.")
    empty = [SPLIT_NAMES[name] for name in SPLITS if name != "test" and not dataset.split_samples(name)]
    found += [f"The {name} split is empty." for name in empty]
    return found


def _few(by_kind: Mapping[str, Scores]) -> list[str]:
    """Return warnings about scores from few images."""
    images = by_kind.get("all", {}).get("images")
    if not images:
        return []
    if by_kind["all"].get("nuclei_true") == 0:
        return ["No test image has a nucleus: the quality of the model on new images is unknown."]
    if images < _FEW_IMAGES:
        return [f"Few test images ({count(images)}): the scores may be off by several hundredths."]
    few = {kind: scores.get("images") or 0 for kind, scores in by_kind.items() if kind != "all"}
    return [
        f"Few test images of the kind {KINDS.get(kind, kind)} ({count(number)}): its scores are unreliable."
        for kind, number in few.items()
        if number < _FEW_OF_KIND
    ]
