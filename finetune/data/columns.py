"""Which column of a table holds the text or image, and which the label: as named, or guessed where it is obvious."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, near
from .dataset import Task

if TYPE_CHECKING:
    import datasets

PROSE_NAMES = ("text", "content", "document")
TEXT_NAMES = (*PROSE_NAMES, "sentence", "review", "question", "prompt", "tweet", "utterance")
LABEL_NAMES = ("label", "labels", "category", "class", "target", "intent", "fine_label")


@dataclass(frozen=True)
class Columns:
    """The columns of a task; ``content`` is the text or the image, ``label`` None for language models."""

    task: Task
    content: str
    label: str | None
    notes: list[str] = field(default_factory=list)


def is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def is_image(feature: Any) -> bool:
    import datasets

    encoded = (
        isinstance(feature, dict) and "bytes" in feature
    )  # a Parquet struct that nobody marked as an image
    return encoded or isinstance(feature, datasets.Image)


def choose(
    table: datasets.Dataset, text: str | None, image: str | None, label: str | None, task: Task | None
) -> Columns:
    """Every named column is checked and every other one guessed; raises ``ConfigError`` with all faults."""
    features, faults = dict(table.features), []
    for option, column in {"text_column": text, "image_column": image, "label_column": label}.items():
        if column is not None and column not in features:
            faults.append(
                f"dataset.{option}={column} is not a column.{near(column, features)} The columns are: {', '.join(features)}."
            )
    if text and image:
        faults.append(
            "dataset.text_column and dataset.image_column are both set. A data set has the one or the other."
        )
    for option, column, idle in (
        ("text_column", text, "image_classification"),
        ("label_column", label, "causal_lm"),
    ):
        if column and task == idle:
            faults.append(
                f"dataset.{option}={column} would not be used by dataset.task={task}. Remove one of the two."
            )
    for option, column, kind, fits in (
        ("text_column", text, "text", is_text),
        ("image_column", image, "images", is_image),
    ):
        if column in features and not fits(features[column]):
            faults.append(
                f"dataset.{option}={column} does not hold {kind}. Name another of: {', '.join(features)}."
            )
    if faults:
        raise ConfigError(*faults)
    return _complete(table, text, image, label, task)


def _complete(
    table: datasets.Dataset, text: str | None, image: str | None, label: str | None, task: Task | None
) -> Columns:
    features = dict(table.features)
    images = [image] if image else [c for c in features if is_image(features[c]) and c != label]
    if task is None and images and not text:
        task = "image_classification"
    content = text or ""
    if task == "image_classification":
        content = images[0] if len(images) == 1 else _ambiguous(table, "image", images)
    if label is None and task != "causal_lm":
        label = _one(_labels(table, content), LABEL_NAMES)
        if label is None:
            raise ConfigError(_no_label(table, task))
    if not content:
        texts = [c for c in features if is_text(features[c]) and c != label]
        content = _one(texts, PROSE_NAMES if task == "causal_lm" else TEXT_NAMES) or _ambiguous(
            table, "text", texts
        )
    task = task or "sequence_classification"
    if task == "causal_lm":
        return Columns(task, content, None, [f"Text: column {content}."])
    return Columns(
        task, content, label, [f"{'Image' if images else 'Text'}: column {content}. Label: column {label}."]
    )


def _one(found: list[str], names: tuple[str, ...]) -> str | None:
    """The only column, or the first that has one of the usual names."""
    return (
        found[0] if len(found) == 1 else next((c for name in names for c in found if c.lower() == name), None)
    )


def _labels(table: datasets.Dataset, content: str) -> list[str]:
    """Columns that could be labels: by their type, else by a usual name, else texts with few different values."""
    import datasets

    features = {c: f for c, f in table.features.items() if c != content}
    tests: list[Callable[[str, Any], bool]] = [
        lambda c, f: isinstance(f, datasets.ClassLabel),
        lambda c, f: c.lower() in LABEL_NAMES,
        lambda c, f: str(getattr(f, "dtype", "")).startswith(("int", "uint", "bool")),
        lambda c, f: is_text(f) and len(table.unique(c)) <= max(2, len(table) // 10),
    ]
    for test in tests:
        if found := [c for c, f in features.items() if test(c, f)]:
            return found
    return []


def _no_label(table: datasets.Dataset, task: Task | None) -> str:
    cure = "Name it by dataset.label_column"
    if task is None:
        cure += ", or set dataset.task=causal_lm to train on the text alone"
    if any(is_image(feature) for feature in table.features.values()):
        cure += "; images in folders need one folder per class"
    return f"No column is plainly the label among: {', '.join(table.column_names)}. {cure}."


def _ambiguous(table: datasets.Dataset, kind: str, found: list[str]) -> str:
    several, none = (
        f"Several columns could be the {kind}: {', '.join(found)}",
        f"No column holds the {kind} among: {', '.join(table.column_names)}",
    )
    raise ConfigError(f"{several if found else none}. Name it by dataset.{kind}_column.")


def names_of(table: datasets.Dataset, column: str) -> list[str]:
    """A label column as names; the empty string where a label is missing (None, or -1 of a class label)."""
    import datasets

    feature, values = table.features[column], table.data.column(column).to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        return ["" if v is None or v < 0 else feature.names[v] for v in values]
    return [
        "" if v is None else str(int(v)) if isinstance(v, float) and v.is_integer() else str(v)
        for v in values
    ]


def missing(table: datasets.Dataset, name: str, columns: Columns) -> list[str]:
    """Faults: a split without the columns, and rows without a text, an image or a label."""
    faults = []
    for column in filter(None, (columns.content, columns.label)):
        if column not in table.column_names:
            faults.append(
                f"{name} has no column {column}, which the training data has. Its columns are: {', '.join(table.column_names)}."
            )
            continue
        absent = (
            [i for i, v in enumerate(names_of(table, column)) if not v]
            if column == columns.label
            else _nulls(table, column)
        )
        if absent:
            where = f"first: row {absent[0]}, counted from 0"
            faults.append(
                f"{name}: {len(absent)} rows have nothing in column {column} ({where}). Fill or remove them."
            )
    return faults


def _nulls(table: datasets.Dataset, column: str) -> list[int]:
    cells = table.data.column(column)
    return [i for i, null in enumerate(cells.is_null().to_pylist()) if null] if cells.null_count else []
