"""Save the checkpoints of a run, and resume from the newest one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config import plugin_records
from ..errors import ConfigError
from ..storage import checkpoint
from ..storage.progress import ProgressRecord, read_progress
from ..storage.run_folder import RunFolder
from .prepare import Setup
from .run_log import RunLog
from .session import Session


class Snapshot:
    """A copy of a session's state, for a checkpoint written after the session has loaded another state."""

    def __init__(self, session: Session) -> None:
        self._state = session.state_dict()
        copied = {}
        for name, tensor in self._state["states"].items():
            copied[name] = tensor.detach().cpu().clone()
        self._state["states"] = copied

    def state_dict(self) -> dict[str, Any]:
        """Return the state as the session returned it."""
        return self._state


class Checkpoints:
    """The checkpoints of one run. Only rank 0 writes; all ranks read."""

    def __init__(self, setup: Setup, files: RunFolder, log: RunLog) -> None:
        self.setup, self.session, self.files, self.log = setup, setup.session, files, log
        self.is_main = setup.session.accelerator.is_main_process
        self.saved_step = 0  # of the last checkpoint; there is nothing to save at step 0
        self._snapshot: Snapshot | None = None

    def resume(self, fresh: ProgressRecord, begun: bool) -> ProgressRecord | None:
        """Resume from the newest complete checkpoint; return its record, or ``None`` if there is none.

        ``fresh``: the record of a new run, which fills in what an old checkpoint lacks. ``begun``: the run
        was started before. Raises ``ConfigError`` if the checkpoint belongs to another configuration.
        """
        folder = checkpoint.find_newest(self.files, self.log)
        if folder is None:
            if begun:
                self.log(
                    "This run was interrupted before its first checkpoint, or none of its checkpoints "
                    "is whole, so it starts from the beginning."
                )
            return None
        record = read_progress(folder, checkpoint.load(folder, self.session), fresh)
        self.files.check_unaltered(record.config, folder)
        for path, mark in record.references.items():
            if fresh.references.get(path) != mark:
                raise ConfigError(
                    f"The reference model {path} has other weights now than when {folder} was written. "
                    "Put the old ones back, or train again."
                )
        self.session.memory.restore(record.memory)
        self._use_threads(record.threads)
        if self.is_main:
            checkpoint.restore_best(folder, self.files.delta)
        self.saved_step = self.session.number
        self.log(f"Resuming from step {self.session.number}, the newest checkpoint of this run.")
        if record.processes != fresh.processes:
            warning = (
                f"steps up to {self.session.number} were made by {record.processes} processes and later "
                f"ones by {fresh.processes}: the last bits, and what dropout draws, differ from "
                "an uninterrupted run"
            )
            record.watch.warnings.append(warning)
            self.log(f"Warning: {warning}.")
        self._note_changed_plugins(record, fresh)
        record.processes, record.config, record.plugins = fresh.processes, fresh.config, fresh.plugins
        return record

    def _note_changed_plugins(self, record: ProgressRecord, fresh: ProgressRecord) -> None:
        """Record a warning if the code of a plug-in has changed since the checkpoint.

        The user is told by ``plugin_records.check``, before the run starts.
        """
        before = plugin_records.describe_others(record.plugins, fresh.plugins)
        now = plugin_records.describe_others(fresh.plugins, record.plugins)
        if before and now:
            warning = (
                f"steps up to {self.session.number} were made with the plug-in {before} and later ones with "
                f"{now}: the code has changed, so neither version alone gives this result"
            )
            record.watch.warnings.append(warning)
            self.log.write(f"Warning: {warning}.")

    def _use_threads(self, count: int) -> None:
        """Use as many threads as the earlier steps did: another number would sum in another order."""
        current = torch.get_num_threads()
        if count != current:
            threads = "1 thread" if count == 1 else f"{count} threads"
            self.log(f"Using {threads} instead of {current}, as the earlier steps did.")
            torch.set_num_threads(count)

    def take_snapshot(self) -> None:
        """Keep the state after the last step for ``save``, before the session loads another state."""
        self._snapshot = Snapshot(self.session)

    def save(self, record: ProgressRecord) -> Path:
        """Save the state after the last step, unless that was done; return the checkpoint's folder."""
        step = self.session.number
        folder = self.files.checkpoint(step)
        if self.is_main and self.saved_step != step:
            self.files.sync()
            record.memory = self.session.memory.record()
            best = self.files.delta if record.best is not None else None
            checkpoint.save(folder, self._snapshot or self.session, record.to_json(), best)
            checkpoint.prune(self.files, self.setup.config.train.keep_last, step)
        self.saved_step = step
        return folder
