"""HFT: half fine-tuning.

A random half of the weight matrices is frozen, and the rest of the model is trained in place. Nothing is
added to the model. The half is drawn once before training, or once for each of several rounds. Embeddings,
head, pooler and everything outside the blocks always train. A bias follows its matrix. A fused matrix, such
as GPT-2's qkv, counts as one: freezing some of its rows would need masks, and weight decay would still move
those rows.

Formula:
    W <- W - rate M step(W)        M: 0 for a frozen matrix, 1 for a trained one
    scope=category: of every block's q, k, v, o two are frozen; of up, gate, down two in a random half of
                    the blocks (rounded down), one in the others

Paper: Hui et al., "HFT: Half Fine-Tuning for Large Language Models", ACL 2025, arXiv 2404.18466.

Reading: The body of the paper was not available, and the authors released no code. The rule by category is
the one on which the abstract, reviews and a third party's code agree. It is unverified that embeddings and
head train. ``sparsity`` is the share of the *matrices*, which is a share of the entries only where matrices
are equal in size. For other shares, the number of frozen matrices in the model is the nearest whole number (a
half is rounded down), and the numbers in two blocks differ by at most one. ``norms`` is a rule of the third
party's code only. The paper draws once per stage (a task, or a round of tuning), never within one. ``rounds``
makes stages of equal length within a run; each starts from the current weights with a new optimizer. The
learning rate's schedule spans the whole run.

Rate: The paper is understood to train at the rate of full fine-tuning; this is unverified. The third party's
code has 5e-5, cosine.

Differs: The authors released no code. A third party's code freezes one norm per block and, for shares other
than half, counts parameters instead of matrices.

Cost: One gradient and two moments in Adam for every trained parameter; none for a matrix that is frozen in
all rounds. The trained parameters are stored. Backward passes through every block, but skips the weight
gradients of frozen matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import nn

from ...core.inplace import InPlace, list_untrained
from ...core.method import Method, Run
from ...core.roles import block_of, layer_role, roles
from ...core.site import GROUPS
from ...errors import ConfigError
from ...registry import register

Pool = dict[int, list[str]]  # names of modules by their block


def draw_frozen(pool: Pool, share: Fraction) -> set[str]:
    """Draw a random ``share`` of a pool's modules; the numbers in two blocks differ by at most one.

    The numbers come from torch's default generator.
    """
    least = {block: int(share * len(names)) for block, names in pool.items()}
    uneven = [block for block, names in pool.items() if least[block] != share * len(names)]
    total = math.ceil(share * sum(map(len, pool.values())) - Fraction(1, 2))
    extra = total - sum(least.values())
    blocks_with_more = {uneven[i] for i in torch.randperm(len(uneven)).tolist()[:extra]}
    frozen: set[str] = set()
    for block, names in pool.items():
        count = least[block] + (block in blocks_with_more)
        frozen |= {names[i] for i in torch.randperm(len(names)).tolist()[:count]}
    return frozen


class Halves(InPlace):
    """Every parameter that is trained in some round.

    ``frozen``: names of the modules that are frozen, for each round. They follow from the run's seed.
    """

    def __init__(self, model: nn.Module, frozen: list[set[str]]) -> None:
        always_frozen = set.intersection(*frozen)
        names = [name for name in list_untrained(model) if name.rpartition(".")[0] not in always_frozen]
        super().__init__(model, names, keep=False)
        self.frozen = frozen

    def freeze(self, modules: set[str]) -> None:
        """Freeze the parameters of ``modules`` and train all others.

        The optimizer neither moves nor decays a parameter without gradient.
        """
        for name, parameter in self.trained().items():
            parameter.requires_grad_(name.rpartition(".")[0] not in modules)


@register("hft")
@dataclass(frozen=True)
class HFT(Method):
    """HFT: a random half of the weight matrices is frozen, the rest of the model is trained.

    Options:
        sparsity: Share of the matrices that is frozen.
        scope: Group within which the share holds: each ``category`` of matrices (attention and feed-forward,
            as in the paper), or all matrices of a ``block`` or of the ``model``.
        norms: Whether half of each block's norms is frozen too.
        rounds: Number of equal stretches of the run, each with a new half and a new optimizer.
    """

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5
    scope: Literal["category", "block", "model"] = "category"
    norms: bool = False
    rounds: Annotated[int, Ge(1)] = 1

    family: ClassVar[str] = "layer selection"
    trains: ClassVar[str] = "a random half of the weight matrices, and everything else, in place"
    paper: ClassVar[str] = "arXiv 2404.18466"
    size: ClassVar[str] = "sparsity"

    @property
    def unused_parameters(self) -> bool:  # type: ignore[override]  # a ClassVar in the base
        return self.rounds > 1

    def faults(self, steps: int) -> list[str]:
        found = []
        if self.rounds > steps:
            found.append(
                f"method.rounds={self.rounds} is more than the run's {steps} steps, and every round needs "
                f"one; take at most {steps}."
            )
        if self.rounds > 1 and not self.sparsity:
            found.append(
                f"method.rounds={self.rounds} draws nothing at method.sparsity=0; take rounds=1, or a "
                "sparsity above 0."
            )
        return found

    def pools(self, model: nn.Module) -> list[Pool]:
        """Return the modules that may be frozen, in pools; the share holds within each pool.

        Raises ``ConfigError`` if the categories of the model's matrices are not known.
        """
        pools: dict[str, Pool] = {}
        for name, role in roles(model).items():
            block = block_of(name)
            category = self._category(layer_role(role), block)
            if category is None:
                continue
            if category == "matrix" and self.scope == "model":
                block = -1
            pools.setdefault(category, {}).setdefault(block, []).append(name)
        if not pools.keys() - {"norm"}:
            raise ConfigError(
                f"method.scope={self.scope}: this project does not know which matrices of a "
                f"{type(model).__name__} are attention and which are feed-forward. Use method.scope=block or "
                "method.scope=model, which do not depend on it."
            )
        return list(pools.values())

    def _category(self, role: str, block: int) -> str | None:
        """Return the category of a module by its role; None if it is never frozen."""
        if role == "norm":
            return "norm" if self.norms and block >= 0 else None
        if self.scope != "category":
            return "matrix" if role in GROUPS["all"] else None
        for category in ("attention", "mlp"):
            if role in GROUPS[category]:
                return category
        return None

    def build(self, model: nn.Module) -> Halves:
        """Draw the frozen modules of all rounds from the default generator, seeded with the run's seed.

        They are therefore the same on all ranks and after a resume. The generator's state is restored
        afterwards, so that the model's own dropout is the same at every sparsity.
        """
        pools, share = self.pools(model), Fraction(str(self.sparsity))
        frozen: list[set[str]] = []
        with torch.random.fork_rng(devices=[]):
            for _ in range(self.rounds):
                frozen.append(set().union(*(draw_frozen(pool, share) for pool in pools)))
        if self.sparsity and not any(frozen):
            count = 0
            for pool in pools:
                count += sum(map(len, pool.values()))
            raise ConfigError(
                f"method.sparsity={self.sparsity} freezes none of this model's {count} matrices; take a "
                "larger share, or method=full."
            )
        return Halves(model, frozen)

    def before_step(self, run: Run, state: Any) -> None:
        current = run.step * self.rounds // run.total
        if run.step and current != (run.step - 1) * self.rounds // run.total:
            run.optimizer.state.clear()
        state.freeze(state.frozen[current])

    def after_step(self, run: Run, state: Any) -> None:
        """Train every parameter again, because between steps the state must be as it was built."""
        state.freeze(set())
