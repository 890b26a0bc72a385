"""What stands at the top of the page: whose it is, how good, and what to be careful about."""

from collections.abc import Mapping
from dataclasses import dataclass

from nucleus.data.dataset import SPLITS, DatasetManifest
from nucleus.report.tables import found_of
from nucleus.runs.record import RunRecord
from nucleus.text import KINDS, SPLIT_NAMES, count, date_of, duration, plural, score, seconds_between

__all__ = ["Headline", "Summary", "cost_of", "scored_split", "summarize"]

_FEW_IMAGES = 20
_FEW_OF_KIND = 5
_HEADLINES = (
    ("map", "mAP", "how well nuclei are found and outlined, from loose to exact"),
    ("ap_50", "AP.5", "nuclei found, where half an overlap is enough"),
    ("iou", "IoU", "overlap of all nuclei's area with the truth"),
    ("dice", "Dice", "the same overlap, as Dice counts it"),
)


@dataclass(frozen=True)
class Headline:
    """A number that is read first."""

    value: str
    name: str
    meaning: str


@dataclass(frozen=True)
class Summary:
    """The top of the page.

    Attributes:
        title: Model and version, or run.
        split: Which split the headlines are of; None if no split was scored.
        headlines: The numbers.
        sentence: The result as a biologist would say it.
        facts: Term and text.
        warnings: What to be careful about.
    """

    title: str
    split: str | None
    headlines: list[Headline]
    sentence: str
    facts: list[tuple[str, str]]
    warnings: list[str]


def scored_split(record: RunRecord) -> str | None:
    """The split by which the model is judged: the test split, or else the validation split; None without either."""
    for split in ("test", "val"):
        if record.metrics.get(split, {}).get("all", {}).get("images"):
            return split
    return None


def summarize(record: RunRecord, dataset: DatasetManifest) -> Summary:
    """The top of the page of a run."""
    split = scored_split(record)
    scores = record.metrics[split]["all"] if split else {}
    named = f"{record.model}, version {record.version}"
    return Summary(
        title=named if record.version is not None else f"{record.model}, run {record.run}",
        split=split and SPLIT_NAMES[split],
        headlines=[Headline(score(scores, key), name, meaning) for key, name, meaning in _HEADLINES if key in scores],
        sentence=_sentence(split, scores),
        facts=_facts(record, dataset),
        warnings=_warnings(record, dataset, split),
    )


def cost_of(record: RunRecord) -> str:
    """What the run held, in GPU-seconds and core-seconds."""
    cores = f"{count(record.cpu_seconds)} CPU-core-seconds ({record.cpu_seconds / 3600:.2f} core-hours)"
    if not record.gpus_per_worker:
        return f"0 GPU-seconds; {cores}"
    return f"{count(record.gpu_seconds)} GPU-seconds ({record.gpu_seconds / 3600:.2f} GPU-hours); {cores}"


def _sentence(split: str | None, scores: Mapping[str, float]) -> str:
    if split is None:
        return "This run was scored on no images: nothing is known of how good its model is."
    seen = "that it had not seen in training" if split == "test" else "of the validation split, by which it was chosen"
    images = f"{plural(scores['images'], 'image')} {seen}"
    found = found_of(scores)
    if found is None:
        return f"The scores are of {images}."
    matched, true, predicted = found
    part = f" ({matched / true:.0%})" if true else ""
    return (
        f"In {images} the model found {count(matched)} of {plural(true, 'nucleus', 'nuclei')}{part}. "
        f"Of its {plural(predicted, 'outline')}, {count(predicted - matched)} match no single true nucleus."
    )


def _facts(record: RunRecord, dataset: DatasetManifest) -> list[tuple[str, str]]:
    train = dataset.split_samples("train")
    trained = (
        f"{plural(len(train), 'image')} with {count(sum(sample.nuclei for sample in train))} nuclei ({dataset.name})"
    )
    seconds = seconds_between(record.begun, record.ended)
    facts = [
        ("Run", record.run),
        ("Trained on", trained),
        ("Ended", date_of(record.ended)),
        ("Duration", "not known" if seconds is None else duration(seconds)),
        ("Machine", f"{plural(record.workers, 'worker')}, each on {record.device}"),
        ("Cost", cost_of(record)),
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
        found.append("Trained without pretrained encoder weights: with them a model is usually better.")
    if split != "test":
        why = "This dataset has no test split" if not dataset.split_samples("test") else "The test split was not scored"
        found.append(f"{why}: how good the model is on new images is not known.")
    found += _few(record.metrics.get("test", {}))
    if record.version is None:
        found.append("Not published: this model has no version.")
    if record.commit and record.commit.endswith("-dirty"):
        found.append("The code had changes that are in no commit, so the run cannot be repeated exactly.")
    empty = [SPLIT_NAMES[name] for name in SPLITS if name != "test" and not dataset.split_samples(name)]
    found += [f"The {name} split is empty." for name in empty]
    return found


def _few(by_kind: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Remarks on scores that rest on few images."""
    images = by_kind.get("all", {}).get("images", 0)
    if not images:
        return []
    if images < _FEW_IMAGES:
        return [f"Few test images ({count(images)}): the scores may be off by several hundredths."]
    few = {kind: scores.get("images", 0) for kind, scores in by_kind.items() if kind != "all"}
    return [
        f"Few test images of the kind {KINDS.get(kind, kind)} ({count(number)}): its scores mean little."
        for kind, number in few.items()
        if number < _FEW_OF_KIND
    ]
