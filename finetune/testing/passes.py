"""Check what every pass must guarantee: ``check_pass(Magnitude(sparsity=0.5))``.

The reference is the pass applied to a whole model in memory, which knows nothing of files, names and
journals.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..artifacts.model_files import StoredModel
from ..artifacts.parents import open_parents
from ..artifacts.pass_subject import Request, Subject, make_subject
from ..artifacts.passes import apply, process
from ..core.passes import Pass, Pruned, weight_of
from ..core.roles import is_transposed
from ..core.site import Site, find_sites
from ..core.statistics import gather_statistics
from ..core.structure import Structured
from ..errors import RunFailed
from ..models.masks import FILE, pack_mask
from ..models.sidecar import make_module, replace_module
from ..models.stored import match_names
from ..storage.tensor_file import TensorFile
from .sessions import Kind, examples, tiny


class Stopped(BaseException):
    """Stands for a kill."""


@dataclass
class PassTrial:
    """One pass on one kind of model. Every run works on its own folder in ``root``.

    ``masks``: the mask of each stored weight that ``whole`` has pruned.
    """

    method: Pass
    kind: Kind
    root: Path
    masks: dict[str, Tensor] = field(default_factory=dict)

    def subject(self, folder: str = "model") -> Subject:
        """Open a folder again, as a new process would."""
        place = self.root / folder
        model = tiny(self.kind)
        if not place.exists():
            model.save_pretrained(place)
        files = [TensorFile(place / "model.safetensors")]
        tensors = load_file(files[0].path)
        stored = match_names(model, files[0].names)
        model.load_state_dict({own: tensors[name] for own, name in stored.items()}, strict=False)
        sites = find_sites(model.requires_grad_(False), self.method.targets)
        data = examples(self.kind) if self.method.needs else []
        subject = make_subject(place, files, model, sites, [], data)
        if self.method.models == "several":
            subject.parents = open_parents(self.further(), StoredModel(place, files, model), sites)
        return subject

    def further(self) -> list[Path]:
        """Return the folders of two models that differ from the first in the weights of the sites."""
        places = []
        for number in range(2):
            place = self.root / f"further-{number}"
            places.append(place)
            if place.exists():
                continue
            model = tiny(self.kind)
            generator = torch.Generator().manual_seed(number)
            for site in find_sites(model.requires_grad_(False), self.method.targets):
                weight = site.module.get_parameter("weight")
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
            model.save_pretrained(place)
        return places

    def run(self, out: str, report: Callable[[str], None] = lambda line: None, model: str = "model") -> Path:
        """Run the pass into the folder ``out``, and return it."""
        place = self.root / out
        subject = self.subject(model)
        faults = self.method.faults(subject.sites)
        assert not faults, faults
        process(Request(self.method, model, place), subject, report)
        return place

    def whole(self, stored: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors that the pass makes of the whole model in memory, by their ``stored`` names."""
        subject = self.subject()
        blocks: dict[int, list[Site]] = {}
        for site in subject.sites:
            blocks.setdefault(site.block, []).append(site)
        observed = subject.model  # computes the statistics
        result = observed if self.method.is_sequential() else copy.deepcopy(observed)
        for _, sites in sorted(blocks.items()):
            found: dict[str, Any] = {}
            if self.method.needs:
                found = gather_statistics(
                    observed, sites, self.method.needs, subject.batches(), dtype=torch.float64
                )
            for site in sites:
                parameter = result.get_submodule(site.name).weight
                weight = site.as_matrix(parameter).clone()
                changes = _read_changes(subject, site, weight)
                made = apply(self.method, site, weight, found.get(site.name), changes)
                new = weight_of(made)
                if isinstance(new, Tensor):
                    parameter.data = new.T if is_transposed(site.module) else new
                else:
                    replace_module(result, site.name, make_module(new.structure, new.tensors, site.module))
                if isinstance(made, Pruned):
                    name = subject.places[site.name][1]
                    self.masks[name] = pack_mask(made.zeros.T if is_transposed(site.module) else made.zeros)
        tensors = result.state_dict()
        return {name: tensors[own].contiguous() for own, name in match_names(result, stored).items()}


def check_streamed_is_whole(trial: PassTrial) -> None:
    """The folder holds, to the bit, what the pass makes of the whole model in memory."""
    folder = trial.run("streamed")
    found = load_file(folder / "model.safetensors")
    expected = trial.whole(found)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} differs from the pass over the whole model"
    for name, packed in trial.masks.items():
        written = load_file(folder / FILE)[name]
        assert torch.equal(written, packed), f"the mask of {name} is not that of the pass"


def _read_changes(subject: Subject, site: Site, weight: Tensor) -> list[Tensor]:
    """Return what the further models of a trial add to the weight of a site; none changes nothing."""
    found = []
    for parent in subject.parents:
        change = parent.change(site, weight)
        assert change is not None
        found.append(change)
    return found


def check_weight_is_left_alone(trial: PassTrial) -> None:
    """``tensor`` or ``combine`` changes nothing that it was given, and gives the same again."""
    subject = trial.subject()
    found: dict[str, Any] = {}
    if trial.method.needs:
        found = gather_statistics(subject.model, subject.sites, trial.method.needs, subject.batches())
    for site in subject.sites:
        weight = site.as_matrix(site.module.get_parameter("weight")).clone()
        before, statistics = weight.clone(), found.get(site.name)
        kept = copy.deepcopy(statistics)
        changes = _read_changes(subject, site, weight)
        kept_changes = copy.deepcopy(changes)
        first = weight_of(apply(trial.method, site, weight, statistics, changes))
        assert torch.equal(weight, before), f"the weight of {site.name} was changed in place"
        for change, kept_change in zip(changes, kept_changes, strict=True):
            assert torch.equal(change, kept_change), f"a change of {site.name} was changed in place"
        if statistics is not None and kept is not None:
            for name, value in statistics.values.items():
                assert torch.equal(value, kept.values[name]), f"{name} of {site.name} was changed in place"
        second = weight_of(apply(trial.method, site, weight, statistics, changes))
        assert _equal(first, second), f"{site.name} differs in a second call with the same arguments"
        if trial.method.idempotent and isinstance(first, Tensor):
            third = weight_of(apply(trial.method, site, first, statistics, changes))
            assert _equal(first, third), f"{site.name} changes again in a second run of the pass"


def _equal(first: Tensor | Structured, second: Tensor | Structured) -> bool:
    """Tell whether two results of a pass are the same to the bit."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    if first.structure != second.structure or first.tensors.keys() != second.tensors.keys():
        return False
    return all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def check_restart(trial: PassTrial) -> None:
    """A pass that is stopped goes on and ends with the bytes of an undisturbed one.

    It is stopped inside a block, between blocks and behind the last site.
    """
    undisturbed = _read_tensors(trial.run("undisturbed"))
    sites = len(trial.subject().sites)
    for stop in sorted({1, sites // 4, sites // 2, sites - 1, sites}):
        done = 0

        def report(line: str, stop: int = stop) -> None:
            nonlocal done
            done += 1
            if done == stop:
                raise Stopped

        out = f"stopped-{stop}"
        try:
            trial.run(out, report)
        except Stopped:
            assert not (trial.root / out).exists(), "a folder that is not finished has its name"
        else:
            raise AssertionError("the pass was not stopped")
        finished = _read_tensors(trial.run(out))
        assert finished == undisturbed, f"other bytes after a stop behind site {stop}"


def _read_tensors(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the files of tensors in a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


def check_proof(trial: PassTrial) -> None:
    """A byte that changes after it was written is found, and no folder gets its name."""
    sites, done = len(trial.subject().sites), 0

    def report(line: str) -> None:
        nonlocal done
        done += 1
        if done == sites:
            work = trial.root / ".damaged.pass"
            kept = work / "tensors" / "0.safetensors"  # of a pass that makes structures
            _flip_last_byte(kept if kept.exists() else work / "model" / "model.safetensors")

    try:
        trial.run("damaged", report)
    except RunFailed:
        assert not (trial.root / "damaged").exists()
        return
    raise AssertionError("a changed byte was not found")


def _flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


PASS_CHECKS = {
    "streamed": check_streamed_is_whole,
    "pure": check_weight_is_left_alone,
    "restart": check_restart,
    "proof": check_proof,
}


def check_pass(method: Pass, kind: Kind = "llama") -> None:
    """Run every check of ``PASS_CHECKS`` on a tiny model of two blocks."""
    for run_check in PASS_CHECKS.values():
        with tempfile.TemporaryDirectory() as folder:
            run_check(PassTrial(method, kind, Path(folder)))
