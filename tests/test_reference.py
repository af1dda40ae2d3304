"""The reference of the settings is what the schema and the shipped files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wmtp import config, reference
from wmtp.registry import trainer_registry

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/settings.md"


def test_the_page_is_what_the_command_makes() -> None:
    assert PAGE.read_text() == reference.page(ROOT), "python -m wmtp.reference > docs/settings.md"


@pytest.mark.parametrize("model", [config.Config, config.Recipe])
def test_every_key_has_a_description_and_a_rule(model: type[config.Settings]) -> None:
    found = [entry for entry in reference.entries(model) if entry.rule]
    assert [entry.key for entry in found] == config.all_keys(model)
    assert all(re.fullmatch(r"\S.*[^.]\.", entry.text) and entry.default for entry in found)


def test_a_variable_that_is_said_to_win_is_read_somewhere() -> None:
    sources = [*(ROOT / "scripts").rglob("*.*sh"), ROOT / "docker/vessl_startup.sh", ROOT / "src/wmtp/config.py"]
    read = "".join(path.read_text() for path in sources)
    said = set(re.findall(r"`([A-Z][A-Z0-9_]+)` wins", PAGE.read_text()))
    assert set(config.ENVIRONMENT) < said and {name for name in said if name not in read} == set()


@pytest.mark.parametrize(
    ("key", "kind", "shown"),
    [
        ("paths.checkpoints.save_interval", "config", "`5` local_minitest, vessl_minitest, local_test; `100` vessl"),
        ("seed", "config", "`42`"),
        ("storage.endpoint", "config", ""),
        ("storage.bucket", "config", "`${S3_BUCKET_NAME:-wmtp}`"),
        ("optim.lr", "recipe", "`2e-5` production; `1e-3` test"),
        ("optim.betas", "recipe", "`0.9, 0.999`"),
        ("train.algo", "recipe", "; ".join(f"`{algo}` {algo.replace('-', '_')}" for algo in sorted(trainer_registry))),
    ],
)
def test_values_are_shown_as_the_files_have_them(key: str, kind: str, shown: str) -> None:
    assert reference.as_set(key, reference.shipped(ROOT, kind)) == shown
