"""Data sets of the hub. A test cannot reach the hub, so its cache is written by hand."""

import datasets
import pytest
from huggingface_hub import constants

from finetune.data.hub import Hub
from finetune.errors import ConfigError


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Write a cache with the data set someone/words, which has the splits train, validation and extra."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "cache" / "someone___words" / "default" / "0.0.0" / "0123456789abcdef"
    info = datasets.DatasetInfo(
        builder_name="csv",
        dataset_name="words",
        config_name="default",
        version="0.0.0",
        splits=datasets.SplitDict(),
    )
    for split, size in {"train": 20, "validation": 4, "extra": 2}.items():
        table = datasets.Dataset.from_dict(
            {"text": [f"{split} {i}" for i in range(size)], "label": [i % 2 for i in range(size)]}
        )
        folder.mkdir(parents=True, exist_ok=True)
        with datasets.arrow_writer.ArrowWriter(
            path=str(folder / f"words-{split}.arrow"), features=table.features
        ) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
        info.features = table.features
        info.splits[split] = datasets.SplitInfo(split, num_examples=size, dataset_name="words")
    info.write_to_directory(str(folder))


@pytest.mark.usefixtures("cached")
def test_a_cached_data_set_is_read_without_the_network(capfd):
    raw = Hub(path="someone/words").read()
    assert {split: len(rows) for split, rows in raw.splits.items()} == {"train": 16, "val": 4, "test": 4}
    assert raw.splits["val"][1] == {"id": "validation:1", "label": 1, "text": "validation 1"}
    assert "Left out: the split extra." in raw.notes
    assert capfd.readouterr() == ("", "")


def test_without_download_no_request_is_made_and_the_switches_are_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    with pytest.raises(
        ConfigError, match=r"dataset\.path=nobody/nothing is not in the local cache .*dataset\.download=true"
    ):
        Hub(path="nobody/nothing").read()
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def test_a_failed_download_is_reported(monkeypatch):
    def refuse(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"could not be read from the hub \(no network\)"):
        Hub(path="nobody/nothing", download=True).read()
