"""Read data sets that are tables: find the columns, and divide the rows into splits.

The registered classes in ``files.py`` and ``hub.py`` find the tables; ``columns.py`` finds the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

from annotated_types import Ge, Gt, Lt

from ..errors import ConfigError
from .columns import Columns, choose_columns, find_missing, read_label_names
from .dataset import Dataset, Example, Raw, Task
from .splits import cut_stretches, spread_classes

if TYPE_CHECKING:
    import datasets

Share = Annotated[float, Gt(0), Lt(1)]
LISTED = 5  # number of labels that a message names


@dataclass(frozen=True)
class Source:
    """A table that was given for one split.

    ``name``: part of the ids of its examples. ``root``: the folder of the images, if images are files.
    """

    split: str
    name: str
    table: datasets.Dataset
    root: Path | None = None

    def __str__(self) -> str:
        return f"{self.split} split ({self.name})"


@dataclass(frozen=True, kw_only=True)
class Table(Dataset):
    """Base of the data sets that are tables.

    Options:
        text_column: Column with the text; ``null`` takes the only one with text, or one with a usual name.
        image_column: Column with the image; ``null`` takes the only one with images.
        label_column: Column with the label; ``null`` finds it by its type and its name.
        task: The kind of task; ``null`` infers it from the columns.
        val_share: Share of the training rows that becomes the validation split, if none is given.
        test_share: Share of the training rows that becomes the test split, if none is given.
        split_seed: Seed for drawing these rows. The seed of the run does not move a row between splits.
        fold: Number of the part of the rows, in the order that ``split_seed`` draws, that is the test split.
            With a test share of 0.5 there are folds 0 and 1, with 0.2 folds 0 to 4.
        length: Tokens in one example; ``null`` takes the limit of the tokenizer, at most 1,024.
    """

    text_column: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    task: Task | None = None
    val_share: Share = 0.1
    test_share: Share = 0.2
    split_seed: Annotated[int, Ge(0)] = 0
    fold: Annotated[int, Ge(0)] = 0
    length: Annotated[int, Ge(2)] | None = None

    def sources(self) -> tuple[list[Source], list[str]]:
        """Return the given tables, train first, and notes."""
        raise NotImplementedError

    def read(self) -> Raw:
        """Read and check the tables. If val or test is not given, draw it from train."""
        sources, notes = self.sources()
        empty = [source for source in sources if not len(source.table)]
        if empty:
            raise ConfigError(
                *[f"The data set's {source} has no rows. Give one that has some." for source in empty]
            )
        columns = choose_columns(
            sources[0].table, self.text_column, self.image_column, self.label_column, self.task
        )
        sources, dropped = drop_unlabelled(sources, columns)
        faults = []
        for source in sources:
            faults += find_missing(source.table, source.name, columns)
        if faults:
            raise ConfigError(*faults)
        labels, numbers = number_labels(sources, columns)
        splits, drawn = self.divide(sources, columns, numbers)
        return Raw(columns.task, labels, splits, [*notes, *columns.notes, *dropped, *drawn], self.length)

    def divide(
        self, sources: list[Source], columns: Columns, numbers: dict[str, list[int]]
    ) -> tuple[dict[str, Sequence[Example]], list[str]]:
        """Return the examples of each split, and notes; val and test are drawn from train if not given."""
        given = {}
        for source in sources:
            given[source.split] = TableExamples(source, columns, numbers.get(source.split))
        train = given["train"]
        sizes = {}
        for split, share in (("val", self.val_share), ("test", self.test_share)):
            if split not in given:
                sizes[split] = max(1, round(share * len(train)))
        rest = len(train) - sum(sizes.values())
        if rest < max(1, len(set(train.labels))):
            raise ConfigError(
                f"Of {len(train)} rows of {train.name}, {' and '.join(sizes)} leave {max(0, rest)} "
                f"to train on. Lower dataset.val_share={self.val_share} "
                f"and dataset.test_share={self.test_share}."
            )
        order = self._move_fold(spread_classes(train.labels, self.split_seed), sizes.get("test"))
        stretches = cut_stretches(order, [rest, *sizes.values()])
        splits: dict[str, Sequence[Example]] = dict(given)
        for split, places in zip(["train", *sizes], stretches, strict=True):
            splits[split] = train.pick(places)
        drawn = f"drawn with dataset.split_seed={self.split_seed}"
        if self.fold:
            drawn += f" fold={self.fold}"
        notes = []
        for split, size in sizes.items():
            notes.append(f"{split}: {size} of the {len(train)} rows of {train.name}, {drawn}.")
        return {split: splits[split] for split in ("train", "val", "test")}, notes

    def _move_fold(self, order: list[int], test_size: int | None) -> list[int]:
        """Rotate ``order`` so that the fold's stretch of ``test_size`` rows comes last.

        ``test_size`` is None if the test split is given. Raises ``ConfigError`` if there is no such fold.
        """
        folds = len(order) // test_size if test_size else 1
        if self.fold >= folds:
            fault = "the test split is given, so there is only fold 0. Leave dataset.fold out."
            if test_size:
                fault = f"a test split of {test_size} of {len(order)} rows has the folds 0 to {folds - 1}. "
                fault += "Choose one of them."
            raise ConfigError(f"dataset.fold={self.fold}: {fault}")
        end = len(order) - self.fold * (test_size or 0)
        return [*order[end:], *order[:end]]


class TableExamples(Sequence[Example]):
    """Rows of a table as examples, read on access. ``chosen``: the positions of the rows; by default all."""

    def __init__(
        self, source: Source, columns: Columns, labels: list[int] | None, chosen: Sequence[int] | None = None
    ) -> None:
        self.source, self.columns, self.name = source, columns, source.name
        self.table = source.table.select_columns([columns.content])
        self.table_labels = labels
        self.chosen = range(len(self.table)) if chosen is None else chosen
        self.labels = [0] * len(self.chosen)
        if labels is not None:
            self.labels = [labels[place] for place in self.chosen]

    def pick(self, chosen: Sequence[int]) -> TableExamples:
        """Return only the rows of the table at these positions."""
        return TableExamples(self.source, self.columns, self.table_labels, chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | Sequence[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        example: Example = {"id": f"{self.name}:{self.chosen[i]}"}
        if self.table_labels is not None:
            example["label"] = self.labels[i]
        value = self.table[self.chosen[i]][self.columns.content]
        if self.columns.task != "image_classification":
            return {**example, "text": value}
        if self.source.root is not None:
            example["id"] = Path(value["path"]).relative_to(self.source.root).as_posix()
        return {**example, "image": decode_image(value, example["id"])}


def decode_image(value: dict[str, Any], name: str) -> Any:
    """Return the PIL image of a cell, turned upright as its EXIF data say."""
    import datasets

    try:
        content = value["bytes"] or Path(value["path"]).read_bytes()
        return datasets.Image().decode_example({"bytes": content, "path": None})
    except (
        Exception
    ) as error:  # PIL raises many kinds of errors for damaged files and for images of absurd size
        raise ConfigError(
            f"The image {name} of the data set cannot be read ({error}). Replace or remove it."
        ) from error


def drop_unlabelled(sources: list[Source], columns: Columns) -> tuple[list[Source], list[str]]:
    """Leave out val and test splits without any label; return the remaining sources, and notes.

    Benchmarks that keep their test labels secret publish such splits.
    """
    if columns.label is None:
        return sources, []
    kept, notes = [], []
    for source in sources:
        has_column = columns.label in source.table.column_names
        if source.split == "train" or not has_column or any(read_label_names(source.table, columns.label)):
            kept.append(source)
        else:
            notes.append(f"The given {source} has no labels and is left out.")
    return kept, notes


def number_labels(sources: list[Source], columns: Columns) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Return the names of the labels, and each row's label number for every given split.

    Both are empty for language models. Raises ``ConfigError`` if train has a single label, or if another
    split has labels that train lacks.
    """
    import datasets

    if columns.label is None:
        return (), {}
    names = {source.split: read_label_names(source.table, columns.label) for source in sources}
    declared = sources[0].table.features[columns.label]
    if isinstance(declared, datasets.ClassLabel):
        labels = list(declared.names)
    else:
        labels = sorted(set(names["train"]), key=_sort_naturally)
    faults = []
    if len(set(names["train"])) < 2:
        faults.append(
            f"Column {columns.label} has only the label {names['train'][0]!r} in {sources[0].name}. "
            "Classification needs at least two: give other data, or another dataset.label_column."
        )
    for source in sources[1:]:
        unknown = sorted(set(names[source.split]) - set(labels), key=_sort_naturally)
        if unknown:
            shown = ", ".join(unknown[:LISTED])
            if len(unknown) > LISTED:
                shown += ", ..."
            faults.append(
                f"The {source} has labels that the train split lacks: {shown}. Make the splits' labels agree."
            )
    if faults:
        raise ConfigError(*faults)
    number_of = {label: number for number, label in enumerate(labels)}
    numbers = {}
    for split, column in names.items():
        numbers[split] = [number_of[name] for name in column]
    return tuple(labels), numbers


def _sort_naturally(label: str) -> tuple[int, float, str]:
    """Return a sort key: numbers come first, by size, and then words in alphabetical order."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label
