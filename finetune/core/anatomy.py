"""Describe the anatomy of a transformer: its blocks with their parts, its heads, its widths.

The anatomy is derived from the roles of the linear layers (``roles.py``), from the places of the norms and
from the configuration. It is unknown for an architecture that has no table of roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError
from .roles import TABLES, block_of, in_head, is_matrix, is_recognised, roles
from .site import GROUPS, Site, all_sites
from .structure import structures_of

CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma")  # causal models


@dataclass(frozen=True, eq=False)
class Place:
    """A module of the model and its dotted name."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Sublayer:
    """The attention or the MLP of a block. It reads the residual stream, and its output is added to it.

    ``place``: the smallest module that holds its linear layers. None if that is the whole block, as for the
    MLP of BERT; an edit then reaches the sub-layer through ``first`` (input) and ``last`` (output).
    ``sites``: its linear layers by role. ``norm``: the norm that belongs to the sub-layer. In a pre-norm
    block it comes before ``first``; in a post-norm block it comes after ``last`` and the residual sum
    (``Anatomy.norm_first``).
    """

    place: Place | None
    sites: dict[str, Site]
    norm: Place

    @property
    def first(self) -> Site:
        """Return a linear layer that receives the sub-layer's input: q or qkv, or up."""
        return self._find("q", "qkv", "up")

    @property
    def last(self) -> Site:
        """Return the linear layer that gives the sub-layer's output: o or down."""
        return self._find("o", "down")

    def _find(self, *names: str) -> Site:
        return next(self.sites[name] for name in names if name in self.sites)


@dataclass(frozen=True, eq=False)
class Block:
    """One block: attention, then MLP, each with a residual connection around it."""

    name: str
    module: nn.Module
    attention: Sublayer
    mlp: Sublayer

    @property
    def norms(self) -> tuple[Place, Place]:
        """Return the norms of the attention and of the MLP."""
        return self.attention.norm, self.mlp.norm


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts and sizes of a transformer.

    ``embedding``: the module that embeds tokens or patches. ``final_norm``: the norm after the last block;
    None in a post-norm model (BERT). ``head``: the linear layer that gives the logits; None for
    a model without one. ``heads``: attention heads per block. ``kv_heads``: heads of keys and values per
    block, fewer with grouped queries. ``head_dim``: rows of q, k or v, and columns of o, in one
    head. ``width``: size of the residual stream. ``causal``: whether no position attends to later ones.
    """

    blocks: tuple[Block, ...]
    embedding: Place
    final_norm: Place | None
    head: Place | None
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    causal: bool

    @property
    def norm_first(self) -> bool:
        """Tell whether the blocks are pre-norm: they normalize the inputs of their sub-layers.

        Post-norm blocks normalize the residual sums instead, so the model has no norm after its last block.
        """
        return self.final_norm is not None

    @classmethod
    def of(cls, model: nn.Module) -> Anatomy:
        """Return the anatomy of a transformers model; layers may be patched.

        Raises ``ConfigError``, which names the model's type, if a part is unknown.
        """
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        if not is_recognised(model):
            raise ConfigError(
                f"The blocks and heads of a {kind} model are unknown. Use a model of one of these types: "
                f"{', '.join(TABLES)}; or a method that needs linear layers only, such as method=lora."
            )
        if structures_of(model):
            raise ConfigError(
                f"Layers of this {kind} model are stored as structures, so its anatomy is unknown. Use a "
                "method that needs linear layers only, such as method=lora, or multiply the structures out "
                "(--dense)."
            )
        config: Any = model.config
        blocks = tuple(_read_blocks(model, kind))
        width, head_dim = int(config.hidden_size), find_head_width(model)
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        _check_heads(blocks, kind, heads, kv_heads, head_dim)
        return cls(
            blocks,
            _find_embedding(model),
            _find_final_norm(model, blocks),
            _find_head(model),
            heads,
            kv_heads,
            head_dim,
            width,
            kind in CAUSAL or bool(getattr(config, "is_decoder", False)),
        )


def find_head_width(model: nn.Module) -> int:
    """Return the width of one attention head (rows of q, k or v, columns of o); 0 if the config lacks it."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    width = getattr(config, "head_dim", None)
    if width:
        return int(width)
    heads = getattr(config, "num_attention_heads", 0)
    return int(config.hidden_size // heads) if heads else 0


def _read_blocks(model: nn.Module, kind: str) -> list[Block]:
    """Return the blocks in the model's order. Raises ``ConfigError`` for a block that lacks a part."""
    found: list[Block] = []
    by_block: dict[int, dict[str, Site]] = {}
    for site in all_sites(model):
        if site.block >= 0 and site.role in (*GROUPS["attention"], *GROUPS["mlp"]):
            by_block.setdefault(site.block, {})[site.role] = site
    norms = [name for name, role in roles(model).items() if role == "norm"]
    for number, sites in sorted(by_block.items()):
        missing = [role for role in ("o", "up", "down") if role not in sites]
        if not {"q", "qkv"} & sites.keys():
            missing.append("q or qkv")
        name = _enclosing([site.name for site in sites.values()])
        own_norms = _list_block_norms(norms, number, sites)
        if len(own_norms) != 2:
            missing.append(f"two norms (there are {len(own_norms)})")
        if missing:
            raise ConfigError(
                f"Block {number} of this {kind} model lacks {', '.join(missing)}, so its anatomy is unknown. "
                "Choose another model, or a method that needs linear layers only, such as method=lora."
            )
        parts = []
        for group, norm in zip(("attention", "mlp"), own_norms, strict=True):
            own = {role: site for role, site in sites.items() if role in GROUPS[group]}
            holder = _enclosing([site.name for site in own.values()])
            place = None if holder == name else Place(holder, model.get_submodule(holder))
            parts.append(Sublayer(place, own, Place(norm, model.get_submodule(norm))))
        found.append(Block(name, model.get_submodule(name), *parts))
    if not found:
        raise ConfigError(
            f"This {kind} model has no blocks, so its anatomy is unknown. Choose another model."
        )
    return found


def _list_block_norms(norms: Sequence[str], number: int, sites: dict[str, Site]) -> list[str]:
    """Return a block's norms of the residual stream.

    Norms of queries and keys are left out. They lie in the same module as the q projection.
    """
    query = sites.get("q") or sites.get("qkv")
    beside = "" if query is None else query.name.rpartition(".")[0]
    return [name for name in norms if block_of(name) == number and name.rpartition(".")[0] != beside]


def _enclosing(names: Sequence[str]) -> str:
    """Return the name of the smallest module that holds all of ``names`` and is none of them."""
    common: list[str] = []
    for steps in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return ".".join(common)


def _check_heads(blocks: Sequence[Block], kind: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise ``ConfigError`` if the sizes of a block's matrices contradict the number and width of heads."""
    expected = {
        "o": (1, heads),
        "q": (0, heads),
        "k": (0, kv_heads),
        "v": (0, kv_heads),
        "qkv": (0, 3 * heads),
    }
    for block in blocks:
        for role, site in block.attention.sites.items():
            side, count = expected[role]
            if site.shape[side] != count * head_dim:
                raise ConfigError(
                    f"The heads of this {kind} model are unknown: its configuration gives {heads} heads "
                    f"({kv_heads} of keys and values) of width {head_dim}, but "
                    f"{site.name} is {site.shape[0]} x {site.shape[1]}. Choose another model."
                )


def _find_embedding(model: Any) -> Place:
    """Return the module that transformers calls the input embeddings."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return Place(name, embedding)


def _find_final_norm(model: nn.Module, blocks: Sequence[Block]) -> Place | None:
    """Return the norm that comes after the last block."""
    after = False
    for name, role in roles(model).items():
        inside = name.startswith(blocks[-1].name + ".")
        if after and not inside and role == "norm":
            return Place(name, model.get_submodule(name))
        after = after or inside
    return None


def _find_head(model: nn.Module) -> Place | None:
    """Return the last linear layer outside of the body."""
    last = None
    for name, module in model.named_modules():
        if is_matrix(getattr(module, "base", module)) and in_head(model, name):
            last = Place(name, module)
    return last
