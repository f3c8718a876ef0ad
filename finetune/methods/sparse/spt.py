"""SPT: entries where few are sensitive, a low-rank branch where many are (He et al., 2023, arXiv 2303.08566; the abstract and the code were read).

The sensitivity of an entry is the sum over ``batches`` batches of its squared gradient of the mean loss, in eval mode (the code: in train mode). Of
the tau most sensitive of all matrices' entries each is trained by itself, but a matrix with c >= P / ``alpha`` of them gets a branch B A of P =
``rank`` (in + out) parameters instead. tau is the largest one at which all that is trained is within the budget, the entries less the share
``sparsity`` of them; the code takes the nearest on a grid. ``alpha`` = 10 is the code's; the paper's rule, as remembered, is c >= P, ``alpha=1``.

A starts as in LoRA, B at 0, and there is no factor alpha / rank. One weight decay holds for factors and entries, where the code spares the latter.
Left out are the dropout in its branch, and its rule for biases and norms, which is no part of the abstract. The class token, where there is one, is
trained too, outside of the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from ...core.inplace import InPlace
from ...core.method import Method, Run
from ...core.part import attach, patched
from ...core.site import Site, find_sites
from ...core.sparse.mixed import Mixed, MixedDelta
from ...core.sparse.probe import scan
from ...core.sparse.select import TopK
from ...registry import register


def divide(
    scores: list[Tensor], limits: list[int], branches: list[int], budget: int
) -> tuple[list[Tensor], Tensor]:
    """Which of each site's best entries are trained, and which sites [sites] bool have a branch instead, of ``branches`` values.

    ``scores``: the best of each site, as many as ``limits`` says or fewer, ties to the earlier. Entries of all sites come in from the best down; the
    one that is its site's ``limits``-th turns all of these into a branch. Each adds to the cost (a limit is never above its branch), until one does
    not fit.
    """
    order = torch.cat(scores).sort(descending=True, stable=True).indices
    counts = torch.tensor([len(s) for s in scores])
    site = torch.arange(len(scores)).repeat_interleave(counts)[order]
    last = torch.zeros(len(scores), dtype=torch.int64).scatter_reduce_(
        0, site, torch.arange(len(site)), "amax"
    )
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
    """SPT: the most sensitive entries, and low-rank branches where they are many."""

    targets: tuple[str, ...] = ("all",)
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.98
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Ge(1)] = 10.0
    batches: Annotated[int, Ge(1)] = 16
    class_token: bool = True

    score: ClassVar[str] = "sensitivity"
    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = (
        "the entries that the loss is most sensitive to, or a low-rank branch where a matrix has many"
    )
    paper: ClassVar[str] = "arXiv 2303.08566"
    size: ClassVar[str] = "sparsity"

    def build(self, model: nn.Module) -> nn.ModuleDict:
        sites = find_sites(model, self.targets)
        size = sum(s.size for s in sites)
        most = sum(
            branch if limit <= s.size else s.size
            for s, (limit, branch) in zip(sites, map(self.costs, sites), strict=True)
        )
        bank = Mixed(sites, min(max(1, size - round(self.sparsity * size)), most), self.rank)
        views = [MixedDelta(bank, i, s) for i, s in enumerate(sites)]
        for site, view in zip(sites, views, strict=True):
            attach(model, site.name, view)
        state = nn.ModuleDict({"bank": bank, "views": nn.ModuleList(views)})
        tokens = [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "cls_token"]
        if self.class_token and tokens:
            state["class_token"] = InPlace(model, tokens, keep=True)
        return state

    def costs(self, site: Site) -> tuple[int, int]:
        """At how many entries a site gets a branch, and of how many parameters."""
        branch = self.rank * sum(site.shape)
        return math.ceil(branch / self.alpha), branch

    def begin(self, run: Run, state: Any, previous: Any) -> None:
        bank: Mixed = state["bank"]
        sites, layers, budget = find_sites(run.model, self.targets), patched(run.model), len(bank.values)
        limits = [self.costs(s)[0] for s in sites]
        best: dict[int, tuple[Tensor, Tensor]] = {}

        def add(i: int, score: Tensor) -> None:
            top = TopK(min(limits[i], budget), {i: 1})
            top.add(
                i, score
            )  # which turns scores into keys, in place: of a score that is not negative the key has the same bits
            at = run.agree(top.take()[i])
            best[i] = at, run.agree(score.reshape(-1)[at.long()]).cpu()

        scan(self, run, bank, [layers[s.name] for s in sites], [None] * len(sites), add)
        chosen, structured = divide([best[i][1] for i in range(len(sites))], limits, bank.branches, budget)
        bank.mix([best[i][0][c.to(best[i][0].device)] for i, c in enumerate(chosen)], structured)
        with torch.no_grad():
            for a, _ in [view.factors() for view in state["views"] if view.additive]:
                a.copy_(
                    nn.init.kaiming_uniform_(torch.empty(a.shape), a=math.sqrt(5), generator=run.generator)
                )
