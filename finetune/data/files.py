"""Read tables and images from local files, without writing to the user's Hugging Face cache."""

from __future__ import annotations

import atexit
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError
from ..registry import register
from .columns import is_image
from .guard import check_files
from .table import Source, Table

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Files(Table):
    """Base of the data sets in local files.

    Options:
        path: The file or the folder.
        val_path: File or folder with the validation split.
        test_path: File or folder with the test split.
    """

    path: str
    val_path: str | None = None
    test_path: str | None = None

    def resolve_paths(self) -> tuple[Path, dict[str, Path]]:
        """Return ``path``, and the other given paths by split, all absolute.

        Raises ``ConfigError`` naming every path that does not exist.
        """
        found, faults = {}, []
        for option in ("path", "val_path", "test_path"):
            given: str | None = getattr(self, option)
            if given is None:
                continue
            found[option] = Path(given).expanduser().resolve()
            if not found[option].exists():
                faults.append(f"dataset.{option}={given} does not exist. Check the path.")
        if faults:
            raise ConfigError(*faults)
        path = found.pop("path")
        return path, {option.removesuffix("_path"): other for option, other in found.items()}

    def read_tables(self, kind: str, suffixes: tuple[str, ...]) -> tuple[list[Source], list[str]]:
        """Return the tables of the given files, and notes; a folder's files are divided by their names."""
        path, others = self.resolve_paths()
        files, notes = {"train": [path]}, list[str]()
        if path.is_dir():
            files, notes = group_files(path, suffixes)
        for split, other in others.items():
            files[split] = [other]
        sources = []
        for split, group in sort_splits(files):
            name = group[0].name if len(group) == 1 else split
            sources.append(Source(split, name, read_table(kind, group, group[0])))
        return sources, notes


@register("csv")
@dataclass(frozen=True, kw_only=True)
class Csv(Files):
    """CSV or TSV with a header: a file, or a folder of files called train, val and test."""

    def sources(self) -> tuple[list[Source], list[str]]:
        return self.read_tables("csv", (".csv", ".tsv"))


@register("jsonl")
@dataclass(frozen=True, kw_only=True)
class Jsonl(Files):
    """One JSON object per line: a file, or a folder of files called train, val and test."""

    def sources(self) -> tuple[list[Source], list[str]]:
        return self.read_tables("json", (".jsonl", ".json"))


@register("parquet")
@dataclass(frozen=True, kw_only=True)
class Parquet(Files):
    """Parquet with texts or encoded images: a file, or a folder of files called train, val and test."""

    def sources(self) -> tuple[list[Source], list[str]]:
        return self.read_tables("parquet", (".parquet",))


@register("imagefolder")
@dataclass(frozen=True, kw_only=True)
class ImageFolder(Files):
    """Images in one folder per class; these may lie in folders called train, val and test."""

    def sources(self) -> tuple[list[Source], list[str]]:
        path, others = self.resolve_paths()
        folders = find_split_folders(path) | others
        faults = []
        for folder in folders.values():
            if not has_images(folder):
                faults.append(
                    f"dataset=imagefolder: {folder} has no images. "
                    "Give a folder with one folder of images per class."
                )
        if faults:
            raise ConfigError(*faults)
        sources, notes = [], []
        for split, folder in sort_splits(folders):
            table = read_table("imagefolder", [folder], folder)
            sources.append(Source(split, folder.name, table, root=folder))
            notes.append(f"{split}: the folder {folder.name}.")
        return sources, notes if len(sources) > 1 else []


def find_split_folders(root: Path) -> dict[str, Path]:
    """Return the folders in ``root`` that are called train, val and test.

    Without a train folder, ``root`` itself is train. A name must match as a whole: ``train_engine`` is a
    class.
    """
    found = {}
    for folder in _list_folders(root):
        for split, names in SPLIT_NAMES.items():
            if folder.name.lower() in names:
                found[split] = folder
    if "train" in found:
        return found
    return {"train": root}


def _list_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir())


def sort_splits(found: Mapping[str, T]) -> list[tuple[str, T]]:
    """Return the splits in ``found`` with their values, in the order train, val, test."""
    return [(split, found[split]) for split in SPLIT_NAMES if split in found]


def find_split(name: str) -> str | None:
    """Return the split that the name of a file or folder begins with, or None.

    Examples: ``train-00000-of-00002.parquet``, ``dev.csv``, ``Test``.
    """
    word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    for split, names in SPLIT_NAMES.items():
        if word in names:
            return split
    return None


def group_files(folder: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the folder's files by split, and notes; if no file name names a split, all files are train."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if not found:
        raise ConfigError(
            f"dataset.path={folder} has no {' or '.join(suffixes)} files. "
            "Give a file, or a folder that has some."
        )
    groups: dict[str, list[Path]] = {}
    unnamed = []
    for file in found:
        split = find_split(file.name)
        if split is None:
            unnamed.append(file)
        else:
            groups.setdefault(split, []).append(file)
    if not groups:
        return {"train": unnamed}, [f"train: all {len(unnamed)} files of {folder.name}."]
    if "train" not in groups:
        raise ConfigError(
            f"dataset.path={folder} has files for {' and '.join(groups)}, "
            "but none whose name begins with train. Rename one, or give the files by dataset.path, "
            "dataset.val_path and dataset.test_path."
        )
    notes = []
    for split, group in sort_splits(groups):
        notes.append(f"{split}: {', '.join(file.name for file in group)}.")
    for file in unnamed:
        notes.append(f"Left out: {file.name}, which names no split.")
    return groups, notes


def has_images(folder: Path) -> bool:
    """Tell whether there is an image file in or below ``folder``."""
    from PIL import Image

    known = set(Image.registered_extensions())
    for _, _, files in os.walk(folder):
        suffixes = {Path(file).suffix.lower() for file in files}
        if suffixes & known:
            return True
    return False


@cache
def make_scratch_folder() -> str:
    """Make a folder for tables that ``datasets`` maps into memory; it is removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="finetune-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read_table(kind: str, files: Sequence[Path], named: Path) -> Any:
    """Return a ``datasets.Dataset`` of the files, with images still encoded.

    ``kind`` is the reader of ``datasets``; errors name ``named``. Raises ``ConfigError`` if the files cannot
    be read.
    """
    import datasets

    check_files(kind, files)
    options: dict[str, Any] = {}
    if kind == "csv":  # only an empty cell counts as missing: "NA" and "null" are words
        separator = "\t" if named.suffix.lower() == ".tsv" else ","
        options = {"keep_default_na": False, "na_values": [""], "sep": separator}
    patterns = []
    for file in files:
        everything_below = "/**" if file.is_dir() else ""
        patterns.append(glob.escape(str(file)) + everything_below)
    try:
        with quiet_datasets():
            table = datasets.load_dataset(
                kind,
                data_files={"train": patterns},
                split="train",
                cache_dir=make_scratch_folder(),
                **options,
            )
            if kind != "imagefolder":
                table.data.validate(full=True)  # otherwise invalid UTF-8 raises only when a row is read
    except Exception as error:  # every parser has exceptions of its own
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{named} has no rows or cannot be read as {kind} ({reason[0]}). Check its content and format."
        ) from error
    table = keep_images_encoded(table)
    if kind != "imagefolder":
        refuse_image_paths(table, named)
    return table


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Suppress the progress bars and log lines of ``datasets``. Errors are still raised."""
    import datasets

    datasets.disable_progress_bars()
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def keep_images_encoded(table: Any) -> Any:
    """Return the table with images as bytes and paths, so that an image is decoded when its row is read."""
    import datasets

    for column in _list_image_columns(table):
        table = table.cast_column(column, datasets.Image(decode=False))
    return table


def refuse_image_paths(table: Any, named: Path) -> None:
    """Raise ``ConfigError`` if the table names images by paths, which could be any file of this machine."""
    for column in _list_image_columns(table):
        for chunk in table.data.column(column).chunks:
            if chunk.field("bytes").null_count > chunk.null_count:
                raise ConfigError(
                    f"{named} names images in column {column} by their paths. "
                    "Store the images' bytes in it, or use dataset=imagefolder."
                )


def _list_image_columns(table: Any) -> list[str]:
    return [column for column, feature in table.features.items() if is_image(feature)]
