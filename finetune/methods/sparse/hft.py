"""HFT: half fine-tuning (Hui et al., ACL 2025, arXiv 2404.18466).

A random half of the weight matrices is frozen and the rest of the model is trained in place; nothing is added to it. The authors released no code.
The rule by category is the one that public readings of the paper agree on: of each block's attention matrices half (2 of q, k, v, o); of up, gate and
down 2 in a random half of the blocks (rounded down) and 1 in the others. Embeddings, head, pooler and what lies outside the blocks always train.

    sparsity   share of the *matrices* that is frozen (of the entries only where matrices are equal in size). Shares other than the paper's half
               follow the same rule: the nearest count over the model, halves down, and no block more than one away from its even share
    scope      where the share is met: in each category of matrices (the paper), or of all matrices in a block or in the model (its coarser variants)
    norms      also half of each block's norms, rounded likewise: only a third party's code does this
    rounds     a new half is drawn for each of so many equal stretches of the run, from the weights as they are and with a new optimizer; the paper
               draws once a stage (a task, or a round of tuning) and never within one. The learning rate's schedule spans the whole run

A bias follows its matrix. A fused matrix (GPT-2's qkv) is one matrix: freezing rows of it would need masks, and weight decay would move those rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import nn

from ...core.inplace import InPlace, untrained
from ...core.method import Method, Run
from ...core.roles import block_of, roles
from ...core.site import GROUPS
from ...errors import ConfigError
from ...registry import register

Pool = dict[int, list[str]]  # block -> names of modules


def draw(pool: Pool, share: Fraction) -> set[str]:
    """A random ``share`` of the modules, the same in every block but for one."""
    least = {block: int(share * len(names)) for block, names in pool.items()}
    uneven = [block for block, names in pool.items() if least[block] != share * len(names)]
    extra = math.ceil(share * sum(map(len, pool.values())) - Fraction(1, 2)) - sum(least.values())
    more = {uneven[i] for i in torch.randperm(len(uneven)).tolist()[:extra]}
    return {
        names[i]
        for block, names in pool.items()
        for i in torch.randperm(len(names)).tolist()[: least[block] + (block in more)]
    }


class Halves(InPlace):
    """Every parameter that is trained in some round. ``frozen`` names the modules that rest, by round; it follows from the seed."""

    def __init__(self, model: nn.Module, frozen: list[set[str]]) -> None:
        never = set.intersection(*frozen)
        super().__init__(
            model, [name for name in untrained(model) if name.rpartition(".")[0] not in never], keep=False
        )
        self.frozen = frozen

    def thaw(self, resting: set[str]) -> None:
        """Train all parameters but those of the modules ``resting``: without gradient the optimizer neither moves nor decays them."""
        for name, parameter in self.trained().items():
            parameter.requires_grad_(name.rpartition(".")[0] not in resting)


@register("hft")
@dataclass(frozen=True)
class HFT(Method):
    """HFT: a random half of the weight matrices is frozen, the rest of the model is trained."""

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5
    scope: Literal["category", "block", "model"] = "category"
    norms: bool = False
    rounds: Annotated[int, Ge(1)] = 1

    family: ClassVar[str] = "layer selection"
    trains: ClassVar[str] = "half of the weight matrices, drawn at random, and all the rest, in place"
    paper: ClassVar[str] = "arXiv 2404.18466"
    size: ClassVar[str] = "sparsity"

    @property
    def unused_parameters(self) -> bool:  # type: ignore[override]  # with one round the frozen matrices are not wrapped at all
        return self.rounds > 1

    def faults(self, steps: int) -> list[str]:
        found = []
        if self.rounds > steps:
            found.append(
                f"method.rounds={self.rounds} is more than the run's {steps} steps, and a round needs one; take at most {steps}."
            )
        if self.rounds > 1 and not self.sparsity:
            found.append(
                f"method.rounds={self.rounds} draws nothing at method.sparsity=0; take rounds=1, or a sparsity above 0."
            )
        return found

    def pools(self, model: nn.Module) -> list[Pool]:
        """The modules that may be frozen; in each pool the share is met."""
        pools: dict[str, Pool] = {}
        for name, role in roles(model).items():
            category = next((c for c in ("attention", "mlp") if role in GROUPS[c]), role)
            block = block_of(name)
            if role in GROUPS["all"] and self.scope != "category":
                category, block = "matrix", block if self.scope == "block" else -1
            if category in ("attention", "mlp", "matrix") or (
                category == "norm" and self.norms and block >= 0
            ):
                pools.setdefault(category, {}).setdefault(block, []).append(name)
        if not pools.keys() - {"norm"}:
            raise ConfigError(
                f"method.scope={self.scope}: which matrices of a {type(model).__name__} are attention and which feed-forward is not known. "
                "Use method.scope=block or method.scope=model, which need not know."
            )
        return list(pools.values())

    def build(self, model: nn.Module) -> Halves:
        """All rounds are drawn here, from the generator that the run's seed has just set: alike on every rank and after a resume.

        It is put back after that, so that the model's own dropout is the same at every sparsity.
        """
        pools, share = self.pools(model), Fraction(str(self.sparsity))
        with torch.random.fork_rng(devices=[]):
            frozen = [set().union(*(draw(pool, share) for pool in pools)) for _ in range(self.rounds)]
        if self.sparsity and not any(frozen):
            count = sum(len(names) for pool in pools for names in pool.values())
            raise ConfigError(
                f"method.sparsity={self.sparsity} freezes none of this model's {count} matrices; take more, or method=full."
            )
        return Halves(model, frozen)

    def before_step(self, run: Run, state: Any) -> None:
        now = run.step * self.rounds // run.total
        if run.step and now != (run.step - 1) * self.rounds // run.total:
            run.optimizer.state.clear()
        state.thaw(state.frozen[now])

    def after_step(self, run: Run, state: Any) -> None:
        """Between steps everything counts as trained, as it was built."""
        state.thaw(set())
