"""Gather statistics of a model's sites on given batches: of inputs, outputs and gradients of the weights.

No bank and no part is needed. Hooks observe the modules while the model runs, and are removed afterwards,
also after an error. Tokens of padding, which the attention mask of a batch marks by 0, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .collective import gather, sum_processes
from .run import Run
from .site import Site

StatisticName = Literal[
    "input_squares",
    "input_gram",
    "input_sum",
    "input_abs",
    "input_max",
    "output_squares",
    "output_gram",
    "output_sum",
    "output_abs",
    "output_max",
    "gradient",
    "gradient_squares",
]
OF_GRADIENTS = ("gradient", "gradient_squares")
HELD = 2**28  # entries of gradients that ``gather_gradients`` holds at once: 1 GiB in float32


@dataclass
class SiteStatistics:
    """The statistics of one site. ``tokens``: rows of the site's input, padding left out.

    ``values`` by name, of inputs X [tokens, in] (and likewise of outputs):

    - ``input_squares`` [in]: the sum over tokens of the square of each feature,
    - ``input_gram`` [in, in]: X^T X,
    - ``input_sum`` [in]: the sum over tokens,
    - ``input_abs`` [in]: the sum over tokens of the absolute values,
    - ``input_max`` [in]: the largest absolute value,
    - ``gradient`` [out, in]: the gradient of the summed losses with respect to the weight,
    - ``gradient_squares`` [out, in]: the sum over examples of the squared gradient of each example.
    """

    tokens: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: StatisticName) -> Tensor:
        """Return a statistic."""
        return self.values[name]

    def mean(self, side: Literal["input", "output"] = "input") -> Tensor:
        """Return the mean of each feature over tokens, from ``input_sum`` or ``output_sum``."""
        return self.values[f"{side}_sum"] / self.tokens


# Runs the model on a batch. Where gradients are asked for, it returns the loss, or runs backward itself.
RunBatch = Callable[[Any], Tensor | None]


def gather_statistics(
    model: nn.Module,
    sites: Sequence[Site],
    names: Sequence[StatisticName],
    batches: Iterable[Any],
    run_batch: RunBatch | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, SiteStatistics]:
    """Return the statistics ``names`` of each site by the site's name, summed over batches and processes.

    ``batches`` have ``inputs``, a mapping of tensors; a batch is None where this process has no example.
    ``run_batch`` runs the model, by default ``model(**batch.inputs)``. For gradients it must return the loss,
    a sum over examples, so that batches add up, or run backward of it and return None. ``dtype``: of the
    sums, float32 or float64. The model runs in eval mode. Raises ``ConfigError`` if the squared gradients of
    a layer that runs more than once in a forward pass are asked for.
    """
    gatherer = _Gatherer(sites, tuple(names), dtype)
    needs_gradients = any(name in OF_GRADIENTS for name in names)
    was_training = model.training
    model.eval()
    try:
        with gatherer.hooks(model), torch.set_grad_enabled(needs_gradients):
            for batch in batches:
                if batch is None:
                    continue
                gatherer.begin_batch(batch)
                loss = run_batch(batch) if run_batch else model(**batch.inputs)
                if needs_gradients:
                    _backward(loss)
    finally:
        model.train(was_training)
    gatherer.add_up_processes()
    return gatherer.found


def _backward(loss: Any) -> None:
    """Run backward from the loss that a ``run_batch`` returned; None: it has done so."""
    if loss is None:
        return
    if not isinstance(loss, Tensor):
        raise TypeError("gradients need a run_batch that returns the loss")
    loss.backward()


@dataclass(frozen=True)
class _Pass:
    """One backward pass of a run: a micro-batch and its step's batch. Gradients need no attention mask."""

    batch: Any  # None if this process has no example
    micro: list[Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)


def gather_gradients(run: Run, sites: Sequence[Site], steps: int) -> Iterator[tuple[Site, Tensor]]:
    """Yield each site with the gradient with respect to its weight, [out, in] float32, over ``steps`` steps.

    It is the gradient of the loss summed over the examples, or scored tokens, of all processes, in eval mode.
    Not more than ``HELD`` entries, or one site, are held at once. Sites beyond that wait for their turn, and
    each turn runs every backward pass again.
    """
    passes = []
    for micro in run.upcoming(steps):
        passes += [_Pass(batch, micro) for batch in micro]

    def run_backward(each: _Pass) -> None:
        run.backward(each.batch, each.micro, True, False)

    for turn in divide_by_size([site.size for site in sites], HELD):
        group = [sites[i] for i in turn]
        found = gather_statistics(run.model, group, ("gradient",), passes, run_backward)
        for site in group:
            yield site, found.pop(site.name)["gradient"]


def divide_by_size(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Yield consecutive positions in groups whose sizes add up to no more than ``limit``, or single ones."""
    group: list[int] = []
    for i, size in enumerate(sizes):
        if group and sum(sizes[j] for j in group) + size > limit:
            yield group
            group = []
        group.append(i)
    yield group


class _Gatherer:
    """Adds what the hooks of the sites see to one accumulator for each statistic of each site."""

    def __init__(self, sites: Sequence[Site], names: tuple[StatisticName, ...], dtype: torch.dtype) -> None:
        self.sites, self.names, self.dtype = sites, names, dtype
        self.found = {site.name: SiteStatistics() for site in sites}
        self.mask: Tensor | None = None
        self.ran: set[str] = set()  # sites whose gradient came in the current batch

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Observe the sites inside the block."""
        handles = []
        try:
            for site in self.sites:
                module = model.get_submodule(site.name)
                handles.append(module.register_forward_hook(self._make_hook(site)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_batch(self, batch: Any) -> None:
        """Take the attention mask of the batch that runs next."""
        self.mask = batch.inputs.get("attention_mask")
        self.ran = set()

    def _make_hook(self, site: Site) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            with torch.no_grad():
                self._add_features(site, args[0].detach(), output.detach())
            if not any(name in OF_GRADIENTS for name in self.names):
                return None
            return self._watch_gradient(site, args[0].detach(), output)

        return hook

    def _add_features(self, site: Site, x: Tensor, y: Tensor) -> None:
        found = self.found[site.name]
        tokens = self._tokens(x)
        found.tokens += len(tokens)
        for name in self.names:
            side, _, what = name.partition("_")
            if side == "gradient" or name == "gradient":
                continue
            rows = tokens if side == "input" else self._tokens(y)
            rows = rows.to(self.dtype)
            if what == "max":
                _raise_to(found.values, name, rows)
            elif what == "squares":
                _add(found.values, name, rows.square().sum(0))
            elif what == "abs":
                _add(found.values, name, rows.abs().sum(0))
            elif what == "gram":
                _add(found.values, name, rows.T @ rows)
            else:
                _add(found.values, name, rows.sum(0))

    def _tokens(self, x: Tensor) -> Tensor:
        """Return the features of all tokens but padding, [tokens, features].

        The mask is [n, length]. A tensor of another shape, such as pooled features, has no padding.
        """
        rows, mask = x.reshape(-1, x.shape[-1]), self.mask
        if mask is None or mask.ndim != 2:
            return rows
        is_per_token = x.shape[:-1] in (mask.shape, (mask.numel(),))
        return rows[mask.reshape(-1).bool().to(rows.device)] if is_per_token else rows

    def _watch_gradient(self, site: Site, x: Tensor, output: Tensor) -> Tensor:
        """Make backward add the gradient of the site; return the output that the model goes on with."""
        if output.requires_grad:
            output.register_hook(lambda grad: self._add_gradient(site, x, grad.detach()))
            return output
        # Nothing before this site is trained, so the graph begins here. The model may change the output in
        # place, which a tensor at the start of a graph does not allow: it goes on with a copy.
        start = output.requires_grad_()
        start.register_hook(lambda grad: self._add_gradient(site, x, grad.detach()))
        return start.clone()

    @torch.no_grad()
    def _add_gradient(self, site: Site, x: Tensor, grad: Tensor) -> None:
        values = self.found[site.name].values
        x, grad = x.to(self.dtype), grad.to(self.dtype)
        if "gradient" in self.names:
            _add(values, "gradient", grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]))
        if "gradient_squares" not in self.names:
            return
        if site.name in self.ran:
            raise ConfigError(
                f"The squared gradients of {site.name} are asked for, and this layer runs more than once in "
                "a forward pass. Leave the layer out of targets."
            )
        self.ran.add(site.name)
        for example, example_grad in zip(x, grad, strict=True):
            whole = example_grad.reshape(-1, grad.shape[-1]).T @ example.reshape(-1, x.shape[-1])
            _add(values, "gradient_squares", whole.square_())

    def add_up_processes(self) -> None:
        """Replace each sum by that over all processes, and each maximum likewise."""
        for site in self.sites:
            found = self.found[site.name]
            device = site.module.get_parameter("weight").device
            found.tokens = int(sum_processes(torch.tensor(found.tokens)))
            for name in self.names:
                if (
                    name not in found.values
                ):  # this process had no example, or backward did not reach the site
                    found.values[name] = torch.zeros(_shape(site, name), dtype=self.dtype, device=device)
                if name.endswith("_max"):
                    parts = gather(found.values[name])
                    found.values[name] = torch.stack([part.to(device) for part in parts]).amax(0)
                else:
                    found.values[name] = sum_processes(found.values[name])


def _shape(site: Site, name: str) -> tuple[int, ...]:
    """Return the shape of a statistic."""
    if name in OF_GRADIENTS:
        return site.shape
    features = site.shape[1] if name.startswith("input") else site.shape[0]
    return (features, features) if name.endswith("gram") else (features,)


def _add(values: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Add to a sum in place, or begin it."""
    if name in values:
        values[name].add_(tensor)
    else:
        values[name] = tensor


def _raise_to(values: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """Raise a maximum to the largest absolute values of the rows."""
    if not len(rows):
        return
    largest = rows.abs().amax(0)
    values[name] = torch.maximum(values[name], largest) if name in values else largest
