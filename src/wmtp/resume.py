"""What a checkpoint was made of, against what would go on from it: a run does not change under its name unsaid."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from wmtp import config as settings
from wmtp.outcome import BadInput, say

FREE = ("run.name", "run.tags", "eval.", "pretrain.save_value_head")
"""Keys of a recipe that no step depends on: names, and how often is looked."""
DIGESTS = ("data", "scores")
CODE = "code"
"""Told where it has changed, not refused: what ended a run may be what was mended."""
FIXED = ("rows_per_step",)
"""What can't be allowed: which rows were seen is known by the number of the step."""


def made_of(config: settings.Config, recipe: settings.Recipe, **facts: Any) -> dict[str, Any]:
    """Everything that the losses depend on, by its key; ``facts`` are those that no file names (digests, counts)."""
    both = settings.resolved(config, recipe)
    early = recipe.train.early_stopping.enabled or recipe.pretrain.early_stopping.enabled
    free = tuple(key for key in FREE if key != "eval." or not early)  # then a run ends by what is looked at
    kept = {key: value for key, value in settings.flat(both["recipe"]).items() if not key.startswith(free)}
    kept |= {"seed": config.seed, "devices.mixed_precision": config.devices.mixed_precision}
    if config.devices.compile:  # compiled kernels round otherwise
        kept["devices.compile"] = True
    return kept | {CODE: code_digest()} | facts


def code_digest() -> str:
    """Of the package that trains: a changed rule under the same name is another run, which no setting shows."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)).hexdigest()[:12]


def parts_of(trainer: Mapping[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint was made of: what a recipe says, and the digests that are known later. Raises BadInput."""
    made = trainer.get("made_of")
    if made is None:
        raise BadInput(
            f"the checkpoint of step {step} doesn't say what it was made of; rule: a run goes on as it began; "
            "next: take another run name"
        )
    facts = {key: made[key] for key in DIGESTS if key in made}
    return {key: value for key, value in made.items() if key not in facts}, facts


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str], step: int) -> None:
    """Raise BadInput with every difference that is not allowed by its name; those that are, are told."""
    absent = "not set"
    if CODE in before and before[CODE] != now.get(CODE):
        say(
            f"train     warn  the checkpoint of step {step} was made by other code (src/wmtp was {before[CODE]}, is "
            f"{now.get(CODE)}): if what is learned changed with it, take another run name"
        )
    before, now = ({key: value for key, value in made.items() if key != CODE} for made in (before, now))
    changed = [key for key in sorted({*before, *now}) if before.get(key, absent) != now.get(key, absent)]
    lines = {key: f"{key}: {before.get(key, absent)} -> {now.get(key, absent)}" for key in changed}
    if refused := [key for key in changed if key not in allowed or key in FIXED]:
        may = " ".join(key for key in refused if key not in FIXED)
        told = [lines[key] + (" (ranks x batch size x accumulation)" if key in FIXED else "") for key in refused]
        raise BadInput(
            f"the checkpoint of step {step} was made otherwise:\n  "
            + "\n  ".join(told)
            + "\n; rule: a run goes on as it began, or its losses mean something else; next: set these back, or take "
            + "another run name"
            + (f', or allow each by its name: ALLOW="{may}" (--allow KEY)' if may else "")
        )
    for line in lines.values():
        say(f"train     goes on changed, as allowed: {line}")
