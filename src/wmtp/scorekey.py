"""The name under which a scorer's verdicts are kept: a digest of everything that they depend on. Imports no torch.

    python -m wmtp.scorekey --config F --recipe F [--set K=V]… [--env E] --manifests DIR

prints a line for each model of the run: role, name, and the name of its kept scores (`-` for a model that is trained
or whose key can't be known here). DIR holds the models' manifests as NAME.json. With kept scores the scorer itself
isn't needed. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp import config as settings
from wmtp.manifest import MANIFEST, Entry, ManifestError, create, hash_file, load_manifest
from wmtp.paths import PathResolver

FORMAT = 1
REFERENCE, REWARD = "reference", "reward"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")  # in the order in which a tokenizer is looked for


def scorer_of(recipe: settings.Recipe) -> tuple[str, str] | None:
    """Kind of scores and role of the scorer that the recipe's algorithm needs; None for an algorithm without one."""
    if recipe.train.algo == "rho1-wmtp":
        return REFERENCE, "ref"
    if recipe.train.algo == "critic-wmtp":
        # Pseudo rewards are made of the base model's own cross-entropies.
        return (REFERENCE, "base") if recipe.critic.use_pseudo_rewards else (REWARD, "rm")
    return None


def files_of(folder: Path, manifests: Path | None, name: str) -> list[Entry]:
    """What a model consists of: from the manifest that it came with, from a kept one, or by reading it all."""
    kept = manifests / f"{name}.json" if manifests else None
    for manifest in (folder / MANIFEST, kept):
        if manifest and manifest.is_file():
            return list(load_manifest(manifest).files)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: neither the model nor its manifest is there")
    return [Entry(**item) for item in create(folder.resolve(), name)["files"]]


def tokenizer_digest(folder: Path, manifests: Path | None, name: str) -> str:
    """blake3 of a model's tokenizer file."""
    for tokenizer in TOKENIZERS:
        if (folder / tokenizer).is_file():
            return hash_file(folder / tokenizer)
    by_path = {entry.path: entry.blake3 for entry in files_of(folder, manifests, name)}
    for tokenizer in TOKENIZERS:
        if tokenizer in by_path:
            return by_path[tokenizer]
    raise FileNotFoundError(f"{name}: no {' or '.join(TOKENIZERS)}")


def data_digests(config: settings.Config, sources: Sequence[str]) -> list[str]:
    """blake3 of each file of the sources, in the order in which they are read."""
    found = []
    for source in sources:
        folder = Path(PathResolver().resolve(config.paths.datasets[source])[1])
        files = sorted(folder.glob("*.jsonl"))
        if not files:
            raise FileNotFoundError(f"{folder}: no *.jsonl")
        found += [hash_file(file) for file in files]
    return found


def ingredients(config: settings.Config, recipe: settings.Recipe, manifests: Path | None) -> dict[str, Any]:
    """Everything that the scores depend on, by content: no path, no name. Raises OSError, ManifestError."""
    scorer = scorer_of(recipe)
    assert scorer
    kind, role = scorer

    def model(role: str) -> tuple[Path, Path | None, str]:
        path = PathResolver().resolve(getattr(config.paths.models, role))[1]
        return Path(path), manifests, path.rstrip("/").rpartition("/")[2]

    return {
        "format": FORMAT,
        "kind": kind,
        "scorer": sorted((entry.path, entry.bytes, entry.blake3) for entry in files_of(*model(role))),
        "tokenizer": tokenizer_digest(*model("base")),
        "data": [
            [data_digests(config, part.sources), part.max_length, part.pack_sequences]
            for part in (recipe.data.train, recipe.data.eval)
        ],
        "template": recipe.critic.reward_template if kind == REWARD else None,
        "precision": config.devices.mixed_precision,
    }


def kept_name(config: settings.Config, recipe: settings.Recipe, manifests: Path | None) -> tuple[str, dict[str, Any]]:
    """`KIND-DIGEST`, the folder of the kept scores, and what the digest was made of."""
    what = ingredients(config, recipe, manifests)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return f"{what['kind']}-{digest[:32]}", what


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wmtp.scorekey", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--env")
    parser.add_argument("--manifests", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        config, recipe = settings.load_pair(
            arguments.config, arguments.recipe, arguments.overrides, env=arguments.env or None
        )
    except settings.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    scorer = scorer_of(recipe)
    for role, uri in settings.needed_models(config, recipe).items():
        name = "-"
        if scorer and role == scorer[1] and role != "base":
            try:
                name = kept_name(config, recipe, arguments.manifests)[0]
            except (OSError, ManifestError) as error:
                print(f"scores    warn  {error}: whether scores are kept can't be known here", file=sys.stderr)
        print(role, uri.rstrip("/").rpartition("/")[2], name, sep="\t")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that was killed is no traceback
    sys.exit(main())
