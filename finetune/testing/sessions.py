"""Make tiny sessions for tests, train them, and compare them to the bit.

The models are tiny and have random weights. The data is random and follows a rule that can be learned.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config.settings import TrainConfig
from ..core.method import Method
from ..core.objective import Objective
from ..core.optimizer import Optimizer
from ..core.selector import Selector
from ..core.site import find_sites
from ..core.zeros import hold_zeros
from ..data.encode import Images, Tokens, collate
from ..objectives.task import Task
from ..optim.adamw import AdamW
from ..storage import checkpoint
from ..training.batches import Batches
from ..training.build import Pretrained
from ..training.prepare import make_accelerator
from ..training.session import Recipe, Session

Kind = Literal["vit", "gpt2", "llama"]
STEPS = 6
STREAM_EXAMPLES = 19  # of each data stream: its last batch has another size than that of the training data
TRAIN = TrainConfig(steps=STEPS, batch_size=8, device="cpu")
OPTIMIZER = AdamW(lr=1e-2)


def tiny(kind: Kind = "vit") -> Any:
    """Make a two-block model with random weights, the same at every call."""
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


def tiny_pruned(kind: Kind = "vit", share: float = 0.5) -> Any:
    """Make the model of ``tiny`` with a random share of the entries of each linear layer pruned."""
    model, generator = tiny(kind), torch.Generator().manual_seed(3)
    for site in find_sites(model.requires_grad_(False), ("all",)):
        weight = site.module.get_parameter("weight")
        pruned = torch.rand(weight.shape, generator=generator) < share
        weight.data.masked_fill_(pruned, 0)
        hold_zeros(site.module, pruned)
    return model


def examples(kind: Kind = "vit", n: int = 21, seed: int = 1) -> list[dict[str, Any]]:
    """Make ``n`` items as the data module gives them; items of a language model differ in length."""
    generator = torch.Generator().manual_seed(seed)
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
    method: Method,
    kind: Kind = "vit",
    train: TrainConfig = TRAIN,
    seed: int = 0,
    model: Any = None,
    selector: Selector | None = None,
    optimizer: Optimizer | None = None,
    objective: Objective | None = None,
    loss_scale: float | None = None,
) -> Session:
    """Make a session of ``method`` on a tiny model, or on ``model``.

    ``loss_scale``: the loss scale at the start of a session that computes in float16, as
    ``train.precision=fp16`` does on a GPU.
    """
    model = model if model is not None else tiny(kind)
    head = ("classifier.weight", "classifier.bias") if kind == "vit" else ()
    data = Tokens(examples(kind))
    objective = objective or Task()
    streams: dict[str, Tokens | Images] = {}
    wanted = (*objective.streams(), *(selector.streams() if selector else ()))
    for number, name in enumerate(wanted):
        streams[name] = Tokens(examples(kind, STREAM_EXAMPLES, seed=2 + number))
    batches = Batches(
        data, train.batch_size, train.micro_batch_size, seed, workers=train.workers, streams=streams
    )
    original = copy.deepcopy(model)
    accelerator = make_accelerator(train)
    if loss_scale is not None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    batches.rank, batches.world = accelerator.process_index, accelerator.num_processes
    pretrained = Pretrained(model, head, reload=lambda: copy.deepcopy(original))
    recipe = Recipe(method, optimizer or OPTIMIZER, train, seed, selector or Selector(), objective)
    session = Session(pretrained, recipe, batches, accelerator)
    session.check_objectives()
    return session


def finish(session: Session) -> Session:
    """Train to the end and return the session."""
    for _ in session.steps():
        pass
    return session


@torch.no_grad()
def logits(model: nn.Module, kind: Kind = "vit") -> Tensor:
    """Return the model's output on a fixed batch, in eval mode, as float32."""
    model.eval()
    inputs = collate(examples(kind)[:5]).inputs
    if kind == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    found: Tensor = model(**inputs).logits
    return found.float()


def same_values(a: nn.Module, b: nn.Module) -> None:
    """Raise ``AssertionError`` unless two modules have the same state to the bit."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys(), f"names differ: {sorted(left.keys() ^ right.keys())}"
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), f"{name} differs"


@dataclass(frozen=True)
class Standing:
    """Everything that the rest of a run depends on: values, optimizer, random generators and place."""

    tensors: dict[str, Tensor]
    optimizer_settings: str
    place: list[int]

    @classmethod
    def read(cls, session: Session) -> Standing:
        """Copy the standing of a session."""
        tensors = {}
        for name, tensor in checkpoint.name_tensors(session.state_dict()).items():
            tensors[name] = tensor.clone()
        settings = json.dumps(session.optimizer.state_dict()["param_groups"])  # JSON turns tuples into lists
        return cls(tensors, settings, [session.run.step, *session.phase_and_target_met])

    def check_equal(self, other: Standing) -> None:
        """Raise ``AssertionError`` unless ``other`` is the same to the bit."""
        left, right = self.tensors, other.tensors
        assert left.keys() == right.keys(), f"names differ: {sorted(left.keys() ^ right.keys())}"
        for name, tensor in left.items():
            # compared as bytes, so that NaN equals NaN and 0.0 differs from -0.0
            a, b = (t.reshape(-1).view(torch.uint8) for t in (tensor, right[name]))
            assert torch.equal(a, b), f"{name} differs"
        assert self.optimizer_settings == other.optimizer_settings, "the optimizer's settings differ"
        assert self.place == other.place, "step, phase or readiness differ"


def same_session(a: Session, b: Session) -> None:
    """Raise ``AssertionError`` unless two sessions would continue to the same bits."""
    Standing.read(a).check_equal(Standing.read(b))


def trained_values(session: Session) -> dict[str, Tensor]:
    """Copy the trained tensors of a session by name."""
    found = {}
    for name, parameter in session.states.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.detach().clone()
    return found
