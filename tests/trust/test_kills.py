"""``kill -9`` at random moments of real runs, and ``train --resume`` until they are done.

They end as the runs that were not killed, to the bit.

FINETUNE_KILLS=N: how often (50). FINETUNE_SEED=N: of the moments (0).
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ..support import task
from ..support.nursery import Child, Nursery, nursery
from ..support.same_run import differences

pytestmark = pytest.mark.slow
KILLS, SEED, STEPS = (
    int(os.environ.get("FINETUNE_KILLS", "50")),
    int(os.environ.get("FINETUNE_SEED", "0")),
    12,
)
RUNS = {
    "lora": ["method=lora", "method.rank=4", "train.save_every=1"],
    "snell": ["method=snell", "method.rank=4", "train.save_every=2"],
    "spiel": [
        "method=spiel",
        "schedule=drop_grow",
        "schedule.every=3",
        "method.window=2",
        "train.save_every=1",
    ],
    "lt_sft": ["method=lt_sft", "train.save_every=3"],
    "sara": ["method=sara", "train.save_every=1", "train.workers=1"],
    "sparse": [
        "method=sparse",
        "schedule=cubic",
        "schedule.every=2",
        "method.score=snip",
        "train.save_every=2",
        "optimizer=sm3",
    ],
    "snella": [
        "method=snella",
        "method.rank=4",
        "method.every=3",
        "train.save_every=3",
        "train.micro_batch_size=3",
    ],
    "forget": [
        "method=lora",
        "objective=forget",
        "streams.retain=imagefolder",
        "streams.retain.path=${dataset.path}",
        "train.save_every=1",
        "train.micro_batch_size=3",
    ],
    "shira": ["method=shira", "selector=ist", "train.save_every=1", "train.precision=bf16"],
}
Moment = Callable[[Child], bool]


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("said")) as made:
        yield made


def wall(draw: random.Random, run: Path, seconds: float) -> tuple[str, Moment]:
    """Uniform over the life of the undisturbed run."""
    end = time.monotonic() + draw.uniform(0, seconds)
    return "any", lambda child: child.until(lambda: time.monotonic() >= end)


def step(draw: random.Random, run: Path, seconds: float) -> tuple[str, Moment]:
    """Within the step, the validation or the checkpoint after a line of metrics."""
    lines, after = draw.randint(0, STEPS), draw.uniform(0, 1.5 * seconds / STEPS / 2)

    def come(child: Child) -> bool:
        file = run / "metrics.jsonl"
        return child.until(lambda: file.exists() and file.read_bytes().count(b"\n") >= lines) and _later(
            child, after
        )

    return "step", come


def writing(draw: random.Random, run: Path, seconds: float) -> tuple[str, Moment]:
    """While a checkpoint or a change is written under its temporary name, or just renamed."""
    place, skip, after = draw.choice([run / "checkpoints", run]), draw.randint(0, 6), draw.uniform(0, 0.006)
    seen: set[int] = set()

    def there() -> bool:
        with suppress(OSError):
            seen.update(entry.inode() for entry in os.scandir(place) if entry.name.endswith((".tmp", ".old")))
        return len(seen) > skip

    return "writing", lambda child: child.until(there) and _later(child, after)


def _later(child: Child, seconds: float) -> bool:
    end = time.monotonic() + seconds
    return child.until(lambda: time.monotonic() >= end)


def undisturbed(begin: Nursery, common: list[str], folder: Path) -> dict[str, float]:
    """Every run once, with its seconds."""
    found = {}
    for name, words in RUNS.items():
        (folder / name).mkdir()
        began = time.monotonic()
        child = begin.run("train", *common, *words, folder=folder / name)
        assert child.wait() == 0, child.said
        found[name] = time.monotonic() - began
    return found


def one(
    begin: Nursery,
    words: list[str],
    folder: Path,
    seconds: float,
    kinds: list[Callable[..., tuple[str, Moment]]],
    draw: random.Random,
) -> str:
    """Start a run, then kill and resume it until it is done.

    Returns the kind of moment and how far it was.
    """
    run, killed = folder / "outputs" / "t" / "r", ""
    for kind in kinds:
        name, come = kind(draw, run, seconds)
        child = begin.start(
            *(["train", "--resume", "outputs/t/r"] if (run / "config.yaml").exists() else words),
            folder=folder,
        )
        if come(child):
            child.kill(signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:
            assert child.wait() == 0, child.said
            return killed
        killed += f"{name} at step {_steps(run)}; "
    child = begin.run(
        *(["train", "--resume", "outputs/t/r"] if (run / "config.yaml").exists() else words), folder=folder
    )
    assert child.wait() == 0, child.said
    return killed


def _steps(run: Path) -> int:
    try:
        return max(
            (json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()), default=0
        )
    except (OSError, ValueError):
        return 0


def test_killed_at_any_moment_it_ends_the_same(
    begin: Nursery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [*task.make(tmp_path / "task"), f"train.steps={STEPS}", "train.eval_every=2", "run=r"]
    (tmp_path / "whole").mkdir()
    seconds = undisturbed(begin, common, tmp_path / "whole")
    kinds, names = [wall, step, writing], list(RUNS)
    kills, equal, runs, wrong, moments = 0, 0, 0, list[str](), Counter[str]()
    while kills < KILLS:
        draw, name = random.Random(f"{SEED}-{runs}"), names[runs % len(names)]
        chosen = [kinds[(runs // len(names) + i) % 3] for i in range(draw.choice([1, 2, 3]))]
        folder = tmp_path / f"{runs}"
        folder.mkdir()
        told = one(begin, ["train", *common, *RUNS[name]], folder, seconds[name], chosen, draw)
        found = differences(tmp_path / "whole" / name / "outputs" / "t" / "r", folder / "outputs" / "t" / "r")
        left = [str(file) for file in folder.rglob("*") if file.name.endswith((".tmp", ".old"))]
        kills, runs = kills + told.count(";"), runs + 1
        equal += told.count(";") if not found + left else 0
        wrong += [f"{name}, seed {SEED}-{runs - 1}, {told}{found + left}"] if found + left else []
        moments.update(part.split()[0] for part in told.split("; ") if part)
        with capsys.disabled():
            print(
                f"seed {SEED}-{runs - 1}: {name}, killed {told or 'never; '}"
                f"{'different' if found + left else 'equal'}",
                flush=True,
            )
    with capsys.disabled():
        print(
            f"\n{equal} of {kills} bit-equal: {runs} runs of {len(names)} methods, "
            f"seeds {SEED}-0 to {SEED}-{runs - 1}, moments {dict(moments)}"
        )
    assert not wrong
