"""Data sets that are tables: which column is what, which row belongs to which split.

Where the tables lie is told by the registered classes in ``files.py`` and ``hub.py``; columns are guessed in ``columns.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

from annotated_types import Ge, Gt, Lt

from ..errors import ConfigError
from .columns import Columns, choose, missing, names_of
from .dataset import Dataset, Raw, Row, Task
from .splits import cut, spread

if TYPE_CHECKING:
    import datasets

Share = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True)
class Source:
    """The table that was given as one split. ``name`` stands in its rows' ids; ``root`` is the folder of images that are files."""

    split: str
    name: str
    table: datasets.Dataset
    root: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Table(Dataset):
    """Base of the data sets that are tables.

    Options:
        text_column: Column with the text; ``null`` takes the column with a usual name.
        image_column: Column with the image; ``null`` takes the only one with images.
        label_column: Column with the label; ``null`` takes the column with a usual name.
        task: What is learned; ``null`` infers it from the columns.
        val_share: Share of the training rows that becomes the validation split, if none is given.
        test_share: Share of the training rows that becomes the test split, if none is given.
        split_seed: Seed that draws these rows. The seed of the run does not move a row between splits.
        fold: Which part of the rows, in the order that ``split_seed`` draws, is the test split. With a test share
            of 0.5 there are folds 0 and 1, with 0.2 folds 0 to 4.
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
        """The given tables, train first, and notes."""
        raise NotImplementedError

    def read(self) -> Raw:
        sources, notes = self.sources()
        if empty := [source for source in sources if not len(source.table)]:
            raise ConfigError(
                *(
                    f"The data set's {source.split} split ({source.name}) has no rows. Give one that has."
                    for source in empty
                )
            )
        columns = choose(sources[0].table, self.text_column, self.image_column, self.label_column, self.task)
        sources, dropped = unlabelled(sources, columns)
        if faults := [fault for source in sources for fault in missing(source.table, source.name, columns)]:
            raise ConfigError(*faults)
        labels, numbers = number(sources, columns)
        splits, drawn = self.divide(sources, columns, numbers)
        return Raw(columns.task, labels, splits, [*notes, *columns.notes, *dropped, *drawn], self.length)

    def divide(
        self, sources: list[Source], columns: Columns, numbers: dict[str, list[int]]
    ) -> tuple[dict[str, Sequence[Row]], list[str]]:
        """Rows by split; val and test are drawn from train where they were not given."""
        given = {source.split: Rows(source, columns, numbers.get(source.split)) for source in sources}
        train = given["train"]
        shares = {
            split: share
            for split, share in (("val", self.val_share), ("test", self.test_share))
            if split not in given
        }
        sizes = {split: max(1, round(share * len(train))) for split, share in shares.items()}
        rest = len(train) - sum(sizes.values())
        if rest < max(1, len(set(train.labels))):
            taken = " and ".join(sizes)
            raise ConfigError(
                f"Of {len(train)} rows, {taken} leave {max(0, rest)} to train on. Lower dataset.val_share and dataset.test_share."
            )
        order = self._turned(spread(train.labels, self.split_seed), sizes.get("test"))
        parts = dict(zip(["train", *sizes], cut(order, rest, *sizes.values()), strict=True))
        splits: dict[str, Sequence[Row]] = {
            **given,
            **{split: train.pick(part) for split, part in parts.items()},
        }
        drawn = (
            f"of the {len(train)} rows of {train.name}, drawn with dataset.split_seed={self.split_seed}"
            + (f" fold={self.fold}" if self.fold else "")
        )
        notes = [f"{split}: {size} {drawn}." for split, size in sizes.items()]
        return {split: splits[split] for split in ("train", "val", "test")}, notes

    def _turned(self, order: list[int], size: int | None) -> list[int]:
        """``order`` with the fold's stretch of ``size`` at its end. Raises ``ConfigError`` where there is no such fold."""
        folds = len(order) // size if size else 1
        if self.fold >= folds:
            why = (
                f"a test split of {size} of {len(order)} rows has the folds 0 to {folds - 1}"
                if size
                else "the test split is given"
            )
            raise ConfigError(f"dataset.fold={self.fold}: {why}. Choose one of them, or leave it out.")
        return [
            *order[len(order) - self.fold * (size or 0) :],
            *order[: len(order) - self.fold * (size or 0)],
        ]


class Rows(Sequence[Row]):
    """Rows of a table, read when asked for."""

    def __init__(
        self, source: Source, columns: Columns, labels: list[int] | None, chosen: Sequence[int] | None = None
    ) -> None:
        self.source, self.columns, self.name = source, columns, source.name
        self.table = source.table.select_columns([columns.content])
        self.numbers = labels
        self.chosen = range(len(self.table)) if chosen is None else chosen
        self.labels = [labels[i] for i in self.chosen] if labels is not None else [0] * len(self.chosen)

    def pick(self, chosen: Sequence[int]) -> Rows:
        """Only these rows of the table."""
        return Rows(self.source, self.columns, self.numbers, chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | Sequence[Row]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row: Row = {"id": f"{self.name}:{self.chosen[i]}"}
        if self.numbers is not None:
            row["label"] = self.labels[i]
        value = self.table[self.chosen[i]][self.columns.content]
        if self.columns.task != "image_classification":
            return {**row, "text": value}
        if self.source.root is not None:
            row["id"] = Path(value["path"]).relative_to(self.source.root).as_posix()
        return {**row, "image": decoded(value, row["id"])}


def decoded(value: dict[str, Any], name: str) -> Any:
    """The PIL image of a cell, upright."""
    import datasets

    try:
        content = value["bytes"] or Path(value["path"]).read_bytes()
        return datasets.Image().decode_example({"bytes": content, "path": None})
    except Exception as error:  # PIL's decoders raise many kinds for damaged files, and one of its own for images of absurd size
        raise ConfigError(
            f"The image {name} of the data set cannot be read ({error}). Replace or remove it."
        ) from error


def unlabelled(sources: list[Source], columns: Columns) -> tuple[list[Source], list[str]]:
    """Without the given val or test splits that have no label at all, as benchmarks with hidden labels publish them."""
    if columns.label is None:
        return sources, []
    bare = [
        s
        for s in sources
        if s.split != "train"
        and columns.label in s.table.column_names
        and not any(names_of(s.table, columns.label))
    ]
    return [s for s in sources if s not in bare], [
        f"The given {s.split} split ({s.name}) has no labels and is left out." for s in bare
    ]


def number(sources: list[Source], columns: Columns) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """The labels' names, and each given split's labels as their numbers."""
    import datasets

    if columns.label is None:
        return (), {}
    names = {source.split: names_of(source.table, columns.label) for source in sources}
    declared = sources[0].table.features[columns.label]
    labels = (
        list(declared.names)
        if isinstance(declared, datasets.ClassLabel)
        else sorted(set(names["train"]), key=_natural)
    )
    faults = []
    if len(set(names["train"])) < 2:
        faults.append(
            f"Column {columns.label} has only the label {names['train'][0]!r} in {sources[0].name}. Classification needs at least two."
        )
    for source in sources[1:]:
        if unseen := sorted(set(names[source.split]) - set(labels), key=_natural):
            known = f"{', '.join(unseen[:5])}{', ...' if len(unseen) > 5 else ''}"
            faults.append(
                f"The {source.split} split ({source.name}) has labels that train has not: {known}. Make the splits' labels agree."
            )
    if faults:
        raise ConfigError(*faults)
    of = {label: i for i, label in enumerate(labels)}
    return tuple(labels), {split: [of[name] for name in column] for split, column in names.items()}


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers by size before words by letter."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label
