"""SHiRA: train a few entries of each weight, chosen once before training.

K values are added to each weight at fixed positions; they start at 0. The change is very sparse but of high
rank. The paper's masks are choices of score and grain:

- random (the default): score=random
- WM: score=magnitude
- Grad: score=gradient
- SNIP: score=snip
- Struct, without its diagonal: score=random with grain=row or grain=column

Formula:
    W' = W + S        S: K trained values at fixed positions, from 0

Paper: Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024, arXiv 2406.13175.

Reading: The paper was read, and the code of huggingface/peft, since the repository that the paper names holds
no code. What is trained is a vector of values that are added to W, so weight decay pulls towards W. The paper
trains 1 to 2 percent of the entries, hence sparsity = 0.98.

Rate: The paper has 5e-4, linear, for language models and 1e-4, cosine, for image generation.

Differs:
- peft has only the random mask. Its generator starts from the same state in every run, so that all layers of
  one shape get the same mask; here the run's seed draws the masks, and every layer gets its own.
- peft's budget is rank (in + out) entries per layer; here it is ``sparsity``.
- The diagonal of the Struct mask is left out.

Cost: K trained values, their gradients and two moments in Adam. Values and positions are stored. Masks by
gradients cost one or more backward passes before training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...registry import register
from ...schedules.static import Static


@register("shira")
@dataclass(frozen=True)
class SHiRA(Sparse):
    """SHiRA: a fixed set of entries of each weight."""

    schedule: Schedule = Static()

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "a share of the entries of each weight, chosen once"
    paper: ClassVar[str] = "arXiv 2406.13175"
