"""Tables and images in local files, read by Hugging Face ``datasets`` without leaving anything in the user's cache."""

from __future__ import annotations

import atexit
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..registry import register
from .columns import is_image
from .guard import check
from .table import Source, Table

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@register("csv")
@dataclass(frozen=True, kw_only=True)
class Csv(Table):
    """CSV or TSV with a header: a file, or a folder of files called train, val and test.

    Options:
        path: The file or the folder.
        val_path: File or folder with the validation split.
        test_path: File or folder with the test split.
    """

    path: str
    val_path: str | None = None
    test_path: str | None = None

    def sources(self) -> tuple[list[Source], list[str]]:
        return read_tables(
            "csv",
            (".csv", ".tsv"),
            {"path": self.path, "val_path": self.val_path, "test_path": self.test_path},
        )


@register("jsonl")
@dataclass(frozen=True, kw_only=True)
class Jsonl(Table):
    """One JSON object per line: a file, or a folder of files called train, val and test.

    Options:
        path: The file or the folder.
        val_path: File or folder with the validation split.
        test_path: File or folder with the test split.
    """

    path: str
    val_path: str | None = None
    test_path: str | None = None

    def sources(self) -> tuple[list[Source], list[str]]:
        return read_tables(
            "json",
            (".jsonl", ".json"),
            {"path": self.path, "val_path": self.val_path, "test_path": self.test_path},
        )


@register("parquet")
@dataclass(frozen=True, kw_only=True)
class Parquet(Table):
    """Parquet with texts or encoded images: a file, or a folder of files called train, val and test.

    Options:
        path: The file or the folder.
        val_path: File or folder with the validation split.
        test_path: File or folder with the test split.
    """

    path: str
    val_path: str | None = None
    test_path: str | None = None

    def sources(self) -> tuple[list[Source], list[str]]:
        return read_tables(
            "parquet",
            (".parquet",),
            {"path": self.path, "val_path": self.val_path, "test_path": self.test_path},
        )


@register("imagefolder")
@dataclass(frozen=True, kw_only=True)
class ImageFolder(Table):
    """Images in one folder per class, perhaps below folders called train, val and test.

    Options:
        path: The file or the folder.
        val_path: File or folder with the validation split.
        test_path: File or folder with the test split.
    """

    path: str
    val_path: str | None = None
    test_path: str | None = None

    def sources(self) -> tuple[list[Source], list[str]]:
        roots = existing({"path": self.path, "val_path": self.val_path, "test_path": self.test_path})
        folders = split_folders(roots.pop("path")) | {
            option.removesuffix("_path"): root for option, root in roots.items()
        }
        cure = "Give a folder with one folder of images per class"
        if faults := [
            f"dataset=imagefolder: {folder} has no images. {cure}."
            for folder in folders.values()
            if not has_images(folder)
        ]:
            raise ConfigError(*faults)
        sources = [
            Source(split, folder.name, load("imagefolder", [folder], folder), folder)
            for split, folder in by_split(folders)
        ]
        return sources, [f"{source.split}: the folder {source.name}." for source in sources] if len(
            sources
        ) > 1 else []


def split_folders(root: Path) -> dict[str, Path]:
    """The folders below that are called train, val and test; without one called train, the whole is train."""
    inner = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    found = {
        split: folder
        for folder in inner
        for split, names in SPLIT_NAMES.items()
        if folder.name.lower() in names
    }  # train_engine is a class
    return found if "train" in found else {"train": root}


def by_split(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(split, found[split]) for split in SPLIT_NAMES if split in found]


def split_of(name: str) -> str | None:
    """Which split a file or folder of this name holds, if it says so: ``train-00000-of-00002.parquet``, ``dev.csv``, ``Test``."""
    word = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def existing(options: dict[str, str | None]) -> dict[str, Path]:
    """The given paths, absolute; raises ``ConfigError`` naming every one that does not exist."""
    paths = {
        option: Path(path).expanduser().resolve() for option, path in options.items() if path is not None
    }
    if faults := [
        f"dataset.{option}={options[option]} does not exist. Check the path."
        for option, path in paths.items()
        if not path.exists()
    ]:
        raise ConfigError(*faults)
    return paths


def read_tables(
    kind: str, suffixes: tuple[str, ...], options: dict[str, str | None]
) -> tuple[list[Source], list[str]]:
    """The tables of the given files; a folder's files are told apart by their names."""
    paths = existing(options)
    files, notes = (
        in_folder(paths["path"], suffixes) if paths["path"].is_dir() else ({"train": [paths["path"]]}, [])
    )
    files |= {option.removesuffix("_path"): [path] for option, path in paths.items() if option != "path"}
    named = [(split, group, group[0].name if len(group) == 1 else split) for split, group in by_split(files)]
    return [Source(split, name, load(kind, group, group[0])) for split, group, name in named], notes


def in_folder(folder: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, list[Path]], list[str]]:
    """The folder's files by split; without one called train, all of them are train."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)
    if not found:
        raise ConfigError(
            f"dataset.path={folder} has no {' or '.join(suffixes)} files. Give a file, or a folder that has some."
        )
    groups: dict[str, list[Path]] = {}
    for file in found:
        groups.setdefault(split_of(file.name) or "", []).append(file)
    unnamed = groups.pop("", [])
    if "train" not in groups:
        if groups:
            given = " and ".join(groups)
            raise ConfigError(
                f"dataset.path={folder} has files for {given}, but none called train. Name one so, or give the files singly."
            )
        return {"train": unnamed}, [f"train: all {len(unnamed)} files of {folder.name}."]
    notes = [f"{split}: {', '.join(p.name for p in group)}." for split, group in by_split(groups)]
    return groups, notes + [f"Left out: {p.name}, which names no split." for p in unnamed]


def has_images(folder: Path) -> bool:
    """Whether any image file lies below."""
    from PIL import Image

    known = set(Image.registered_extensions())
    return any(Path(file).suffix.lower() in known for _, _, files in os.walk(folder) for file in files)


@cache
def scratch() -> str:
    """A folder for the tables that ``datasets`` maps into memory, removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="finetune-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def load(kind: str, files: list[Path], named: Path) -> Any:
    """A ``datasets.Dataset`` of the files; images stay encoded. Raises ``ConfigError`` when they cannot be read as ``kind``."""
    import datasets

    check(kind, files)
    options: dict[str, Any] = {}
    if kind == "csv":  # only an empty cell is missing: "NA" and "null" are words
        options = {
            "keep_default_na": False,
            "na_values": [""],
            "sep": "\t" if named.suffix.lower() == ".tsv" else ",",
        }
    patterns = [glob.escape(str(f)) + ("/**" if f.is_dir() else "") for f in files]
    try:
        with hushed():
            table = datasets.load_dataset(
                kind, data_files={"train": patterns}, split="train", cache_dir=scratch(), **options
            )
            if kind != "imagefolder":
                table.data.validate(full=True)  # texts that are no UTF-8 would show when they are read
    except Exception as error:  # every parser has exceptions of its own
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{named} has no rows or cannot be read as {kind} ({reason[0]}). Check its content and format."
        ) from error
    return whole_images(encoded_images(table), named) if kind != "imagefolder" else encoded_images(table)


@contextmanager
def hushed() -> Iterator[None]:
    """No progress bars or log lines from ``datasets``: what goes wrong is raised."""
    import datasets

    datasets.disable_progress_bars()
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def encoded_images(table: Any) -> Any:
    """The table with every image column as bytes and path, to be decoded row by row."""
    import datasets

    for column in [c for c, feature in table.features.items() if is_image(feature)]:
        table = table.cast_column(column, datasets.Image(decode=False))
    return table


def whole_images(table: Any, named: Path) -> Any:
    """The table, if its images are in it. Raises ``ConfigError`` where they are paths, which could name any file of this machine."""
    for column in [c for c, feature in table.features.items() if is_image(feature)]:
        if any(
            chunk.field("bytes").null_count > chunk.null_count for chunk in table.data.column(column).chunks
        ):
            raise ConfigError(
                f"{named} names images in column {column} by their paths. Store the images' bytes in it, or use dataset=imagefolder."
            )
    return table
