"""A run's change in the format of huggingface/peft: a folder that ``PeftModel.from_pretrained`` loads on the base, with the same logits.

Two factors a layer are peft's LoRA, with rank and scale by layer. Single entries of linear layers are its SHiRA: their positions are in the file, and
peft wants ``r * (in + out)`` of them in every layer, so that layers with fewer get more, which are 0. What method=peft trained goes back as it is. A
new head goes into ``modules_to_save``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.changes import LowRankChange, SparseChange
from ..core.part import Patched, parts, patched, trained_in_place
from ..errors import ConfigError
from ..models.folder import find_folder
from ..models.load import quiet, read_model
from ..training.prepare import Setup
from . import merge
from .compose import sparse_changes
from .plain import check_free, writing_folder
from .reopen import rebuild

PREFIX = "base_model.model."  # before every name in a file of peft's


def export(path: Path, form: str, out: Path) -> dict[str, Any]:
    """Write the change of a run to ``out``, after comparing logits. Raises ``ConfigError``, with nothing written, for what the format cannot hold."""
    if form != "peft":
        raise ConfigError(
            f"format={form}: no such format; there is peft. Nearest is a plain folder: finetune merge ckpt={path} out={out}."
        )
    check_free(out)
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "export format=peft reads back what it has written, and needs peft: pip install 'finetune-bench[peft]'."
        ) from None
    setup = rebuild(path)
    config, tensors = _as_peft(setup, path)
    config.base_model_name_or_path, config.inference_mode = setup.config.model.path, True
    if setup.base.head:
        config.modules_to_save = sorted({name.rpartition(".")[0] for name in setup.base.head})
        parameters = dict(setup.session.model.named_parameters())
        tensors |= {PREFIX + name: parameters[name] for name in setup.base.head}
    live = merge.live_logits(setup)
    tolerance = max(
        merge.TOLERANCE[setup.config.model.dtype],
        merge.TOLERANCE[merge.PRECISION[setup.config.train.precision]],
    )
    with writing_folder(out) as temporary:
        config.save_pretrained(temporary)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary / "adapter_model.safetensors",
        )
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = (
                peft.PeftModel.from_pretrained(_base(setup), str(temporary))
                .to(setup.session.accelerator.device)
                .eval()
            )
            found = merge.compare(
                live,
                merge.logits(
                    lambda **inputs: again(**inputs).logits, setup, setup.session.accelerator.autocast()
                ),
            )
        merge.check_equal("exported", found, tolerance)
    kept = {"modules_to_save": config.modules_to_save} if setup.base.head else {}
    return {
        "out": str(out),
        "format": form,
        "type": config.peft_type.value,
        "base": setup.config.model.path,
        **kept,
        **found,
        "tolerance": tolerance,
    }


def _base(setup: Setup) -> Any:
    """The base once more, with its head as it started."""
    config = setup.config
    return read_model(find_folder(config.model)[0], config.model, setup.base.task, setup.labels, config.seed)[
        0
    ]


def _as_peft(setup: Setup, path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return a configuration of peft and the tensors by their names in its file.

    Raises ``ConfigError`` if peft has no format for what the run changed.
    """
    state = setup.session.states["method"]
    for part in parts(state):
        written = part.export_as("peft")
        if written is not None:
            return written
    layers = {}
    for name, layer in patched(setup.session.model).items():
        if any(delta.acts for delta in layer.deltas):
            layers[name] = layer
    fault = _misfit_of_all(state, layers)
    if not fault:
        factors = _factors(layers)
        if factors is not None:
            return _lora(layers, factors)
        changes = sparse_changes(setup)
        fault = _misfit({name: layers[name] for name in changes}, changes)
        if not fault:
            return _shira(layers, changes)
    raise ConfigError(
        f"method={setup.config.method.name}: peft has no such format: {fault}. "
        f"Nearest is a plain Hugging Face folder: finetune merge ckpt={path} out=DIR."
    )


def _misfit_of_all(state: nn.Module, layers: dict[str, Patched]) -> str:
    """Return why the change is neither two factors a layer nor single entries; empty if it is."""
    in_place = trained_in_place(state)
    if in_place:
        return f"it trains parameters in place, such as {next(iter(in_place))}"
    if not layers:
        return "it changes no layer but the head"
    deltas = [delta for layer in layers.values() for delta in layer.deltas]
    if _factors(layers) is not None or all(delta.changes().entries is not None for delta in deltas):
        return ""
    kinds = " and ".join(sorted({delta.describe() for delta in deltas}))
    return f"{kinds} is neither two factors nor single entries a layer"


def _factors(layers: dict[str, Patched]) -> dict[str, LowRankChange] | None:
    """Return the two factors of each layer; None if some layer's change is anything else."""
    found = {}
    for name, layer in layers.items():
        factors = layer.deltas[0].changes().factors
        if factors is None or len(layer.deltas) > 1:
            return None
        found[name] = factors
    return found


def _lora(layers: dict[str, Patched], factors: dict[str, LowRankChange]) -> tuple[Any, dict[str, Tensor]]:
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
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft multiplies by it, whatever number it is
        target_modules=list(layers),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
    )
    return config, tensors


def _rank(layers: dict[str, Patched], changes: dict[str, SparseChange]) -> int:
    """The smallest r whose ``r * (in + out)`` entries suffice in every layer."""
    return max(
        1, *(-(-len(change.index) // sum(layers[name].original.shape)) for name, change in changes.items())
    )


def _misfit(layers: dict[str, Patched], changes: dict[str, SparseChange]) -> str:
    """Why peft's SHiRA cannot hold the changes; empty if it can."""
    rank = _rank(layers, changes)
    for name, layer in layers.items():
        if layer.transposed:
            return f"its SHiRA knows nn.Linear only, and {name} is a Conv1D"
        if rank * sum(layer.original.shape) > layer.original.numel():
            return f"its SHiRA wants {rank} * (in + out) entries in every layer, and {name} has {layer.original.numel()}"
    return ""


def _shira(layers: dict[str, Patched], changes: dict[str, SparseChange]) -> tuple[Any, dict[str, Tensor]]:
    from peft import ShiraConfig

    rank, tensors = _rank(layers, changes), dict[str, Tensor]()
    for name, change in changes.items():
        out, in_ = layers[name].original.shape
        free = torch.ones(out * in_, dtype=torch.bool)
        free[change.index] = False
        more = free.nonzero().view(-1)[: rank * (in_ + out) - len(change.index)]
        index, order = torch.cat([change.index, more]).sort()
        tensors[f"{PREFIX}{name}.shira_weight"] = torch.cat([change.values, torch.zeros(len(more))])[order]
        tensors[f"{PREFIX}{name}.shira_indices"] = torch.stack([index // in_, index % in_]).to(torch.int32)
    return ShiraConfig(r=rank, target_modules=list(changes)), tensors
