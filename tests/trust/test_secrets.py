"""What the environment and the repository hold stays there.

No file of a run says it, W&B's own included, nor does any message.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from finetune.errors import ConfigError, make_printable

from .world import RUN, call

PLANTED = {
    "HF_TOKEN": "hf_plantedTokenOfTheHub0123456789",
    "HUGGING_FACE_HUB_TOKEN": "hf_plantedOlderToken0123456789ab",
    "WANDB_API_KEY": "0123456789abcdefplantedapikey0123456789a",
    "AWS_SECRET_ACCESS_KEY": "plantedAws/0123456789",
    "OPENAI_API_KEY": "sk-planted0123456789",
    "SOME_VALUE": "planted-value-of-the-environment",
}
ADDRESS = "https://somebody:plantedPassword@git.example.org/private-project.git"
WORDS = [*PLANTED.values(), "plantedPassword", "private-project"]


@pytest.fixture
def secret(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place in a git repository with a password in its remote, and an environment of secrets."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(place / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for command in (["init", "-q"], ["remote", "add", "origin", ADDRESS]):
        subprocess.run(
            ["git", *command], cwd=place, check=True, env={**os.environ, "GIT_CONFIG_NOSYSTEM": "1"}
        )
    return place


def holding(folder: Path) -> list[tuple[str, str]]:
    """The files below that hold a planted word, and the word."""
    found = []
    for file in folder.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            found += [(str(file), word) for word in WORDS if word.encode() in data]
    return found


@pytest.mark.processes
def test_no_file_of_a_run_holds_a_secret(secret: Path) -> None:
    """With W&B offline: everything that would be sent lies in its folder."""
    config = [
        "--config",
        RUN / "config.yaml",
        "name=second",
        "logger.name=wandb",
        "train.steps=2",
        "train.save_every=1",
    ]
    said = call("train", *config, folder=secret)
    assert said.code == 0, said
    run = secret / "outputs" / "second" / "run"
    assert list(run.glob("wandb/*/*.wandb"))
    assert holding(secret / "outputs") == []
    assert not any(word in said.out + said.err for word in WORDS)


@pytest.mark.processes
def test_wandb_receives_neither_machine_nor_user(secret: Path) -> None:
    said = call(
        "train",
        "--config",
        RUN / "config.yaml",
        "name=second",
        "logger.name=wandb",
        "train.steps=2",
        folder=secret,
    )
    assert said.code == 0, said
    files = {file.name for file in (secret / "outputs" / "second" / "run" / "wandb").rglob("*")}
    assert not files & {"wandb-metadata.json", "requirements.txt", "diff.patch", "conda-environment.yaml"}
    recorded = b"".join(file.read_bytes() for file in (secret / "outputs").rglob("*.wandb"))
    host = os.uname().nodename.encode()
    assert (
        bytes([len(host)]) + host not in recorded
    )  # as a protocol buffer holds text: a short name alone may stand there by chance


@pytest.mark.processes
@pytest.mark.parametrize(
    "word",
    [
        "run=${oc.env:SOME_VALUE}",
        "name=x-${oc.env:HF_TOKEN}",
        "model.path=${oc.env:HF_TOKEN}",
        "seed=${oc.env:SOME_VALUE}",
    ],
)
def test_no_message_holds_a_secret(secret: Path, word: str) -> None:
    for command in ("show", "train", *([] if word.startswith("run=") else ["sweep"])):
        said = call(command, word, folder=secret)
        assert said.code == 2
        assert "no environment variables" in said.err
        assert not any(secret in said.out + said.err for secret in WORDS)


def test_addresses_lose_their_passwords() -> None:
    with pytest.raises(ConfigError) as caught:
        raise ConfigError(f"dataset.path={ADDRESS} does not exist.")
    assert "plantedPassword" not in str(caught.value)
    assert caught.value.faults == (
        "dataset.path=https://***@git.example.org/private-project.git does not exist.",
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ünï 一 🙂", "plain, ünï 一 🙂"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("two\nlines\tand\r", "two lines and "),
        ("\u202egnp", "\\u202egnp"),
        ("\x9b31m\x07\x7f\0", "\\x9b31m\\x07\\x7f\\x00"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_is_shown_is_letters(text: str, shown: str) -> None:
    assert make_printable(text) == shown


def test_long_messages_lose_their_middle() -> None:
    shown = make_printable("a" * 5000 + "b" * 5000)
    assert len(shown) < 2100
    assert shown.startswith("aaa")
    assert shown.endswith("bbb")


def test_log_and_result_hold_no_escape_codes(place: Path) -> None:
    rows = "".join(f"a {'cat' if i % 2 else 'dog'} sat {i},\x1b[31m{i % 2}\n" for i in range(30))
    (place / "data.csv").write_text("text,label\n" + rows)
    said = call("train", "--config", RUN / "config.yaml", "name=third", "train.steps=2", folder=place)
    assert said.code == 0, said
    run = place / "outputs" / "third" / "run"
    for text in (
        said.out,
        said.err,
        (run / "log.txt").read_text(),
        (run / "result.json").read_text(),
        (run / "config.yaml").read_text(),
    ):
        assert "\x1b" not in text
    assert json.loads((run / "delta" / "delta.json").read_text())["labels"] == [
        "\x1b[31m0",
        "\x1b[31m1",
    ]  # the data's own names, kept as they are
