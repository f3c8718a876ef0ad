"""Compare full fine-tuning with a bare torch loop."""

from __future__ import annotations

import torch
from torch import nn

from finetune.data.encode import collate
from finetune.methods.baseline.full import Full
from finetune.testing import contract, sessions
from finetune.testing.cases import Case, contract_test
from finetune.training.session import rate

CASES = [Case("full", Full, ("vit", "gpt2"), selectable=False, budget=1_007_232)]

test_contract = contract_test(CASES)


def test_equals_a_bare_torch_loop() -> None:
    session = contract.begin(Full())
    bare = contract.tiny().train()
    decays = [p for p in bare.parameters() if p.ndim > 1]
    rest = [p for p in bare.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays}, {"params": rest}], lr=1e-2, weight_decay=0.0, fused=True
    )
    for step, micro in enumerate(session.batches.steps(0, contract.STEPS)):
        batch = collate([contract.examples()[int(i)] for i in micro[0].ids])  # type: ignore[union-attr]
        optimizer.zero_grad()
        nn.functional.cross_entropy(bare(**batch.inputs).logits, batch.labels).backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate(sessions.OPTIMIZER, step, contract.STEPS)
        optimizer.step()
    contract.finish(session)
    torch.testing.assert_close(contract.logits(session.tuned), contract.logits(bare), atol=1e-4, rtol=1e-4)


def test_trains_the_model_s_own_tensors_without_a_copy() -> None:
    model = contract.tiny()
    places = {p.data_ptr() for n, p in model.named_parameters() if "classifier" not in n}
    session = contract.begin(Full(), model=model)
    assert {p.data_ptr() for p in session.states["method"].parameters()} == places
    assert not dict(session.states["method"].named_buffers())
