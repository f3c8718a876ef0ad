"""Check what a pass is asked to do, and open the model folder that it works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.passes import PassWords
from ..config.settings import ModelConfig
from ..core.roles import is_transposed, layer_role
from ..core.site import Site, find_sites
from ..data.encode import Batch, collate, encode
from ..errors import ConfigError
from ..models.load import load
from ..models.masks import OR_FREE, unpack_mask
from ..models.scratch import describe
from ..models.sidecar import FILE, Structures, read_structures
from ..models.stored import match_names
from ..storage.tensor_file import TensorFile
from ..system import safe
from .model_files import StoredModel, fingerprint_files, open_files
from .parent import Parent
from .parents import find_path_faults, open_parents
from .plain import check_free
from .reopen import place_of
from .stored_masks import open_masks

FOLDER, ABOUT = "finetune", "pass.json"
BATCH = 8  # calibration examples that run at once


@dataclass(frozen=True)
class Request:
    """What is asked for: a pass, the model (folder, hub id or ``builtin:NAME``), and the folder to write.

    ``dataset``, ``calibration`` and ``seed`` are used only by a pass that needs statistics: ``calibration``
    examples of the training split are drawn with the seed. ``runs`` are the further models of a pass over
    several, and ``head`` is the one of them whose head the result has; by default the last one with a head of
    its own.
    ``dense``: multiply structures out, so that the folder is a plain one.
    """

    method: Any
    model: str
    out: Path
    dataset: Any = None
    calibration: int = 128
    seed: int = 0
    runs: tuple[Path, ...] = ()
    head: Path | None = None
    dense: bool = False

    @property
    def writes_structures(self) -> bool:
        """Tell whether weights are replaced by other tensors in the folder."""
        return self.method.makes_structures and not self.dense


@dataclass
class Subject:
    """The model that a pass works on, checked and opened.

    ``sites`` in the order of the blocks. ``places``: the file and the name of the stored weight, by the
    site's name. ``model``: on the meta device, or loaded if the pass needs statistics. ``chain``: the passes
    that made the folder what it is. ``parents``: the further models. ``head``: the number of the one whose
    head the result has; None if it has that of the model. ``structures``: of layers that are stored as other
    tensors, by the names that the layers have in the folder. ``masks``: the folder's file of masks, if it has
    one.
    """

    folder: Path
    files: list[TensorFile]
    sites: list[Site]
    places: dict[str, tuple[TensorFile, str]]
    chain: list[dict[str, Any]]
    model: Any
    examples: list[Any] = field(default_factory=list)
    parents: list[Parent] = field(default_factory=list)
    head: int | None = None
    structures: Structures = field(default_factory=dict)
    masks: TensorFile | None = None

    def batches(self) -> Iterator[Batch]:
        """Yield the calibration data, on the model's device."""
        device = next(self.model.parameters()).device
        for start in range(0, len(self.examples), BATCH):
            batch = collate(self.examples[start : start + BATCH])
            for name, tensor in batch.inputs.items():
                batch.inputs[name] = tensor.to(device)
            yield batch

    def read(self, file: TensorFile, site: Site) -> Tensor:
        """Return a site's weight, [out, in], from ``file``."""
        return turned(file.read(self.places[site.name][1]), site)

    def read_mask(self, site: Site) -> Tensor | None:
        """Return which entries of a site's weight are pruned, [out, in] bool; None if it has no mask."""
        file, name = self.places[site.name]
        if self.masks is None or name not in self.masks.names:
            return None
        return turned(unpack_mask(self.masks.read(name), file.describe(name)[1][1]), site)

    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the names, shapes, dtypes and bytes of all stored tensors."""
        return fingerprint_files(self.files)


def turned(weight: Tensor, site: Site) -> Tensor:
    """Turn a weight from the stored layout to [out, in], or back."""
    return weight.T.contiguous() if is_transposed(site.module) else weight


def open_subject(request: Request) -> Subject:
    """Check a request and open its model.

    Raises ``ConfigError`` with every fault that shows, before anything is written.
    """
    faults = [*request.method.faults(()), *_find_data_faults(request), *_find_out_faults(request.out)]
    faults += _find_run_faults(request.method, request.runs, request.head)
    if request.dense and not request.method.makes_structures:
        faults.append(
            f"--dense has no effect with method={request.method.name}, which makes no structures. "
            "Leave it out."
        )
    if faults:
        raise ConfigError(*dict.fromkeys([*faults, *find_model_faults(request.model, request.method)]))
    try:
        subject = _open_model(request)
    except ConfigError as error:
        raise ConfigError(*_name_model(error)) from None
    faults = list(request.method.faults(subject.sites))
    try:
        _open_runs(request, subject)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(*faults)
    return subject


def _find_run_faults(method: Any, runs: Sequence[Path], head: Path | None) -> list[str]:
    """Return what is wrong with the further models that a pass is given. None is opened."""
    if method.models == "one":
        return []
    if not runs:
        return [f"method={method.name} works on runs of one base. Name them by runs=RUN1,RUN2."]
    faults = [*method.count_faults(len(runs)), *find_path_faults(runs)]
    if head and place_of(head, runs) < 0:
        faults.append(f"head={head} is not one of runs={','.join(map(str, runs))}. Take one of them.")
    return faults


def _open_runs(request: Request, subject: Subject) -> None:
    """Open the further models of a pass, and choose the head of the result."""
    if request.method.models == "one":
        return
    base = StoredModel(subject.folder, subject.files, subject.model)
    subject.parents = open_parents(request.runs, base, subject.sites)
    for number, parent in enumerate(subject.parents):
        if parent.head:
            subject.head = number
    if request.head:
        subject.head = place_of(request.head, request.runs)
        if not subject.parents[subject.head].head:
            subject.head = None  # its head is that of the base


def find_faults(given: PassWords) -> list[str]:
    """Return what is wrong with those parts of a request that are given. No weight and no data are read."""
    faults: list[str] = []
    method, model, out, dataset = given.method, given.model, given.out, given.dataset
    if method and (dataset or not given.names_dataset):
        faults += _find_data_faults(Request(method, model, Path(out), dataset))
    if out:
        faults += _find_out_faults(Path(out))
    if method:
        faults += _find_run_faults(method, given.runs, given.head)
    if model:
        faults += find_model_faults(model, method)
    return faults


def find_model_faults(model: str, method: Any) -> list[str]:
    """Return what is wrong with a model folder for a pass, and for ``method`` unless that is None."""
    try:
        folder, config, _ = open_files(model)
        if method is None:
            return []
        return list(method.faults(_find_sites(describe(folder, config), method)))
    except ConfigError as error:
        return _name_model(error)


def _find_out_faults(out: Path) -> list[str]:
    try:
        check_free(out)
    except ConfigError as error:
        return list(error.faults)
    return []


def _name_model(error: ConfigError) -> list[str]:
    """Return the faults of a model, which the user of a pass names by ``model=``."""
    return [fault.replace("model.path=", "model=").replace(OR_FREE, "") for fault in error.faults]


def _find_data_faults(request: Request) -> list[str]:
    """Return a fault if there is no data that the pass needs, or data that it does not need."""
    name, needs = request.method.name, request.method.needs
    if needs and request.dataset is None:
        return [
            f"method={name} needs statistics of the model's inputs ({', '.join(needs)}), which are gathered "
            "on data. Add dataset=NAME."
        ]
    if not needs and request.dataset is not None:
        return [
            f"dataset={request.dataset.name} has no effect with method={name}, which needs no data. "
            "Leave it out."
        ]
    return []


def _open_model(request: Request) -> Subject:
    """Find the folder and its sites, and load the model if statistics are needed."""
    folder, config, files = open_files(request.model)
    chain = read_chain(folder)
    examples: list[Any] = []
    if request.method.needs and request.dataset is not None:
        model, examples = _load_with_data(request, config)
    else:
        model = describe(folder, config)
    sites = _find_sites(model, request.method)
    subject = make_subject(folder, files, model, sites, chain, examples)
    subject.structures = read_structures(folder, config)
    subject.masks = open_masks(folder, config, files)
    return subject


def _find_sites(model: Any, method: Any) -> list[Site]:
    """Return the layers that a pass works on; raise ``ConfigError`` if there is none, or one is the head."""
    try:
        sites = find_sites(model, method.targets)
    except ConfigError as error:
        raise ConfigError(*(fault.replace("method.targets", "targets") for fault in error.faults)) from None
    for site in sites:
        if site.role == "head":
            raise ConfigError(
                f"targets: {site.name} belongs to the head, which a pass leaves as it is. Leave it out."
            )
        if method.makes_structures and layer_role(site.role) != site.role:
            raise ConfigError(
                f"targets: {site.name} belongs to a structure already ({FILE} of the folder). Choose other "
                "targets, or start from the model that has its weights."
            )
    return sites


def make_subject(
    folder: Path,
    files: list[TensorFile],
    model: Any,
    sites: Sequence[Site],
    chain: list[dict[str, Any]],
    examples: list[Any],
) -> Subject:
    """Return the subject of a pass; raise ``ConfigError`` if the weight of a site cannot be overwritten."""
    in_order = sorted(sites, key=lambda site: site.block)  # stable: the order inside a block stays
    return Subject(folder, files, in_order, _find_places(model, files, sites, folder), chain, model, examples)


def _find_places(
    model: Any, files: Sequence[TensorFile], sites: Sequence[Site], named: Path
) -> dict[str, tuple[TensorFile, str]]:
    """Return where each site's weight is stored; raise ``ConfigError`` if it is not, or in another shape."""
    file_of = {name: file for file in files for name in file.names}
    stored = match_names(model, file_of)
    places, faults = {}, []
    for site in sites:
        name = stored.get(f"{site.name}.weight")
        if name is None:
            faults.append(f"model={named} stores no single weight for its layer {site.name}.")
            continue
        file = file_of[name]
        dtype, shape = file.describe(name)
        expected = tuple(site.module.get_parameter("weight").shape)
        if shape != expected or dtype not in ("F32", "F16", "BF16"):
            faults.append(
                f"model={named} stores {name} as {dtype} of shape {list(shape)}. A pass works on float32, "
                f"float16 and bfloat16, here of shape {list(expected)}."
            )
        places[site.name] = (file, name)
    if faults:
        cure = "Choose other targets, or save the model again with save_pretrained."
        raise ConfigError(*(f"{fault} {cure}" for fault in faults))
    return places


def _load_with_data(request: Request, config: ModelConfig) -> tuple[Any, list[Any]]:
    """Load the model, and draw the calibration examples from the training split."""
    raw = request.dataset.read()
    base = load(config, raw.task, raw.labels, request.seed)
    data = encode(raw, base.processor)["train"]
    generator = torch.Generator().manual_seed(request.seed)
    chosen = torch.randperm(len(data), generator=generator)[: request.calibration].tolist()
    if len(chosen) < request.calibration:
        raise ConfigError(
            f"calibration={request.calibration} is more than the {len(data)} training examples of "
            f"dataset={request.dataset.name}. Lower it to at most {len(data)}."
        )
    model = base.model.to("cuda" if torch.cuda.is_available() else "cpu")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model, [data[i] for i in chosen]


def read_chain(folder: Path) -> list[dict[str, Any]]:
    """Return what ``finetune/pass.json`` of a model folder says was done to it; nothing if it has none."""
    file = folder / FOLDER / ABOUT
    try:
        content = safe.read_json(file, {"chain": [{str: object}]})
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}). Copy the model's folder again.") from None
    if newer := safe.explain_newer_format(file, content):
        raise ConfigError(f"{newer}.")
    chain: list[dict[str, Any]] = content["chain"]
    return chain
