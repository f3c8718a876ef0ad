"""The linear layers of a model that a method may change, called sites."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, suggest_nearest
from .layer import Patched
from .roles import block_of, is_matrix, is_transposed, layer_role, roles
from .zeros import count_pruned, find_pruned

GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "o", "qkv"),
    "mlp": ("up", "gate", "down"),
    "all": ("q", "k", "v", "o", "qkv", "up", "gate", "down", "linear"),
}


@dataclass(frozen=True)
class Site:
    """One linear layer of a model. ``shape`` is the shape of its weight, [out, in]."""

    name: str  # dotted
    module: nn.Module
    block: int  # -1: in no block
    role: str
    shape: tuple[int, int]

    @property
    def key(self) -> str:
        """Return the name with slashes, since torch allows no dots in the name of a submodule."""
        return self.name.replace(".", "/")

    @property
    def size(self) -> int:
        """Return the number of entries of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def has_bias(self) -> bool:
        """Tell whether the layer adds a bias."""
        return getattr(self.module, "bias", None) is not None

    @property
    def pruned(self) -> Tensor | None:
        """Return which entries of the weight are held at 0, [out, in] bool; None if none are."""
        return find_pruned(self.module)

    @property
    def live(self) -> int:
        """Return the number of entries that are not held at 0."""
        return self.size - count_pruned(self.module)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a parameter of the layer as [out, in], without gradient. A Conv1D stores it transposed."""
        return (weight.T if is_transposed(self.module) else weight).detach()


def all_sites(model: nn.Module) -> list[Site]:
    """List every linear layer that has a role, in the model's order. ``module`` is never a patched layer."""
    role_of = roles(model)
    found = []
    for name, module in model.named_modules():
        layer: Any = module.base if isinstance(module, Patched) else module
        if is_matrix(layer) and name in role_of:
            rows, cols = layer.weight.shape
            shape = (cols, rows) if is_transposed(layer) else (rows, cols)
            found.append(Site(name, layer, block_of(name), role_of[name], shape))
    return found


def find_sites(model: nn.Module, targets: tuple[str, ...]) -> list[Site]:
    """List the sites that any of ``targets`` names, in the model's order.

    A target is a role (``q``), a group of roles (``attention``, ``mlp``, ``all``) or a pattern of layer
    names. Raises ``ConfigError`` for a target that matches nothing, for a task head that is trained already,
    and for a weight that the model uses in two places: changing one of them would change both.
    """
    sites = all_sites(model)
    chosen: dict[str, Site] = {}
    faults: list[str] = []
    for target in targets:
        matches = [site for site in sites if _matches(site, target)]
        if not matches:
            faults.append(_no_match(target, sites))
        for site in matches:
            chosen[site.name] = site
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for site in chosen.values():
        weight = site.module.get_parameter("weight")
        if uses[id(weight)] > 1:
            faults.append(
                f"method.targets: {site.name} shares its weight with another layer, so a change here "
                "would act there too; leave it out."
            )
        elif site.role == "head" and weight.requires_grad:
            faults.append(
                f"method.targets: {site.name} is the task's head, which is trained in place already; "
                "leave it out."
            )
    if faults:
        raise ConfigError(*faults)
    return [site for site in sites if site.name in chosen]


def _matches(site: Site, target: str) -> bool:
    """Tell whether a target names the site. The head is matched by its name only, never by a role."""
    if site.role != "head" and {site.role, layer_role(site.role)} & {*GROUPS.get(target, (target,))}:
        return True
    return fnmatchcase(site.name, target) or fnmatchcase(site.name, f"*.{target}")


def _no_match(target: str, sites: list[Site]) -> str:
    """Return the fault of a target that matches nothing, with the roles that the model has."""
    here = sorted({site.role for site in sites})
    last_names = sorted({site.name.rsplit(".", 1)[-1] for site in sites})
    hint = suggest_nearest(target, [*here, *GROUPS, *last_names])
    roles_here = ", ".join(here)
    return (
        f"method.targets: {target!r} matches no linear layer of this model.{hint} Roles here: {roles_here}."
    )
