"""Data sets in local files: every reader returns what was written into the files."""

import io
import json
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetune.data.files import Csv, ImageFolder, Jsonl, Parquet
from finetune.errors import ConfigError

ROWS = [{"text": f"text {i}", "category": "even" if i % 2 == 0 else "odd"} for i in range(40)]


def write_csv(path, rows, separator=","):
    path.write_text(
        "\n".join(separator.join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)])
    )
    return str(path)


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def png(shade):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def all_rows(raw):
    return [row for rows in raw.splits.values() for row in rows]


def test_one_csv_is_divided_and_every_row_keeps_its_text_and_label(tmp_path):
    raw = Csv(path=write_csv(tmp_path / "a.csv", ROWS)).read()
    assert raw.task == "sequence_classification"
    assert raw.labels == ("even", "odd")
    assert {split: len(rows) for split, rows in raw.splits.items()} == {"train": 28, "val": 4, "test": 8}
    assert "Text: column text. Label: column category." in raw.notes
    for row in all_rows(raw):
        i = int(row["id"].removeprefix("a.csv:"))
        assert (row["text"], raw.labels[row["label"]]) == (ROWS[i]["text"], ROWS[i]["category"])
    assert len({row["id"] for row in all_rows(raw)}) == 40
    for rows in raw.splits.values():
        assert Counter(row["label"] for row in rows)[0] == len(rows) / 2


def test_only_the_split_seed_moves_rows(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS)
    ids = [[row["id"] for row in Csv(path=path, split_seed=seed).read().splits["test"]] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(("share", "folds"), [(0.5, 2), (0.25, 4)])
def test_folds_are_tested_once_each(tmp_path, share, folds):
    path = write_csv(tmp_path / "a.csv", ROWS)
    raws = [Csv(path=path, test_share=share, fold=fold).read() for fold in range(folds)]
    tests = [{row["id"] for row in raw.splits["test"]} for raw in raws]
    assert sum(map(len, tests)) == len(set.union(*tests)) == len(ROWS)
    assert all(
        not tests[i] & {row["id"] for split in ("train", "val") for row in raw.splits[split]}
        for i, raw in enumerate(raws)
    )
    with pytest.raises(ConfigError, match=rf"dataset.fold={folds}: .* has the folds 0 to {folds - 1}"):
        Csv(path=path, test_share=share, fold=folds).read()
    with pytest.raises(ConfigError, match="the test split is given"):
        Csv(path=path, test_path=path, fold=1).read()


def test_given_files_are_the_splits_and_only_the_missing_ones_are_drawn(tmp_path):
    train, test = write_csv(tmp_path / "x.csv", ROWS), write_csv(tmp_path / "y.csv", ROWS[:6])
    raw = Csv(path=train, test_path=test, val_share=0.25).read()
    assert {split: len(rows) for split, rows in raw.splits.items()} == {"train": 30, "val": 10, "test": 6}
    assert [row["id"] for row in raw.splits["test"]] == [f"y.csv:{i}" for i in range(6)]
    raw = Csv(path=train, val_path=test, test_path=test).read()
    assert {split: len(rows) for split, rows in raw.splits.items()} == {"train": 40, "val": 6, "test": 6}


def test_a_folder_of_named_files_is_read_by_its_names(tmp_path):
    for name, rows in {
        "train-0.csv": ROWS[:20],
        "train-1.csv": ROWS[20:],
        "dev.csv": ROWS[:4],
        "Test.csv": ROWS[4:10],
        "notes.csv": ROWS,
    }.items():
        write_csv(tmp_path / name, rows)
    raw = Csv(path=str(tmp_path)).read()
    assert {split: len(rows) for split, rows in raw.splits.items()} == {"train": 40, "val": 4, "test": 6}
    assert "Left out: notes.csv, which names no split." in raw.notes


def test_words_that_look_missing_are_words_and_tabs_separate_tsv(tmp_path):
    rows = [
        {"text": word, "label": label} for word in ("NA", "null", "None", "nan") for label in ("null", "x")
    ]
    raw = Csv(path=write_csv(tmp_path / "a.tsv", rows, "\t")).read()
    assert sorted(row["text"] for row in all_rows(raw)) == sorted(row["text"] for row in rows)
    assert raw.labels == ("null", "x")


def test_numbers_as_labels_are_in_the_order_of_numbers(tmp_path):
    raw = Jsonl(
        path=write_jsonl(tmp_path / "a.jsonl", [{"words": "w", "y": i % 12} for i in range(48)])
    ).read()
    assert raw.labels == tuple(map(str, range(12)))
    assert all(row["label"] == int(row["id"].split(":")[1]) % 12 for row in all_rows(raw))


def test_jsonl_as_text_for_a_language_model(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)])
    raw = Jsonl(path=path, task="causal_lm", text_column="answer", length=32).read()
    assert (raw.task, raw.labels, raw.length) == ("causal_lm", (), 32)
    assert {row["text"] for row in all_rows(raw)} == {f"a{i}" for i in range(20)}
    assert all("label" not in row for row in all_rows(raw))


def test_images_inside_parquet(tmp_path):
    table = pa.table(
        {"image": [{"bytes": png(i), "path": None} for i in range(20)], "label": [i % 2 for i in range(20)]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    raw = Parquet(path=str(tmp_path / "a.parquet")).read()
    assert raw.task == "image_classification"
    for row in all_rows(raw):
        shade = row["image"].getpixel((0, 0))[0]
        assert (row["id"], row["label"]) == (f"a.parquet:{shade}", shade % 2)


def image_tree(root, classes=("cat", "test_tube", "train_engine"), each=4):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"train_{i}.png").write_bytes(png(10 * c + i))
    return str(root)


def test_one_folder_per_class_whatever_the_classes_are_called(tmp_path):
    raw = ImageFolder(path=image_tree(tmp_path / "odd [1] name")).read()
    assert raw.labels == ("cat", "test_tube", "train_engine")
    assert sum(map(len, raw.splits.values())) == 12
    for row in all_rows(raw):
        name, file = row["id"].split("/")
        assert row["image"].getpixel((0, 0))[0] == 10 * raw.labels.index(name) + int(file[6])
        assert raw.labels[row["label"]] == name


def test_folders_called_train_and_test_are_the_splits(tmp_path):
    image_tree(tmp_path / "train")
    image_tree(tmp_path / "test", each=2)
    raw = ImageFolder(path=str(tmp_path), val_share=0.25).read()
    assert {split: len(rows) for split, rows in raw.splits.items()} == {"train": 9, "val": 3, "test": 6}
    assert raw.splits["test"][0]["id"] == "cat/train_0.png"


def test_nothing_is_left_in_the_users_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Csv(path=write_csv(tmp_path / "a.csv", ROWS)).read()
    assert not (tmp_path / "cache").exists()


def test_nothing_is_printed(tmp_path, capfd):
    Csv(path=write_csv(tmp_path / "a.csv", ROWS)).read()
    with pytest.raises(ConfigError):
        Jsonl(path=str(tmp_path / "a.csv")).read()
    assert capfd.readouterr() == ("", "")


def test_a_damaged_image_is_named_when_it_is_read(tmp_path):
    path = image_tree(tmp_path / "images")
    (tmp_path / "images/cat/train_1.png").write_bytes(png(1)[:50])
    rows = all_rows_lazily(ImageFolder(path=path).read())
    with pytest.raises(ConfigError, match=r"The image cat/train_1\.png of the data set cannot be read"):
        list(rows)


def all_rows_lazily(raw):
    return (row for rows in raw.splits.values() for row in rows)


def faults(dataset):
    with pytest.raises(ConfigError) as caught:
        dataset.read()
    return caught.value.faults


def test_paths_that_do_not_exist_are_all_named():
    found = faults(Csv(path="nowhere.csv", test_path="neither.csv"))
    assert found == (
        "dataset.path=nowhere.csv does not exist. Check the path.",
        "dataset.test_path=neither.csv does not exist. Check the path.",
    )


def test_columns_that_do_not_exist_are_all_named(tmp_path):
    found = faults(Csv(path=write_csv(tmp_path / "a.csv", ROWS), text_column="txt", label_column="categry"))
    assert found == (
        "dataset.text_column=txt is not a column. Did you mean 'text'? The columns are: text, category.",
        "dataset.label_column=categry is not a column. "
        "Did you mean 'category'? The columns are: text, category.",
    )


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"a": f"x{i}", "b": f"y{i}"} for i in range(9)],
            {},
            "It is not clear which column is the label among: a, b",
        ),
        (
            [{"a": f"x{i}", "b": f"y{i}", "label": i % 2} for i in range(9)],
            {},
            "Several columns could be the text: a, b",
        ),
        ([{"text": "x", "label": "same"}] * 9, {}, "has only the label 'same'"),
        (
            [{"text": "x", "label": i % 2 or ""} for i in range(9)],
            {},
            r"5 rows have no value in column label \(first: row 0",
        ),
        (
            [{"text": "x" if i else "", "label": i % 2} for i in range(9)],
            {},
            r"1 rows have no value in column text \(first: row 0",
        ),
        (
            [{"text": "x", "label": i % 2} for i in range(9)],
            {"image_column": "text"},
            "image_column=text does not hold images",
        ),
        (
            [{"text": "the same text"} for _ in range(9)],  # few different values, but the only text
            {},
            "set dataset.task=causal_lm to train on the text alone",
        ),
        (
            [{"text": "x", "label": i % 2} for i in range(9)],
            {"text_column": "label"},
            "text_column=label does not hold text",
        ),
        (
            [{"text": "x", "label": i % 2} for i in range(9)],
            {"task": "image_classification"},
            "None of these columns holds the image: text, label",
        ),
        (
            [{"text": "x", "label": i % 2} for i in range(9)],
            {"task": "causal_lm", "label_column": "label"},
            "label_column=label would not be used",
        ),
        (
            [{"text": "x", "label": i % 2} for i in range(4)],
            {"test_share": 0.8},
            "Lower dataset.val_share=0.1 and dataset.test_share=0.8",
        ),
    ],
)
def test_faults_of_a_table(tmp_path, rows, options, message):
    with pytest.raises(ConfigError, match=message):
        Csv(path=write_csv(tmp_path / "a.csv", rows), **options).read()


def test_labels_that_train_lacks_are_named(tmp_path):
    test = write_csv(tmp_path / "t.csv", [*ROWS[:3], {"text": "x", "category": "prime"}])
    found = faults(Csv(path=write_csv(tmp_path / "a.csv", ROWS), test_path=test))
    assert found == (
        "The test split (t.csv) has labels that the train split lacks: prime. Make the splits' labels agree.",
    )


def test_a_split_without_the_column_is_named(tmp_path):
    test = write_csv(tmp_path / "t.csv", [{"text": "x", "other": "even"}])
    assert (
        "t.csv has no column category"
        in faults(Csv(path=write_csv(tmp_path / "a.csv", ROWS), test_path=test))[0]
    )


def test_files_that_hold_nothing_or_something_else(tmp_path):
    (tmp_path / "header.csv").write_text("text,label\n")
    assert "has no rows" in faults(Csv(path=str(tmp_path / "header.csv")))[0]
    (tmp_path / "empty.csv").write_text("")
    assert "cannot be read as csv" in faults(Csv(path=str(tmp_path / "empty.csv")))[0]
    (tmp_path / "noise.parquet").write_bytes(os.urandom(100))
    assert "cannot be read as parquet" in faults(Parquet(path=str(tmp_path / "noise.parquet")))[0]
    assert "has no .jsonl or .json files" in faults(Jsonl(path=str(tmp_path)))[0]


def test_a_folder_with_no_images(tmp_path):
    (tmp_path / "readme.txt").write_text("none")
    assert (
        "has no images. Give a folder with one folder of images per class."
        in faults(ImageFolder(path=str(tmp_path)))[0]
    )
    (tmp_path / "flat.png").write_bytes(png(1))
    assert "images in folders need one folder per class" in faults(ImageFolder(path=str(tmp_path)))[0]


def test_a_split_whose_labels_are_all_hidden_is_left_out(tmp_path):
    features = {
        "info": {
            "features": {
                "text": {"dtype": "string", "_type": "Value"},
                "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
            }
        }
    }
    for name, labels in {"train": [0, 1] * 10, "test": [-1] * 5}.items():
        table = pa.table({"text": ["x"] * len(labels), "label": labels})
        pq.write_table(
            table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / f"{name}.parquet"
        )
    raw = Parquet(path=str(tmp_path)).read()
    assert raw.labels == ("no", "yes")
    assert {split: len(rows) for split, rows in raw.splits.items()} == {"train": 14, "val": 2, "test": 4}
    assert "The given test split (test.parquet) has no labels and is left out." in raw.notes


def test_jsonl_with_invalid_utf8_is_refused(tmp_path):
    """Arrow's JSON reader accepts any bytes as text, so the texts are validated after reading."""
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "good \x99", "label": "a"}\n{"text": "bad", "label": "b"}\n' * 20
    )
    with pytest.raises(ConfigError, match="cannot be read as json"):
        Jsonl(path=str(tmp_path / "a.jsonl")).read()
