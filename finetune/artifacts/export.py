"""Export a run's change in a format of huggingface/peft that ``PeftModel.from_pretrained`` loads.

The exported folder is read back and must give the run's logits. Five kinds of changes have a format:

- two factors per layer: LoRA, with rank and scale by layer;
- single entries of linear layers: SHiRA, with the positions in the file. peft requires ``r * (in + out)``
  entries in every layer, so layers with fewer are filled up with entries whose change is 0;
- single entries and two factors in every layer: Super-Tuning with ``r``, filled up in the same way, since
  peft requires the same share of the entries in every layer;
- what method=peft has trained: the format of its tuner;
- factors of features (method=ia3): IA3.

A new head goes into ``modules_to_save``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.attach import parts, patched, trained_in_place
from ..core.changes import LowRankChange, SparseChange
from ..core.layer import Patched
from ..core.state import state_modules
from ..errors import ConfigError
from ..models.folder import find_folder
from ..models.load import quiet, read_model
from ..training.build import method_states
from ..training.prepare import Setup
from . import merge
from .compose import sparse_changes
from .plain import check_free, writing_folder
from .reopen import rebuild

PREFIX = "base_model.model."  # precedes every name in a file of peft


def export(path: Path, form: str, out: Path) -> dict[str, Any]:
    """Write the change of a run to ``out`` and compare the logits of what was written.

    Raises ``ConfigError``, with nothing written, if the format cannot hold the change or the logits differ.
    """
    if form != "peft":
        raise ConfigError(
            f"format={form}: no such format; there is peft. "
            f"Nearest is a plain folder: finetune merge ckpt={path} out={out}."
        )
    check_free(out)
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "export format=peft reads back what it has written, and needs peft: "
            "pip install 'finetune-bench[peft]'."
        ) from None
    setup = rebuild(path)
    if setup.config.model.init == "random":
        raise ConfigError(
            "export format=peft: the base was drawn by model.init=random, and no folder has its weights. "
            f"Nearest is a plain folder: finetune merge ckpt={path} out={out}."
        )
    model, accelerator = setup.session.model, setup.session.accelerator
    config, tensors = _as_peft(setup, path)
    config.base_model_name_or_path, config.inference_mode = setup.config.model.path, True
    if setup.base.head:
        config.modules_to_save = sorted({name.rpartition(".")[0] for name in setup.base.head})
        for name in setup.base.head:
            tensors[PREFIX + name] = model.get_parameter(name)
    live = merge.live_logits(setup)
    tolerance = merge.default_tolerance(setup.config.model.dtype, setup.config.train.precision)
    with writing_folder(out) as temporary:
        config.save_pretrained(temporary)
        on_disk = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(on_disk, temporary / "adapter_model.safetensors")
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = peft.PeftModel.from_pretrained(_read_base(setup), str(temporary))
            loaded = loaded.to(accelerator.device).eval()
            exported = merge.logits(loaded, setup, accelerator.autocast())
        found = merge.compare(live, exported)
        merge.check_equal("exported", found, tolerance)
    summary = {
        "out": str(out),
        "format": form,
        "type": config.peft_type.value,
        "base": setup.config.model.path,
    }
    if setup.base.head:
        summary["modules_to_save"] = config.modules_to_save
    return {**summary, **found, "tolerance": tolerance}


def _read_base(setup: Setup) -> Any:
    """Read the base again, with its head as it was at the start."""
    config = setup.config
    folder, _ = find_folder(config.model)
    return read_model(folder, config.model, setup.base.task, setup.labels, config.seed).model


def _as_peft(setup: Setup, path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return a configuration of peft and the tensors by their names in its file.

    Raises ``ConfigError`` if peft has no format for what the run changed.
    """
    state = nn.ModuleList(method_states(setup.session.states))
    for module in state_modules(state):
        written = module.export_as("peft")
        if written is not None and len(state) == 1:
            return written
    layers = {}
    for name, layer in patched(setup.session.model).items():
        if any(delta.has_effect for delta in layer.deltas):
            layers[name] = layer
    both = _entries_and_factors(layers)
    fault = _not_on_layers(state, patched(setup.session.model))
    if not fault:
        fault = _not_supertuning(layers) if both else _not_exportable(layers)
    if not fault and both:
        return _as_supertuning(layers, both)
    if not fault:
        factors = _factors(layers)
        if factors is not None:
            return _as_lora(layers, factors)
        changes = sparse_changes(setup)
        fault = _not_shira({name: layers[name] for name in changes}, changes)
        if not fault:
            return _as_shira(layers, changes)
    advice = f"Nearest is a plain Hugging Face folder: finetune merge ckpt={path} out=DIR."
    if not setup.config.method.mergeable or not all(part.mergeable for part in parts(state)):
        advice = f"It cannot be merged either; pass on the run itself, {path}."
    raise ConfigError(f"method={setup.config.method.name}: peft has no such format: {fault}. {advice}")


def _not_on_layers(state: nn.Module, layers: dict[str, Patched]) -> str:
    """Return what is trained besides the changes of layers' weights; empty if there is nothing."""
    deltas = [delta for layer in layers.values() for delta in layer.deltas]
    others = sorted({part.describe() for part in parts(state) if part not in deltas})
    in_place = trained_in_place(state)
    if in_place:
        return f"it trains parameters in place, such as {next(iter(in_place))}"
    return f"it trains {' and '.join(others)}" if others else ""


def _not_exportable(layers: dict[str, Patched]) -> str:
    """Return why the change is neither two factors per layer nor single entries; empty if it is."""
    if not layers:
        return "it changes no layer but the head"
    deltas = [delta for layer in layers.values() for delta in layer.deltas]
    if _factors(layers) is not None or all(delta.changes().entries is not None for delta in deltas):
        return ""
    kinds = " and ".join(sorted({delta.describe() for delta in deltas}))
    return f"{kinds} is neither two factors nor single entries per layer"


def _factors(layers: dict[str, Patched]) -> dict[str, LowRankChange] | None:
    """Return the two factors of each layer; None if some layer's change is anything else."""
    found = {}
    for name, layer in layers.items():
        factors = layer.deltas[0].changes().factors
        if factors is None or len(layer.deltas) > 1:
            return None
        found[name] = factors
    return found


def _entries_and_factors(layers: dict[str, Patched]) -> dict[str, tuple[SparseChange, LowRankChange]]:
    """Return single entries and two factors of equal rank for each layer; empty if some layer has others."""
    found = {}
    ranks = set()
    for name, layer in layers.items():
        entries = [delta.changes().entries for delta in layer.deltas]
        factors = [delta.changes().factors for delta in layer.deltas]
        if len(layer.deltas) != 2 or entries[0] is None or factors[1] is None:
            return {}
        found[name] = (entries[0], factors[1])
        ranks.add(len(factors[1].a))
    return found if len(ranks) == 1 else {}


def _not_supertuning(layers: dict[str, Patched]) -> str:
    """Return why peft's Super-Tuning cannot hold entries and factors; empty if it can."""
    try:
        from peft import SupertuningConfig  # noqa: F401  (asks whether peft has it)
    except ImportError:
        return "the installed peft has no Super-Tuning; peft 0.21.2 has it"
    for name, layer in layers.items():
        if layer.transposed:
            return f"its Super-Tuning supports nn.Linear only, and {name} is a Conv1D"
    return ""


def _as_supertuning(
    layers: dict[str, Patched], changes: dict[str, tuple[SparseChange, LowRankChange]]
) -> tuple[Any, dict[str, Tensor]]:
    """Write entries and factors as a Super-Tuning of peft, which computes ``W + S + alpha / r * B A``.

    peft gives a layer of n entries ``int(n * (1 - sparsity))`` of them.
    """
    from peft import SupertuningConfig

    sizes = {name: layers[name].original.numel() for name in changes}
    sparsity = 1 - max(len(entries.index) / sizes[name] for name, (entries, _) in changes.items())
    while any(int(sizes[name] * (1 - sparsity)) < len(changes[name][0].index) for name in changes):
        sparsity = max(0.0, sparsity - 1e-9)  # 1 - sparsity was rounded
    rank, tensors = 0, dict[str, Tensor]()
    for name, (entries, factors) in changes.items():
        gates = [delta.gate for delta in layers[name].deltas]
        rank, key = len(factors.a), f"{PREFIX}{name}.supertuning_"
        index, values = entries.index.cpu(), gates[0] * entries.values.cpu()
        index, values = _fill_up(index, values, sizes[name], int(sizes[name] * (1 - sparsity)))
        tensors |= {f"{key}indices": index.to(torch.int32), f"{key}values": values}
        tensors[f"{key}lora_A.weight"] = factors.a
        tensors[f"{key}lora_B.weight"] = factors.b * (gates[1] * factors.scale / 2)
    return SupertuningConfig(target_modules=list(changes), sparsity=sparsity, r=rank), tensors


def _fill_up(index: Tensor, values: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Add the first other positions of ``size``, with a change of 0, until there are ``count``; ascending."""
    free = torch.ones(size, dtype=torch.bool)
    free[index] = False
    filler = free.nonzero().view(-1)[: count - len(index)]
    index, order = torch.cat([index, filler]).sort()
    return index, torch.cat([values, torch.zeros(len(filler))])[order]


def _as_lora(layers: dict[str, Patched], factors: dict[str, LowRankChange]) -> tuple[Any, dict[str, Tensor]]:
    """Write factors as a LoRA of peft, which computes ``alpha / rank * B A``."""
    from peft import LoraConfig

    tensors, ranks, alphas = dict[str, Tensor](), dict[str, int](), dict[str, float]()
    for name, change in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = change.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = change.b
        ranks[name] = len(change.a)
        alphas[name] = len(change.a) * layers[name].deltas[0].gate * change.scale
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    other_ranks = {name: r for name, r in ranks.items() if r != rank}
    other_alphas = {name: value for name, value in alphas.items() if value != alpha}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft multiplies by it, whatever number it is
        target_modules=list(layers),
        rank_pattern=other_ranks,
        alpha_pattern=other_alphas,
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
    )
    return config, tensors


def _rank(layers: dict[str, Patched], changes: dict[str, SparseChange]) -> int:
    """Return the smallest r for which ``r * (in + out)`` entries suffice in every layer."""
    rank = 1
    for name, change in changes.items():
        rank = max(rank, -(-len(change.index) // sum(layers[name].original.shape)))
    return rank


def _not_shira(layers: dict[str, Patched], changes: dict[str, SparseChange]) -> str:
    """Return why peft's SHiRA cannot hold the changes; empty if it can."""
    rank = _rank(layers, changes)
    for name, layer in layers.items():
        if layer.transposed:
            return f"its SHiRA supports nn.Linear only, and {name} is a Conv1D"
        if rank * sum(layer.original.shape) > layer.original.numel():
            return (
                f"its SHiRA requires {rank} * (in + out) entries in every layer, "
                f"and {name} has {layer.original.numel()}"
            )
    return ""


def _as_shira(layers: dict[str, Patched], changes: dict[str, SparseChange]) -> tuple[Any, dict[str, Tensor]]:
    """Write single entries as a SHiRA of peft: their values, and their rows and columns."""
    from peft import ShiraConfig

    rank, tensors = _rank(layers, changes), dict[str, Tensor]()
    for name, change in changes.items():
        out, in_ = layers[name].original.shape
        index, values = _fill_up(change.index, change.values, out * in_, rank * (in_ + out))
        tensors[f"{PREFIX}{name}.shira_weight"] = values
        tensors[f"{PREFIX}{name}.shira_indices"] = torch.stack([index // in_, index % in_]).to(torch.int32)
    return ShiraConfig(r=rank, target_modules=list(changes)), tensors
