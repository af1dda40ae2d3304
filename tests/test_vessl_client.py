"""The client's imports are done once, its calls are as in new processes; with a client of ten lines in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[1] / "scripts/lib/vessl_client.py"
CLI = """
import sys, time
import vessl
import vessl.openapi_client

def cli():
    print("login", vessl.LOGINS, "imported", vessl.openapi_client.TIMES, *sys.argv, flush=True)
    if "nap" in sys.argv:
        time.sleep(2)
    if "hang" in sys.argv:
        time.sleep(60)
    if "fail" in sys.argv:
        raise RuntimeError("it broke")
    if "word" in sys.argv:
        sys.exit("a word")
    if "7" in sys.argv:
        sys.exit(7)
    vessl.LOGINS += 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    package = tmp_path / "site/vessl"
    (package / "cli").mkdir(parents=True)
    (package / "openapi_client").mkdir()
    (package / "__init__.py").write_text("LOGINS = globals().get('LOGINS', 0) + 1\n")
    (package / "openapi_client/__init__.py").write_text("TIMES = 1\nprint('once', file=open('imports', 'a'))\n")
    (package / "cli/__init__.py").write_text("")
    (package / "cli/_main.py").write_text(CLI)
    home = tmp_path / "home"
    home.mkdir()
    os.mkfifo(home / "calls")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONIOENCODING": "utf-8:surrogateescape"}
    command = [sys.executable, str(SERVER), str(home), str(os.getpid())]
    server = subprocess.Popen(command, cwd=home, env=environment, start_new_session=True)
    (home / "group").write_text(str(server.pid))
    yield home
    server.kill()
    server.wait()


def call(folder: Path, *arguments: str, seconds: int = 30) -> tuple[str, str]:
    """What it gives as its code, and what it printed."""
    name = f"{time.monotonic_ns()}"
    os.mkfifo(folder / f"{name}.code")
    (folder / f"{name}.arguments").write_bytes(
        b"".join(os.fsencode(f"{word}\0") for word in (str(seconds), *arguments))
    )
    calls = os.open(folder / "calls", os.O_RDWR)
    os.write(calls, f"{name}\n".encode())
    code = (folder / f"{name}.code").read_text()
    os.close(calls)
    return code, (folder / f"{name}.said").read_text(errors="surrogateescape")


def test_each_call_begins_anew_and_the_imports_are_done_once(folder: Path) -> None:
    for word in ("a b", "c"):
        assert call(folder, "run", word) == ("0\n", f"login 1 imported 1 vessl run {word}\n")
    assert (folder / "imports").read_text() == "once\n"


def test_a_path_may_be_of_any_bytes(folder: Path) -> None:
    word = os.fsdecode(b"/caf\xe9")
    assert call(folder, word) == ("0\n", f"login 1 imported 1 vessl {word}\n")


def test_a_call_ends_as_the_client_ends(folder: Path) -> None:
    assert call(folder, "7")[0] == "7\n"
    code, said = call(folder, "word")
    assert code == "1\n" and said.endswith("a word\n")
    code, said = call(folder, "fail")
    assert code == "1\n" and "RuntimeError: it broke" in said


def test_a_call_that_hangs_is_given_up_and_the_next_is_answered(folder: Path) -> None:
    assert call(folder, "hang", seconds=1)[0] == ""
    assert call(folder, "run")[0] == "0\n"


def test_a_signal_to_the_stages_group_cuts_no_call_off(folder: Path) -> None:
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(call, folder, "nap")
        while not any(file.stat().st_size for file in folder.glob("*.said")):
            assert not answer.done()
            time.sleep(0.05)
        os.killpg(int((folder / "group").read_text()), signal.SIGKILL)
        assert answer.result()[0] == "0\n"


def test_it_ends_where_its_parent_was_gone_before_it_began(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "calls")
    gone = subprocess.Popen(["true"])
    gone.wait()
    subprocess.run([sys.executable, SERVER, tmp_path, str(gone.pid)], check=True, timeout=30)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "calls")
    shell = f"'{sys.executable}' '{SERVER}' '{tmp_path}' $$ >/dev/null 2>&1 & echo $!; sleep 1"
    started = subprocess.run(["bash", "-c", shell], stdout=subprocess.PIPE, text=True, check=True)
    until = time.monotonic() + 20
    while Path(f"/proc/{started.stdout.strip()}").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
