"""Rules of the house that no single module can keep."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "module",
    [
        "causes",
        "config",
        "paths",
        "ledger",
        "minitest",
        "record",
        "reference",
        "registry",
        "manifest",
        "monitor",
        "publish",
        "published",
        "preflight",
        "report",
        "runfile",
        "scorekey",
        "vocab",
    ],
)
def test_looking_does_not_import_torch(module: str) -> None:
    code = f"import sys, wmtp.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch brings nvidia-* packages")
def test_an_environment_without_a_gpu_holds_no_nvidia_package() -> None:
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    assert not [n for n in names if n.startswith("nvidia-")]


def test_locks_record_hashes_and_no_addresses() -> None:
    for lock in ("run.txt", "dev.txt", "uv.txt", "vessl.txt"):
        text = (ROOT / "requirements" / lock).read_text()
        assert "://" not in text and "--hash=sha256:" in text
        assert not [line for line in text.splitlines() if line.startswith("torch==")]


def test_the_lock_of_torch_is_of_the_version_that_is_named_and_agrees_with_the_others() -> None:
    lines = (ROOT / "requirements/cuda.txt").read_text().splitlines()
    assert (ROOT / "requirements/torch.txt").read_text().split() == [
        line.split()[0] for line in lines if line.startswith("torch==")
    ]
    run = {line.split()[0] for line in (ROOT / "requirements/run.txt").read_text().splitlines() if "==" in line}
    names = {pin.split("==")[0] for pin in run}
    both = [line.split()[0] for line in lines if line[:1].isalpha() and line.split("==")[0] in names]
    assert len(both) > 5 and set(both) <= run
    assert not [line for line in lines if "://" in line] and sum("--hash=sha256:" in line for line in lines) > 100


def test_what_a_run_needs_is_locked_alike_on_a_laptop() -> None:
    """install.sh reads dev.txt alone: a package that only run.txt has is missing on every fresh clone."""

    def pins(lock: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / lock).read_text().splitlines()
        return dict(line.split(";")[0].rstrip(" \\").split("==") for line in lines if "==" in line.split(";")[0])

    def asked(file: str) -> set[str]:
        lines = (ROOT / "requirements" / file).read_text().splitlines()
        return {line.split("==")[0].strip().replace(".", "-") for line in lines if line.strip() and line[0] not in "#-"}

    laptop, run = pins("dev.txt"), pins("run.txt")
    assert run.items() <= laptop.items()
    assert asked("run.in") <= run.keys() and asked("dev.in") <= laptop.keys()


def test_a_script_stays_within_150_lines() -> None:
    scripts = [*(ROOT / "scripts").rglob("*.*sh"), *(ROOT / "docker").glob("*.sh")]
    assert scripts
    assert {s.name: n for s in scripts if (n := len(s.read_text().splitlines())) > 150} == {}
