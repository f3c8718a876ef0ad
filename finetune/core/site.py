"""Name the places of a model that a method may change."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, near
from .part import Patched
from .roles import block_of, is_matrix, roles

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o", "qkv"),
    "mlp": ("up", "gate", "down"),
    "all": ("q", "k", "v", "o", "qkv", "up", "gate", "down", "linear"),
}


@dataclass(frozen=True)
class Site:
    """One linear layer: dotted name, the layer itself, its block (-1: none), its role, and its weight's shape [out, in]."""

    name: str
    module: nn.Module
    block: int
    role: str
    shape: tuple[int, int]

    @property
    def key(self) -> str:
        """The name as torch allows it for a submodule."""
        return self.name.replace(".", "/")

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a parameter of the layer as [out, in]: a Conv1D, as in GPT-2, stores it transposed."""
        return (weight.T if type(self.module).__name__ == "Conv1D" else weight).detach()


def all_sites(model: nn.Module) -> list[Site]:
    """Every linear layer with a role, in the model's order; layers that are patched already are seen through."""
    role_of = roles(model)
    found = []
    for name, module in model.named_modules():
        layer: Any = module.base if isinstance(module, Patched) else module
        if is_matrix(layer) and name in role_of:
            shape = tuple(layer.weight.shape)
            found.append(
                Site(
                    name,
                    layer,
                    block_of(name),
                    role_of[name],
                    shape[::-1] if type(layer).__name__ == "Conv1D" else shape,
                )
            )
    return found


def find_sites(model: nn.Module, targets: tuple[str, ...]) -> list[Site]:
    """The sites that any of ``targets`` names: a role (``q``), a group of roles (``attention``, ``mlp``, ``all``) or a pattern of layer names.

    Raises ``ConfigError`` for a target that matches nothing, and for a weight that the model uses in two places (merging it would change both).
    """
    sites = all_sites(model)
    chosen: dict[str, Site] = {}
    faults: list[str] = []
    for target in targets:
        wanted = GROUPS.get(target, (target,))
        hits = [
            s
            for s in sites
            if (s.role in wanted and s.role != "head")
            or fnmatchcase(s.name, target)
            or fnmatchcase(s.name, f"*.{target}")
        ]
        if not hits:
            here = sorted({s.role for s in sites})
            known = [*here, *GROUPS, *sorted({s.name.rsplit(".", 1)[-1] for s in sites})]
            faults.append(
                f"method.targets: {target!r} matches no linear layer of this model.{near(target, known)} Roles here: {', '.join(here)}."
            )
        chosen |= {s.name: s for s in hits}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for site in chosen.values():
        if uses[id(site.module.weight)] > 1:
            faults.append(
                f"method.targets: {site.name} shares its weight with another layer, so a change here would act there too; leave it out."
            )
        elif site.role == "head" and site.module.weight.requires_grad:
            faults.append(
                f"method.targets: {site.name} is trained already, in place, as the task's head; leave it out."
            )
    if faults:
        raise ConfigError(*faults)
    return [s for s in sites if s.name in chosen]
