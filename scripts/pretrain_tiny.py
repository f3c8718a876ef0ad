"""Make the built-in models in ``finetune/models``.

    python scripts/pretrain_tiny.py vit  --data DATA/cifar10           # the image model
    python scripts/pretrain_tiny.py lm   --data DATA                   # the language model
    python scripts/pretrain_tiny.py deep --data DATA                   # a language model of twelve blocks

``DATA/cifar10`` has CIFAR-10 as ``train.parquet`` and ``test.parquet`` (columns image and label). ``DATA``
has the folders wikitext2, tinyshakespeare and gsm8k. The script writes a README beside the weights, with the
training time and the test result.

Three methods make a few epochs on a CPU sufficient for the image model. It starts from the mimetic
initialization of attention (Trockman and Kolter, arXiv 2305.09828) and whitened patches. In the first epochs
it sees only a part of its patches (PatchDropout, arXiv 2208.07220). Its matrices are trained by Muon (Jordan
et al., 2024).
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODELS = Path(__file__).resolve().parents[1] / "finetune" / "models"
SIZES = {
    "lm": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5},
    "deep": {"hidden_size": 96, "intermediate_size": 264, "num_hidden_layers": 12},
}  # of the language models
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def make_positions(side: int, dim: int) -> Tensor:
    """Return two-dimensional sine and cosine positions [side * side, dim]."""
    rates = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim / 4))
    angles = torch.arange(side)[:, None] * rates
    wave = torch.cat([angles.sin(), angles.cos()], 1)  # [side, dim / 2]
    grid = torch.cat([wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)], -1)
    return grid.reshape(side * side, dim)


@torch.no_grad()
def init_mimetic_(layer: nn.Module, heads: int) -> None:
    """Initialize ``Wq^T Wk`` of every head near the identity, and ``Wo Wv`` near minus the identity."""
    attention = layer.attention
    dim = attention.q_proj.weight.shape[0]
    head = dim // heads
    u, s, vh = torch.linalg.svd(0.4 * torch.randn(dim, dim) / math.sqrt(dim) - 0.4 * torch.eye(dim))
    attention.o_proj.weight.copy_(u * s.sqrt())
    attention.v_proj.weight.copy_(s.sqrt()[:, None] * vh)
    for h in range(heads):
        u, s, vh = torch.linalg.svd(0.7 * torch.randn(dim, dim) / math.sqrt(dim) + 0.7 * torch.eye(dim))
        rows = slice(h * head, (h + 1) * head)
        attention.q_proj.weight[rows] = (u * s.sqrt())[:, :head].T
        attention.k_proj.weight[rows] = (s.sqrt()[:, None] * vh)[:head]


@torch.no_grad()
def init_whitening_(projection: nn.Conv2d, images: Tensor) -> None:
    """Initialize filters with the principal directions of patches, at unit variance and in both signs."""
    columns = F.unfold(images / 127.5 - 1, projection.kernel_size, stride=projection.stride)
    patches = columns.transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    filters = vectors.T / (values + 1e-2).sqrt()[:, None]
    both = torch.cat([filters, -filters]).view(-1, *projection.weight.shape[1:])
    projection.weight[: len(both)] = 0.3 * both


class Muon(torch.optim.Optimizer):
    """Momentum for matrices, with each update replaced by the nearest orthogonal matrix.

    The orthogonal matrix comes from five Newton-Schulz steps in float32; matrices of one shape are computed
    together.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix once."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape), []).append(p)
            for same in by_shape.values():
                for p in same:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                updates = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in same]
                for p, update in zip(same, orthogonalize(torch.stack(updates)), strict=True):
                    p.sub_(update, alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def make_optimizers(model: nn.Module, blocks: nn.Module, steps: int) -> list[Any]:
    """Return Muon for the matrices of the blocks, AdamW for the rest, and a schedule for each.

    The learning rates warm up for a few steps and then fall linearly to zero. Call ``step`` of all once per
    step.
    """
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    by_muon = {id(matrix) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in by_muon]
    warm_up = min(300, steps // 10)

    def scale(step: int) -> float:
        return min((step + 1) / warm_up, 1 - step / steps)

    adamw, muon = torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.01), Muon(matrices, 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR
    return [adamw, muon, schedule(adamw, scale), schedule(muon, scale)]


def orthogonalize(x: Tensor) -> Tensor:
    """Return approximately U V^T of the singular value decomposition of each matrix."""
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images of CIFAR-10, uint8 [n, 3, 32, 32], and their labels [n]."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(path).to_pydict()
    images = []
    for row in table["image"]:
        images.append(np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.contiguous(), torch.tensor(table["label"])


def augment(x: Tensor) -> Tensor:
    """Crop each image at random after adding a reflected border of 4, and flip half of them.

    Takes uint8 and returns float in [-1, 1].
    """
    n, padded = len(x), F.pad(x.float(), (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, n))
    columns = torch.arange(32).expand(n, 32)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns) + left[:, None]
    rows = torch.arange(32) + top[:, None]
    cropped = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]]
    return cropped.permute(0, 3, 1, 2) / 127.5 - 1


def compute_logits(model: nn.Module, x: Tensor, keep: float) -> Tensor:
    """Return the classifier's output for a random share ``keep`` of the patches; 1 keeps all."""
    h = model.vit.embeddings(x)
    patches = h.shape[1] - 1
    if keep < 1:
        chosen = torch.rand(len(x), patches).topk(int(keep * patches)).indices + 1
        h = torch.cat([h[:, :1], h.gather(1, chosen[..., None].expand(-1, -1, h.shape[2]))], 1)
    for layer in model.vit.layers:
        h = layer(h)
    return model.classifier(model.vit.layernorm(h)[:, 0])


@torch.no_grad()
def measure_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that the model classifies correctly."""
    model.eval()
    right = 0
    for images, labels in zip(x.split(500), y.split(500), strict=True):
        right += int((compute_logits(model, images / 127.5 - 1, 1.0).argmax(1) == labels).sum())
    model.train()
    return right / len(y)


def pretrain_vit(data: Path, epochs: int, seed: int, batch: int = 128) -> None:
    """Train the image model and write it."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(seed)
    started = time.time()
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=32,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CIFAR10)),
        label2id={name: number for number, name in enumerate(CIFAR10)},
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = 0.3 * make_positions(8, 128)
    for layer in model.vit.layers:
        init_mimetic_(layer, config.num_attention_heads)
    (x, y), (x_test, y_test) = read_images(data / "train.parquet"), read_images(data / "test.parquet")
    init_whitening_(model.vit.embeddings.patch_embeddings.projection, x[:2000])
    per_epoch = len(x) // batch
    steps = epochs * per_epoch
    updates = make_optimizers(model, model.vit.layers, steps)
    folder = MODELS / "tiny_vit"
    for epoch in range(epochs):
        keep = 0.7
        if epoch < 0.7 * epochs:
            keep = 0.4
        elif epoch == epochs - 1:
            keep = 1.0
        total = 0.0
        for chosen in torch.randperm(len(x))[: per_epoch * batch].split(batch):
            loss = F.cross_entropy(compute_logits(model, augment(x[chosen]), keep), y[chosen])
            model.zero_grad()
            loss.backward()
            for update in updates:
                update.step()
            total += loss.item()
        tested = measure_accuracy(model, x_test[:2000], y_test[:2000])
        minutes = (time.time() - started) / 60
        figures = f"keep {keep} loss {total / per_epoch:.3f} test {tested:.3f} {minutes:.0f} min"
        print(f"epoch {epoch + 1}/{epochs} {figures}", flush=True)
        # float16 halves the file, and reading it as float32 is exact.
        copy.deepcopy(model).half().save_pretrained(folder)
    processor = ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    tested = measure_accuracy(model, x_test, y_test)
    write_card(
        folder,
        "ViT, 6 blocks of width 128, patches of 4, for 32x32 images",
        "CIFAR-10's 50,000 training images",
        f"test accuracy {tested:.4f} on CIFAR-10's 10,000 test images",
        f"vit --data DATA/cifar10 --epochs {epochs} --seed {seed}",
        started,
    )


def read_prose(data: Path) -> tuple[str, str]:
    """Return English prose for training, and other prose for the test."""
    train = [
        (data / "wikitext2" / "valid.txt").read_text(),
        (data / "tinyshakespeare" / "input.txt").read_text(),
    ]
    with (data / "gsm8k" / "train.jsonl").open() as lines:
        for line in lines:
            problem = json.loads(line)
            train.append(f"{problem['question']}\n{problem['answer']}")
    return "\n".join(train), (data / "wikitext2" / "test.txt").read_text()


@torch.no_grad()
def measure_bits_per_byte(model: nn.Module, ids: Tensor, text: str, length: int) -> float:
    """Return the bits per byte of ``text``, whose tokens are ``ids``, in windows of ``length`` tokens."""
    model.eval()
    nats = 0.0
    for piece in ids.split(length - 1):
        window = F.pad(piece, (1, 0))[None]  # the start token is 0
        nats += F.cross_entropy(model(window).logits[0, :-1].float(), piece, reduction="sum").item()
    model.train()
    return nats / math.log(2) / len(text.encode())


def pretrain_lm(name: str, data: Path, epochs: int, seed: int, length: int = 256, batch: int = 16) -> None:
    """Train a language model of ``SIZES`` and its tokenizer, and write both."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    started = time.time()
    train, held_out = read_prose(data)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train.splitlines(keepends=True), trainer)
    folder, sizes = MODELS / f"tiny_{name}", SIZES[name]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", model_max_length=length
    ).save_pretrained(folder)
    ids, ids_test = torch.tensor(tokenizer.encode(train).ids), torch.tensor(tokenizer.encode(held_out).ids)
    config = LlamaConfig(
        **sizes,
        vocab_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    steps = epochs * (len(ids) // length // batch)
    updates = make_optimizers(model, model.model.layers, steps)
    for step in range(steps):
        starts = torch.randint(0, len(ids) - length + 1, (batch, 1))
        window = F.pad(ids[starts + torch.arange(length - 1)], (1, 0))  # a window begins with the start token
        loss = model(window, labels=window).loss
        model.zero_grad()
        loss.backward()
        for update in updates:
            update.step()
        if step % 100 == 99 or step == steps - 1:
            minutes = (time.time() - started) / 60
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} {minutes:.1f} min", flush=True)
    model.half().save_pretrained(folder)
    tested = measure_bits_per_byte(model.float(), ids_test, held_out, length)
    write_card(
        folder,
        f"Llama, {sizes['num_hidden_layers']} blocks of width {sizes['hidden_size']}, 1,024 byte-level BPE "
        "tokens, context 256",
        "WikiText-2's validation text, Tiny Shakespeare and GSM8K's training problems",
        f"{tested:.3f} bits per byte on WikiText-2's test text",
        f"{name} --data DATA --epochs {epochs} --seed {seed}",
        started,
    )


def write_card(folder: Path, what: str, data: str, reached: str, command: str, started: float) -> None:
    """Write the README beside the weights, and print the result."""
    from safetensors.torch import load_file

    size = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    minutes = (time.time() - started) / 60
    lines = [
        f"# {folder.name}\n\n{what}; {size:,} parameters, stored as float16.\n",
        f"- trained on: {data}",
        f"- reached: {reached}",
        f"- made by: `python scripts/pretrain_tiny.py {command}`",
        f"- took: {minutes:.0f} minutes on 2 cores",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    print(f"{folder.name}: {reached}, {minutes:.0f} min")


def main() -> None:
    """Train the model that is named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["vit", *SIZES])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.model == "vit":
        pretrain_vit(given.data, given.epochs or 14, given.seed)
    else:
        pretrain_lm(given.model, given.data, given.epochs or 1, given.seed)


if __name__ == "__main__":
    main()
