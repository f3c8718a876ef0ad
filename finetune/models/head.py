"""Keep a checkpoint's classification head if its labels are those of the run, or start a new one."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.roles import in_head, is_transposed

UNNAMED = re.compile(r"LABEL_\d+")  # the names that transformers gives to unnamed labels
SHOWN, LONGEST = 5, 40  # number of labels that a message shows, and of characters of each


class HeadMismatch(ValueError):
    """The reason why the head of a checkpoint cannot be kept, as a clause."""


def keep_head_(
    model: nn.Module,
    head: Collection[str],
    info: Mapping[str, Any],
    settings: Mapping[str, Any],
    labels: Sequence[str],
    allow_unnamed: bool,
) -> str:
    """Put the rows of the head, as it was loaded, into the order of ``labels``; return a note for the user.

    ``head``: names of its parameters. ``info``: what transformers could not load. ``settings``: the content
    of config.json, which is not trusted. ``allow_unnamed``: accept labels called LABEL_0, LABEL_1 and so on
    if the run's labels have the same names. Raises ``HeadMismatch``, with nothing changed, if the head does
    not fit.
    """
    for name in head:
        if name in info["missing_keys"]:
            raise HeadMismatch(f"the checkpoint has no {name}")
    rows = match_rows(settings, labels, allow_unnamed)
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    for name in head:
        if name in mismatched:
            raise HeadMismatch(f"{name} has another shape in the checkpoint than config.json says")
    note = "The head of the checkpoint is kept: its labels are those of the data set"
    if rows != sorted(rows):
        reorder_outputs_(model, rows)
        note += ", and its rows were put into the data set's order"
    return f"{note}. model.head=new starts a new one."


def match_rows(settings: Mapping[str, Any], labels: Sequence[str], allow_unnamed: bool) -> list[int]:
    """Return the row of the checkpoint's head for each of ``labels``.

    Raises ``HeadMismatch`` unless the checkpoint has exactly these labels, by name.
    """
    names = read_label_names(settings)
    lacking, surplus = sorted(set(labels) - set(names)), sorted(set(names) - set(labels))
    unnamed = all(UNNAMED.fullmatch(name) for name in names)
    if unnamed and (lacking or surplus or not allow_unnamed):
        raise HeadMismatch("the labels of the checkpoint have no names, only placeholders such as LABEL_0")
    differences = []
    if lacking:
        differences.append(f"missing: {_show(lacking)}")
    if surplus:
        differences.append(f"too many: {_show(surplus)}")
    if differences:
        reason = "the checkpoint's labels are not those of the data set"
        raise HeadMismatch(f"{reason} ({'; '.join(differences)})")
    row_of = {name: row for row, name in enumerate(names)}
    return [row_of[label] for label in labels]


def read_label_names(settings: Mapping[str, Any]) -> list[str]:
    """Return the names of the head's rows, in their order, from the content of a config.json.

    Raises ``HeadMismatch`` if there are none, or if ``id2label`` does not give each row a different name.
    """
    named = settings.get("id2label")
    if named is None:
        raise HeadMismatch("config.json of the checkpoint names no labels (id2label)")
    if not isinstance(named, dict) or not named:
        raise HeadMismatch("id2label in config.json of the checkpoint does not map rows to names")
    names: list[str] = []
    for row in range(len(named)):
        name = named.get(str(row))
        if not isinstance(name, str | int):
            raise HeadMismatch(f"id2label in config.json of the checkpoint has no name for row {row}")
        names.append(str(name))
    if len(set(names)) < len(names):
        raise HeadMismatch("id2label in config.json of the checkpoint gives two rows the same name")
    return names


def _show(names: Sequence[str]) -> str:
    """List names from an untrusted file: quoted, without control characters, and of bounded length."""
    shown = ", ".join(repr(name[:LONGEST]) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


@torch.no_grad()
def reorder_outputs_(model: nn.Module, rows: Sequence[int]) -> None:
    """Reorder the outputs of the head: output i becomes the former output ``rows[i]``.

    Only the last layer of the head changes. Raises ``HeadMismatch`` if it is not clear which layer that is.
    """
    layer = _find_output_layer(model, len(rows))
    place = torch.tensor(rows)
    dim = 1 if is_transposed(layer) else 0
    layer.weight.copy_(layer.weight.index_select(dim, place))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[place])


def _find_output_layer(model: nn.Module, outputs: int) -> Any:
    """Return the layer that computes the logits.

    It is the last layer with a matrix in its part of the head. If the head has several parts (such as a
    pooler and a classifier in DeBERTa), only one of them may end in ``outputs`` outputs.
    """
    last_of_part: dict[str, Any] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim > 1 and in_head(model, name):
            last_of_part[name.partition(".")[0]] = module
    found = []
    for module in last_of_part.values():
        if module.weight.shape[1 if is_transposed(module) else 0] == outputs:
            found.append(module)
    if len(found) != 1:
        raise HeadMismatch(
            "its labels are in another order than those of the data set, and it is not clear which layer "
            "computes the logits"
        )
    return found[0]


@torch.no_grad()
def initialize_head_(parameters: Mapping[str, Tensor], seed: int) -> None:
    """Initialize the parameters of a head in place, in the order of their names in the model.

    Matrices are drawn from N(0, 0.02); biases become 0, scales 1. The generator is seeded here, so that every
    method starts from the same head.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        if parameter.ndim > 1:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
