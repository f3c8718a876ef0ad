"""Save and load an optimizer's state by parameter name, so that the order and the groups may change."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def save_optimizer(optimizer: torch.optim.Optimizer, states: nn.Module) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` with the parameters' names in ``states`` instead of numbers."""
    saved = optimizer.state_dict()
    names = _names(optimizer, states)
    entries = {names[number]: entry for number, entry in saved["state"].items()}
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    return {"state": entries, "param_groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, states: nn.Module, saved: dict[str, Any]) -> None:
    """Restore an optimizer from what ``save_optimizer`` returned.

    The groups and their settings are taken from ``saved``, so a resumed run keeps its groups even if this
    version would form others. Early checkpoints have numbers instead of names: the positions of the
    parameters in the optimizer's groups. Raises ``ValueError`` if ``saved`` has other parameters.
    """
    names = _names(optimizer, states)
    given = [name for group in saved["param_groups"] for name in group["params"]]
    for group in saved["param_groups"]:
        _check_settings(group, optimizer.param_groups[0])
    if given and isinstance(given[0], int):
        optimizer.load_state_dict(saved)
        return
    if wrong := sorted({*names} ^ {*given, *saved["state"]}):
        raise ValueError(f"{len(wrong)} of the optimizer's parameters differ (first: {wrong[0]})")
    parameters = dict(states.named_parameters())
    numbers = {name: number for number, name in enumerate(given)}
    groups, numbered = [], []
    for group in saved["param_groups"]:
        groups.append({"params": [parameters[name] for name in group["params"]]})
        numbered.append({**group, "params": [numbers[name] for name in group["params"]]})
    entries = {numbers[name]: entry for name, entry in saved["state"].items()}
    optimizer.param_groups = groups
    optimizer.load_state_dict({"state": entries, "param_groups": numbered})


def _check_settings(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a setting of a saved group has another type than the optimizer's own."""
    for key, value in saved.items():
        own = current.get(key)
        if key != "params" and None not in (value, own) and _kind(value) != _kind(own):
            raise ValueError(f"the optimizer's {key} is {str(value)[:40]!r}")


def _kind(value: Any) -> Any:
    """Return a value's type, or the types in a list; numbers count as float, and tuples as lists (JSON)."""
    if isinstance(value, list | tuple):
        return [_kind(item) for item in value]
    return float if type(value) is int else type(value)


def _names(optimizer: torch.optim.Optimizer, states: nn.Module) -> list[str]:
    """Return the names of the optimizer's parameters in the order in which torch numbers them."""
    names = {id(parameter): name for name, parameter in states.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        found += [names[id(parameter)] for parameter in group["params"]]
    return found
