"""What a search may choose from, and the file of lines that it reads while a run goes."""

from __future__ import annotations

from pathlib import Path

from finetune.sweep import lines, space

LR = "optimizer.lr=tag(log,interval(1e-4,1e-1))"


def test_dimensions() -> None:
    words = [
        "method=lora",
        LR,
        "method.rank=interval(2,16)",
        "method.dropout=interval(0,0.5)",
        "method.alpha=choice(1,2.5)",
        "train.batch_size=8,16",
    ]
    fixed, found = space.space([*words, "train.steps=range(10,40,10)"], None)
    assert fixed == ["method=lora"]
    lr, rank, dropout, alpha, batch, steps = found
    assert (lr.low, lr.high, lr.log, lr.whole) == (1e-4, 1e-1, True, False)
    assert (rank.key, rank.low, rank.high, rank.whole) == ("method.rank", 2, 16, True)
    assert (dropout.whole, dropout.options) == (False, ())
    assert [d.options for d in (alpha, batch, steps)] == [("1", "2.5"), ("8", "16"), ("10", "20", "30")]
    assert all(not d.whole for d in (lr, dropout))


def test_whole_numbers_where_the_setting_takes_no_others() -> None:
    found = {
        d.key: d
        for d in space.space(
            [
                "method=shira",
                "sparsity=interval(0,0.9)",
                "optimizer.lr=interval(1,2)",
                "train.steps=interval(2,4)",
            ],
            None,
        )[1]
    }
    assert {key: d.whole for key, d in found.items()} == {
        "method.sparsity": False,
        "optimizer.lr": False,
        "train.steps": True,
    }


def test_lines_of_a_growing_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    read = lines.Lines(file)
    assert read.new() == []
    with file.open("a") as out:
        for text, found in (('{"a": 1}\n{"a"', [{"a": 1}]), (": 2}", []), ("\n", [{"a": 2}]), ("", [])):
            out.write(text)
            out.flush()
            assert read.new() == found
    (tmp_path / "g").write_text('{"a": 3}\n')
    (tmp_path / "g").replace(file)
    assert read.new() == [{"a": 3}]
