"""Listings of what nobody published."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from wmtp import bucket
from wmtp.manifest import crc64nvme


def test_a_listing_has_sizes_and_the_checksums_that_the_bucket_keeps(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.environ["S3_BUCKET_NAME"]
    client = bucket.client_of(os.environ["S3_ENDPOINT_URL"], "eu-north-1")
    assert bucket.main(["m", prefix]) == 13
    capsys.readouterr()
    (tmp_path / "a").write_bytes(b"content")
    under = prefix.split("/", 3)[3]
    client.put_object(Bucket=name, Key=f"{under}/s/b", Body=b"content")
    known = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumCRC64NVME": crc64nvme(tmp_path / "a")}
    client.put_object(Bucket=name, Key=f"{under}/a", Body=b"content", **known)
    assert bucket.main(["m", f"{prefix}/"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [(f["path"], f["bytes"]) for f in files] == [("a", 7), ("s/b", 7)]
    assert files[0]["crc64nvme"] == crc64nvme(tmp_path / "a")


def test_no_answer_is_11_and_a_refusal_3(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bucket.main(["m", "s3://no-such-bucket-here/models/m"]) == 3
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    assert bucket.main(["m", "s3://wmtp/models/m"]) == 11
