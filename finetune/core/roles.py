"""What each module of a transformer does: its *role*, read from its name by a table for each architecture.

Roles: q k v o qkv (attention), up gate down (mlp), embedding, norm, head, other (the remaining matrices of a
recognised model, such as BERT's pooler), and linear (every matrix of a model that no table knows). A matrix
inside of a structure has the role of the layer and its own name, as in ``q.first``.
"""

from __future__ import annotations

import re

from torch import nn

from .structure import StructuredLinear

Table = dict[str, str]  # maps the end of a module's name to its role; the first match counts

VIT: Table = {
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
    "attention.o_proj": "o",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}
BERT: Table = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
}
DISTILBERT: Table = {
    "attention.q_lin": "q",
    "attention.k_lin": "k",
    "attention.v_lin": "v",
    "attention.out_lin": "o",
    "ffn.lin1": "up",
    "ffn.lin2": "down",
}
GPT2: Table = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"}
LLAMA: Table = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
TABLES: dict[str, Table] = {
    **dict.fromkeys(["vit", "deit"], VIT),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "camembert", "electra"], BERT),
    "distilbert": DISTILBERT,
    "gpt2": GPT2,
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma"], LLAMA),
}
# Names of head modules, for models whose ``base_model_prefix`` does not name their body.
HEADS = ("classifier", "pre_classifier", "score", "lm_head", "head")


def _table(model: nn.Module) -> Table | None:
    """Return the table of the model's architecture, if there is one."""
    return TABLES.get(getattr(getattr(model, "config", None), "model_type", ""))


def is_recognised(model: nn.Module) -> bool:
    """Tell whether a table names this architecture's matrices."""
    return _table(model) is not None


def in_head(model: nn.Module, name: str) -> bool:
    """Tell whether a module or parameter of this name belongs to the task head, outside the model's body."""
    body = getattr(model, "base_model_prefix", "")
    first = name.partition(".")[0]
    if body and hasattr(model, body):
        return first != body
    return first in HEADS


def block_of(name: str) -> int:
    """Return the block that a module or parameter lies in: the first number in its name, or -1."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else -1


def is_transposed(module: nn.Module) -> bool:
    """Tell whether the layer stores its weight as [in, out]: the Conv1D of transformers, as in GPT-2."""
    return type(module).__name__ == "Conv1D"


def is_matrix(module: nn.Module) -> bool:
    """Tell whether the module multiplies by one matrix: a linear layer, or the Conv1D of transformers."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def _role(name: str, module: nn.Module, table: Table | None) -> str | None:
    """Return the role of a module of the body; None if it has none, such as a container."""
    if is_matrix(module):
        return _matrix_role(name, table)
    if isinstance(module, nn.Embedding) or (isinstance(module, nn.Conv2d) and "embed" in name):
        return "embedding"
    return "norm" if "norm" in type(module).__name__.lower() else None


def _matrix_role(name: str, table: Table | None) -> str:
    """Return the role of a linear layer, or of a structure in the place of one."""
    if table is None:
        return "linear"
    for end, role in table.items():
        if name == end or name.endswith("." + end):
            return role
    return "other"


def roles(model: nn.Module) -> dict[str, str]:
    """Return the role of each module by name, in the model's order.

    A patched layer (one with a module called ``base``) counts under its own name.
    """
    found: dict[str, str] = {}
    table = _table(model)
    wrapped: list[str] = []
    structure = ""  # the name of the structure that was seen last
    for name, module in model.named_modules():
        if not name or any(name.startswith(outer + ".") for outer in wrapped):
            continue
        if isinstance(module, StructuredLinear):
            structure = name
            continue
        while isinstance(inner := getattr(module, "base", None), nn.Module):
            wrapped = [*wrapped, name]
            module = inner
        role = _role(name, module, table)
        if structure and name.startswith(structure + "."):
            inner = name.removeprefix(structure + ".")
            role = f"{_matrix_role(structure, table)}.{inner}" if is_matrix(module) else None
        if role:
            found[name] = "head" if in_head(model, name) else role
    return found


def layer_role(role: str) -> str:
    """Return the role of the layer that a matrix belongs to: ``q`` for the ``q.first`` of a structure."""
    return role.partition(".")[0]
