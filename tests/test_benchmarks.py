"""What waits for a GPU runs on a CPU, all of it, and writes tables that can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_the_gpu_benchmark_runs_whole_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = out.read_text()
    assert done.returncode == 0 and text.startswith("# CPU"), done.stderr[-2000:]
    assert "failed" not in text and "stopped" not in text, text + done.stderr[-2000:]
    sections = text.split("\n## ")[1:]
    assert len(sections) == 6
    for section in sections:
        header, rule, *rows = [line for line in section.splitlines() if line.startswith("|")]
        assert set(rule) == set("|- ") and rows, section
        assert {line.count("|") for line in (rule, *rows)} == {header.count("|")}, section
