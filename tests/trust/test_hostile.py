"""Files that a stranger made: refused in words, with nothing run, nothing followed and nothing written.

Each spoils one file of a good run and renews its manifest, as a stranger would.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.storage import manifest

from .world import RUN, Said, call, listing

GIB = 2**20  # of ru_maxrss, in kB
EXPLODED = Path(tempfile.gettempdir()) / f"exploded-{os.getpid()}"
Spoil = Callable[[Path], None]


class Bomb:
    """A pickle of it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def bomb(file: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(EXPLODED)))


def torch_bomb(file: Path) -> None:
    torch.save({"weight": Bomb(EXPLODED)}, file)


def header(text: str | bytes, length: int | None = None, body: bytes = b"") -> Spoil:
    data = text.encode() if isinstance(text, str) else text
    return lambda file: (
        file.write_bytes(struct.pack("<Q", len(data) if length is None else length) + data + body) and None
    )


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def hole(file: Path) -> None:
    """A hundred gigabytes that are nowhere, claimed by a header that fits them."""
    text = json.dumps({"a": entry("F32", (25 * 10**9,), (0, 10**11))}).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + 10**11)


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Spoil:
    """The stored tensors, changed and saved again."""

    def spoil(file: Path) -> None:
        save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)

    return spoil


def each(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(
        lambda stored: {name: change(t.clone()) if name.endswith(end) else t for name, t in stored.items()}
    )


def _set(tensor: torch.Tensor, place: int, value: float) -> torch.Tensor:
    tensor.view(-1)[place] = value
    return tensor


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def link_to(target: str) -> Spoil:
    def spoil(file: Path) -> None:
        elsewhere = file.parents[3] / f"elsewhere-{file.name}" if target == "copy" else Path(target)
        if target == "copy":
            shutil.copy(file, elsewhere)
        file.unlink()
        file.symlink_to(elsewhere)

    return spoil


TENSORS: dict[str, Spoil] = {
    "pickle": bomb,
    "torch's pickle": torch_bomb,
    "empty": lambda file: os.truncate(file, 0),
    "header of 2^60 bytes": header("{}", 2**60),
    "header of 10^9 bytes": header("{}", 10**9, bytes(10**8)),
    "10^9 elements": header(json.dumps({"a": entry("F32", (10**9,), (0, 4 * 10**9))})),
    "10^9 elements in 8 bytes": header(json.dumps({"a": entry("F32", (10**9,), (0, 8))}), body=bytes(8)),
    "huge numbers": header(json.dumps({"a": entry("F32", (2**62,) * 8, (0, 8))}), body=bytes(8)),
    "overlapping": header(json.dumps({"a": entry(), "b": entry(offsets=(4, 12))}), body=bytes(12)),
    "named twice": header(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}', body=bytes(8)),
    "negative": header(json.dumps({"a": entry("F32", (-2, -1))}), body=bytes(8)),
    "unknown type": header(json.dumps({"a": entry("O")}), body=bytes(8)),
    "offsets of text": header(
        json.dumps({"a": {"dtype": "F32", "shape": "2", "data_offsets": "08"}}), body=bytes(8)
    ),
    "NaN header": header('{"a": NaN}'),
    "deep header": header("[" * 100_000),
    "list header": header("[1, 2]"),
    "a million names": header(
        "{" + ",".join(f'"{i}":{json.dumps(entry("F32", (0,), (0, 0)))}' for i in range(10**6)) + "}"
    ),
    "a hole": hole,
    "pipe": pipe,
    "folder": folder,
    "link out": link_to("copy"),
    "link to a device": link_to("/dev/zero"),
    "other names": tensors(lambda stored: {f"../../{name}": t for name, t in stored.items()}),
    "other shapes": tensors(lambda stored: {name: torch.zeros(3) for name in stored}),
}
VALUES: dict[str, Spoil] = {
    "NaN": each("values", lambda t: _set(t, 0, float("nan"))),
    "values of a matrix": each("values", lambda t: t.view(1, -1)),
    "values of whole numbers": each("values", lambda t: t.long()),
    "starts below 0": each("starts", lambda t: _set(t, 0, -5)),
    "starts beyond": each("starts", lambda t: t * 2**40),
    "starts that fall": each("starts", lambda t: t.flip(0)),
    "starts of fractions": each("starts", lambda t: t.float()),
    "gaps beyond": each("gaps", lambda t: torch.full_like(t, 127)),
    "gaps of nothing": each("gaps", lambda t: torch.zeros_like(t)),
    "gaps unfinished": each("gaps", lambda t: torch.full_like(t, 255)),
}
JSON: dict[str, Spoil] = {
    "pickle": bomb,
    "depth": lambda file: file.write_text('{"a":' * 100_000) and None,
    "closed depth": lambda file: file.write_text("[" * 900 + "]" * 900) and None,
    "40 MB": lambda file: file.write_text("[" + "0," * 20_000_000 + "0]") and None,
    "sparse size": lambda file: os.truncate(file, 10**11),
    "list": lambda file: file.write_text("[]") and None,
    "nothing": lambda file: file.write_text("") and None,
    "NaN": lambda file: file.write_text(re.sub(r": \d", ": NaN", file.read_text())) and None,
    "bytes": lambda file: file.write_bytes(b"\xff\xfe\x00{") and None,
    "pipe": pipe,
    "folder": folder,
    "link out": link_to("copy"),
    "link to a device": link_to("/dev/zero"),
    "a format to come": lambda file: (
        file.write_text(json.dumps({**json.loads(file.read_text()), "format": 10**30})) and None
    ),
}
WRONG: list[Any] = ["x", None, -1, 10**30, 0.5, True, [], {}, [[[]]], [None], {"a": {"a": {}}}, [{"a": "b"}]]


def wrong_types(file: Path) -> list[Spoil]:
    """Each value of a JSON file in turn replaced by each of other kinds."""

    def spoil(key: str, value: Any) -> Spoil:
        return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), key: value})) and None

    return [spoil(key, value) for key in json.loads(file.read_text()) for value in WRONG]


def bombs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join([*lines, *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels))])


def appended(text: str) -> Spoil:
    return lambda file: file.write_text(f"{file.read_text()}\n{text}\n") and None


def changed(old: str, new: str) -> Spoil:
    def spoil(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return spoil


def doubling(levels: int) -> str:
    return "\n".join(
        ["x0: aaaaaaaaaaaaaaaa", *(f"x{i}: ${{x{i - 1}}}${{x{i - 1}}}" for i in range(1, levels))]
    )


YAML: dict[str, Spoil] = {
    "pickle": bomb,
    "tag that runs": appended("x: !!python/object/apply:os.system [touch EXPLODED]"),
    "tag of a module": appended("x: !!python/module:os"),
    "a name of bytes": changed("method:", "!!binary method:"),
    "tag in place": changed("seed: 0", "seed: !!python/object/new:os.system [touch EXPLODED]"),
    "billion laughs": appended(bombs(9)),
    "laughs at itself": appended("x: &x [*x]"),
    "10 MB": appended("# " + "x" * 10 * 2**20),
    "10 MB of keys": appended("\n".join(f"k{i}: {i}" for i in range(700_000))),
    "as large as may be": appended("\n".join(f"k{i}: {i}" for i in range(4_000))),
    "depth": appended("x: " + "[" * 10_000 + "]" * 10_000),
    "depth by lines": appended("x:\n" + "\n".join(" " * i + "- " for i in range(1, 400))),
    "_target_": appended("_target_: os.system"),
    "_target_ inside": changed("model:", "model:\n  _target_: os.system"),
    "environment": changed("seed: 0", "seed: ${oc.env:PLANTED}"),
    "environment in a name": changed("run: run", "run: ${oc.env:PLANTED}"),
    "environment hidden": changed("run: run", "run: ${oc.decode:${oc.env:PLANTED}}"),
    "environment escaped": changed("run: run", "run: \\${oc.env:PLANTED}"),
    "made settings": appended("x: ${oc.create:{a: b}}"),
    "doubling": appended(doubling(40)),
    "doubling lists": appended(
        "y0: [x, x]\n" + "\n".join(f"y{i}: ['${{y{i - 1}}}', '${{y{i - 1}}}']" for i in range(1, 40))
    ),
    "circle": changed("run: run", "run: ${run}"),
    "merge keys": appended("z: {<<: {name: 1}}"),
    "list": lambda file: file.write_text("- a") and None,
    "word": lambda file: file.write_text("hello") and None,
    "nothing": lambda file: file.write_text("") and None,
    "bytes": lambda file: file.write_bytes(b"\xff\xfe\x00\x01") and None,
    "name out": changed("name: first", "name: ../../first"),
    "model of a device": changed("path: model", "path: /dev"),
    "data of a device": changed("path: data.csv", "path: /dev/zero"),
    "data of a pickle": changed("path: data.csv", "path: model/model.safetensors"),
    "pipe": pipe,
    "folder": folder,
    "link out": link_to("copy"),
    "link to a device": link_to("/dev/zero"),
}


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PLANTED", "planted-value")
    return "planted-value"


def refused(place: Path, *words: object, codes: tuple[int, ...] = (2,), free: Path | None = None) -> str:
    """Runs a command that must be refused. Returns the messages.

    It gives only messages, writes nothing but below ``free``, and takes little memory.
    """
    before, peak = listing(place), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = call(*words, folder=place)
    assert said.code in codes, said
    check_words(said)
    after = listing(place)
    if free is not None:
        before, after = (
            {k: v for k, v in found.items() if not k.startswith(str(free))} for found in (before, after)
        )
    assert after == before
    assert not EXPLODED.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2 * GIB
    return said.err


def check_words(said: Said) -> None:
    lines = said.err.splitlines()
    assert lines
    assert all(line.startswith("Error: ") for line in lines), said
    for word in ("Traceback", "failed unexpectedly", "planted-value"):
        assert word not in said.err + said.out, said


@pytest.mark.parametrize("name", [*TENSORS, *VALUES])
def test_delta(place: Path, name: str) -> None:
    delta = place / RUN / "delta"
    ({**TENSORS, **VALUES}[name])(delta / "delta.safetensors")
    seal(delta)
    assert "delta" in refused(place, "eval", f"ckpt={RUN}")


def seal(folder: Path) -> None:
    """The manifest of the files as they are; none where they cannot be read."""
    try:
        if all(
            file.is_file() and not file.is_symlink() and file.stat().st_size < 10**9
            for file in folder.iterdir()
        ):
            manifest.write(folder)
        else:
            (folder / manifest.NAME).unlink()
    except FileNotFoundError:
        pass


@pytest.mark.parametrize(
    "name", [name for name in TENSORS if name != "link out"]
)  # the hub's cache has links
def test_base_model(place: Path, name: str) -> None:
    TENSORS[name](place / "model" / "model.safetensors")
    assert "model" in refused(place, "eval", f"ckpt={RUN}")


@pytest.mark.parametrize("name", JSON)
def test_delta_json(place: Path, name: str) -> None:
    JSON[name](place / RUN / "delta" / "delta.json")
    seal(place / RUN / "delta")
    assert "delta" in refused(place, "eval", f"ckpt={RUN}")
    said = call("compare", "outputs", folder=place)
    assert said.code in (0, 2), said
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_delta_json_of_wrong_types(place: Path) -> None:
    """A wrong value is refused if it is used, and does no harm if it is not."""
    delta = place / RUN / "delta"
    good, codes = (delta / "delta.json").read_text(), []
    for spoil in wrong_types(delta / "delta.json"):
        spoil(delta / "delta.json")
        seal(delta)
        said = call("eval", f"ckpt={RUN}", folder=place)
        codes.append(said.code)
        assert said.code in (0, 2), ((delta / "delta.json").read_text()[:300], said)
        assert "Traceback" not in said.err
        (delta / "delta.json").write_text(good)
    assert codes.count(2) > len(codes) // 2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "as large as may be")) for name in YAML]
)
def test_config(place: Path, name: str) -> None:
    YAML[name](place / RUN / "config.yaml")
    harmless = name in ("as large as may be",)
    for words in (
        ("eval", f"ckpt={RUN}"),
        ("train", "--config", RUN / "config.yaml", "--dry-run"),
        ("show", "--config", RUN / "config.yaml"),
    ):
        if (
            name in ("name out", "data of a device", "data of a pickle", "model of a device", "link out")
            and words[0] != "eval"
        ):
            continue  # values that are only wrong once they are used; and a file of one's own may be a link
        if name == "name out":
            assert call(*words, folder=place).code == 0  # eval writes nothing
            continue
        assert refused(place, *words) or harmless
    said = call("compare", "outputs", folder=place)
    assert said.code in (0, 2), said
    assert "planted-value" not in said.out + said.err


@pytest.mark.parametrize("name", [*TENSORS, "index beyond", "starts beyond"])
def test_checkpoint_tensors(place: Path, name: str) -> None:
    state = place / RUN / "checkpoints" / "step-4"
    more = {
        "index beyond": each(".index", lambda t: t + 2**20),
        "starts beyond": each(".starts", lambda t: t + 2**40),
    }
    ({**TENSORS, **more}[name])(state / "state.safetensors")
    seal(state)
    assert refused(place, "eval", f"ckpt={state.relative_to(place)}")


@pytest.mark.parametrize("name", JSON)
def test_checkpoint_json(place: Path, name: str) -> None:
    state = place / RUN / "checkpoints" / "step-4"
    JSON[name](state / "state.json")
    seal(state)
    if name in ("pipe", "folder"):
        return  # no longer a checkpoint: what is evaluated is the run
    assert refused(place, "eval", f"ckpt={state.relative_to(place)}")


@pytest.mark.slow
def test_checkpoint_json_of_wrong_types(place: Path) -> None:
    state = place / RUN / "checkpoints" / "step-4"
    good = (state / "state.json").read_text()
    for spoil in wrong_types(state / "state.json"):
        spoil(state / "state.json")
        seal(state)
        said = call("eval", f"ckpt={state.relative_to(place)}", folder=place)
        assert said.code in (0, 2), ((state / "state.json").read_text()[:300], said)
        (state / "state.json").write_text(good)


@pytest.mark.slow
def test_a_resume_from_a_state_of_wrong_types(place: Path) -> None:
    run, good = place / RUN, place / "good"
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.copytree(run, good)
    about = json.loads((run / "checkpoints" / "step-2" / "state.json").read_text())
    codes, inside = (
        set[int](),
        [("extra", about["extra"]), *((key, about["extra"][key]) for key in ("watch", "memory"))],
    )
    spoiled = [{**about, key: value} for key in about for value in WRONG]
    for name, part in inside:
        parts = [{**part, key: value} for key in part for value in WRONG]
        spoiled += [
            {**about, "extra": part if name == "extra" else {**about["extra"], name: part}} for part in parts
        ]
    for state in spoiled:
        (run / "checkpoints" / "step-2" / "state.json").write_text(json.dumps(state))
        seal(run / "checkpoints" / "step-2")
        said = call("train", "--config", RUN / "config.yaml", folder=place)
        assert said.code in (0, 2), (state, said)
        assert "Traceback" not in said.err, (state, said)
        codes.add(said.code)
        shutil.rmtree(run)
        shutil.copytree(good, run)
    assert codes == {0, 2}


@pytest.mark.parametrize("name", ["delta", "checkpoints", "log.txt", ".lock", "metrics.jsonl"])
def test_nothing_is_written_through_links(place: Path, name: str) -> None:
    """Resume a run in a folder with links that lead out of it."""
    run, outside = place / RUN, place / "outside"
    (run / "result.json").unlink()
    kept = run / name
    if kept.is_dir():
        kept.rename(outside)
    else:
        outside.write_text("precious")
        kept.unlink(missing_ok=True)
    kept.symlink_to(outside)
    assert "link" in refused(place, "train", "--config", RUN / "config.yaml", codes=(1, 2), free=run)


@pytest.mark.parametrize("name", JSON)
def test_result(place: Path, name: str) -> None:
    JSON[name](place / RUN / "result.json")
    said = call("compare", "outputs", folder=place)
    assert said.code in (0, 2), said
    assert "Traceback" not in said.err
    refused(place, "reproduce", RUN)


@pytest.mark.slow
def test_result_of_wrong_types(place: Path) -> None:
    """``compare`` survives every one, and no other command shows a traceback."""
    file = place / RUN / "result.json"
    good = file.read_text()
    for spoil in wrong_types(file):
        spoil(file)
        for words in (
            ("compare", "outputs", "--json"),
            ("train", "--config", RUN / "config.yaml", "train.steps=9"),
        ):
            said = call(*words, folder=place)
            assert said.code in (0, 2), (file.read_text(), said)
        file.write_text(good)
    nested = json.loads(good)
    for key in ("metrics", "params", "cost"):
        for inner in nested[key]:
            for value in WRONG:
                file.write_text(json.dumps({**nested, key: {**nested[key], inner: value}}))
                said = call("compare", "outputs", folder=place)
                assert said.code in (0, 2), (key, inner, value, said)


@pytest.mark.parametrize(
    "content",
    [
        "x" * 64 * 2**20,
        '{"step": 2, "val_accuracy": "x"}\n' * 3,
        "[" * 10**6 + "\n",
        '{"step": 1e400, "val_accuracy": 1e400, "churn": 1}\n',
        "\0" * 1000,
    ],
    ids=["one line", "text", "depth", "infinite", "zeros"],
)
def test_metrics(place: Path, content: str) -> None:
    (place / RUN / "metrics.jsonl").write_text(content)
    for words in (("compare", "outputs", "--out", "a.html"), ("inspect", RUN)):
        said = call(*words, folder=place)
        assert said.code == 0, said


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 5000,
        b"{" * 10**5,
        b'{"pid": "x", "host": ["a"], "started": {}}',
        b'{"pid": 1, "host": "\\u001b[2J"}',
    ],
)
def test_lock(place: Path, content: bytes) -> None:
    """A lock that no process holds is free, whatever its file contains."""
    (place / RUN / ".lock").write_bytes(content)
    (place / RUN / "result.json").unlink()
    said = call("train", "--config", RUN / "config.yaml", folder=place)
    assert said.code == 0, said
    assert "\x1b" not in said.err


@pytest.mark.parametrize("where", ["sweep.json", "tuning.json", "predictions.parquet"])
@pytest.mark.parametrize("name", ["depth", "list", "nothing", "bytes", "pickle", "pipe", "sparse size"])
def test_other_files(place: Path, where: str, name: str) -> None:
    file = place / RUN.parent / where if where == "sweep.json" else place / RUN / where
    file.touch()
    JSON[name](file)
    said = call("compare", "outputs", folder=place)
    assert said.code == 0, said
    if where == "sweep.json":
        refused(place, "sweep", "--watch", RUN.parent)


CONFIGS: dict[str, tuple[str, Any]] = {
    "code of its own": (
        "auto_map",
        {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
    ),
    "kernel": ("attn_implementation", "someone/kernels"),
    "kernel inside": ("text_config", {"_attn_implementation": "someone/kernels:fn"}),
    "quantized": ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "million layers": ("n_layer", 10**6),
    "wide": ("n_embd", 10**6),
    "large table": ("vocab_size", 10**12),
    "negative": ("n_embd", -16),
    "text for a number": ("n_layer", "x"),
    "list for a number": ("n_embd", [1, 2]),
    "unknown": ("model_type", "evil"),
    "type of a list": ("model_type", ["gpt2"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_model_config(place: Path, name: str) -> None:
    file = place / "model" / "config.json"
    key, value = CONFIGS[name]
    content = {**json.loads(file.read_text()), key: value}
    if name == "code of its own":
        content["model_type"] = "evil"
        (place / "model" / "evil.py").write_text(f"open({str(EXPLODED)!r}, 'w')")
    file.write_text(json.dumps(content))
    assert "model" in refused(place, "eval", f"ckpt={RUN}")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", ["pickle", "depth", "list", "nothing", "bytes", "pipe"])
def test_model_json(place: Path, file: str, name: str) -> None:
    JSON[name](place / "model" / file)
    if (
        name != "pipe" or file == "config.json"
    ):  # what is no file is not there, and a tokenizer can do without
        assert "model" in refused(place, "eval", f"ckpt={RUN}")


def test_model_of_pickles(place: Path) -> None:
    model = place / "model"
    (model / "model.safetensors").unlink()
    torch_bomb(model / "pytorch_model.bin")
    assert "save_pretrained, which writes safetensors" in refused(place, "eval", f"ckpt={RUN}")


@pytest.mark.parametrize("named", ["../elsewhere.safetensors", "pytorch_model.bin", "/etc/passwd", 7, None])
def test_model_index(place: Path, named: Any) -> None:
    model = place / "model"
    shutil.copy(model / "model.safetensors", place / "elsewhere.safetensors")
    torch_bomb(model / "pytorch_model.bin")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"transformer.wte.weight": named}})
    )
    assert "index.json" in refused(place, "eval", f"ckpt={RUN}")


def test_model_with_an_adapter(place: Path) -> None:
    (place / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "someone/else", "peft_type": "LORA"})
    )
    assert "adapter" in refused(place, "eval", f"ckpt={RUN}")


def test_chat_templates_are_not_run(place: Path) -> None:
    """A chat template is data and is never run."""
    file = place / "model" / "tokenizer_config.json"
    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}{% endfor %}"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": code}))
    (place / "model" / "chat_template.jinja").write_text(code)
    assert call("eval", f"ckpt={RUN}", folder=place).code == 0


def test_links_of_a_model_are_followed(place: Path) -> None:
    """The hub's cache is made of them."""
    (place / "model").rename(place / "blobs")
    (place / "model").mkdir()
    for file in (place / "blobs").iterdir():
        (place / "model" / file.name).symlink_to(file)
    assert call("eval", f"ckpt={RUN}", folder=place).code == 0


def gzipped(file: Path) -> None:
    import gzip

    file.write_bytes(gzip.compress(bytes(10**7)))


def zipped(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("../../escaped.csv", "text,label\n" * 10**6)


def tarred(file: Path) -> None:
    with tarfile.open(file, "w") as made:
        about = tarfile.TarInfo("../../escaped.csv")
        about.size = 10
        made.addfile(about, io.BytesIO(bytes(10)))


def arrays(file: Path) -> None:
    with file.open("wb") as opened:
        np.savez_compressed(opened, text=np.zeros(10**7))


DATA: dict[str, Spoil] = {
    "gzip": gzipped,
    "zip": zipped,
    "tar": tarred,
    "npz": arrays,
    "pickle": bomb,
    "pipe": pipe,
    "device": link_to("/dev/zero"),
    "zeros": lambda file: file.write_bytes(bytes(10**6)) and None,
    "one line": lambda file: file.write_text("x" * 10**7) and None,
    "bytes": lambda file: file.write_bytes(bytes(range(256)) * 100) and None,
    "quotes": lambda file: file.write_text('text,label\n"' + "a,b\n" * 10_000) and None,
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_data(place: Path, kind: str, name: str) -> None:
    DATA[name](place / "data.csv")
    words = ["train", "model=hf", "model.path=model", f"dataset={kind}", "dataset.path=data.csv", "--dry-run"]
    assert re.search("data.csv|/dev/zero", refused(place, *words)) or name in ("one line", "quotes")


def parquet(place: Path, table: Any, **options: Any) -> str:
    import pyarrow.parquet as pq

    pq.write_table(table, place / "data.parquet", **options)
    return refused(
        place,
        "train",
        "model=hf",
        "model.path=model",
        "dataset=parquet",
        "dataset.path=data.parquet",
        "--dry-run",
    )


@pytest.mark.slow
def test_parquet_that_unpacks_to_a_gigabyte(place: Path) -> None:
    import pyarrow as pa

    text = pa.array(["x" * 2**28, "y" * 2**28])
    assert "claims" in parquet(
        place, pa.table({"text": text, "label": [0, 1]}), compression="zstd", use_dictionary=False
    )


@pytest.mark.slow
def test_parquet_of_a_billion_rows(place: Path) -> None:
    import pyarrow as pa

    ones = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**7, np.int8)), pa.array(["x"]))
    table = pa.table({"text": pa.chunked_array([ones] * 10)})
    assert "claims 100,000,000 rows" in parquet(place, table, compression="zstd")


def test_parquet_that_names_files_of_this_machine(place: Path) -> None:
    import pyarrow as pa

    image = pa.array(
        [{"bytes": None, "path": "/etc/passwd"}] * 20, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    assert "by their paths" in parquet(place, pa.table({"image": image, "label": [0, 1] * 10}))


@pytest.mark.slow
def test_jsonl_of_depth(place: Path) -> None:
    (place / "data.jsonl").write_text('{"text": "a", "label": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    command = [sys.executable, "-c", "from finetune.data.files import Jsonl\nJsonl(path='data.jsonl').read()"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 1  # and not by a signal: the parser's own recursion
    assert "levels deep" in done.stderr


@pytest.mark.parametrize("name", ["zip", "tar", "pickle", "gzip"])
def test_images_with_an_archive_among_them(place: Path, name: str) -> None:
    from PIL import Image

    for label in "ab":
        (place / "images" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(place / "images" / label / f"{i}.png")
    DATA[name](place / "images" / "a" / "more.dat")
    said = call("train", "dataset=imagefolder", "dataset.path=images", "--dry-run", folder=place)
    assert said.code == (0 if name == "pickle" else 2), said
    assert not list(place.parent.rglob("escaped*"))


def test_image_of_absurd_size(place: Path) -> None:
    from PIL import Image

    for label in "ab":
        (place / "images" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8)).save(place / "images" / label / f"{i}.png")
        first = place / "images" / label / "0.png"
        about = b"IHDR" + struct.pack(">II", 100_000, 100_000) + first.read_bytes()[24:29]
        first.write_bytes(
            first.read_bytes()[:12] + about + struct.pack(">I", zlib.crc32(about)) + first.read_bytes()[33:]
        )
    said = call(
        "train", "dataset=imagefolder", "dataset.path=images", "train.steps=1", "name=a", folder=place
    )
    assert said.code == 2
    assert re.fullmatch(
        r"Error: The image \w/0.png of the data set cannot be read .*bomb.*", said.err.splitlines()[-1]
    )


@pytest.mark.parametrize(
    "word",
    [
        "name=../x",
        "run=../../x",
        "run=a/../../b",
        "name=.",
        "name=..",
        "run=.hidden",
        "name=a\x1b[2Jb",
        "run=a\nb",
        "name=" + "x" * 300,
        "run=\u202egnp",
        "run='a\\b'",
        "name=/tmp/x",
        "run=\udcff",
    ],
)
def test_names_stay_in_outputs(place: Path, word: str) -> None:
    said = refused(
        place,
        "train",
        "model=hf",
        "model.path=model",
        "dataset=csv",
        "dataset.path=data.csv",
        "train.steps=1",
        word,
    )
    assert "\x1b" not in said
    assert "\u202e" not in said


@pytest.mark.parametrize(
    "word",
    [
        "run=${oc.env:PLANTED}",
        "run=x${oc.env:PLANTED}y",
        "seed=${oc.env:PLANTED}",
        "run='\\${oc.env:PLANTED}'",
        "method.targets=['${oc.env:PLANTED}']",
        "run=${oc.env:${seed}}",
        "run=${method}",
        "run=${run}",
        "run=${hydra:runtime.cwd}",
        "logger.tags=['${oc.env:PLANTED}']",
        "method._target_=os.system",
    ],
)
def test_overrides_call_nothing(place: Path, word: str) -> None:
    for command in ("show", "train"):
        refused(place, command, word)
    refused(place, "sweep", word, "seed=0,1")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("method/mine.yaml", "defaults: [lora, _self_]\nalpha: ${oc.env:PLANTED}\n"),
        ("method/mine.yaml", "defaults:\n  - ${oc.env:PLANTED}\n"),
        ("config.yaml", "defaults:\n  - method: ${oc.env:PLANTED}\n"),
        ("method/mine.yaml", "x: !!python/object/apply:os.system [touch EXPLODED]\n"),
        ("method/mine.yaml", "_target_: os.system\nname: lora\n"),
        ("method/mine.yaml", bombs(9)),
        ("sweep/mine.yaml", "- !!python/object/apply:os.system [touch EXPLODED]\n"),
        ("sweep/mine.yaml", "- run=${oc.env:PLANTED}\n"),
    ],
)
def test_groups_call_nothing(place: Path, file: str, text: str) -> None:
    (place / "groups" / file).parent.mkdir(parents=True)
    (place / "groups" / file).write_text(text)
    words = (
        ["sweep", "sweep=mine"]
        if file.startswith("sweep")
        else ["show", *(["method=mine"] if file.startswith("method") else [])]
    )
    refused(place, *words, "--config-dir", "groups")


EVIL = "<script>alert(1)</script>\x1b[31m\n=cmd|' /C calc'!A0 \\input{x} [red]"


def test_reports_show_what_they_are_given(place: Path) -> None:
    """Names that would be markup, escape codes, formulas or commands: in every format they are letters."""
    for i, evil in enumerate((EVIL, "=1+1", "@SUM(1)", "plain")):
        run = place / "outputs" / "first" / f"evil{i}"
        shutil.copytree(place / RUN, run)
        about, result = (json.loads((run / file).read_text()) for file in ("delta/delta.json", "result.json"))
        about["config"]["method"]["name"] = evil
        result |= {"method": evil, "config_hash": f"{i}", "group_hash": f"{i}"}
        (run / "delta/delta.json").write_text(json.dumps(about))
        (run / "result.json").write_text(json.dumps(result))
    files = [f"all.{end}" for end in ("html", "csv", "md", "tex", "json")]
    said = call("compare", "outputs", *(word for file in files for word in ("--out", file)), folder=place)
    assert said.code == 0, said
    texts = {file: (place / file).read_text() for file in files}
    assert "alert(1)" in texts["all.html"]
    assert "<script>alert" not in texts["all.html"]
    for text in (said.out, said.err, *texts.values()):
        assert "\x1b" not in text
    cells = [cell for line in texts["all.csv"].splitlines() for cell in line.split(",")]
    assert any(cell.startswith("'=1+1") for cell in cells)
    assert not any(cell.startswith(("=", "@", '"=')) for cell in cells)
    assert "\\input{" not in "".join(
        line for line in texts["all.tex"].splitlines() if not line.startswith("%")
    )
    assert "<script>" not in texts["all.md"].replace("\\<", "")
