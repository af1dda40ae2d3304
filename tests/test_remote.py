"""Folders in a bucket: what the client is told, how it is watched, what is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from wmtp import remote
from wmtp.config import Storage
from wmtp.manifest import MANIFEST, hash_file
from wmtp.remote import MARKER, CheckpointError, DamagedError, Remote, TransferError, bytes_moved, quoted

STORAGE = Storage(retries=2, retry_wait_s=0, stall_s=1, workers=2, part_size_mb=5)


def folder_of(place: Path, name: str = "final", content: bytes = b"weights") -> Path:
    folder = place / name
    (folder / "sub dir").mkdir(parents=True)
    (folder / "sub dir/weights").write_bytes(content)
    (folder / "empty").touch()
    files = [{"path": "empty", "bytes": 0}, {"path": "sub dir/weights", "bytes": len(content)}]
    (folder / MARKER).write_text(json.dumps({"format": 1, "files": files}))
    return folder


def test_a_quoted_argument_survives_spaces_and_quotes() -> None:
    assert quoted('a "b" c') == '"a \\"b\\" c"'


# ---- the client ------------------------------------------------------------------------------------------------------


def client(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Remote:
    """A client that does what ``script`` says."""
    file = place / "client"
    file.write_text(f"#!/bin/bash\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(remote, "s5cmd_binary", lambda: str(file))
    return Remote("s3://b/r", STORAGE)


@pytest.mark.parametrize(("kills", "told"), [(2, None), (9, "ended with -15")])
def test_a_client_that_a_signal_to_all_ends_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int, told: str | None
) -> None:
    """torchrun tells whole groups to end; the client may not have left its rank's yet."""
    script = f'cd {tmp_path}; echo x >>tries; [ "$(wc -l <tries)" -gt {kills} ] || kill -TERM $$\necho listed'
    bucket = client(tmp_path, monkeypatch, script)
    if told is None:
        assert bucket.s5cmd("ls") == "listed\n"
    else:
        with pytest.raises(TransferError, match=told):
            bucket.s5cmd("ls")


@pytest.mark.skipif(bytes_moved(os.getpid()) is None, reason="no /proc: no watchdog")
def test_a_silent_client_is_ended_and_one_that_moves_bytes_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = client(tmp_path, monkeypatch, f"echo $$ >'{tmp_path}/pid'; exec sleep 600")
    with pytest.raises(TransferError, match="no byte moved for 1 s"):
        bucket.s5cmd("cp")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    slow = "for ((i = 0; i < 9; i++)); do read -rt 0.3 <> <(:) || true; printf x; done; cat"
    assert client(tmp_path, monkeypatch, slow).s5cmd("run", lines=["a", "b"]) == "xxxxxxxxxa\nb"


def test_what_fails_is_tried_as_often_as_the_settings_say(capsys: pytest.CaptureFixture[str]) -> None:
    tries = []

    def work() -> None:
        tries.append(1)
        raise TransferError("no route")

    with pytest.raises(TransferError, match="no route"):
        Remote("s3://b/r", STORAGE).tried("the thing", work)
    assert len(tries) == 2 and "the thing, try 2 of 2: no route" in capsys.readouterr().err


# ---- a real bucket ---------------------------------------------------------------------------------------------------


def keys(bucket: Remote) -> list[str]:
    return sorted(bucket.listed("*"))


def replace(bucket: Remote, key: str, content: str) -> None:
    """Another object under a key, by the client itself."""
    subprocess.run(
        [remote.s5cmd_binary(), "pipe", f"{bucket.prefix}/{key}"],
        input=content.encode(),
        check=True,
        capture_output=True,
    )


def test_a_folder_comes_back_as_it_was(tmp_path: Path, prefix: str) -> None:
    bucket, folder = Remote(prefix, STORAGE), folder_of(tmp_path, content=os.urandom(3_000_000))
    bucket.put(folder)
    assert keys(bucket) == [f"final/{name}" for name in (MARKER, "empty", MANIFEST, "sub dir/weights")]
    bucket.get("final", tmp_path / "back")
    for name in (MARKER, "empty", MANIFEST, "sub dir/weights"):
        assert hash_file(tmp_path / "back" / name) == hash_file(folder / name)
    assert [path.name for path in tmp_path.iterdir()] != [] and not list(tmp_path.glob(".*"))


def recorded(bucket: Remote, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The client's arguments, call by call."""
    calls: list[tuple[str, ...]] = []
    real = bucket.s5cmd

    def call(*arguments: str, lines: Sequence[str] | None = None) -> str:
        calls.append((*arguments, arguments[-1]))
        return real(*arguments, lines=lines)

    monkeypatch.setattr(bucket, "s5cmd", call)
    return calls


def test_what_is_there_is_not_brought_again_and_what_is_other_replaces_it(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, folder = Remote(prefix, STORAGE), folder_of(tmp_path / "a")
    bucket.put(folder)
    before = bucket.listed("*")
    time.sleep(1.1)  # the bucket's clock has seconds
    bucket.put(folder)
    assert bucket.listed("*") == before
    calls = recorded(bucket, monkeypatch)
    bucket.put(folder_of(tmp_path / "b", content=b"WEIGHTS"))
    changes = [(verb, Path(last).name) for verb, *_, last in calls if verb in ("rm", "run", "cp")]
    assert changes == [("rm", MARKER), ("run", "run"), ("cp", MANIFEST), ("cp", MARKER)]
    assert bucket.s5cmd("cat", f"{prefix}/final/sub dir/weights") == "WEIGHTS"
    bucket.get("final", tmp_path / "back")


@pytest.mark.parametrize(
    ("key", "content", "told"),
    [
        ("sub dir/weights", "WEIGHTS", "sub dir/weights: arrived with another content"),
        ("sub dir/weights", "weight", "sub dir/weights: missing, or not as long"),
        ("sub dir/weights", None, "sub dir/weights: missing, or not as long"),
        (MANIFEST, '{"format": 1', "manifest.json is refused"),
        (MARKER, None, "its marker is gone"),
    ],
)
def test_what_is_not_as_its_manifest_says_is_damaged(
    tmp_path: Path, prefix: str, key: str, content: str | None, told: str
) -> None:
    bucket = Remote(prefix, STORAGE)
    bucket.put(folder_of(tmp_path))
    if content is None:
        bucket.s5cmd("rm", f"{prefix}/final/{key}")
    else:
        replace(bucket, f"final/{key}", content)
    with pytest.raises(DamagedError, match=told):
        bucket.get("final", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_folder_of_before_without_a_manifest_is_proved_by_its_sizes(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket, folder = Remote(prefix, STORAGE), folder_of(tmp_path, "step-3")
    bucket.put(folder)
    bucket.s5cmd("rm", f"{prefix}/step-3/{MANIFEST}")
    bucket.get("step-3", tmp_path / "back")
    assert (tmp_path / "back/sub dir/weights").read_bytes() == b"weights"
    assert "has no manifest: only the sizes" in capsys.readouterr().err
    bucket.put(folder)  # the newest is never without its marker while it is written over
    assert f"step-3/{MANIFEST}" not in keys(bucket)
    replace(bucket, f"step-3/{MARKER}", '{"files": [{"path": "../../out", "bytes": 3}]}')
    with pytest.raises(DamagedError, match="climbs out"):
        bucket.get("step-3", tmp_path / "back")


def test_a_folder_larger_than_the_disk_is_refused_before_it_is_fetched(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Remote(prefix, STORAGE)
    bucket.put(folder_of(tmp_path))
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: remote.shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"needs .* MB are free") as caught:
        bucket.get("final", tmp_path / "back")
    assert isinstance(caught.value.__cause__, OSError)


def test_pruning_keeps_what_is_new_and_clears_what_was_cut_short(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Remote(prefix, STORAGE)
    for step in (1, 5, 10, 12):
        bucket.put(folder_of(tmp_path, f"step-{step}"))
    bucket.put(folder_of(tmp_path))
    for step in (1, 12):
        bucket.s5cmd("rm", f"{prefix}/step-{step}/{MARKER}")
    calls = recorded(bucket, monkeypatch)
    bucket.prune(lambda steps: steps[:-1])
    removed = [Path(last).name for verb, *_, last in calls if verb == "rm"]
    assert removed == [MARKER, MANIFEST, "*"]  # a prune that is cut short leaves nothing that names what is gone
    left = {key.split("/")[0] for key in keys(bucket)}
    assert left == {"step-1", "step-10", "step-12", "final"}  # 1 may be another's upload that is just going on
    monkeypatch.setattr(remote, "LEFTOVER_S", -1)
    bucket.prune(lambda steps: steps[:-1])
    left = {key.split("/")[0] for key in keys(bucket)}
    assert left == {"step-10", "step-12", "final"}  # 12 is newer than what is whole: it is still on its way
    assert bucket.steps() == [10]


@contextmanager
def proxied(monkeypatch: pytest.MonkeyPatch, *faults: str) -> Iterator[None]:
    """The bucket behind `fault_proxy.py`."""
    to = os.environ["S3_ENDPOINT_URL"]
    command = [sys.executable, str(Path(__file__).parent / "fault_proxy.py"), "--to", to, *faults]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.stdout.readline().strip())
        try:
            yield
        finally:
            monkeypatch.setenv("S3_ENDPOINT_URL", to)
            proxy.kill()


@pytest.mark.parametrize(("method", "first"), [("PUT", 1), ("GET", 1), ("PUT", -1), ("GET", -1)])
def test_a_stalled_link_costs_a_try_and_one_that_stays_so_ends(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, method: str, first: int
) -> None:
    bucket, folder = Remote(prefix, STORAGE), folder_of(tmp_path, content=os.urandom(2_000_000))
    if method == "GET":
        bucket.put(folder)

    def work() -> None:
        if method == "GET":
            bucket.get("final", tmp_path / "back")
        else:
            bucket.tried("final", lambda: bucket.put(folder))

    with proxied(monkeypatch, f"stall:method={method},key=*/weights,bytes=1000000,first={first}"):
        if first == 1:
            work()
        else:
            with pytest.raises(TransferError, match="no byte moved for 1 s"):
                work()
    if first == 1:
        bucket.get("final", tmp_path / "again")
    else:
        assert bucket.has("final") == (method == "GET") and not (tmp_path / "back").exists()
