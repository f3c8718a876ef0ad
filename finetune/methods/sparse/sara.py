"""SaRA: train the weights of smallest magnitude, narrowed once, and penalize their nuclear norm.

One threshold theta holds for all layers. The entries below it are trained. After the share ``schedule.at`` of
the run, only the entries that are still below theta stay trained; the others keep the values that they have
reached. Decay pulls values towards 0, as AdamW does on the weights.

Formula:
    M = {|w| < theta}        theta: ``threshold``, or the K-th smallest |w| with K from ``sparsity``
    narrowing leaves {i in M: |w_i| < theta}, with the values w at that step
    loss = task loss + penalty ||M * W||_*      one random matrix per step, of those with both sides above 64

Paper: Hu et al., "High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation"
(SaRA), ICLR 2025, arXiv 2409.06633.

Reading: Paper and released code were read. The paper compares w with the threshold, but means |w|. Its
penalty is the sum over all matrices; the code, like this file, takes one random matrix in each step. The
paper finds penalty = 5e-3 best, which is the default; the released commands have 5e-4. The paper narrows
halfway through the run.

Rate: Paper and released code have 1e-3 exp(-350 threshold), which is 5e-4 at a threshold of 2e-3.

Differs: The faults of the released default optimizer are not reproduced:
- its penalty has no effect on the trained values,
- its first forward pass takes |w| for w, and the same happens after narrowing,
- narrowing drops Adam's moments.
Its masks also cover biases, norms and convolutions; here they cover linear layers only. Weights are compared
with theta in float32, so a base in float16 or bfloat16 may have another M.

Cost: One trained value for every entry of M, its gradient and two moments in Adam. Values and positions are
stored. With a penalty, one eigendecomposition of the smaller Gram matrix of one layer in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from ...core.attach import patched
from ...core.layer import Patched
from ...core.method import Run
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
LARGEST_UNPENALIZED = 64  # a matrix with a side of at most this length is not penalized


@register("sara")
@dataclass(frozen=True)
class SaRA(Sparse):
    """SaRA: the smallest weights, narrowed halfway, with a nuclear-norm penalty.

    Options:
        threshold: Magnitude below which an entry is trained; ``null``: ``sparsity`` decides.
        penalty: Factor of the nuclear norm of one random matrix of trained entries, which is added to the
            loss.
    """

    threshold: Annotated[float, Gt(0)] | None = None
    penalty: Annotated[float, Ge(0)] = 5e-3
    score: ScoreName = "magnitude"
    direction: Direction = "smallest"
    scope: Scope = "model"
    schedule: Schedule = Narrow(at=0.5)
    decay: Literal["base", "zero"] = "zero"

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "the smallest weights of the model; halfway, only those that stayed small"
    paper: ClassVar[str] = "arXiv 2409.06633"

    def contradictions(self) -> list[str]:
        found = super().contradictions()
        fields = type(self).__dataclass_fields__
        for name in FIXED:
            value = getattr(self, name)
            if value != fields[name].default:
                found.append(
                    f"method.{name}={value}: SaRA has one threshold for the whole model; take method=sparse "
                    "for other choices."
                )
        if self.threshold is not None:
            found += self._threshold_contradictions(self.threshold)
        if isinstance(self.schedule, Narrow) and self.schedule.keep != Narrow.keep:
            found.append(
                f"schedule.keep={self.schedule.keep:g} has no effect with method=sara, which keeps the "
                "entries below its threshold; leave it out."
            )
        return found

    def _threshold_contradictions(self, threshold: float) -> list[str]:
        """Return a fault for each setting that contradicts ``threshold`` or has no effect with it."""
        found = []
        if self.sparsity != type(self).__dataclass_fields__["sparsity"].default:
            found.append(
                f"method.threshold={threshold:g} says how many entries are trained, and so does "
                f"sparsity={self.sparsity:g}; give one of them."
            )
        if self.schedule.name not in ("narrow", "static"):
            found.append(
                f"method.threshold={threshold:g} fixes which entries are trained, so "
                f"schedule={self.schedule.name} has no effect; take schedule=narrow or schedule=static, or "
                "sparsity instead of a threshold."
            )
        return found

    def budgets(self, sites: list[Site], grains: list[Grain]) -> list[Budget]:
        if self.threshold is None:
            return super().budgets(sites, grains)
        count = 0
        for site in sites:
            small = _is_below(site.as_matrix(site.module.get_parameter("weight")), self.threshold)
            count += int(small.sum()) - (site.size - site.live)  # entries that are held at 0 are not trained
        if not count:
            raise ConfigError(
                f"method.threshold={self.threshold:g}: no weight is below it, so nothing would be trained; "
                "raise it."
            )
        return [Budget(list(range(len(sites))), count)]

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
            largest = [weights.abs().max() for weights in self._trained_weights(run, state) if len(weights)]
            state.theta.copy_(torch.stack(largest).max())

    def before_step(self, run: Run, state: Any) -> None:
        if not isinstance(self.schedule, Narrow):
            super().before_step(run, state)
        elif run.step and self.schedule.move(run.step, run.total):
            self._narrow(run, state)

    def _narrow(self, run: Run, state: Any) -> None:
        """Keep training the entries whose weight is below theta now."""
        bank: Bank = state["bank"]
        stays = []
        for i, weights in enumerate(self._trained_weights(run, state)):
            stays.append(bank.positions(i)[_is_below(weights, state.theta)])
        before = bank.active
        bank.revise(stays, run.moments(bank.values), self.schedule.dropped)
        run.log(kept=bank.active / max(1, before), trained=float(bank.active))

    def loss(self, run: Run, state: Any, batch: Any) -> Tensor | float:
        matrices = [view for view in state["views"] if min(view.site.shape) > LARGEST_UNPENALIZED]
        if not self.penalty or not matrices:
            return 0.0
        # The draw depends on seed and step alone: it is the same for all micro-batches, ranks and retries.
        generator = torch.Generator().manual_seed(run.generator.initial_seed() + 2654435761 * (run.step + 1))
        view = matrices[int(torch.randint(len(matrices), (), generator=generator))]
        layer = cast(Patched, run.model.get_submodule(view.site.name))
        where = state["bank"].positions(view.i)
        return self.penalty * nuclear_norm(_weights(view, layer), where, layer.original.shape)

    @torch.no_grad()
    def _trained_weights(self, run: Run, state: Any) -> list[Tensor]:
        """Return the trained weights of each site as they are now, [count] each."""
        layers = patched(run.model)
        return [_weights(view, layers[view.site.name]) for view in state["views"]]


def _is_below(weight: Tensor, theta: float | Tensor) -> Tensor:
    """Return where |w| < theta, compared in float32."""
    return weight.detach().float().abs() < torch.as_tensor(theta, dtype=torch.float32, device=weight.device)


def _weights(view: SparseDelta, layer: Patched) -> Tensor:
    """Return the trained weights of a site, [count], with the gradient of their change."""
    return view.pretrained(layer.original).to(view.bank.values.dtype) + view.bank.slice(view.i)


def nuclear_norm(values: Tensor, where: Tensor, shape: torch.Size) -> Tensor:
    """Return the nuclear norm of a matrix with ``values`` [n] at flat positions ``where`` and 0 elsewhere.

    Its gradient is U V^T over the singular values that are not 0 (above a millionth of the largest), and the
    norm is <U V^T, matrix>. Both come from the eigenvectors of the smaller Gram matrix in float64, which is
    cheaper than a singular value decomposition.
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
