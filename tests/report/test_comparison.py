"""Comparisons: rows, pairing, verdicts and notes, checked against numbers computed in another way."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import cochrans_q, mcnemar
from statsmodels.stats.multitest import multipletests

from finetune.config.load import load, tree
from finetune.errors import ConfigError
from finetune.report import statistics
from finetune.report.comparison import compare
from finetune.storage.atomic import write_json_atomic, write_yaml_atomic
from finetune.sweep.grid import list_points

from ..support.run_folders import MakeRun


def answers(share: float, seed: int = 0, count: int = 200) -> list[int]:
    """Return which examples a model with accuracy ``share`` gets right.

    These are the easiest ones; the noise is the same for equal seeds.
    """
    luck = np.random.default_rng(seed).normal(0, 0.1, count)
    return [int(i / count + e < share) for i, e in enumerate(luck)]


def compare_folders(tmp_path: Path, *folders: Path, **words: Any) -> dict[str, Any]:
    found = compare(list(folders) or [tmp_path / "outputs" / "sweep"], **words).as_dict()
    json.dumps(found, allow_nan=False)
    return found


def get_row(found: dict[str, Any], label: str) -> dict[str, Any]:
    (one,) = [row for row in found["rows"] if row["label"] == label]
    return dict(one)


def test_rows_by_method_over_seeds(make_run: MakeRun, tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        make_run("lora", seed, answers(0.9, seed))
        make_run("head", seed, answers(0.5, seed + 9))
    found = compare_folders(tmp_path)
    assert (found["by"], found["task"], found["baseline"]) == (["method"], "classification", None)
    assert [r["label"] for r in found["rows"]] == ["lora", "head"]
    values = [np.mean(answers(0.9, seed)) for seed in range(3)]
    lora = get_row(found, "lora")
    assert (lora["seeds"], lora["values"]) == ([0, 1, 2], pytest.approx(values))
    assert lora["mean"] == pytest.approx(np.mean(values))
    assert lora["sd"] == pytest.approx(np.std(values, ddof=1))
    assert (lora["low"], lora["high"]) == pytest.approx(
        scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
    )
    assert (lora["trained"], lora["stored_bytes"], lora["step_seconds"], lora["peak_memory_bytes"]) == (
        35_082,
        144_592,
        0.03125,
        512 << 20,
    )
    assert (lora["rank"], get_row(found, "head")["versus"]["verdict"]) == ("best", "worse")
    assert found["metric"] == {
        "name": "test.accuracy",
        "words": "accuracy",
        "higher_is_better": True,
        "percent": True,
    }


def test_methods_are_judged_over_seeds_and_examples(make_run: MakeRun, tmp_path: Path) -> None:
    """Runs are paired by seed, and their predictions by example."""
    a, b = ([answers(share, seed + luck) for seed in range(3)] for share, luck in ((0.8, 0), (0.75, 40)))
    for seed in range(3):
        make_run("lora", seed, a[seed])
        make_run("head", seed, b[seed], ids=[f"e{i}" for i in range(200)])
    test = get_row(compare_folders(tmp_path), "head")["versus"]
    expected = statistics.crossed(np.array(b) - np.array(a))
    assert (test["test"], test["against"]) == ("seeds and examples", "lora")
    assert (test["difference"], test["low"], test["high"], test["p"]) == pytest.approx(expected)


def test_one_seed_is_mcnemar_and_marked(make_run: MakeRun, tmp_path: Path) -> None:
    a, b = answers(0.85, 1), answers(0.8, 2)
    make_run("lora", 0, a)
    make_run("head", 0, b)
    found = compare_folders(tmp_path)
    one = get_row(found, "head")
    right, wrong = (
        sum(x > y for x, y in zip(b, a, strict=True)),
        sum(x < y for x, y in zip(b, a, strict=True)),
    )
    assert one["versus"]["test"] == "mcnemar mid-p"
    assert one["versus"]["p"] == pytest.approx(statistics.mcnemar_midp(right, wrong))
    assert one["versus"]["p"] < mcnemar([[0, right], [wrong, 0]], exact=True).pvalue
    assert (one["single_seed"], one["low"], one["sd"]) == (True, None, None)
    assert one["examples"]["count"] == 200
    assert (one["examples"]["low"], one["examples"]["high"]) == pytest.approx(statistics.wilson(sum(b), 200))
    assert any("Every row has a single seed" in note for note in found["notes"])
    assert any("not about the methods" in note for note in found["notes"])


def test_bits_per_byte_over_seeds_and_for_one(make_run: MakeRun, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    size = random.integers(50, 500, 40)
    for method, level in (("lora", 2.0), ("head", 2.4)):
        for seed in range(3):
            bits = size * (level + random.normal(0, 0.2, 40))
            make_run(
                method,
                seed,
                bits=list(zip(bits.tolist(), size.tolist(), strict=True)),
                dataset__name="stdlib",
            )
    found = compare_folders(tmp_path)
    assert (found["task"], found["metric"]["name"], found["metric"]["higher_is_better"]) == (
        "causal_lm",
        "test.bits_per_byte",
        False,
    )
    assert [r["label"] for r in found["rows"]] == ["lora", "head"]
    test = get_row(found, "head")["versus"]
    assert (test["test"], test["verdict"]) == ("seeds and examples", "worse")
    assert test["difference"] == pytest.approx(
        get_row(found, "head")["mean"] - get_row(found, "lora")["mean"]
    )
    runs = sorted((tmp_path / "outputs" / "sweep").glob("*-s0-*"))
    alone = get_row(compare_folders(tmp_path, *runs), "head")["versus"]
    assert (alone["test"], alone["verdict"]) == ("paired bootstrap", "worse")
    assert alone["low"] < alone["difference"] < alone["high"]


def test_only_common_examples_are_paired(make_run: MakeRun, tmp_path: Path) -> None:
    """Examples are paired by their id, not by their place in the file."""
    a, b = answers(0.85, 1), answers(0.8, 2)
    make_run("lora", 0, a)
    order = list(np.random.default_rng(0).permutation(200)[:150])
    make_run("head", 0, [b[i] for i in order], ids=[f"e{i}" for i in order])
    found = compare_folders(tmp_path)
    right, wrong = sum(b[i] > a[i] for i in order), sum(b[i] < a[i] for i in order)
    assert get_row(found, "head")["versus"]["p"] == pytest.approx(statistics.mcnemar_midp(right, wrong))
    assert get_row(found, "head")["versus"]["difference"] == pytest.approx((right - wrong) / 150)
    assert any("150 of 200" in note for note in found["notes"])


def test_rows_that_share_one_seed_or_none(make_run: MakeRun, tmp_path: Path) -> None:
    """With one common seed two models are compared; with none, two unpaired groups."""
    for seed in (0, 1, 2):
        make_run("lora", seed, answers(0.9, seed))
        make_run("head", seed + 2, answers(0.6, seed))
        make_run("full", seed + 5, answers(0.7, seed))
    found = compare_folders(tmp_path)
    assert get_row(found, "head")["versus"]["test"] == "mcnemar mid-p"
    other = get_row(found, "full")
    assert other["versus"]["test"] == "welch t over seeds"
    expected = scipy.stats.ttest_ind(other["values"], get_row(found, "lora")["values"], equal_var=False)
    assert other["versus"]["p"] == pytest.approx(expected.pvalue)
    assert {finding["kind"] for finding in found["fairness"]} == {"seeds"}


def test_metric_without_examples_is_tested_over_seeds(make_run: MakeRun, tmp_path: Path) -> None:
    values = {"lora": (0.3, 0.31, 0.29), "head": (0.5, 0.56, 0.52)}
    for method, losses in values.items():
        for seed, loss in enumerate(losses):
            make_run(method, seed, result={"metrics": {"test": {"accuracy": 0.9}, "val": {"loss": loss}}})
    found = compare_folders(tmp_path, metric="val.loss")
    test = get_row(found, "head")["versus"]
    assert test["test"] == "paired t over seeds"
    assert test["p"] == pytest.approx(scipy.stats.ttest_rel(values["head"], values["lora"]).pvalue)
    assert found["metric"] == {
        "name": "val.loss",
        "words": "validation loss",
        "higher_is_better": False,
        "percent": False,
    }
    assert [r["label"] for r in found["rows"]] == ["lora", "head"]


def test_costs_can_be_the_metric_and_one_seed_has_no_test(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, answers(0.9))
    make_run("head", 0, answers(0.6), result={"stored_bytes": 10})
    found = compare_folders(tmp_path, metric="stored_bytes")
    assert [r["mean"] for r in found["rows"]] == [10, 144_592]
    assert (get_row(found, "lora")["versus"]["verdict"], get_row(found, "head")["rank"]) == ("untested", "")
    assert compare_folders(tmp_path, metric="peak_memory_bytes")["metric"]["name"] == "cost.peak_memory_bytes"


def test_holm_over_the_table_and_ties(make_run: MakeRun, tmp_path: Path) -> None:
    shares = {"lora": 0.8, "head": 0.5, "full": 0.8, "bitfit": 0.795, "snell": 0.8}
    for number, (method, share) in enumerate(shares.items()):
        for seed in range(3):
            make_run(method, seed, answers(share, 10 * number + seed))
    found = compare_folders(tmp_path)
    tests = [r["versus"] for r in found["rows"] if r["versus"]]
    assert [t["p_holm"] for t in tests] == pytest.approx(
        multipletests([t["p"] for t in tests], method="holm")[1]
    )
    ranks = {r["label"]: r["rank"] for r in found["rows"]}
    assert ranks["head"] == ""
    assert {method for method, rank in ranks.items() if rank == "tie"} == set(shares) - {"head"}
    assert len(found["tests"]) == 10
    assert [t["p_holm"] for t in found["tests"]] == pytest.approx(
        multipletests([t["p"] for t in found["tests"]], method="holm")[1]
    )
    assert all((t["p_holm"] <= 0.05) == (t["verdict"] != "tie") for t in found["tests"])


def test_friedman_and_critical_difference_over_seeds(make_run: MakeRun, tmp_path: Path) -> None:
    values = np.array([[0.9, 0.8, 0.7], [0.92, 0.81, 0.65], [0.89, 0.9, 0.6], [0.91, 0.7, 0.69]])
    for seed, triple in enumerate(values):
        for method, value in zip(("lora", "head", "full"), triple, strict=True):
            make_run(method, seed, result={"metrics": {"test": {"accuracy": value}}})
    found = compare_folders(tmp_path)
    expected = scipy.stats.friedmanchisquare(*values.T)
    assert (found["omnibus"]["test"], found["omnibus"]["blocks"]) == ("friedman", 4)
    assert (found["omnibus"]["statistic"], found["omnibus"]["p"]) == pytest.approx(
        (expected.statistic, expected.pvalue)
    )
    assert found["critical_difference"]["ranks"] == {"lora": 1.25, "head": 1.75, "full": 3.0}
    assert found["critical_difference"]["cd"] == pytest.approx(
        scipy.stats.studentized_range.ppf(0.95, 3, math.inf) / math.sqrt(2) * math.sqrt(12 / 24)
    )
    assert found["critical_difference"]["cliques"] == [["lora", "head"], ["head", "full"]]


def test_cochran_for_one_seed(make_run: MakeRun, tmp_path: Path) -> None:
    columns = [answers(share, seed) for seed, share in enumerate((0.9, 0.85, 0.8))]
    for method, right in zip(("lora", "head", "full"), columns, strict=True):
        make_run(method, 0, right)
    found = compare_folders(tmp_path)
    expected = cochrans_q(np.array(columns).T)
    assert found["omnibus"]["test"] == "cochran q"
    assert (found["omnibus"]["statistic"], found["omnibus"]["p"]) == pytest.approx(
        (expected.statistic, expected.pvalue)
    )
    assert found["critical_difference"] is None


def test_repeated_splits_are_corrected_for_their_overlap(make_run: MakeRun, tmp_path: Path) -> None:
    shares = {
        "dataset__name": "csv",
        "dataset__path": "a.csv",
        "dataset__test_share": 0.2,
        "dataset__val_share": 0.1,
        "dataset__test_path": None,
    }
    differences = []
    for split in range(6):
        ids = [f"{split}-{i}" for i in range(200)]  # other examples each time
        a, b = answers(0.9, split), answers(0.8, split + 30)
        make_run("lora", 0, a, ids=ids, dataset__split_seed=split, **shares)
        make_run("head", 0, b, ids=ids, dataset__split_seed=split, **shares)
        differences.append(float(np.mean(b) - np.mean(a)))
    found = compare_folders(tmp_path)
    assert len(found["rows"]) == 2
    assert get_row(found, "head")["versus"]["test"] == "corrected resampled t"
    assert get_row(found, "head")["versus"]["p"] == pytest.approx(
        statistics.corrected_t(differences, 0.2 / 0.7).p
    )


def test_five_halvings_have_a_test_of_their_own(make_run: MakeRun, tmp_path: Path) -> None:
    """The expected p-value is Alpaydin's F with 10 and 5 degrees of freedom, from its formula."""
    shares = {
        "dataset__name": "csv",
        "dataset__path": "a.csv",
        "dataset__test_share": 0.5,
        "dataset__val_share": 0.1,
        "dataset__test_path": None,
    }
    d = np.zeros((5, 2))
    for split, fold in itertools.product(range(5), range(2)):
        ids = [f"{split}-{fold}-{i}" for i in range(200)]
        a, b = answers(0.9, 2 * split + fold), answers(0.86, split + 30 + 5 * fold)
        for method, right in (("lora", a), ("head", b)):
            make_run(method, 0, right, ids=ids, dataset__split_seed=split, dataset__fold=fold, **shares)
        d[split, fold] = np.mean(b) - np.mean(a)
    f = (d**2).sum() / (2 * ((d - d.mean(1, keepdims=True)) ** 2).sum())
    versus = get_row(compare_folders(tmp_path), "head")["versus"]
    assert (versus["test"], versus["low"]) == ("5x2cv F", None)
    assert (versus["difference"], versus["p"]) == pytest.approx((d.mean(), scipy.stats.f.sf(f, 10, 5)))
    assert 0.001 < versus["p"] < 0.9
    shutil.rmtree(
        next(
            path
            for path in (tmp_path / "outputs").rglob("result.json")
            if json.loads(path.read_text())["method"] == "head"
        ).parent
    )
    assert get_row(compare_folders(tmp_path), "head")["versus"]["test"] == "corrected resampled t"


def test_settings_that_differ_make_rows(make_run: MakeRun, tmp_path: Path) -> None:
    """The method determines the rank, but not the sparsity of snell; lora has no sparsity."""
    for seed in (0, 1):
        make_run("lora", seed, answers(0.9, seed), method__rank=8)
        for sparsity in (0.9, 0.99):
            make_run("snell", seed, answers(sparsity - 0.1, seed), method__sparsity=sparsity, method__rank=4)
    found = compare_folders(tmp_path)
    assert found["by"] == ["method", "sparsity"]
    assert {r["label"]: r["by"] for r in found["rows"]} == {
        "lora": {"method": "lora", "sparsity": None},
        "snell sparsity=0.9": {"method": "snell", "sparsity": 0.9},
        "snell sparsity=0.99": {"method": "snell", "sparsity": 0.99},
    }
    assert found["fairness"] == []
    pooled = compare_folders(tmp_path, by=["method"])
    assert get_row(pooled, "snell")["finished"] == 4
    assert any("differ in sparsity" in note for note in pooled["notes"])
    assert {r["label"] for r in compare_folders(tmp_path, by=["sparsity"])["rows"]} == {
        "no sparsity",
        "sparsity=0.9",
        "sparsity=0.99",
    }


def test_tuned_settings_make_no_rows(make_run: MakeRun, tmp_path: Path) -> None:
    for method, rate in (("lora", 0.01), ("head", 0.1)):
        for seed in (0, 1):
            make_run(
                method,
                seed,
                answers(0.9, seed),
                optimizer__lr=rate * (1 + seed),
                tuning={"parameter": "optimizer.lr", "trials": 5, "chosen": rate},
            )
    found = compare_folders(tmp_path)
    assert sorted((r["label"], r["finished"], r["trials"]) for r in found["rows"]) == [
        ("head", 2, 5),
        ("lora", 2, 5),
    ]
    assert found["fairness"] == []


@pytest.mark.parametrize("into", ["sweep", "other"])
def test_a_configuration_tuned_twice_makes_a_row_for_each_value(
    make_run: MakeRun, tmp_path: Path, into: str
) -> None:
    """The runs may lie in one folder or in two. With ``--by`` they share a row, and every run counts."""
    for method, rate, folder in (("lora", 0.01, "sweep"), ("head", 0.1, "sweep"), ("head", 0.2, into)):
        for seed in (0, 1):
            make_run(
                method,
                seed,
                answers(rate + 0.6),
                optimizer__lr=rate,
                into=folder,
                tuning={"parameter": "optimizer.lr", "trials": 5, "chosen": rate},
            )
    found = compare_folders(tmp_path, tmp_path / "outputs")
    assert found["by"] == ["method", "optimizer.lr"]
    rows = {r["label"]: (r["seeds"], r["missing"], len(set(r["values"]))) for r in found["rows"]}
    assert rows == {
        name: ([0, 1], 0, 1)
        for name in ("lora optimizer.lr=0.01", "head optimizer.lr=0.1", "head optimizer.lr=0.2")
    }
    pooled = compare_folders(tmp_path, tmp_path / "outputs", by=["method"])
    head = get_row(pooled, "head")
    assert (head["finished"], head["missing"], len(head["values"])) == (4, 0, 4)
    assert any("Some rows contain runs that differ in optimizer.lr" in note for note in pooled["notes"])


def test_a_tuned_run_and_an_untuned_one_of_its_seed_are_two_rows(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(
        "lora",
        0,
        answers(0.9),
        optimizer__lr=0.1,
        tuning={"parameter": "optimizer.lr", "trials": 5, "chosen": 0.1},
    )
    make_run("lora", 0, answers(0.8))
    assert {r["label"]: r["missing"] for r in compare_folders(tmp_path)["rows"]} == {
        "optimizer.lr=0.1": 0,
        "optimizer.lr=0.001": 0,
    }


def test_runs_of_a_pooled_row_are_paired_whatever_their_tuned_setting(
    make_run: MakeRun, tmp_path: Path
) -> None:
    for method, sparsity, rate in (
        ("snell", 0.9, 0.1),
        ("snell", 0.99, 0.2),
        ("spiel", 0.9, 0.3),
        ("spiel", 0.99, 0.4),
    ):
        for seed in (0, 1):
            tuning = {"parameter": "optimizer.lr", "trials": 5, "chosen": rate}
            make_run(
                method,
                seed,
                answers(sparsity - rate, seed),
                method__sparsity=sparsity,
                optimizer__lr=rate,
                tuning=tuning,
            )
    found = compare_folders(tmp_path, by=["method"])
    assert [r["versus"]["test"] for r in found["rows"] if r["versus"]] == ["seeds and examples"]
    assert not any("lr" in note for note in found["notes"])


def test_trials_of_a_tuning_make_no_rows(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, answers(0.9))
    make_run("head", 0, answers(0.9), into="sweep/trials")
    assert [r["label"] for r in compare_folders(tmp_path)["rows"]] == ["lora"]


def test_failed_and_unfinished_runs_stay(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, answers(0.9))
    make_run("lora", 1, status="failed")
    make_run("lora", 2, status="unfinished")
    make_run("head", 0, status="failed")
    found = compare_folders(tmp_path)
    lora, head = get_row(found, "lora"), get_row(found, "head")
    assert (lora["finished"], lora["failed"], lora["unfinished"], lora["single_seed"]) == (1, 1, 1, True)
    assert (head["finished"], head["failed"], head["mean"], head["values"], head["trained"]) == (
        0,
        1,
        None,
        [],
        None,
    )
    assert lora["errors"][0].endswith(": out of memory")
    assert found["rows"][-1] == head
    (failures,) = [finding for finding in found["fairness"] if finding["kind"] == "failures"]
    assert failures["values"] == {"lora": "1 failed, 1 unfinished", "head": "1 failed"}


def test_only_failures_still_make_a_table(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, status="failed")
    assert get_row(compare_folders(tmp_path), "lora")["failed"] == 1


def test_missing_metrics_are_counted(make_run: MakeRun, tmp_path: Path) -> None:
    make_run(
        "lora",
        0,
        answers(0.9),
        result={"metrics": {"test": {"accuracy": 0.9}, "retention": {"accuracy": 0.5}}},
    )
    make_run("lora", 1, answers(0.9))
    make_run("head", 0, answers(0.9))
    found = compare_folders(tmp_path, metric="retention.accuracy")
    assert (
        get_row(found, "lora")["missing"],
        get_row(found, "lora")["values"],
        get_row(found, "head")["missing"],
    ) == (
        1,
        [0.5],
        1,
    )
    assert any(
        "2 finished runs without retention.accuracy: 1 of lora, 1 of head" in note for note in found["notes"]
    )
    assert get_row(found, "lora")["retention"] == {"mean": 0.5, "low": None, "high": None, "base": None}


def test_predictions_that_contradict_the_result_are_not_used(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, answers(0.9))
    make_run("head", 0, answers(0.6), result={"metrics": {"test": {"accuracy": 0.99}}})
    found = compare_folders(tmp_path)
    assert get_row(found, "lora")["versus"]["test"] == "none"
    assert any("result.json says 0.99" in note for note in found["notes"])


def test_baseline(make_run: MakeRun, tmp_path: Path) -> None:
    for method, share in (("lora", 0.9), ("head", 0.5), ("full", 0.7)):
        for seed in (0, 1, 2):
            make_run(method, seed, answers(share, seed))
    found = compare_folders(tmp_path, baseline="full")
    assert (found["baseline"], get_row(found, "full")["versus"]) == ("full", None)
    assert {r["label"]: r["versus"]["verdict"] for r in found["rows"] if r["versus"]} == {
        "lora": "better",
        "head": "worse",
    }
    assert get_row(found, "lora")["rank"] == "best"
    with pytest.raises(ConfigError, match=r"--baseline ful is not a row. Did you mean 'full'"):
        compare_folders(tmp_path, baseline="ful")


def test_baseline_by_its_values(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, answers(0.9), method__rank=8)
    for sparsity in (0.9, 0.99):
        make_run("snell", 0, answers(0.8), method__sparsity=sparsity)
    assert compare_folders(tmp_path, baseline="snell,0.99")["baseline"] == "snell sparsity=0.99"
    assert compare_folders(tmp_path, baseline="lora")["baseline"] == "lora"
    with pytest.raises(ConfigError, match=r"could be snell sparsity=0.9, snell sparsity=0.99"):
        compare_folders(tmp_path, baseline="snell")


def test_different_data_or_tasks_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, answers(0.9))
    make_run("lora", 1, answers(0.9), dataset__name="csv", dataset__path="a.csv")
    with pytest.raises(ConfigError, match=r"2 data sets.*digits: 1 run, such as .*csv a.csv: 1 run,"):
        compare_folders(tmp_path)


def test_a_metric_that_no_run_has(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, answers(0.9))
    with pytest.raises(ConfigError, match=r"no run has it. Did you mean 'test.accuracy'"):
        compare_folders(tmp_path, metric="test.acuracy")


def test_words_of_by_that_are_no_setting(make_run: MakeRun, tmp_path: Path) -> None:
    make_run("lora", 0, answers(0.9))
    with pytest.raises(ConfigError) as caught:
        compare_folders(tmp_path, by=["methd", "seed", "lr"])
    assert len(caught.value.faults) == 2
    assert "Did you mean 'method'" in caught.value.faults[0]


def test_curves_have_bands(make_run: MakeRun, tmp_path: Path) -> None:
    for seed, values in enumerate(((0.5, 0.8), (0.7, 0.9))):
        lines = [
            {"step": 1, "loss": 2.0 + seed},
            {"step": 2, "loss": 1.0},
            {"step": 2, "val_accuracy": values[0], "val_loss": 0.5},
        ]
        lines += [{"step": 3, "loss": 0.25}, {"step": 4, "val_accuracy": values[1]}]
        file = make_run("lora", seed, answers(0.9)) / "metrics.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "val_acc')
    first, second = get_row(compare_folders(tmp_path), "lora")["curve"]
    assert (first["step"], first["mean"], first["loss"]) == (
        2,
        pytest.approx(0.6),
        pytest.approx((1.5 + 2.0) / 2),
    )
    assert (first["low"], first["high"]) == pytest.approx(scipy.stats.t.interval(0.95, 1, 0.6, 0.1))
    assert (second["step"], second["loss"]) == (4, 0.25)


def test_the_command_repeats_the_run(make_run: MakeRun, tmp_path: Path) -> None:
    """Parsing the command gives the frozen configuration again."""
    data_set = ["dataset=csv", 'dataset.path="my data, 1.csv"', "dataset.text_column=null"]
    config = load(
        ["method=snell", "sparsity=0.95", "seed=3", "optimizer.betas=[0.8,0.9]", "train.steps=7", *data_set]
    )
    folder = tmp_path / "run"
    folder.mkdir()
    write_yaml_atomic(folder / "config.yaml", config.as_dict())
    for defaults in (None, lambda choices: {key: value for key, (value, _) in tree(list(choices)).items()}):
        (only,) = compare([folder]).as_dict(defaults=defaults)["rows"]
        words = shlex.split(only["command"])
        assert words[:2] == ["finetune", "train"]
        assert load(words[2:]).hash() == config.hash()
    assert "train.steps=7" in words
    assert "train.batch_size=16" not in words


@pytest.mark.parametrize(
    "repeated",
    [
        ["seed=0,1,2"],
        ["seed=4", "dataset.split_seed=0,1", "dataset.fold=0,1"],
        ["method.rank=2,3", "seed=0,1"],
    ],
)
@pytest.mark.parametrize("skipped", [0, 1])
def test_the_command_repeats_the_whole_row(tmp_path: Path, repeated: list[str], skipped: int) -> None:
    """The command repeats every run of the row and no other, with as many threads."""
    words = [
        "method=lora",
        "dataset=csv",
        "dataset.path=a.csv",
        "dataset.test_share=0.5",
        "dataset.val_share=0.1",
        "train.steps=7",
        *repeated,
    ]
    for point in list_points(words)[skipped:]:
        folder = tmp_path / point.folder.path.name
        folder.mkdir()
        write_yaml_atomic(folder / "config.yaml", point.config.as_dict())
        result = {
            "status": "finished",
            "threads": 3,
            "processes": 1,
            "seed": point.config.seed,
            "config_hash": point.config.hash(),
        }
        write_json_atomic(folder / "result.json", result)
    (only,) = compare([tmp_path], by=["method"]).as_dict()["rows"]
    found = [
        point.config for part in only["command"].split(" && ") for point in list_points(shlex.split(part)[2:])
    ]
    assert {config.train.threads for config in found} == {3}
    assert sorted(
        replace(config, train=replace(config.train, threads=None)).hash() for config in found
    ) == sorted(point.config.hash() for point in list_points(words)[skipped:])
    if not skipped:
        assert only["command"].count("finetune sweep ") == (2 if "method.rank=2,3" in repeated else 1)


def add_plugin(run: Path, name: str, digit: str, version: str = "") -> None:
    """Write what a run records of a plug-in into its config.yaml."""
    record = json.dumps({"name": name, "version": version, "sha256": digit * 64})
    first, _, rest = (run / "config.yaml").read_text().partition("\n")
    (run / "config.yaml").write_text(f"{first}\n# plug-in {record}\n{rest}")


def test_the_plug_ins_that_a_command_needs_are_named(make_run: MakeRun, tmp_path: Path) -> None:
    """A run has a record of its plug-ins even if it has no result."""
    make_run("lora", 0, [1, 0])
    add_plugin(make_run("mine", 0, [1, 1]), "lab", "a", "1.2")
    add_plugin(make_run("mine", 1, [1, 1]), "lab", "a", "1.2")
    add_plugin(make_run("theirs", 0, status="unfinished"), "other", "c")
    found = compare_folders(tmp_path)
    assert get_row(found, "lora")["plugins"] == []
    assert get_row(found, "mine")["plugins"] == ["lab 1.2 (SHA-256 aaaaaaaaaa)"]
    assert get_row(found, "theirs")["plugins"] == ["other (SHA-256 cccccccccc)"]
    notes = [note for note in found["notes"] if "plug-in" in note]
    cure = "Add --plugins DIR with its folder to the command, unless it is an installed package."
    assert notes == [
        f"mine: training again needs the plug-in lab 1.2 (SHA-256 aaaaaaaaaa). {cure}",
        f"theirs: training again needs the plug-in other (SHA-256 cccccccccc). {cure}",
    ]
    assert not any("--plugins" in row["command"] for row in found["rows"])


def test_other_code_of_a_plug_in_between_seeds_is_a_note(make_run: MakeRun, tmp_path: Path) -> None:
    add_plugin(make_run("mine", 0, [1, 1]), "lab", "a")
    add_plugin(make_run("mine", 1, [1, 0]), "lab", "b")
    found = compare_folders(tmp_path)
    both = "lab (SHA-256 aaaaaaaaaa), lab (SHA-256 bbbbbbbbbb)"
    assert f"The code of the plug-in lab changed between these runs: {both}." in found["notes"]


@pytest.mark.parametrize("result", [{"threads": 2}, {"threads": 3, "processes": 2}, {}])
def test_the_command_gives_no_threads_where_the_runs_do_not_agree(
    make_run: MakeRun, tmp_path: Path, result: dict[str, Any]
) -> None:
    make_run("lora", 0, answers(0.9), result={"threads": 3, "processes": 1})
    make_run("lora", 1, answers(0.9), result=result)
    assert "train.threads=null" in get_row(compare_folders(tmp_path), "lora")["command"]
