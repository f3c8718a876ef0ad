"""Find the columns of a table that hold the text or image and the label.

The user names them; otherwise they are guessed from the types and the names of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ConfigError, suggest_nearest
from .dataset import Task

if TYPE_CHECKING:
    import datasets

PROSE_NAMES = ("text", "content", "document")
TEXT_NAMES = (*PROSE_NAMES, "sentence", "review", "question", "prompt", "tweet", "utterance")
LABEL_NAMES = ("label", "labels", "category", "class", "target", "intent", "fine_label")


@dataclass(frozen=True)
class Columns:
    """The columns of a task: ``content`` is the text or the image; ``label`` is None for language models."""

    task: Task
    content: str
    label: str | None
    notes: list[str] = field(default_factory=list)


def is_text(feature: Any) -> bool:
    """Tell whether a column with this feature holds text."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def is_image(feature: Any) -> bool:
    """Tell whether a column with this feature holds images; a Parquet struct with bytes counts as one."""
    import datasets

    has_bytes = isinstance(feature, dict) and "bytes" in feature
    return has_bytes or isinstance(feature, datasets.Image)


def choose_columns(
    table: datasets.Dataset, text: str | None, image: str | None, label: str | None, task: Task | None
) -> Columns:
    """Return the named columns after checking them, and guess those that are not named.

    Raises ``ConfigError`` with every fault of the named columns, or if a column cannot be guessed.
    """
    features = dict(table.features)
    names = ", ".join(features)
    faults = []
    for option, column in {"text_column": text, "image_column": image, "label_column": label}.items():
        if column is not None and column not in features:
            faults.append(
                f"dataset.{option}={column} is not a column.{suggest_nearest(column, features)} "
                f"The columns are: {names}."
            )
    if text and image:
        faults.append(
            f"dataset.text_column={text} and dataset.image_column={image} are both set, but a data set has "
            "either texts or images. Remove one of the two."
        )
    if text and task == "image_classification":
        faults.append(_explain_unused("text_column", text, task))
    if label and task == "causal_lm":
        faults.append(_explain_unused("label_column", label, task))
    if text in features and not is_text(features[text]):
        faults.append(f"dataset.text_column={text} does not hold text. Choose another of: {names}.")
    if image in features and not is_image(features[image]):
        faults.append(f"dataset.image_column={image} does not hold images. Choose another of: {names}.")
    if faults:
        raise ConfigError(*faults)
    return _guess_rest(table, text, image, label, task)


def _explain_unused(option: str, column: str, task: Task) -> str:
    return f"dataset.{option}={column} would not be used by dataset.task={task}. Remove one of the two."


def _guess_rest(
    table: datasets.Dataset, text: str | None, image: str | None, label: str | None, task: Task | None
) -> Columns:
    images = [image] if image else _list_columns(table, is_image, label)
    if task is None and images and not text:
        task = "image_classification"
    content = text or ""
    if task == "image_classification":
        content = _find_one(images) or _refuse(table, "image", images)
    if label is None and task != "causal_lm":
        label = _find_one(_list_label_candidates(table, content), LABEL_NAMES)
        if label is None:
            raise ConfigError(_explain_no_label(table, task))
    if not content:
        texts = _list_columns(table, is_text, label)
        usual = PROSE_NAMES if task == "causal_lm" else TEXT_NAMES
        content = _find_one(texts, usual) or _refuse(table, "text", texts)
    if task == "causal_lm":
        return Columns(task, content, None, [f"Text: column {content}."])
    kind = "Image" if images else "Text"
    notes = [f"{kind}: column {content}. Label: column {label}."]
    return Columns(task or "sequence_classification", content, label, notes)


def _list_columns(table: datasets.Dataset, fits: Callable[[Any], bool], without: str | None) -> list[str]:
    """Return the columns whose feature fits, except the column ``without``."""
    return [column for column, feature in table.features.items() if fits(feature) and column != without]


def _find_one(candidates: Sequence[str], usual: Sequence[str] = ()) -> str | None:
    """Return the only candidate, or the first that has one of the usual names, or None."""
    if len(candidates) == 1:
        return candidates[0]
    for name in usual:
        for column in candidates:
            if column.lower() == name:
                return column
    return None


def _list_label_candidates(table: datasets.Dataset, content: str) -> list[str]:
    """Return the columns that could hold the label, by the first criterion that at least one column meets.

    The criteria are, in this order: a ``ClassLabel`` feature; a usual name; integers or booleans; texts with
    few different values, if a further column holds the text or image.
    """
    import datasets

    declared, usual, integers = [], [], []
    for column, feature in table.features.items():
        if column == content:
            continue
        if isinstance(feature, datasets.ClassLabel):
            declared.append(column)
        if column.lower() in LABEL_NAMES:
            usual.append(column)
        if str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool")):
            integers.append(column)
    found = declared or usual or integers
    texts = _list_columns(table, is_text, content)
    if not found and (content or len(texts) > 1):
        for column in texts:
            if len(table.unique(column)) <= max(2, len(table) // 10):
                found.append(column)
    return found


def _explain_no_label(table: datasets.Dataset, task: Task | None) -> str:
    cure = "Name it with dataset.label_column"
    if task is None:
        cure += ", or set dataset.task=causal_lm to train on the text alone"
    if any(map(is_image, table.features.values())):
        cure += "; images in folders need one folder per class"
    return f"It is not clear which column is the label among: {', '.join(table.column_names)}. {cure}."


def _refuse(table: datasets.Dataset, kind: str, candidates: Sequence[str]) -> NoReturn:
    """Raise ``ConfigError``: no column holds the text or image, or several could."""
    fault = f"None of these columns holds the {kind}: {', '.join(table.column_names)}"
    if candidates:
        fault = f"Several columns could be the {kind}: {', '.join(candidates)}"
    raise ConfigError(f"{fault}. Name it with dataset.{kind}_column.")


def read_label_names(table: datasets.Dataset, column: str) -> list[str]:
    """Return the name of each row's label; the empty string if the label is missing (None, or class -1)."""
    import datasets

    feature, values = table.features[column], table.data.column(column).to_pylist()
    if isinstance(feature, datasets.ClassLabel):
        return ["" if value is None or value < 0 else feature.names[value] for value in values]
    return list(map(_show_label, values))


def _show_label(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def find_missing(table: datasets.Dataset, name: str, columns: Columns) -> list[str]:
    """Return the faults of a split: columns that it lacks, and rows without a text, an image or a label."""
    faults = []
    for column in (columns.content, columns.label):
        if column is None:
            continue
        if column not in table.column_names:
            faults.append(
                f"{name} has no column {column}, which the training data has. "
                f"Its columns are: {', '.join(table.column_names)}. Rename one of them."
            )
            continue
        if column == columns.label:
            empty = [place for place, label in enumerate(read_label_names(table, column)) if not label]
        else:
            empty = _find_nulls(table, column)
        if empty:
            faults.append(
                f"{name}: {len(empty)} rows have no value in column {column} "
                f"(first: row {empty[0]}, counted from 0). Fill or remove them."
            )
    return faults


def _find_nulls(table: datasets.Dataset, column: str) -> list[int]:
    cells = table.data.column(column)
    if not cells.null_count:
        return []
    return [place for place, is_null in enumerate(cells.is_null().to_pylist()) if is_null]
