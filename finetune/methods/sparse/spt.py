"""SPT: train single entries where few are sensitive, and a low-rank branch where many are.

The sensitivity of an entry is its squared gradient of the mean loss, summed over ``batches`` batches before
training, in eval mode. The tau most sensitive entries of all matrices are chosen. A matrix with few chosen
entries trains these entries; a matrix with many gets a low-rank branch B A instead. tau is the largest number
for which all trained values together fit into the budget. The class token, if the model has one, is trained
too: in place, outside of the budget and without weight decay.

Formula:
    sensitivity = sum over batches of g^2
    branch where c >= P / alpha        c: chosen entries of a matrix
    P = rank (in + out)                parameters of a branch
    W' = W + S   or   W' = W + B A     A: [rank, in] as in LoRA, B: [out, rank] from 0
    sum of entries and of branches' parameters <= (1 - sparsity) n        n: entries of all matrices

Paper: He et al., "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning", ICCV 2023, arXiv 2303.08566.

Reading: The abstract and the released code were read. alpha = 10 is taken from the released scripts. The
paper's rule is taken to be c >= P, which is ``alpha=1``; this is unverified. 16 batches and rank 8 are the
released defaults.

Rate: The released code has 1e-3, cosine, over 100 epochs, of which 10 are warm-up. The rate of the paper is
unverified.

Differs:
- The released code computes sensitivities in train mode, and on the first examples of the training set in
  order.
- It takes the nearest tau on a grid of steps of 20,000; here tau is exact.
- Factors and entries have the same weight decay; the released code does not decay the entries.
- Left out: the dropout and the drop path in the branch, the variant with adapters, and the released rule for
  biases and norms, which is not part of the abstract.

Cost: (1 - sparsity) n trained values at most, their gradients and two moments in Adam. Entries with positions
and factors are stored. ``batches`` backward passes before training, with the best entries of each matrix in
memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from ...core.attach import attach, patched
from ...core.inplace import train_class_token
from ...core.method import Method, Run
from ...core.site import Site, find_sites
from ...core.sparse.mixed import Mixed, MixedDelta
from ...core.sparse.probe import scan_scores
from ...core.sparse.select import TopK
from ...registry import register


def divide_budget(
    scores: list[Tensor], limits: list[int], branches: list[int], budget: int
) -> tuple[list[Tensor], Tensor]:
    """Divide the budget among single entries and branches.

    ``scores``: the best scores of each site, at most ``limits`` of them. ``limits``: the number of chosen
    entries at which a site gets a branch instead, and ``branches``: the number of values of that branch,
    never below the limit.

    The entries of all sites are taken in the order of their scores, best first; among equal scores, the
    earlier site comes first. An entry costs 1. The entry that reaches its site's limit turns the site's
    entries into a branch, and costs the difference. The first entry that does not fit into the budget ends
    the choice.
    Returns which of each site's scores are trained as entries, bool, and which sites have a branch, [sites]
    bool.
    """
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    counts = torch.tensor([len(s) for s in scores])
    site = torch.arange(len(scores)).repeat_interleave(counts)[order]
    last = torch.zeros(len(scores), dtype=torch.int64)
    last.scatter_reduce_(0, site, torch.arange(len(site)), "amax")
    full = (counts == torch.tensor(limits)).nonzero().view(-1)
    costs = torch.ones(len(site), dtype=torch.int64)
    costs[last[full]] += (torch.tensor(branches) - torch.tensor(limits))[full]
    fits = costs.cumsum(0) <= budget
    structured = torch.zeros(len(scores), dtype=torch.bool).index_copy_(0, full, fits[last[full]])
    chosen = torch.zeros(len(site), dtype=torch.bool).index_copy_(0, order, fits & ~structured[site])
    return list(chosen.split(counts.tolist())), structured


@register("spt")
@dataclass(frozen=True)
class SPT(Method):
    """SPT: the most sensitive entries, and a low-rank branch where a matrix has many of them.

    Options:
        targets: Layers whose weights compete: roles, groups of roles, or patterns of layer names.
        sparsity: Share of the entries of all layers that is not trained. The rest is the budget of entries
            and branches together.
        rank: Rank of a branch.
        alpha: A matrix gets a branch if the number of its chosen entries is at least the branch's number of
            parameters divided by alpha.
        batches: Number of batches, one per step, from which the sensitivity is computed.
        class_token: Whether the class token is trained too.
        class_token_decay: Whether weight decay acts on the trained class token.
    """

    targets: tuple[str, ...] = ("all",)
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.98
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Ge(1)] = 10.0
    batches: Annotated[int, Ge(1)] = 16
    class_token: bool = True
    class_token_decay: bool = False

    score: ClassVar[str] = "sensitivity"
    selection: ClassVar[str] = "eval"
    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = (
        "the entries to which the loss is most sensitive, or a low-rank branch where a matrix has many"
    )
    paper: ClassVar[str] = "arXiv 2303.08566"
    size: ClassVar[str] = "sparsity"

    @property
    def reads_gradients(self) -> bool:
        return True

    def build(self, model: nn.Module) -> nn.ModuleDict:
        sites = find_sites(model, self.targets)
        size = most = 0
        for site in sites:
            limit, branch = self.costs(site)
            size += site.size
            most += branch if limit <= site.size else site.size
        budget = max(1, size - round(self.sparsity * size))
        bank = Mixed(sites, min(budget, most), self.rank)
        views = [MixedDelta(bank, i, site) for i, site in enumerate(sites)]
        for site, view in zip(sites, views, strict=True):
            attach(model, site.name, view)
        state = nn.ModuleDict({"bank": bank, "views": nn.ModuleList(views)})
        token = train_class_token(model, self.class_token_decay) if self.class_token else None
        if token is not None:
            state["class_token"] = token
        return state

    def costs(self, site: Site) -> tuple[int, int]:
        """Return the number of chosen entries at which a site gets a branch, and the branch's parameters."""
        branch = self.rank * sum(site.shape)
        return math.ceil(branch / self.alpha), branch

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        bank: Mixed = state["bank"]
        sites, layers, budget = find_sites(run.model, self.targets), patched(run.model), len(bank.values)
        limits = [self.costs(site)[0] for site in sites]
        positions: dict[int, Tensor] = {}
        scores: dict[int, Tensor] = {}

        def keep_best(i: int, score: Tensor) -> None:
            top = TopK(min(limits[i], budget), {i: 1})
            # Selection overwrites the scores with its keys. The key of a score that is not negative has the
            # same bits, so the scores can still be read.
            top.add(i, score)
            positions[i] = run.average_or_broadcast(top.take()[i])
            scores[i] = run.average_or_broadcast(score.reshape(-1)[positions[i].long()]).cpu()

        scan_scores(self, run, bank, [layers[site.name] for site in sites], [None] * len(sites), keep_best)
        in_order = [scores[i] for i in range(len(sites))]
        chosen, structured = divide_budget(in_order, limits, bank.branches, budget)
        bank.mix([positions[i][own.to(positions[i].device)] for i, own in enumerate(chosen)], structured)
        self._start_branches(run, state)

    @torch.no_grad()
    def _start_branches(self, run: Run, state: Any) -> None:
        """Draw the factor A of every branch from the run's generator."""
        for view in state["views"]:
            if view.additive:
                a, _ = view.factors()
                drawn = torch.empty(a.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=run.generator)
                a.copy_(drawn)
