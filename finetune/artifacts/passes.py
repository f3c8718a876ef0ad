"""Run a pass over the weights of a model folder, site by site, and write a new Hugging Face folder.

The folder is copied first, and each site's weight is then overwritten in its place in the copy, so the model
is never whole in memory unless the pass needs statistics. A pass that replaces weights by structures writes
new files of weights instead (``structured_output.py``). A journal beside the copy lists the finished sites:
after a kill, the same command goes on with the next one and ends with the same bytes. Everything is read back
before the folder gets its name. ``finetune/pass.json`` inside it says what was done.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.settings import to_plain
from ..core.passes import Pruned, weight_of
from ..core.site import Site
from ..core.statistics import SiteStatistics, gather_statistics
from ..core.structure import Structured
from ..errors import ConfigError, RunFailed
from ..models.sidecar import write_entries
from ..storage import manifest
from ..storage.atomic import STAMP, replacing, sync_to_disk, write_json_atomic
from ..storage.lock import holding_lock
from ..storage.tensor_file import TensorFile, raw_bytes
from ..system import safe
from .graft import graft_head
from .model_files import fingerprint_files
from .pass_masks import create_masks, prove_masks, update_mask
from .pass_subject import ABOUT, FOLDER, Request, Subject, open_subject, turned
from .structured_output import StructuredOutput, check_structured, raise_not_proved

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")  # what stands beside the weights
GRAFTED = "grafted"  # the copy of the model with the head of another one
Row = dict[str, Any]


def plan(request: Request) -> dict[str, Any]:
    """Return what ``run`` would do. Nothing is written."""
    subject = open_subject(request)
    rows = []
    for site in subject.sites:
        rows.append({"site": site.name, "role": site.role, "block": site.block, "entries": site.size})
    several: dict[str, Any] = {}
    if subject.parents:
        several["parents"] = [{"path": str(parent.path), **parent.about} for parent in subject.parents]
        several["head"] = None if subject.head is None else str(subject.parents[subject.head].path)
    return {
        "method": request.method.name,
        "settings": _settings(request.method),
        "model": request.model,
        **several,
        "out": str(request.out),
        "entries": sum(site.size for site in subject.sites),
        "calibration": len(subject.examples),
        "sites": rows,
    }


def _settings(method: Any) -> dict[str, Any]:
    """Return the settings of a pass as plain values, without its name."""
    plain: dict[str, Any] = json.loads(json.dumps(to_plain(method)))
    plain.pop("name", None)
    return plain


def run(request: Request, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run a pass and write its folder; return what ``finetune/pass.json`` says of it.

    ``report`` takes a line for each finished site. Raises ``ConfigError``, with nothing written, for a fault
    of the request, and ``RunFailed`` if what was written differs when it is read back.
    """
    return process(request, open_subject(request), report)


def process(
    request: Request, subject: Subject, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Do what ``run`` does, with a subject that has been opened."""
    work = request.out.with_name(f".{request.out.name}.pass")
    try:
        with holding_lock(work):
            step = _begin(request, subject, work)
            if subject.head is not None:
                subject = graft_head(subject, work / GRAFTED)
            _copy_beside(subject, work / "model")
            output: InPlace | StructuredOutput = InPlace(subject, work / "model")
            if request.writes_structures:
                output = StructuredOutput(subject, work / "model", work / "tensors")
            masks = create_masks(request, subject, work / "model")
            rows = _work_on_sites(request, subject, output, masks, work / "sites.jsonl", report)
            try:
                output.finish(rows)
                output.prove(rows)
                prove_masks(subject, masks, rows)
            except RunFailed:
                shutil.rmtree(work / "model")
                (work / "sites.jsonl").unlink(missing_ok=True)
                raise
            step |= {"fingerprint": fingerprint_files(output.files()), **_totals(rows), "sites": rows}
            _describe(work / "model", [*subject.chain, step])
            request.out.parent.mkdir(parents=True, exist_ok=True)
            (work / "model").replace(request.out)
            sync_to_disk(request.out.parent)
        shutil.rmtree(work)
    except OSError as error:
        raise ConfigError(
            f"out={request.out} cannot be written: {error.strerror or error}. "
            "Choose a place with free space that you may write to."
        ) from error
    return {"out": str(request.out), **step}


def _begin(request: Request, subject: Subject, work: Path) -> dict[str, Any]:
    """Return the description of this pass without its results.

    Raises ``ConfigError`` if ``work`` holds an unfinished pass that was begun differently.
    """
    method = request.method
    step: dict[str, Any] = {
        "verb": method.verb,
        "method": method.name,
        "settings": _settings(method),
        "parent": subject.fingerprint(),
    }
    if subject.parents:
        step["parents"] = [parent.about for parent in subject.parents]
        step["head"] = subject.head
    if request.dense:
        step["dense"] = True
    if method.needs:
        step["calibration"] = {
            "dataset": json.loads(json.dumps(to_plain(request.dataset))),
            "examples": len(subject.examples),
            "seed": request.seed,
        }
    begun = work / "request.json"
    if begun.exists() and (work / "model").exists():
        if safe.read_json(begun) != step:
            raise ConfigError(
                f"{work} holds an unfinished pass with other settings or of another model. Repeat its "
                "command to go on with it, remove the folder, or choose another out=FOLDER."
            )
        return step
    (work / "sites.jsonl").unlink(missing_ok=True)
    shutil.rmtree(work / GRAFTED, ignore_errors=True)
    write_json_atomic(begun, step)
    return step


def _copy_beside(subject: Subject, target: Path) -> None:
    """Copy the files of the model that stand beside its weights and are not there yet."""
    target.mkdir(exist_ok=True)
    files: set[Path] = set()
    for pattern in COPIED:
        files.update(subject.folder.glob(pattern))
    for file in sorted(files):
        copied = target / file.name
        if file.is_file() and not copied.exists():
            with replacing(copied) as temporary:
                shutil.copyfile(file, temporary)


class InPlace:
    """A copy of the model's files of weights, in which the weights of sites are overwritten."""

    def __init__(self, subject: Subject, target: Path) -> None:
        """Copy the files that are not there yet."""
        self.subject, self.target = subject, target
        for file in subject.files:
            copied = target / file.path.name
            if not copied.exists():
                with replacing(copied) as temporary:
                    shutil.copyfile(file.path, temporary)
        self.copy = {file.path: TensorFile(target / file.path.name) for file in subject.files}

    def write(self, site: Site, new: Tensor) -> Row:
        """Overwrite the weight of a site; return what its row says of the result."""
        file, name = self.subject.places[site.name]
        stored = turned(new, site)
        self.copy[file.path].overwrite(name, stored)
        return {"sha256": hashlib.sha256(raw_bytes(stored)).hexdigest()}

    def read(self, site: Site, row: Row) -> Tensor:
        """Return the weight of a finished site, in its stored layout."""
        file, name = self.subject.places[site.name]
        return self.copy[file.path].read(name)

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the file that names the structures of the model, if it has any."""
        if self.subject.structures:
            write_entries(self.subject.structures, self.target)

    def prove(self, rows: Sequence[Row]) -> None:
        """Raise ``RunFailed`` unless the files hold what they must."""
        prove(self.subject, self.copy, rows)

    def files(self) -> list[TensorFile]:
        """Return the files of weights."""
        return list(self.copy.values())


def _read_journal(file: Path) -> list[Row]:
    """Return the rows of the finished sites. A last line that was cut short by a kill is removed."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        with replacing(file) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    return [json.loads(line) for line in lines]


def _work_on_sites(
    request: Request,
    subject: Subject,
    output: Any,
    masks: TensorFile | None,
    journal: Path,
    report: Callable[[str], None],
) -> list[Row]:
    """Process the sites that are not finished, block by block; return the rows of all."""
    rows = _read_journal(journal)
    finished = len(rows)
    first = 0
    for _, group in groupby(subject.sites, key=lambda site: site.block):
        block = list(group)
        left = block[max(0, finished - first) :]
        first += len(block)
        gathered: dict[str, SiteStatistics] = {}
        started = time.perf_counter()
        if left and request.method.needs:
            gathered = gather_statistics(
                subject.model, block, request.method.needs, subject.batches(), dtype=torch.float64
            )
        for site in left:
            row = _process(request, subject, site, output, masks, gathered.get(site.name))
            row["seconds"] = time.perf_counter() - started
            started = time.perf_counter()
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
            rows.append(row)
            report(f"{len(rows)}/{len(subject.sites)} {site.name}: {_describe_row(row)}")
        if request.method.is_sequential():
            _put_into_model(block, rows[first - len(block) : first], output)
    return rows


def _process(
    request: Request,
    subject: Subject,
    site: Site,
    output: Any,
    masks: TensorFile | None,
    statistics: SiteStatistics | None,
) -> Row:
    """Compute and write the new weight of one site, or what replaces it; return its row."""
    method = request.method
    file, name = subject.places[site.name]
    weight = subject.read(file, site)
    changes = [parent.change(site, weight) for parent in subject.parents]
    result = apply(method, site, weight.clone(), statistics, changes)
    new = weight_of(result)
    row: Row = {
        "site": site.name,
        "tensor": name,
        "role": site.role,
        "block": site.block,
        "entries": site.size,
    }
    if isinstance(new, Structured):
        check_structured(method.name, site, weight, new)
        structure, dense = new.structure, new.dense()
        row["structure"] = {"structure": structure.name, **structure.sizes()}
        row["parameters"] = sum(tensor.numel() for tensor in new.tensors.values())
        if request.dense:
            new = dense.to(weight.dtype)
    else:
        dense = new
    if isinstance(new, Tensor):
        if new.shape != weight.shape or new.dtype != weight.dtype:
            raise RunFailed(
                f"method={method.name} made a {new.dtype} of shape {list(new.shape)} for {site.name}, not a "
                f"{weight.dtype} of shape {list(weight.shape)}."
            )
        row |= {"zeros": int((new == 0).sum()), "changed": int((new != weight).sum())}
    row["relative_change"] = _ratio((dense - weight).double().norm(), weight.double().norm())
    row["relative_output_error"] = relative_output_error(weight, dense, statistics)
    row |= update_mask(subject, masks, site, result, new)
    row |= output.write(site, new)
    return row


def _describe_row(row: Row) -> str:
    """Say in a few words what was made of a site."""
    change = f"relative change {row['relative_change']:.3g}"
    if "structure" not in row:
        return f"{row['zeros']:,} zeros" if row["zeros"] else change
    return f"{row['parameters']:,} of {row['entries']:,} entries, {change}"


def apply(
    method: Any,
    site: Site,
    weight: Tensor,
    statistics: SiteStatistics | None,
    changes: Sequence[Tensor | None],
) -> Tensor | Structured | Pruned:
    """Return what a pass makes of the weight of a site, [out, in]. ``changes``: of further models."""
    if method.models == "one":
        made: Tensor | Structured | Pruned = method.tensor(site, weight, statistics)
        return made
    combined: Tensor = method.combine(site, weight.double(), changes)
    return combined.to(weight.dtype)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else 0.0


def relative_output_error(weight: Tensor, new: Tensor, statistics: SiteStatistics | None) -> float | None:
    """Return the norm of the change of a site's outputs divided by the norm of its outputs.

    It is exact where the inputs' gram is known. Where only the squares of the inputs are known, they are
    assumed to be uncorrelated. None without either. The bias does not count.
    """
    values = statistics.values if statistics else {}
    change, whole = (new.double() - weight.double()).cpu(), weight.double().cpu()
    if "input_gram" in values:
        gram = values["input_gram"].double().cpu()
        return _ratio(((change @ gram) * change).sum().sqrt(), ((whole @ gram) * whole).sum().sqrt())
    if "input_squares" in values:
        norms = values["input_squares"].double().cpu().sqrt()
        return _ratio((change * norms).norm(), (whole * norms).norm())
    return None


@torch.no_grad()
def _put_into_model(block: Sequence[Site], rows: Sequence[Row], output: Any) -> None:
    """Give the sites of a finished block their new weights in the loaded model."""
    for site, row in zip(block, rows, strict=True):
        site.module.get_parameter("weight").copy_(output.read(site, row))


def prove(subject: Subject, copy: Mapping[Path, TensorFile], rows: Sequence[Row]) -> None:
    """Read back every tensor and raise ``RunFailed`` unless its bytes are what they must be.

    A site's must be those that were computed, every other tensor's those of the model.
    """
    computed = {row["tensor"]: row["sha256"] for row in rows}
    for file in subject.files:
        copied = copy[file.path]
        wrong = [] if copied.header == file.header else ["the header"]
        for name in file.names:
            expected = computed.get(name) or file.sha256(name)
            if copied.sha256(name) != expected:
                wrong.append(name)
        if wrong:
            raise_not_proved(copied.path, wrong[0])


def _totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Return sums over the sites."""
    totals: dict[str, Any] = {}
    for row in rows:
        for name in ("seconds", "entries", "parameters", "zeros", "held"):
            if name in row:
                totals[name] = totals.get(name, 0) + row[name]
    if "parameters" in totals:
        totals["share_kept"] = totals["parameters"] / totals["entries"]
    if "zeros" in totals:
        totals["share_of_zeros"] = totals["zeros"] / totals["entries"]
    return totals


def _describe(folder: Path, chain: Sequence[Mapping[str, Any]]) -> None:
    """Write ``finetune/pass.json`` and the manifest beside it."""
    about = folder / FOLDER
    about.mkdir(exist_ok=True)
    write_json_atomic(about / ABOUT, {**STAMP, "manifest": manifest.NAME, "chain": list(chain)})
    manifest.write(about)
