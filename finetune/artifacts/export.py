"""A run's change in the format of huggingface/peft: a folder that ``PeftModel.from_pretrained`` loads on the base, with the same logits.

Two factors a layer are peft's LoRA, with rank and scale by layer. Single entries of linear layers are its SHiRA: their positions are in the file, and
peft wants ``r * (in + out)`` of them in every layer, so that layers with fewer get more, which are 0. What method=peft trained goes back as it is. A
new head goes into ``modules_to_save``.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.inplace import InPlace
from ..core.lowrank import LowRank
from ..core.part import Part, Patched, patched
from ..core.sparse.bank import SparseDelta
from ..core.sparse.mixed import MixedDelta
from ..core.sparse.switch import Change
from ..errors import ConfigError
from ..models.folder import find
from ..models.load import quiet, read_model
from ..training.prepare import Setup
from . import merge
from .compose import sparse_changes
from .plain import check_free, making
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
    with making(out) as temporary:
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
    return read_model(find(config.model)[0], config.model, setup.base.task, setup.labels, config.seed)[0]


def _as_peft(setup: Setup, path: Path) -> tuple[Any, dict[str, Tensor]]:
    """A configuration of peft's, and the tensors by their names in its file."""
    state = setup.session.states["method"]
    parts = [m for m in state.modules() if isinstance(m, Part)]
    layers = {
        name: layer
        for name, layer in patched(setup.session.model).items()
        if any(d.acts for d in layer.deltas)
    }
    if hasattr(state, "tuner"):
        return _adapters(state.tuner)
    deltas = [d for layer in layers.values() for d in layer.deltas]
    in_place = [name for part in parts if isinstance(part, InPlace) for name in part.names]
    fault = (
        f"it trains parameters in place, such as {in_place[0]}"
        if in_place
        else ""
        if deltas
        else "it changes no layer but the head"
    )
    if (
        not fault
        and all(map(_is_branch, deltas))
        and all(len(layer.deltas) == 1 for layer in layers.values())
    ):
        return _lora(layers)
    if not fault and all(isinstance(d, SparseDelta) and not d.additive for d in deltas):
        changes = sparse_changes(setup)
        fault = _misfit({name: layers[name] for name in changes}, changes)
        if not fault:
            return _shira(layers, changes)
    kinds = " and ".join(sorted({type(d).__name__ for d in deltas}))
    fault = fault or f"a {kinds} change is neither two factors nor single entries a layer"
    raise ConfigError(
        f"method={setup.config.method.name}: peft has no such format: {fault}. "
        f"Nearest is a plain Hugging Face folder: finetune merge ckpt={path} out=DIR."
    )


def _is_branch(delta: nn.Module) -> bool:
    return isinstance(delta, LowRank) or (isinstance(delta, MixedDelta) and delta.additive)


def _lora(layers: dict[str, Patched]) -> tuple[Any, dict[str, Tensor]]:
    """peft computes ``alpha / rank * B A``."""
    from peft import LoraConfig

    tensors, ranks, alphas = dict[str, Tensor](), dict[str, int](), dict[str, float]()
    for name, layer in layers.items():
        delta: Any = layer.deltas[0]
        a, b = (delta.a, delta.b) if isinstance(delta, LowRank) else delta.factors()
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        ranks[name], alphas[name] = (
            len(a),
            len(a) * delta.gate * (delta.scale if isinstance(delta, LowRank) else 1.0),
        )
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=int(rank),
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft multiplies by it, whatever number it is
        target_modules=list(layers),
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
    )
    return config, tensors


def _rank(layers: dict[str, Patched], changes: dict[str, Change]) -> int:
    """The smallest r whose ``r * (in + out)`` entries suffice in every layer."""
    return max(
        1, *(-(-len(change.index) // sum(layers[name].original.shape)) for name, change in changes.items())
    )


def _misfit(layers: dict[str, Patched], changes: dict[str, Change]) -> str:
    """Why peft's SHiRA cannot hold the changes; empty if it can."""
    rank = _rank(layers, changes)
    for name, layer in layers.items():
        if layer.transposed:
            return f"its SHiRA knows nn.Linear only, and {name} is a Conv1D"
        if rank * sum(layer.original.shape) > layer.original.numel():
            return f"its SHiRA wants {rank} * (in + out) entries in every layer, and {name} has {layer.original.numel()}"
    return ""


def _shira(layers: dict[str, Patched], changes: dict[str, Change]) -> tuple[Any, dict[str, Tensor]]:
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


def _adapters(tuner: Any) -> tuple[Any, dict[str, Tensor]]:
    """What peft's own tuner would save."""
    from peft import get_peft_model_state_dict

    whole: Any = nn.Module()  # as a PeftModel holds it
    whole.base_model, whole.peft_config = tuner, tuner.peft_config
    return copy.deepcopy(tuner.peft_config["default"]), get_peft_model_state_dict(
        whole, save_embedding_layers=False
    )
