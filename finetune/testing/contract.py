"""What every method must keep, as checks to call from a test: ``check(lambda: LoRA(rank=4))``.

The oracle is never the method itself: the untouched model, an uninterrupted run, the whole batch, the plain merged layers. Models are tiny, with
random weights, and the data is random with a rule that can be learned; a check takes about a second.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config.settings import OptimizerConfig, TrainConfig
from ..core.method import Method
from ..core.part import base, detach, merge, patched
from ..core.selector import Selector
from ..data.encode import collate
from ..storage import checkpoint
from ..storage import delta as stored
from ..system import random_state as rng
from ..training.batches import Batches
from ..training.prepare import make_accelerator
from ..training.session import Session, Step

Make = Callable[[], Method]
Kind = Literal["vit", "gpt2", "llama"]
STEPS = 6
TRAIN = TrainConfig(steps=STEPS, batch_size=8, device="cpu")
OPTIMIZER = OptimizerConfig(lr=1e-2)


def tiny(kind: Kind = "vit") -> Any:
    """A two-block model with random weights, the same at every call."""
    import transformers

    t: Any = transformers
    torch.manual_seed(7)
    if kind == "vit":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": 16,
            "patch_size": 8,
        }
        return t.ViTForImageClassification(t.ViTConfig(**sizes, num_labels=3)).eval()
    if kind == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False)
        ).eval()
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return t.LlamaForCausalLM(
        t.LlamaConfig(vocab_size=40, max_position_embeddings=16, use_cache=False, **shape)
    ).eval()


def examples(kind: Kind = "vit", n: int = 21) -> list[dict[str, Any]]:
    """``n`` items as the data module gives them; language-model items differ in length."""
    generator = torch.Generator().manual_seed(1)
    items: list[dict[str, Any]] = []
    for i in range(n):
        if kind == "vit":
            pixels = torch.randn(3, 16, 16, generator=generator)
            items.append(
                {
                    "id": str(i),
                    "pixel_values": pixels,
                    "label": int(pixels.mean() * 16 > 0) + int(pixels[0].mean() > 0),
                }
            )
        else:
            ids = torch.randint(1, 40, (5 + i % 7,), generator=generator).tolist()
            items.append({"id": str(i), "input_ids": ids, "bytes": len(ids), "pad": 0})
    return items


def begin(
    method: Method, kind: Kind = "vit", train: TrainConfig = TRAIN, seed: int = 0, model: Any = None, selector: Selector | None = None
) -> Session:  # fmt: skip
    """A session of ``method`` on a tiny model."""
    model = model if model is not None else tiny(kind)
    head = ("classifier.weight", "classifier.bias") if kind == "vit" else ()
    batches = Batches(examples(kind), train.batch_size, train.micro_batch_size, seed, workers=train.workers)  # type: ignore[arg-type]  # a list serves
    original = copy.deepcopy(model)
    accelerator = make_accelerator(train)
    batches.rank, batches.world = accelerator.process_index, accelerator.num_processes
    return Session(
        model,
        method,
        head,
        batches,
        OPTIMIZER,
        train,
        seed,
        accelerator,
        lambda: iter(copy.deepcopy(original).named_parameters()),
        selector,
    )


def finish(session: Session) -> Session:
    """Train to the end."""
    for _ in session.steps():
        pass
    return session


@torch.no_grad()
def logits(model: nn.Module, kind: Kind = "vit") -> Tensor:
    """The model's output on a fixed batch, in eval mode."""
    model.eval()
    inputs = collate(examples(kind)[:5]).inputs
    if kind == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    out = model(**inputs)
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found.float()


def same_values(a: nn.Module, b: nn.Module) -> None:
    """Raise ``AssertionError`` unless both have the same state to the bit."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys(), f"names differ: {sorted(left.keys() ^ right.keys())}"
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), f"{name} differs"


def check_base_untouched(make: Make, kind: Kind = "vit") -> None:
    """After training the model has changed; inside ``base`` and after ``detach`` it is the pretrained one to the bit."""
    original = tiny(kind)
    session = finish(begin(make(), kind))
    assert not torch.equal(logits(session.tuned, kind), logits(original, kind)), "training changed nothing"
    with base(session.states):
        assert torch.equal(logits(session.tuned, kind), logits(original, kind)), (
            "inside base() the output differs from the base's"
        )
    detach(session.model, session.states)
    same_values(session.model, original)


def check_step_zero(make: Make, kind: Kind = "vit") -> None:
    """Before the first step the output is the base's if the method says ``neutral_start``, and differs if not."""
    session = begin(make(), kind)
    session.start()
    close = torch.allclose(logits(session.tuned, kind), logits(tiny(kind), kind), atol=1e-6)
    exact = torch.equal(logits(session.tuned, kind), logits(tiny(kind), kind))
    assert close if session.method.neutral_start else not exact, (
        f"neutral_start={session.method.neutral_start} is not so"
    )


def check_merge(make: Make, kind: Kind = "vit") -> None:
    """Merged into plain layers, the model computes what it computed with parts attached."""
    session = finish(begin(make(), kind))
    live = logits(session.tuned, kind)
    merge(session.model, session.states)
    assert not patched(session.model), "a patched layer is left"
    assert type(session.model) is type(tiny(kind))
    assert {n for n, _ in session.model.named_parameters()} == {
        n for n, _ in tiny(kind).named_parameters()
    }, "the merged model is not plain"
    torch.testing.assert_close(logits(session.model, kind), live, atol=2e-5, rtol=1e-4)


def same_session(a: Session, b: Session) -> None:
    """Raise ``AssertionError`` unless all that the rest of a run depends on is the same to the bit: values, optimizer, random generators."""
    left, right = (checkpoint.tensors(session.state_dict()) for session in (a, b))
    assert left.keys() == right.keys(), f"names differ: {sorted(left.keys() ^ right.keys())}"
    for name, tensor in left.items():
        bits = (t.reshape(-1).view(torch.uint8) for t in (tensor, right[name]))
        assert torch.equal(next(bits), next(bits)), f"{name} differs"
    groups = (
        json.dumps(session.optimizer.state_dict()["param_groups"]) for session in (a, b)
    )  # in which tuples are lists
    assert next(groups) == next(groups), "the optimizer's settings differ"


def check_resume(
    make: Make, kind: Kind = "vit", train: TrainConfig = TRAIN, choose: Callable[[], Selector] = Selector
) -> None:
    """Saved to disk at several steps and gone on from in a new session, the run ends with the same bits as without a break."""
    whole, saved, steps = begin(make(), kind, train, selector=choose()), (1, STEPS // 2, STEPS - 1, STEPS), []
    with tempfile.TemporaryDirectory() as folder:
        for step in whole.steps():
            steps.append(_said(step))
            if step.number in saved:
                checkpoint.save(Path(folder) / str(step.number), whole, {"at": step.number})
        for at in saved:
            resumed = begin(make(), kind, train, selector=choose())
            rng.seed(at)  # a new process stands anywhere
            assert checkpoint.load(Path(folder) / str(at), resumed) == {"at": at}
            assert [_said(step) for step in resumed.steps()] == steps[at:], (
                f"what is said of the steps after {at} differs"
            )
            same_session(resumed, whole)
            assert (resumed.run.step, resumed.stage) == (whole.run.step, whole.stage), (
                "they do not stand at the same place"
            )


def _said(step: Step) -> str:
    """All of a step but its time, as text: NaN is equal to itself there."""
    return repr((step.number, step.loss, step.lr, sorted(step.metrics.items())))


def check_same_seed(make: Make, kind: Kind = "vit") -> None:
    """Two runs of one seed end with the same bits; another seed's differ."""
    first, second, other = (finish(begin(make(), kind, seed=seed)) for seed in (3, 3, 4))
    same_values(first.states, second.states)
    assert not torch.equal(logits(first.tuned, kind), logits(other.tuned, kind)), "the seed changes nothing"


def check_stored(make: Make, kind: Kind = "vit") -> None:
    """The stored change, put on a new base, gives the same output to the bit."""
    trained, new = finish(begin(make(), kind)), begin(make(), kind)
    with tempfile.TemporaryDirectory() as folder:
        stored.save(Path(folder) / "delta", trained.states, {})
        new.enter(trained.phase)
        stored.load(Path(folder) / "delta", new.states)
    assert torch.equal(logits(trained.tuned, kind), logits(new.tuned, kind))


def check_accumulation(make: Make, kind: Kind = "vit") -> None:
    """Micro-batches of unequal size (and token count) give the gradients and the loss of the whole batch."""
    found = []
    for micro in (None, 3):
        session = begin(make(), kind, replace(TRAIN, micro_batch_size=micro))
        session.start()
        session.tuned.eval()  # without dropout, whose draws depend on the batch's shape
        loss = session._backward(next(session.batches.steps(0, 1)))
        found.append((loss, [p.grad for p in session.states.parameters() if p.requires_grad]))
    (whole_loss, whole), (loss, grads) = found
    assert abs(loss - whole_loss) < 1e-5
    largest = max(float(g.abs().max()) for g in whole if g is not None)
    for a, b in zip(whole, grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6 * largest)


def check_bf16(make: Make, kind: Kind = "vit") -> None:
    """On a bfloat16 base under autocast the trained values are float32, finite and moved, and the base stays as it was."""
    original = tiny(kind).bfloat16()
    train = replace(TRAIN, precision="bf16")
    session = begin(make(), kind, train, model=tiny(kind).bfloat16())
    session.start()
    before = {name: p.detach().clone() for name, p in session.states.named_parameters() if p.requires_grad}
    finish(session)
    moved = 0
    for name, p in session.states.named_parameters():
        if p.requires_grad:
            assert p.dtype == torch.float32, f"{name} is {p.dtype}"
            assert p.isfinite().all(), f"{name} is not finite"
            moved += int(
                not torch.equal(p, before.get(name, torch.zeros_like(p)))
            )  # a later phase's parameters are new; banks start at 0
    assert moved, "nothing moved"
    detach(session.model, session.states)
    same_values(session.model, original)


def check_gradients(make: Make, kind: Kind = "vit") -> None:
    """Within the run every trained tensor moves, and no frozen one gets a gradient."""
    session = begin(make(), kind)
    session.start()
    before = {name: p.detach().clone() for name, p in session.states.named_parameters() if p.requires_grad}
    finish(session)
    still = [n for n, p in session.states.named_parameters() if n in before and torch.equal(p, before[n])]
    assert session.method.unused_parameters or not still, f"never moved: {still}"
    trained = {id(p) for p in session.states.parameters()}
    assert all(p.grad is None for p in session.model.parameters() if id(p) not in trained)


def checks() -> Iterator[tuple[str, Callable[..., None]]]:
    """Every check by name."""
    for name, value in globals().items():
        if name.startswith("check_"):
            yield name, value


def check(make: Make, kind: Kind = "vit") -> None:
    """Every check of this module; ``make`` gives a new instance of the method."""
    for name, one in checks():
        if name != "check_merge" or make().mergeable:
            one(make, kind)
