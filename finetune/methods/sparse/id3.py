"""ID3: train a few more entries at every step, those with large gradient and small weight.

The budget K over the whole model is reached in equal parts: after part i of n, i K / n entries are trained,
rounded. A chosen entry is never dropped. Each part is chosen by the gradient of the batch of its own step,
which costs one more backward pass before the step. A larger ``schedule.every`` makes these passes rarer.
Weight decay pulls towards the pretrained weights, so entries that are not chosen keep their values.

Formula:
    score = |g| / (|w| + eps)^power        g: gradient of the current weight w
    trained after part i of n: i K / n entries of the model, the best by score at each part

Paper: Agarwal et al., "Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models",
TACL 2025, arXiv 2408.14470.

Reading: The abstract and the released code were read; the body of the paper was not available. eps = 1e-3 is
from the example in the released documentation, which has power = 0; the default here is 1.

Rate: The example of the released documentation has 1e-4. The rate of the paper is unverified.

Differs:
- The released code chooses by the gradient of the training step itself, in train mode. Here the gradient is
  that of an additional pass over the same batch: in eval mode by default, and with ``method.selection=train``
  in train mode with the dropout of the step itself. With dropout the two modes choose different entries.
- If scores are equal, the released code chooses more entries than a step's part, and may remove earlier
  entries to make up for it. Here ties go to the lower position, so every part has its exact size and no entry
  is removed.
- In the released code the entries of all trained tensors can be chosen, including embeddings, norms, biases
  and the head; here only those of the weights of linear layers can.
- In the released code weight decay moves entries that are not chosen.
- As in the released code, Adam's moments of an entry are 0 until it is chosen, and its first updates use the
  bias correction of the whole run.

Cost: K trained values, their gradients and two moments in Adam; memory for all K is allocated at the start.
Values and positions are stored. One backward pass for every part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...core.sparse.engine import Sparse
from ...core.sparse.schedule import Schedule
from ...core.sparse.settings import Scope, ScoreName
from ...registry import register
from ...schedules.grow import Grow


@register("id3")
@dataclass(frozen=True)
class ID3(Sparse):
    """ID3: a few more entries at every step, those with large gradient and small weight."""

    score: ScoreName = "d3"
    scope: Scope = "model"
    schedule: Schedule = Grow()

    family: ClassVar[str] = "sparse delta"
    trains: ClassVar[str] = "entries with large gradient and small weight, more at every step"
    paper: ClassVar[str] = "arXiv 2408.14470"
