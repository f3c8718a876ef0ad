"""peft: a tuner of the installed huggingface/peft, as a baseline in this project's training and evaluation.

``type`` and ``config`` name one of peft's tuners and its own settings. If the tuner has target modules and
``config`` names none, it gets the layers that ``targets`` matches. Trained parameters are float32 or wider.
AdaLoRA's tuner chooses its ranks again after every step; the averages that it uses for this are saved in
checkpoints.

Formula:
    as the tuner defines it

Paper: none; the software is huggingface/peft.

Reading: The behaviour and the defaults are those of the installed version of peft. Tuners that do not adapt
single layers are refused by name, and so are those that need the number of a task (POLY), a second model
(SHADOW), or tokens instead of layers (TRAINABLE_TOKENS).

Rate: Each tuner has a paper with rates of its own.

Differs:
- peft freezes the task head; here it stays trained.
- peft keeps AdaLoRA's averages in dictionaries outside of the model, so a checkpoint lacks them; here they
  are saved.

Cost: That of the tuner. The trained parameters are stored; finetune export writes them in peft's format.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ...core.method import Method, Run
from ...core.part import Part
from ...core.site import find_sites
from ...core.state import StateModule
from ...errors import ConfigError, suggest_nearest
from ...registry import register

# Tuners that need the number of a task, a second model, or tokens instead of layers.
UNSUPPORTED = ("POLY", "SHADOW", "TRAINABLE_TOKENS")
# Tuners that choose ranks by gradients, or project the gradients before the optimizer gets them.
READ_GRADIENTS = ("ADALORA", "OSF")


class AdaLoraRanks(StateModule):
    """The averages by which AdaLoRA chooses its ranks, as buffers, so that checkpoints contain them.

    peft keeps them in dictionaries. ``exp_avg_ipt/NAME`` and ``exp_avg_unc/NAME``: average sensitivity and
    uncertainty of each entry of parameter NAME. ``kept/NAME``: which ranks are left, once ``decided`` is
    true.
    """

    AVERAGES = ("exp_avg_ipt", "exp_avg_unc")

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        # A list hides it from torch: as a submodule, the whole model would be part of the state.
        self._tuner = [tuner]
        adapter = tuner.trainable_adapter_name
        for name, parameter in tuner.model.named_parameters():
            if "lora_" not in name or adapter not in name:
                continue
            for average in self.AVERAGES:
                self.register_buffer(_buffer_name(average, name), torch.zeros_like(parameter))
            if f"lora_E.{adapter}" in name:
                every = torch.ones_like(parameter, dtype=torch.bool)
                self.register_buffer(_buffer_name("kept", name), every)
        self.register_buffer("decided", torch.zeros((), dtype=torch.bool))

    def _buffers_of(self, kind: str) -> dict[str, torch.Tensor]:
        """Return the buffers of one kind, keyed by peft's names of the parameters."""
        found = {}
        for name, buffer in self.named_buffers():
            if name.startswith(f"{kind}/"):
                found[name.removeprefix(f"{kind}/").replace("/", ".")] = buffer
        return found

    def after_step(self, step: int) -> None:
        """Copy the buffers to peft, let it choose the ranks, and copy its state back to the buffers."""
        tuner, decided, kept = self._tuner[0], self.get_buffer("decided"), self._buffers_of("kept")
        allocator, config = tuner.rankallocator, tuner.peft_config[tuner.trainable_adapter_name]
        averages = {kind: self._buffers_of(kind) for kind in self.AVERAGES}
        for kind, buffers in averages.items():
            getattr(allocator, kind).update(buffers)
            # peft takes a parameter that is missing here for a new one and starts its averages from zero.
            allocator.ipt.update(dict.fromkeys(buffers))
        config.rank_pattern = None
        if decided:
            config.rank_pattern = {name: buffer.view(-1).tolist() for name, buffer in kept.items()}
        tuner.update_and_allocate(step)
        for kind, buffers in averages.items():
            for name, average in getattr(allocator, kind).items():
                buffers[name].copy_(average)
        if config.rank_pattern:
            decided.fill_(True)
            for name, buffer in kept.items():
                buffer.copy_(torch.tensor(config.rank_pattern[name]).view_as(buffer))

    def pack(self) -> dict[str, torch.Tensor]:
        """Return nothing: the averages are not part of the stored change."""
        return {}

    def unpack(self, stored: dict[str, torch.Tensor]) -> None:
        """Take nothing from a stored change."""


def _buffer_name(kind: str, parameter: str) -> str:
    """Return the name of a buffer, with slashes, since torch allows no dots in it."""
    return f"{kind}/{parameter.replace('.', '/')}"


class Adapters(Part):
    """The parameters and buffers that a peft tuner put into the model, with one switch (gate 0 or 1)."""

    gate_is_switch = True
    folds_itself = True

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        # A list hides it from torch: as a submodule, the whole model would be part of the state.
        self._tuner = [tuner]
        self._gate = 1.0
        for name, parameter in tuner.model.named_parameters():
            if parameter.requires_grad:  # float32 beside a base of lower precision
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            if parameter.requires_grad or tuner.prefix in name:
                self.register_parameter(name.replace(".", "/"), parameter)
        for name, buffer in tuner.model.named_buffers():
            if tuner.prefix in name:
                self.register_buffer(name.replace(".", "/"), buffer)
        self.ranks: AdaLoraRanks | None = None
        if hasattr(tuner, "rankallocator"):
            self.ranks = AdaLoraRanks(tuner)

    @property
    def tuner(self) -> Any:
        """Return peft's tuner."""
        return self._tuner[0]

    def describe(self) -> str:
        return f"an adapter of peft ({self.tuner.peft_config['default'].peft_type.value})"

    @property
    def recoverable(self) -> bool:
        return False

    def export_as(self, format_name: str) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """Return what peft's tuner itself saves, for the format ``peft``."""
        if format_name != "peft":
            return None
        from peft import get_peft_model_state_dict

        whole: Any = nn.Module()  # takes the place of a PeftModel, which holds a tuner
        whole.base_model, whole.peft_config = self.tuner, self.tuner.peft_config
        tensors = get_peft_model_state_dict(whole, save_embedding_layers=False)
        return copy.deepcopy(self.tuner.peft_config["default"]), tensors

    @property
    def gate(self) -> float:  # a property, because peft keeps the switch in its layers
        return self._gate

    @gate.setter
    def gate(self, value: float) -> None:
        if value not in (0.0, 1.0):
            raise ValueError(f"peft's adapters are on (1) or off (0), not {value}")
        if value == self._gate:
            return
        if value:
            self.tuner.enable_adapter_layers()
        else:
            self.tuner.disable_adapter_layers()
        self._gate = value

    def adapted(self) -> int:
        from peft.tuners.tuners_utils import BaseTunerLayer

        count = 0
        for module in self.tuner.model.modules():
            if isinstance(module, BaseTunerLayer):
                layer = module.get_base_layer()
                if isinstance(layer, nn.Linear):
                    count += int(layer.weight.numel())
        return count

    def count_changed(self) -> None:
        """Return None: the tuners of peft have no common way to form a changed weight."""

    def detach(self) -> None:
        self.tuner.unload()

    def fold(self) -> None:
        self.tuner.merge_and_unload()


@register("peft")
@dataclass(frozen=True)
class Peft(Method):
    """A tuner of huggingface/peft for layers, by its own ``type`` and ``config``.

    Options:
        type: Name of the tuner in peft's ``PeftType``, such as LORA, OFT or VERA.
        config: Settings of the tuner's own configuration class.
        targets: Layers that are adapted if ``config`` names no target modules.
    """

    type: str = "LORA"
    config: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("all",)

    family: ClassVar[str] = "baseline"
    trains: ClassVar[str] = "what the peft tuner trains"
    paper: ClassVar[str] = "huggingface/peft"
    size: ClassVar[str] = "config.r"
    unused_parameters: ClassVar[bool] = True

    def build(self, model: nn.Module) -> Adapters:
        tuner, config = self._tuner_and_config()
        options = set(inspect.signature(config).parameters)
        unknown = []
        for name in self.config:
            if name not in options:
                hint = suggest_nearest(name, options)
                unknown.append(f"method.config.{name} is not an option of peft's {config.__name__}.{hint}")
        if unknown:
            raise ConfigError(*unknown)
        given = dict(self.config)
        if "target_modules" in options and not given.get("target_modules"):
            given["target_modules"] = [site.name for site in find_sites(model, self.targets)]
        head = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            state = Adapters(tuner(model, config(**given), "default"))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f"method=peft: peft's {self.type} refuses this configuration: {error}"
            ) from error
        for parameter in head:  # peft freezes everything but its own parameters
            parameter.requires_grad_(True)
        return state

    def _tuner_and_config(self) -> tuple[Any, Any]:
        """Return peft's tuner class and configuration class.

        Raises ``ConfigError`` if peft is not installed, or has no such tuner for layers.
        """
        try:
            from peft import PeftType
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        except ImportError:
            raise ConfigError(
                "method=peft needs the peft package: pip install 'finetune-bench[peft]'."
            ) from None
        tuners: dict[str, Any] = {}
        for kind in PeftType:
            tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
            if kind.value not in UNSUPPORTED and getattr(tuner, "prefix", None):
                tuners[kind.value] = tuner
        if self.type not in tuners:
            raise ConfigError(
                f"method.type={self.type} is not a tuner for layers in the installed peft."
                f"{suggest_nearest(self.type, tuners)} Known: {', '.join(sorted(tuners))}."
            )
        return tuners[self.type], PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.type)]

    @property
    def reads_gradients(self) -> bool:
        return self.type in READ_GRADIENTS

    def after_step(self, run: Run, state: Adapters) -> None:
        if state.ranks:
            state.ranks.after_step(run.step)
