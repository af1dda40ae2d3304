"""Models that are still coming: what the trainer does of its work while the sync brings their weights.

The sync puts settings and tokenizers first (WMTP_SYNC_FIRST); with these, data are read and tokenized. A file says that
all models are here.
"""

from __future__ import annotations

import contextlib
import filecmp
import time
from pathlib import Path

from wmtp.causes import CONFIGURATION, MODEL_FILES, VOCABULARY
from wmtp.config import Recipe
from wmtp.manifest import MANIFEST, load_manifest
from wmtp.model import ModelError, ModelSpec
from wmtp.outcome import BadInput, Stop, Stopped, local_path
from wmtp.weights import base_refused, read_spec, vocabulary_refused


def wait_for(files: list[Path], stop: Stop) -> None:
    """Until one of the files is there. Raises Stopped on a notice to stop."""
    while not any(file.exists() for file in files):
        if stop.cause:
            raise Stopped("before the models came")
        time.sleep(0.05)


def first_look(uri: str, after: Path | None, first: Path | None, stop: Stop) -> tuple[Path, ModelSpec]:
    """Folder and spec of the base, or of the part of it that came first, where that says enough.

    ``after``: the file that says that models are here; None when they are. ``first``: the sync's folder of what came
    first. Raises ModelError, BadInput, Stopped.
    """
    if after is not None:
        part = first / uri.rstrip("/").rpartition("/")[2] if first else None
        wait_for([after, *([part] if part else [])], stop)
        if part and not after.exists():
            with contextlib.suppress(ModelError):  # a size that only the weights say
                return part, read_spec(part, there=[entry.path for entry in load_manifest(part / MANIFEST).files])
        wait_for([after], stop)
    base = local_path(uri, "paths.models.base")
    return base, read_spec(base)


def need_base(name: str, spec: ModelSpec, recipe: Recipe, pieces: int) -> None:
    """Raise BadInput where the base model is none for the recipe; ``pieces``: those of its tokenizer."""
    if told := base_refused(name, spec, recipe, pieces):
        kind = VOCABULARY if told == vocabulary_refused(name, spec, recipe, pieces) else CONFIGURATION
        raise BadInput("{}; rule: {}; next: {}".format(*told), kind)


def then_whole(uri: str, looked_at: Path, after: Path, stop: Stop) -> Path:
    """The base's folder, once all models are here; refused where it isn't what was looked at."""
    wait_for([after], stop)
    base = local_path(uri, "paths.models.base")
    for file in looked_at.iterdir() if looked_at.is_dir() else ():
        if file.is_file() and not ((base / file.name).is_file() and filecmp.cmp(file, base / file.name)):
            raise BadInput(
                f"{base}: {file.name} is another than when data were read; rule: one version of a model for a whole "
                "run; next: start again: it was published again meanwhile",
                MODEL_FILES,
            )
    return base
