from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from wmtp.launch import story


def test_story() -> None:
    assert story(1, 75) == "launch    rank 1 ended with 75"
    assert story(0, -15) == "launch    rank 0 ended by SIGTERM"
    assert "memory" in story(0, -9)


def test_a_failing_rank_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    script = tmp_path / "a rank.py"
    script.write_text("import os, sys; sys.exit(75 if os.environ['RANK'] == '0' else 0)")
    command = [sys.executable, "-m", "wmtp.launch", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "launch    rank 0 ended with 75" in ended.stderr
    assert "Traceback" not in ended.stderr
