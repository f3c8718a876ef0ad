"""Let the ``Trainer`` of transformers train a method that ``finetune.attach`` has put on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..core.method import Method
from ..errors import ConfigError


class Callback(TrainerCallback):
    """Run a method's hooks around the steps of a ``Trainer``. ``Handle.callback`` makes it."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Raise ``ConfigError`` if the trainer would drop the columns that the model takes."""
        if args.remove_unused_columns:
            raise ConfigError(
                "remove_unused_columns=True drops every column, since handle.module takes whatever the model "
                "takes. Set it to False."
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Raise ``ConfigError`` if the trainer would not train, or not clip, what the method trains."""
        wanted = {id(parameter) for parameter in self.handle.parameters()}
        stepped = set()
        for group in given["optimizer"].param_groups:
            stepped |= {id(parameter) for parameter in group["params"]}
        faults = []
        if not wanted <= stepped:
            faults.append(
                "The trainer's optimizer does not hold the trained tensors. Give "
                "Trainer(optimizers=(handle.optimizer(lr=...), None))."
            )
        if args.max_grad_norm and not wanted <= {id(p) for p in given["model"].parameters()}:
            faults.append(
                f"max_grad_norm={args.max_grad_norm} would not limit the gradients of the trained tensors. "
                "Give Trainer(model=handle.module), or max_grad_norm=0."
            )
        changes = type(self.handle.method).after_backward is not Method.after_backward
        penalty = type(self.handle.method).loss is not Method.loss
        if args.max_grad_norm and (changes or penalty):
            faults.append(
                f"method={self.handle.method.name} changes the gradients of a step after the trainer has "
                "limited their norm. Set max_grad_norm=0."
            )
        if faults:
            raise ConfigError(*faults)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.handle._before(given["optimizer"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.handle._complete_gradients()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.handle._after()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.handle.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / "finetune")
