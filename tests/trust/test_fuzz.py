"""Thousands of wrong words and files through the real ``main``.

Each ends with 0 or with 2 and a message, soon, and leaves nothing behind.

The quick run takes a hundredth of the cases; ``pytest -m slow tests/trust/test_fuzz.py -s`` takes them all
and prints the counts.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from finetune.registry import catalog, choices
from finetune.storage import manifest

from .world import RUN, Said, call, listing

CASES = {
    "overrides": 9000,
    "sweeps": 2000,
    "configs": 5000,
    "deltas": 1500,
    "checkpoints": 800,
    "results": 1200,
    "data": 600,
}
QUICK = 100
SECONDS = float(os.environ.get("FINETUNE_FUZZ_SECONDS", "900"))  # for each kind
COUNTS: Counter[tuple[str, int]] = Counter()


@pytest.fixture(scope="module")
def place(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the user's place in which nothing is trained or measured.

    The model and the data are read once.
    """
    from finetune.artifacts import reopen as finished
    from finetune.data.files import Csv
    from finetune.training import plan
    from finetune.training import prepare as setup

    folder = tmp_path_factory.mktemp("fuzz") / "place"
    shutil.copytree(original, folder)
    (folder / "home").mkdir()
    read, load = Csv.read, setup.load

    @cache
    def table(data: Csv) -> Any:
        return read(data)

    loaded: dict[str, Any] = {}

    def base(*asked: Any) -> Any:
        key = repr(asked)
        if key not in loaded:
            loaded[key] = load(*asked)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("PLANTED", "planted-value")
        patch.setattr(
            "typer.main.get_command", cache(typer.main.get_command)
        )  # to make it takes twice as long as most commands
        patch.setattr(plan, "plan", lambda config: {"settings": config.as_dict()})
        patch.setattr(
            "finetune.sweep.forecast.forecast",
            lambda runs, *_: {"folder": "", "runs": [], "total": {"seconds": None}},
        )
        patch.setattr(Csv, "read", lambda data: table(data) if data.path == "data.csv" else read(data))
        patch.setattr(setup, "load", lambda *asked: copy.deepcopy(base(*asked)))
        assert finished.prepare is setup.prepare
        yield folder
    print(
        "\ncases by kind and exit code:",
        *(f"{kind} {code}: {count}" for (kind, code), count in sorted(COUNTS.items())),
        sep="\n  ",
    )
    print("  in all:", sum(COUNTS.values()))


def check(kind: str, said: Said, *shown: Any) -> None:
    COUNTS[kind, said.code] += 1
    both = said.out + said.err
    assert said.code in (0, 2), (said, *shown)
    assert "Traceback" not in both, (said, *shown)
    assert "planted-value" not in both, (said, *shown)
    ours = [line for line in both.splitlines() if line.startswith("Error: ") and "Usage: " not in said.err]
    assert "\x1b" not in both or not ours, (
        said,
        *shown,
    )  # what Typer itself refuses it repeats as it was typed
    if said.code == 2:
        assert said.err.strip(), shown
        assert all(len(line) < 3000 for line in ours), shown


def sized(kind: str, slow: bool, *drawn: Any) -> Callable[[Any], Any]:
    """``given(*drawn)`` with the number of cases of this kind; after ``SECONDS`` the rest are passed by."""
    every = settings(
        max_examples=CASES[kind] if slow else CASES[kind] // QUICK,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # to shrink a case takes as long as all of them
        suppress_health_check=list(HealthCheck),
    )
    began = time.monotonic()

    def bounded(test: Callable[..., None]) -> Any:
        @wraps(test)
        def case(**values: Any) -> None:
            if time.monotonic() - began < SECONDS:
                test(**values)

        return case

    return lambda test: seed(7)(every(given(*drawn)(bounded(test))))


both = pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])

# What is typed.

KEYS = [
    "seed",
    "name",
    "run",
    "sparsity",
    *choices(),
    "logger",
    "train",
    "model.path",
    "model.dtype",
    "method.sparsity",
    "method.targets",
    "method.rank",
    "method.alpha",
    "method.config",
    "method.config.r",
    "method.schedule",
    "schedule.every",
    "method.name",
    "dataset.path",
    "dataset.val_share",
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.name",
    "train.steps",
    "train.batch_size",
    "train.micro_batch_size",
    "train.keep_last",
    "train.precision",
    "train.max_seconds",
    "train.workers",
    "logger.tags",
    "logger.project",
    "sweep",
    "budget",
    "tune",
    "launcher.x",
    "hydra.run.dir",
    "defaults",
    "_target_",
    "method._target_",
    "ckpt",
    "out",
    "weights",
    "head",
]
WORDS = [
    "null",
    "true",
    "1e-3",
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "10" * 40,
    "0x1F",
    "1_000",
    "[]",
    "{}",
    "[q,v]",
    "[[[[1]]]]",
    "{a:{b:[1,{c:2}]}}",
    "???",
    "a,b",
    "0,1",
    "range(0,3)",
    "range(0,1e18)",
    "range(0,1,0)",
    "choice(a,b)",
    "choice()",
    "glob(*)",
    "glob(*,exclude=s*)",
    "interval(0,1)",
    "tag(x,choice(a))",
    "sort(3,1,2)",
    "shuffle(range(0,10))",
    "shuffle(range(0,1000000000000))",
    "sort(range(0,1000000000000))",
    "int(3.7)",
    "float(x)",
    "str([1])",
    "bool(2)",
    "json_str({a:1})",
    "${seed}",
    "${oc.env:PLANTED}",
    "${oc.env:NOPE,${seed}}",
    "${oc.create:{a:1}}",
    "${run}",
    "${method}",
    "${.rank}",
    "${",
    "}",
    "\\${seed}",
    "'${oc.env:PLANTED}'",
    "$",
    "'",
    '"',
    "'a",
    '"a\\',
    "a=b",
    "a b",
    "#",
    "a#b",
    "~",
    "/dev/zero",
    "/etc/passwd",
    "..",
    "../../x",
    "builtin:tiny_vit",
    "builtin:../..",
    "lora",
    "snell",
    "peft",
    "shira",
    "grow",
    "2026-01-01",
    "12:30:45",
    "!!python/object:os.system",
    "&a",
    "*a",
    "<<",
    "\u202e",
    "\x1b[31m",
    "\x7f",
    "\udcff",
    "é",
    "一",
    "🙂",
    "%s",
    "{0}",
    "[/]",
    "[red]",
    "[" * 30,
    "(" * 30,
    "x" * 12_000,
    "[" + "1," * 3000 + "1]",
]
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=20)
VALUE = st.one_of(
    st.sampled_from(WORDS),
    TEXT,
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.sampled_from(WORDS[:40]), max_size=3).map(",".join),
)
CHOICE = st.one_of(
    st.sampled_from(sorted(catalog("method"))).map("method={}".format),
    st.sampled_from(sorted(catalog("schedule"))).map("schedule={}".format),
    st.sampled_from(
        [
            "dataset=csv",
            "dataset=jsonl",
            "dataset=hub",
            "dataset=stdlib",
            "model=hf",
            "model=tiny_lm",
            "optimizer=sm3",
            "selector=ist",
        ]
    ),
)
ASSIGNED = st.tuples(st.sampled_from(["", "", "", "", "", "+", "++", "~"]), st.sampled_from(KEYS), VALUE).map(
    lambda t: f"{t[0]}{t[1]}={t[2]}"
)
WORD = st.one_of(CHOICE, ASSIGNED, ASSIGNED, ASSIGNED, st.tuples(TEXT, VALUE).map("=".join), TEXT)
OPTIONS = [
    "--json",
    "--help",
    "--version",
    "--config",
    "--config-dir",
    "--ckpt",
    "--by",
    "--metric",
    "--baseline",
    "--rank",
    "--nope",
    "-x",
    "--",
    "--tolerance",
]
COMMANDS = [
    ["show"],
    ["show"],
    ["show"],
    ["train", "--dry-run"],
    ["train", "--dry-run"],
    ["eval"],
    ["merge", "out=outputs/first"],
    ["inspect"],
    ["compose"],
    ["compare", "outputs"],
    ["methods"],
    ["reproduce"],
    ["show", "--config", str(RUN / "config.yaml")],
    ["verify"],
    ["export"],
]
LINE = st.tuples(
    st.sampled_from(COMMANDS),
    st.lists(st.one_of(WORD, WORD, WORD, WORD, WORD, st.sampled_from(OPTIONS)), max_size=5),
)


def real(words: list[str]) -> bool:
    """Whether a shell could pass these words on.

    What would read all of ``/`` or the user's own disk is left to other tests.
    """
    return not any("\0" in word or word in ("/", "//") for word in words)


@both
def test_overrides(place: Path, slow: bool) -> None:
    @sized("overrides", slow, LINE)
    def case(line: tuple[list[str], list[str]]) -> None:
        words = [*line[0], *line[1]]
        before = listing(place)
        if real(words):
            check("overrides", call(*words, folder=place), words)
        assert listing(place) == before

    case()


@both
def test_sweeps(place: Path, slow: bool) -> None:
    @sized(
        "sweeps",
        slow,
        st.lists(WORD, max_size=4),
        st.sampled_from(
            [[], ["--max-runs", "3"], ["--jobs", "x"], ["--launcher", "joblib"], ["--sweep", "x"]]
        ),
    )
    def case(words: list[str], options: list[str]) -> None:
        before = listing(place)
        if real(words) and not any(word.startswith(("budget=", "--")) for word in words):
            check(
                "sweeps",
                call("sweep", "--dry-run", "--max-runs", "20", *options, *words, folder=place),
                words,
            )
        assert listing(place) == before

    case()


# What lies in files.

TOKENS = [
    b"",
    b"\n",
    b"\0",
    b"\xff",
    b"{",
    b"[",
    b"]",
    b"}",
    b":",
    b",",
    b"- ",
    b"  ",
    b"\t",
    b'"',
    b"'",
    b"&a ",
    b"*a",
    b"!!python/name:os.system ",
    b"!!binary ",
    b"<<: *a",
    b"? ",
    b"${oc.env:PLANTED}",
    b"${seed}",
    b"${run}",
    b"null",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 30,
    b"../../x",
    b"/dev/zero",
    b"_target_: os.system\n",
    b"%YAML 9.9\n",
    b"---\n",
    b"#",
    b"true",
    b"[[[[[[[[",
    b"\x1b[31m",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"PAR1",
]
PLACE = st.integers(0, 2**20)
BYTES = st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8))
EDIT = st.tuples(st.sampled_from(["put", "put", "over", "flip", "cut", "twice", "end"]), PLACE, PLACE, BYTES)
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(WORDS))
FLAT = st.one_of(LEAF, st.lists(LEAF, max_size=3), st.dictionaries(TEXT, LEAF, max_size=3))
VALUES = st.one_of(LEAF, LEAF, FLAT, st.lists(FLAT, max_size=3), st.dictionaries(TEXT, FLAT, max_size=3))
CHANGE = st.tuples(PLACE, st.sampled_from(["set", "set", "set", "drop", "add", "move"]), VALUES, TEXT)
EDITS = st.one_of(st.lists(EDIT, min_size=1, max_size=3), st.lists(CHANGE, min_size=1, max_size=3))


def edited(data: bytes, edits: list[Any]) -> bytes:
    """``data`` after edits of its bytes."""
    for what, at, length, token in edits:
        at, length = at % (len(data) + 1), length % 40
        if what == "put":
            data = data[:at] + token + data[at:]
        elif what == "over":
            data = data[:at] + token + data[at + len(token) :]
        elif what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << length % 8)]) + data[at + 1 :]
        elif what == "cut":
            data = data[:at] + data[at + length :]
        elif what == "twice":
            data = data[:at] + data[at : at + length] * 3 + data[at + length :]
        elif what == "end":
            data = data[:at]
    return data


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container below with each of its keys."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [found for key in keys for found in [(tree, key), *places(tree[key])]]


def changed(tree: Any, changes: list[Any]) -> Any:
    """``tree`` after changes of its structure."""
    for at, what, value, name in changes:
        if not (found := places(tree)):
            return tree
        inside, key = found[at % len(found)]
        if what == "drop":
            del inside[key]
        elif what == "set" or isinstance(inside, list):
            inside[key] = value
        else:
            inside[name] = inside.pop(key) if what == "move" else value
    return tree


def spoiled(data: bytes, edits: list[Any], load: Callable[[bytes], Any], dump: Callable[[Any], str]) -> bytes:
    if isinstance(edits[0][0], str):
        return edited(data, edits)
    return dump(changed(load(data), edits)).encode(errors="surrogatepass")


def as_json(tree: Any) -> str:
    return json.dumps(tree, default=str)


def as_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


@both
def test_configs(place: Path, slow: bool) -> None:
    good = (place / RUN / "config.yaml").read_bytes()
    file = place / "mine.yaml"
    file.touch()

    @sized(
        "configs",
        slow,
        EDITS,
        st.sampled_from([("show",), ("show", "--json"), ("train", "--dry-run"), ("sweep", "--dry-run")]),
    )
    def case(edits: list[Any], words: tuple[str, ...]) -> None:
        file.write_bytes(spoiled(good, edits, yaml.safe_load, as_yaml))
        before = listing(place)
        check("configs", call(*words, "--config", "mine.yaml", folder=place), file.read_bytes())
        assert listing(place) == before

    case()


def run_files(
    place: Path, kind: str, slow: bool, files: list[str], words: list[str], commands: list[tuple[Any, ...]]
) -> None:
    """Spoil one of ``files`` of the run in each case, and call a command.

    The manifest of its folder is renewed before the command; the file is put back after it.
    """
    run = place / RUN

    @sized(
        kind,
        slow,
        st.sampled_from(files),
        EDITS,
        st.booleans(),
        st.sampled_from(commands),
    )
    def case(name: str, edits: list[Any], sealed: bool, command: tuple[Any, ...]) -> None:
        file = run / name
        good, listed = file.read_bytes(), file.parent / manifest.NAME
        seal = listed.read_bytes() if listed.is_file() else None
        try:
            if file.suffix in (".json", ".yaml"):
                file.write_bytes(
                    spoiled(good, edits, json.loads if file.suffix == ".json" else yaml.safe_load, as_json)
                )
            else:
                file.write_bytes(
                    edited_tensors(good, edits)
                    if file.suffix == ".safetensors"
                    else edited(good, [e for e in edits if isinstance(e[0], str)])
                )
            if sealed and seal:
                manifest.write(file.parent)
            before = listing(place)
            check(kind, call(*command, *words, folder=place), name, edits, command)
            assert listing(place) == before
        finally:
            file.write_bytes(good)
            if seal:
                listed.write_bytes(seal)

    case()


def edited_tensors(data: bytes, edits: list[Any]) -> bytes:
    """Edits of the bytes, or changes of the header with its length put right."""
    if isinstance(edits[0][0], str):
        return edited(data, edits)
    start = 8 + int.from_bytes(data[:8], "little")
    header = as_json(changed(json.loads(data[8:start]), edits)).encode(errors="surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[start:]


@both
def test_deltas(place: Path, slow: bool) -> None:
    files = [
        "delta/delta.safetensors",
        "delta/delta.safetensors",
        "delta/delta.json",
        "delta/manifest.json",
        "config.yaml",
    ]
    run_files(
        place,
        "deltas",
        slow,
        files,
        [f"ckpt={RUN}"],
        [("eval",), ("eval", "--json"), ("eval", "dataset.val_share=0.2")],
    )


@both
def test_checkpoints(place: Path, slow: bool) -> None:
    state = "checkpoints/step-4"
    files = [
        f"{state}/state.safetensors",
        f"{state}/state.safetensors",
        f"{state}/state.json",
        f"{state}/manifest.json",
    ]
    run_files(place, "checkpoints", slow, files, [f"ckpt={RUN / state}"], [("eval",)])


@both
def test_results(place: Path, slow: bool) -> None:
    files = [
        "result.json",
        "result.json",
        "metrics.jsonl",
        "predictions.parquet",
        "delta/delta.json",
        "config.yaml",
    ]
    train = ("train", "--config", place / RUN / "config.yaml", "--resume")
    run_files(
        place,
        "results",
        slow,
        files,
        [],
        [("compare", "outputs"), ("compare", "outputs", "--json"), ("compare", RUN, "--by", "method"), train],
    )


@both
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves a CSV file open that it cannot read
def test_data(place: Path, slow: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finetune.data import files
    from finetune.training import plan

    rows = [{"text": f"a {'cat' if i % 2 else 'dog'} sat {i}", "label": i % 2} for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), place / "good.parquet")
    good = {
        "csv": (place / "data.csv").read_bytes(),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "parquet": (place / "good.parquet").read_bytes(),
    }
    file = place / "data.any"
    file.touch()

    def read(config: Any) -> dict[str, Any]:
        raw = config.dataset.read()
        return {
            "labels": len(raw.labels),
            "text": [row.get("text") for rows in raw.splits.values() for row in rows][:0],
        }

    @sized(
        "data",
        slow,
        st.sampled_from(sorted(good)),
        st.lists(EDIT, min_size=1, max_size=3),
        st.sampled_from([[], ["dataset.task=causal_lm"], ["dataset.text_column=text"]]),
    )
    def case(kind: str, edits: list[Any], words: list[str]) -> None:
        file.write_bytes(edited(good[kind], edits))
        before = listing(place)
        said = call(
            "train",
            "--dry-run",
            "model=hf",
            "model.path=model",
            f"dataset={kind}",
            f"dataset.path={file}",
            *words,
            folder=place,
        )
        check("data", said, kind, edits)
        assert listing(place) == before
        shutil.rmtree(files.make_scratch_folder(), ignore_errors=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "plan", read)
        case()
