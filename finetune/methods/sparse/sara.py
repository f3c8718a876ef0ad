"""SaRA: train the weights that matter least, the smallest (Hu et al., 2025, arXiv 2409.06633).

One threshold theta for all: the trained set is M = {|w| < theta}. theta is ``threshold``, or the K-th smallest |w|, K from ``sparsity``. Narrow
(at the share ``schedule.at`` of the run) leaves {i in M: |w_i| < theta now}; the others rest where they are. Decay pulls to 0, as AdamW in place.
``penalty`` times the nuclear norm of M o w is added to the loss, in each step for one random matrix whose sides are above 64, as released; the paper
sums over all. Its text finds 5e-3 best, the default here; the released commands have 5e-4.

Not taken from the released default code: its penalty reaches none of the trained values, its first forward pass takes |w| for w, and narrowing drops
the moments. Its masks cover biases, norms and convolutions too, here the linear layers. Float32 compares: a float16 or bfloat16 base has its own M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from ...core.method import Run
from ...core.part import Patched, patched
from ...core.site import Site
from ...core.sparse.bank import Bank, SparseDelta
from ...core.sparse.budgets import Budget
from ...core.sparse.engine import Sparse
from ...core.sparse.grain import Grain
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import Direction, Scope, ScoreName
from ...errors import ConfigError
from ...registry import register
from ...schedules.narrow import Narrow

FIXED = ("score", "direction", "scope", "grain")
LEAST = 64  # a matrix with a side of this length or less is not penalized


@register("sara")
@dataclass(frozen=True)
class SaRA(Sparse):
    """SaRA: the smallest weights, narrowed halfway, with a nuclear-norm penalty."""

    threshold: Annotated[float, Gt(0)] | None = None
    penalty: Annotated[float, Ge(0)] = 5e-3
    score: ScoreName = "magnitude"
    direction: Direction = "smallest"
    scope: Scope = "model"
    schedule: Schedule = Narrow(at=0.5)
    decay: Literal["base", "zero"] = "zero"

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "the smallest weights of the model, halfway narrowed to those that stayed small"
    paper: ClassVar[str] = "arXiv 2409.06633"

    def contradictions(self) -> list[str]:
        found = super().contradictions()
        defaults = {name: item.default for name, item in type(self).__dataclass_fields__.items()}
        for name in FIXED:
            if (value := getattr(self, name)) != defaults[name]:
                found.append(
                    f"method.{name}={value}: SaRA is one threshold on |w| over the model; take method=sparse for other choices."
                )
        if self.threshold is not None and self.sparsity != defaults["sparsity"]:
            found.append(
                f"method.threshold={self.threshold:g} says how many entries are trained, and so does sparsity={self.sparsity:g}; give one."
            )
        if self.threshold is not None and self.schedule.name not in ("narrow", "static"):
            found.append(
                f"method.threshold={self.threshold:g} leaves nothing to schedule={self.schedule.name}; take narrow or static, or sparsity."
            )
        if isinstance(self.schedule, Narrow) and self.schedule.keep != Narrow.keep:
            found.append(
                f"schedule.keep={self.schedule.keep:g} means nothing to SaRA, which narrows to what is below its threshold; leave it out."
            )
        return found

    def budgets(self, sites: list[Site], grains: list[Grain]) -> list[Budget]:
        if self.threshold is None:
            return super().budgets(sites, grains)
        counts: list[int] = [
            int(_below(s.module.get_parameter("weight"), self.threshold).sum()) for s in sites
        ]
        k = sum(counts)
        if not k:
            raise ConfigError(
                f"method.threshold={self.threshold:g}: no weight is below it, so nothing would be trained; raise it."
            )
        return [Budget(list(range(len(sites))), k)]

    @property
    def counts_exactly(self) -> bool:
        return self.threshold is None

    @property
    def narrows_by_value(self) -> bool:
        return isinstance(self.schedule, Narrow)

    def build(self, model: nn.Module) -> nn.ModuleDict:
        state = super().build(model)
        state.register_buffer("theta", torch.tensor(self.threshold or 0.0))
        return state

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        super().begin(run, state, previous)
        if self.threshold is None:
            state.theta.copy_(torch.stack([w.abs().max() for w in self._trained(run, state) if len(w)]).max())

    def before_step(self, run: Run, state: Any) -> None:
        if not isinstance(self.schedule, Narrow):
            super().before_step(run, state)
        elif run.step and self.schedule.move(run.step, run.total):
            bank: Bank = state["bank"]
            stays = [bank.where(i)[_below(w, state.theta)] for i, w in enumerate(self._trained(run, state))]
            before = bank.active
            bank.revise(stays, run.moments(bank.values), self.schedule.dropped)
            run.log(kept=bank.active / max(1, before), trained=float(bank.active))

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        matrices = [view for view in state["views"] if min(view.site.shape) > LEAST]
        if not self.penalty or not matrices:
            return 0.0
        draw = torch.Generator().manual_seed(
            run.generator.initial_seed() + 2654435761 * (run.step + 1)
        )  # of the step alone: the same for all
        view = matrices[int(torch.randint(len(matrices), (), generator=draw))]
        layer = cast(Patched, run.model.get_submodule(view.site.name))
        return self.penalty * nuclear_norm(
            _values(view, layer), state["bank"].where(view.i), layer.original.shape
        )

    @torch.no_grad()
    def _trained(self, run: Run, state: Any) -> list[Tensor]:
        """The trained weights of each site as they are now."""
        layers = patched(run.model)
        return [_values(view, layers[view.site.name]) for view in state["views"]]


def _below(weight: Tensor, theta: float | Tensor) -> Tensor:
    """Where |w| < theta, compared in float32."""
    return weight.detach().float().abs() < torch.as_tensor(theta, dtype=torch.float32, device=weight.device)


def _values(view: SparseDelta, layer: Patched) -> Tensor:
    """The trained weights of a site, [count]: the pretrained ones and their change, which a gradient reaches."""
    return view.pretrained(layer.original).to(view.bank.values.dtype) + view.bank.slice(view.i)


def nuclear_norm(values: Tensor, where: Tensor, shape: torch.Size) -> Tensor:
    """The sum of the singular values of the matrix that has ``values`` [n] at the flat positions ``where`` and is 0 elsewhere.

    Its gradient is U V^T over the singular values above 0 (a millionth of the largest), and the sum is <U V^T, matrix>: from the eigenvectors of the
    smaller Gram matrix in float64, which is cheaper than a singular value decomposition.
    """
    with torch.no_grad():
        w = torch.zeros(shape, dtype=torch.float64, device=values.device)
        w.view(-1)[where.long()] = values.double()
        tall = shape[0] >= shape[1]
        squares, vectors = torch.linalg.eigh(w.mT @ w if tall else w @ w.mT)
        scales = torch.where(squares > 1e-12 * squares[-1], squares, torch.inf).rsqrt()
        root = (vectors * scales) @ vectors.mT
        slope = (w @ root if tall else root @ w).view(-1)[where.long()]
    norm: Tensor = (slope.to(values.dtype) * values).sum()
    return norm
