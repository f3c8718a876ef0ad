"""Tuners of the installed huggingface/peft, as baselines inside our loop, evaluation and result files."""

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
from ...errors import ConfigError, near
from ...registry import register

UNFIT = (
    "POLY",
    "SHADOW",
    "TRAINABLE_TOKENS",
)  # they ask for the number of a task, a second model, or tokens instead of layers


class Ranks(StateModule):
    """What AdaLoRA chooses its ranks by, as buffers, so that a checkpoint holds it: peft keeps it in dictionaries. No change on disk needs it.

    ``exp_avg_ipt/NAME`` and ``exp_avg_unc/NAME``: sensitivity and uncertainty of each entry; ``kept/NAME``: which ranks are left, once ``decided``.
    """

    SMOOTHED = ("exp_avg_ipt", "exp_avg_unc")

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        self._tuner = [tuner]
        adapter = tuner.trainable_adapter_name
        trained = {
            name: p for name, p in tuner.model.named_parameters() if "lora_" in name and adapter in name
        }
        for name, parameter in trained.items():
            for kind in self.SMOOTHED:
                self.register_buffer(f"{kind}/{name.replace('.', '/')}", torch.zeros_like(parameter))
            if f"lora_E.{adapter}" in name:
                self.register_buffer(
                    f"kept/{name.replace('.', '/')}", torch.ones_like(parameter, dtype=torch.bool)
                )
        self.register_buffer("decided", torch.zeros((), dtype=torch.bool))

    def _of(self, kind: str) -> dict[str, torch.Tensor]:
        """The buffers of one kind, by peft's names."""
        return {
            name.removeprefix(f"{kind}/").replace("/", "."): b
            for name, b in self.named_buffers()
            if name.startswith(f"{kind}/")
        }

    def after_step(self, step: int) -> None:
        """Have peft choose, with what is known from the buffers, and take down what it knows then."""
        tuner, decided, kept = self._tuner[0], self.get_buffer("decided"), self._of("kept")
        allocator, config = tuner.rankallocator, tuner.peft_config[tuner.trainable_adapter_name]
        smoothed = {kind: self._of(kind) for kind in self.SMOOTHED}
        for kind, buffers in smoothed.items():
            getattr(allocator, kind).update(buffers)
            allocator.ipt.update(dict.fromkeys(buffers))  # else peft takes them for new, and starts from zero
        config.rank_pattern = {name: b.view(-1).tolist() for name, b in kept.items()} if decided else None
        tuner.update_and_allocate(step)
        for kind, buffers in smoothed.items():
            for name, found in getattr(allocator, kind).items():
                buffers[name].copy_(found)
        if config.rank_pattern:
            decided.fill_(True)
            for name, buffer in kept.items():
                buffer.copy_(torch.tensor(config.rank_pattern[name]).view_as(buffer))

    def pack(self) -> dict[str, torch.Tensor]:
        """Nothing of it is part of the change."""
        return {}

    def unpack(self, stored: dict[str, torch.Tensor]) -> None:
        """Nor comes from one."""


class Adapters(Part):
    """What a peft tuner put into the model: its parameters and buffers, under one switch (gate 0 or 1)."""

    gate_is_switch = True
    folds_itself = True

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        self._tuner = [tuner]  # in a list: registered as a submodule, the whole model would become our state
        self._gate = 1.0
        for name, parameter in tuner.model.named_parameters():
            if parameter.requires_grad:  # float32 beside a base of lower precision
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            if parameter.requires_grad or tuner.prefix in name:
                self.register_parameter(name.replace(".", "/"), parameter)
        for name, buffer in tuner.model.named_buffers():
            if tuner.prefix in name:
                self.register_buffer(name.replace(".", "/"), buffer)
        self.ranks = Ranks(tuner) if hasattr(tuner, "rankallocator") else None

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

        whole: Any = nn.Module()  # stands for the PeftModel that holds a tuner
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
        if value != self._gate:
            (self.tuner.enable_adapter_layers if value else self.tuner.disable_adapter_layers)()
            self._gate = value

    def adapted(self) -> int:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m.get_base_layer() for m in self.tuner.model.modules() if isinstance(m, BaseTunerLayer)]
        return sum(int(m.weight.numel()) for m in layers if isinstance(m, nn.Linear))

    def detach(self) -> None:
        self.tuner.unload()

    def fold(self) -> None:
        self.tuner.merge_and_unload()


@register("peft")
@dataclass(frozen=True)
class Peft(Method):
    """A tuner of huggingface/peft for layers, by its own ``type`` and ``config``; without target modules of its own it gets ``targets``."""

    type: str = "LORA"
    config: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("all",)

    family: ClassVar[str] = "baseline"
    trains: ClassVar[str] = "what the peft tuner trains"
    paper: ClassVar[str] = "huggingface/peft"
    size: ClassVar[str] = "config.r"
    unused_parameters: ClassVar[bool] = True

    def build(self, model: nn.Module) -> Adapters:
        try:
            from peft import PeftType
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
        except ImportError:
            raise ConfigError(
                "method=peft needs the peft package: pip install 'finetune-bench[peft]'."
            ) from None
        layered = (
            t
            for t in PeftType
            if t.value not in UNFIT and getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(t), "prefix", None)
        )
        tuners = {t.value: PEFT_TYPE_TO_TUNER_MAPPING[t] for t in layered}
        if self.type not in tuners:
            raise ConfigError(
                f"method.type={self.type} is no tuner of the installed peft for layers.{near(self.type, tuners)} Known: {', '.join(sorted(tuners))}."
            )
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.type)]
        options = set(inspect.signature(config).parameters)
        unknown = [
            f"method.config.{k} is no option of peft's {config.__name__}.{near(k, options)}"
            for k in self.config
            if k not in options
        ]
        if unknown:
            raise ConfigError(*unknown)
        given = dict(self.config)
        if "target_modules" in options and not given.get("target_modules"):
            given["target_modules"] = [s.name for s in find_sites(model, self.targets)]
        head = [p for p in model.parameters() if p.requires_grad]
        try:
            state = Adapters(tuners[self.type](model, config(**given), "default"))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(
                f"method=peft: peft's {self.type} refuses this configuration: {error}"
            ) from error
        for parameter in head:  # peft freezes everything but its own
            parameter.requires_grad_(True)
        return state

    def after_step(self, run: Run, state: Adapters) -> None:
        if state.ranks:  # AdaLoRA's; other tuners have nothing to do
            state.ranks.after_step(run.step)
