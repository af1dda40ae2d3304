"""Checkpoints: saved whole or not at all while training goes on, resumed from the newest whole one, kept in the bucket.

A checkpoint is a folder ``step-N`` with torch.distributed.checkpoint's shards and ``trainer.json``. It is written
under a temporary name and renamed once everything in it is on disk; its last file, ``.complete``, lists the others.
How it comes to the bucket and back is in `wmtp.remote` and `wmtp.uploads`.

However slow the bucket is, the disk holds `keep_last` of them, the one that is written and the one that is uploaded
(and the newest that a finite step followed, where that is none of these).
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from wmtp.config import Storage
from wmtp.remote import MARKER, CheckpointError, DamagedError, Remote, marked, step_of, tell, wrong_of
from wmtp.staging import fsync
from wmtp.uploads import Uploads

# One process saves without a group on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def fsync_folder(folder: Path) -> None:
    """Bring every file under ``folder`` and the folder's own entries to disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


_groups: list[dist.ProcessGroup] = []


def saving_group() -> dist.ProcessGroup | None:
    """A group of its own for what is saved in the background: its collectives must not mix with the training's."""
    if not dist.is_initialized():
        return None
    if not _groups:
        group = dist.new_group(backend="gloo")
        assert group is not None
        _groups.append(group)
    return _groups[0]


class Checkpoints:
    """The checkpoints of one run, on disk under ``folder`` and, with ``remote`` (``s3://…``), in the bucket.

    Every rank holds one; ``save`` and ``load`` are collective. What ``save`` begins goes on in threads: tensors are
    copied until ``staged`` returns, written until ``settle`` does, uploaded until ``close`` does. A failure is raised
    by the next of these.
    """

    def __init__(
        self,
        folder: Path,
        remote: str | None,
        *,
        keep_last: int,
        storage: Storage,
    ) -> None:
        self.folder, self.keep_last = folder, keep_last
        self.remote = Remote(remote, storage) if remote else None
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.uploads = Uploads(self.remote, self._uploaded)
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._begun: tuple[AsyncSaveResponse, Future[None]] | None = None
        self._stager: DefaultStager | None = None
        self.proved: int | None = None
        """The newest step that a finite one followed: it is kept, whatever comes after it."""
        if self.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: {error.strerror}; next: make it writable, or set WMTP_APP_ROOT"
                ) from error
            for stale in folder.glob(".step-*"):  # a kill in the middle of a save leaves one
                shutil.rmtree(stale)

    # -- on disk -----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints on disk, oldest first."""
        return sorted(int(p.parent.name.removeprefix("step-")) for p in self.folder.glob(f"step-*/{MARKER}"))

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        trainer: dict[str, Any],
    ) -> Path:
        """Begin to write ``step-N``, complete or invisible, then prune and upload. Collective.

        Returns the folder that it will have. The tensors of ``model`` and ``optimizer`` must stay as they are until
        `staged` returns.
        """
        self.settle()
        final, staging = self.folder / f"step-{step}", self.folder / f".step-{step}"
        if (final / MARKER).exists():
            if self.rank == 0:
                self.upload(final)
            return final
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies run on a stream of their own
        state: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        self.need_room(f"step {step}", sum(map(local_bytes, tree_leaves(state))))
        if self._stager is None:
            fast = torch.cuda.is_available()
            options = StagingOptions(use_pinned_memory=fast, use_shared_memory=False, use_non_blocking_copy=fast)
            self._stager = DefaultStager(options)
        begun = dcp.async_save(
            state,
            checkpoint_id=staging,
            process_group=saving_group(),
            async_stager=self._stager,
            no_dist=not dist.is_initialized(),
        )
        assert isinstance(begun, AsyncSaveResponse)
        text = json.dumps({"step": step, **trainer})
        self._begun = begun, self.writer.submit(self._complete, step, begun.upload_completion, text, staging, final)
        return final

    def _complete(self, step: int, written: Future[Any], trainer: str, staging: Path, final: Path) -> None:
        """In a thread: what follows once every rank has written its part."""
        try:
            with causes_named(f"step {step} could not be saved"):
                written.result()
        except CheckpointError:
            if self.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        if self.rank == 0:
            (staging / "trainer.json").write_text(trainer)
            self.finish(staging, final)
            tell(f"save      step {step}: {final}")
            self.upload(final)

    def staged(self) -> None:
        """Wait until the tensors of the save that was begun are copied, and may change."""
        if self._begun is not None:
            self._begun[0].staging_completion.result()

    def settle(self, seconds: float | None = None) -> None:
        """Wait, at most ``seconds``, until the save that was begun is whole on disk. Raises CheckpointError."""
        if self._begun is not None:
            (_, whole), self._begun = self._begun, None
            whole.result(seconds)

    def need_room(self, what: str, local: int) -> None:
        """Refuse, on all ranks together, what the disk can't hold; ``local`` bytes a rank. Collective."""
        sums = torch.tensor([local, shutil.disk_usage(self.folder).free if self.rank == 0 else 0])
        if dist.is_initialized():
            dist.all_reduce(sums)
        needed, free = int(sums[0]), int(sums[1])
        if free < needed * 1.02 + (1 << 20):  # the files' own headers, and room for what the run still writes
            raise CheckpointError(
                f"{self.folder}: {what} needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
            ) from OSError(errno.ENOSPC, "no room for a checkpoint")

    def finish(self, staging: Path, final: Path) -> None:
        """Give a written folder its marker and its final name."""
        files = [
            {"path": str(p.relative_to(staging)), "bytes": p.stat().st_size}
            for p in sorted(staging.rglob("*"))
            if p.is_file() and p.name != MARKER
        ]
        (staging / MARKER).write_text(json.dumps({"format": 1, "files": files}))
        fsync_folder(staging)
        if final.exists():
            (final / MARKER).unlink(missing_ok=True)
            shutil.rmtree(final)
        staging.rename(final)
        fsync(self.folder)

    def load(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> dict[str, Any]:
        """Fill ``model`` and ``optimizer`` from ``step-N``; returns the ``trainer`` of ``save``. Collective."""
        folder = self.folder / f"step-{step}"
        for entry in wrong_of(folder, marked(folder)):
            raise CheckpointError(
                f"{folder / entry.path}: {entry.bytes} bytes expected; rule: a checkpoint is used whole; "
                f"next: remove {folder} and start again, the one before it is used"
            )
        trainer: dict[str, Any] = json.loads((folder / "trainer.json").read_text())
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        with causes_named(f"{folder} could not be loaded; next: remove it, the one before it is used"):
            dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return trainer

    def newest(self) -> tuple[int, dict[str, Any]]:
        """Step and ``trainer`` of the newest whole checkpoint, from disk or bucket; 0 where there is none. Collective.

        Raises what rank 0 met, on all ranks: whichever of them tells it, it is the cause.
        """
        told: list[Any] = [0, None, None]
        if self.rank == 0:
            try:
                self.fetch_newest()
                told[0] = max(self.steps(), default=0)
            except CheckpointError as error:
                told = [0, error, error.__cause__]
        if dist.is_initialized():
            dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1] from told[2]
        path = self.folder / f"step-{told[0]}" / "trainer.json"
        return told[0], json.loads(path.read_text()) if told[0] else {}

    def resume(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> int:
        """Load the newest whole checkpoint, from disk or bucket, into all three; returns its step, or 0. Collective."""
        step, _ = self.newest()
        if step:
            state.update(self.load(step, model, optimizer))
            state.pop("step")
            if self.rank == 0:
                self.upload(self.folder / f"step-{step}")  # a kill may have come before its upload ended
        return step

    def prune(self) -> None:
        """Keep the newest ``keep_last`` on disk, `proved` and what is uploaded now; a folder's marker goes first."""
        with self.uploads.changed:
            for step in self.older(self.steps()):
                folder = self.folder / f"step-{step}"
                if folder != self.uploads.now:
                    (folder / MARKER).unlink()
                    shutil.rmtree(folder)

    def older(self, steps: list[int]) -> list[int]:
        """Those of ``steps`` that need not be kept."""
        return [step for step in steps[: -self.keep_last] if step != self.proved]

    # -- in the bucket -----------------------------------------------------------------------------------------

    def fetch_newest(self) -> None:
        """Bring the bucket's newest checkpoint to disk if the disk has none as new. Rank 0 only.

        One that is not as its manifest says is lost, and told: the one before it is taken.
        """
        if self.remote is None:
            return
        there = self.remote.tried(f"what {self.remote.prefix} has", self.remote.steps)
        for step in reversed(there):
            if step <= max(self.steps(), default=0):
                return
            name, staging = f"step-{step}", self.folder / f".step-{step}"
            try:
                self.remote.get(name, staging)
            except DamagedError as error:
                tell(f"load      warn  step {step} is lost: {error}; the one before it is used")
                self.remote.disown(name)
                continue
            fsync_folder(staging)
            staging.rename(self.folder / name)
            fsync(self.folder)
            return

    def upload(self, folder: Path) -> None:
        """Start bringing ``folder`` to the bucket, and prune what is older on the disk. Rank 0 only."""
        if self.remote:
            self.uploads.add(folder)
        self.prune()

    def _uploaded(self, folder: Path, arrived: bool) -> None:
        """In a thread, after each upload."""
        self.prune()
        if self.remote and arrived and step_of(folder.name) is not None:
            self.remote.prune(self.older)

    def close(self, hurry: bool = False) -> None:
        """Wait for the save that was begun and for the uploads. Raises the first failure.

        ``hurry``, for a run that was told to stop: of the steps that wait only the newest is uploaded. While bytes move
        it takes its time; a bucket that is silent, or away, ends it after at most two rounds of `storage.retries` tries
        of `storage.stall_s`, `storage.retry_wait_s` apart.
        """
        problems: list[Exception] = []
        try:
            self.settle()
        except Exception as error:
            problems.append(error)
        self.writer.shutdown(wait=True)
        if self._stager is not None:
            self._stager.close()
        try:
            self.uploads.close(hurry)
        except Exception as error:
            problems.append(error)
        if problems:
            raise problems[0]


@contextlib.contextmanager
def causes_named(what: str) -> Iterator[None]:
    """Raise CheckpointError with the first rank's cause: torch's own exception is none that anybody else catches."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{what}: {cause}") from cause


def local_bytes(leaf: Any) -> int:
    """Bytes of a tensor that lie on this rank; 0 for anything else."""
    if isinstance(leaf, DTensor):
        leaf = leaf.to_local()
    return leaf.nbytes if isinstance(leaf, torch.Tensor) else 0
