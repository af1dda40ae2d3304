from __future__ import annotations

import json
import os
from hashlib import md5
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wmtp import manifest, publish
from wmtp.manifest import ManifestError
from wmtp.publish import Publish, cut_off, fact, hash_both, main

PREFIX = "s3://b/models/m"
MIB = 2**20


def etag(data: bytes, part: int = 5 * MIB) -> str:
    """As S3 says it (measured with the embedded server, too: bats/publish_models.bats)."""
    parts = [md5(data[at : at + part]).digest() for at in range(0, len(data), part)] or [md5(b"").digest()]
    return parts[0].hex() if len(parts) == 1 else f"{md5(b''.join(parts)).hexdigest()}-{len(parts)}"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=50), st.integers(1, 17))
def test_both_hashes_are_those_of_the_content_and_of_its_parts(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, part: int
) -> None:
    path = tmp_path_factory.mktemp("hash") / "a"
    path.write_bytes(data)
    found = hash_both(path, fact(path.stat()), part)
    assert (found.blake3, found.etag) == (blake3(data).hexdigest(), etag(data, part))


def test_a_file_that_is_not_what_was_first_seen_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"content")
    first = fact(path.stat())
    os.utime(path, ns=(1, 1))
    with pytest.raises(ManifestError, match="changed"):
        hash_both(path, first, MIB)
    path.unlink()
    with pytest.raises(OSError):
        hash_both(path, first, MIB)


class Bucket:
    """A folder, and what a bucket would list of it."""

    def __init__(self, tmp_path: Path, files: dict[str, bytes]):
        self.work, self.folder = tmp_path / "work", tmp_path / "m"
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.work.mkdir()
        self.put_here(files)

    def put_here(self, files: dict[str, bytes]) -> None:
        for path, data in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)
        for kept in ("hashes", "facts"):
            (self.work / kept).unlink(missing_ok=True)
        assert main(["survey", str(self.work), str(self.folder), PREFIX]) == 0

    def publish(self, name: str = "m") -> None:
        made = manifest.written(manifest.create(self.folder, name))
        self.objects = {path: file.read_bytes() for path, file in manifest.walk(self.folder).items()}
        self.objects["manifest.json"] = made
        (self.work / "old.json").write_bytes(made)

    def list(self) -> Publish:
        lines = [
            {"key": f"{PREFIX}/{k}", "etag": self.etags.get(k, etag(v)), "type": "file"}
            | ({"size": len(v)} if v else {})
            for k, v in self.objects.items()
        ]
        (self.work / "objects").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Publish(self.work, self.folder, PREFIX, 5)


@pytest.mark.parametrize(
    ("name", "whole", "why"),
    [
        ("model.safetensors", False, "deserializing"),
        ("consolidated.pth", False, "directory"),
        ("model.safetensors", True, ""),
        ("consolidated.pth", True, ""),
    ],
)
def test_weights_that_were_cut_off_are_not_published(tmp_path: Path, name: str, whole: bool, why: str) -> None:
    file = tmp_path / "m" / name
    file.parent.mkdir()
    state = {"w": torch.zeros(1000)}
    if name.endswith(".pth"):
        torch.save(state, file)
    else:
        save_file(state, file)
    if not whole:
        os.truncate(file, file.stat().st_size - 50)
    assert why in cut_off(file) and bool(cut_off(file)) is not whole
    (tmp_path / "work").mkdir()
    assert main(["survey", str(tmp_path / "work"), str(tmp_path / "m"), PREFIX]) == (0 if whole else 13)


def test_settings_and_tokenizers_that_can_not_be_read_are_not_published(tmp_path: Path) -> None:
    for name, text in (("params.json", '{"dim": 64,'), ("tokenizer.model", "no pieces")):
        (tmp_path / name).write_text(text)
        assert cut_off(tmp_path / name)
    (tmp_path / "params.json").write_text('{"dim": 64}')
    assert not cut_off(tmp_path / "params.json")


def test_a_pointer_of_a_large_file_is_no_weights(tmp_path: Path) -> None:
    for name in ("a.bin", "a.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13\n")
        assert "git lfs pull" in cut_off(tmp_path / name)
    (tmp_path / "a.bin").write_text("version 2 of another kind of file")
    assert not cut_off(tmp_path / "a.bin")


FILES = {"a": b"content", "s p/ü*": b"", "big": bytes(range(256)) * 24000}


@pytest.fixture
def bucket(tmp_path: Path) -> Bucket:
    return Bucket(tmp_path, FILES)


def test_nothing_published_is_new_and_all_goes_up(bucket: Bucket) -> None:
    assert bucket.list().look(False)[0] == "new"
    assert dict(bucket.list().decide()) == dict.fromkeys(FILES, True)


def test_the_same_content_is_the_same_whenever_it_was_published(bucket: Bucket) -> None:
    bucket.publish()
    verdict, digest, said = bucket.list().look(False)
    assert (verdict, said) == ("same", []) and digest == blake3(bucket.objects["manifest.json"]).hexdigest()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"a": b"Content"}, "a: blake3"),
        ({"a": b"longer content"}, "a has 14 bytes, not 7"),
        ({"b": b""}, "b is new"),
    ],
)
def test_another_version_is_told_apart(bucket: Bucket, changed: dict[str, bytes], said: str) -> None:
    bucket.publish()
    bucket.put_here(changed)
    verdict, _, found = bucket.list().look(False)
    assert verdict == "other" and found[0].startswith(said)
    # Only what is not proved to be there goes up.
    assert {path for path, up in bucket.list().decide() if up} == set(changed)


def test_sizes_alone_tell_another_version_without_hashing(bucket: Bucket) -> None:
    bucket.publish()
    bucket.put_here({"a": b"longer content"})
    bucket.list().look(False)
    assert not (bucket.work / "hashes").exists()


def test_damage_is_seen_in_the_listing(bucket: Bucket) -> None:
    bucket.publish()
    bucket.objects["big"] = bytes(len(FILES["big"]))
    del bucket.objects["a"]
    assert bucket.list().look(False)[::2] == ("mend", ["a", "big"])
    assert {path for path, up in bucket.list().decide() if up} == {"a", "big"}


def test_an_etag_that_is_no_md5_proves_nothing_and_accuses_nobody(bucket: Bucket) -> None:
    bucket.publish()
    bucket.etags = dict.fromkeys(bucket.objects, "0" * 32)
    assert bucket.list().look(False) == (
        "same",
        blake3(bucket.objects["manifest.json"]).hexdigest(),
        ["3 of 3 objects proved by size alone"],
    )
    # Told to force, what is not proved goes up.
    assert bucket.list().look(True)[0] == "mend"
    assert all(up for _, up in bucket.list().decide())
    # The client's word of this very publish is taken.
    (bucket.work / "sent").write_text(
        json.dumps({"operation": "cp", "success": True, "destination": f"{PREFIX}/big"}) + "\n" + '{"operation": "c'
    )
    assert {path for path, up in bucket.list().decide() if up} == {"a", "s p/ü*"}


def test_another_publishers_part_size_accuses_nobody(bucket: Bucket) -> None:
    bucket.publish()
    bucket.etags["big"] = etag(FILES["big"], 10 * MIB)
    assert bucket.list().look(False)[0] == "same"


def test_an_interrupted_publish_goes_on_with_what_its_etags_prove(bucket: Bucket) -> None:
    bucket.publish()
    del bucket.objects["manifest.json"], bucket.objects["a"]
    claim = b"host 1\n"
    bucket.objects[manifest.CLAIM] = claim
    (bucket.work / "claim").write_bytes(claim)
    assert bucket.list().look(False)[0] == "new"
    assert {path for path, up in bucket.list().decide() if up} == {"a"}


def test_strange_objects_are_foreign_and_go_by_force(bucket: Bucket) -> None:
    bucket.objects = {"theirs": b"1", "a": b"12"}
    assert bucket.list().look(False)[::2] == ("foreign", ["a has 2 bytes", "theirs"])
    assert bucket.list().unnamed() == ["theirs"]
    assert ("remove", 1, "theirs") in list(bucket.list().rehearse())


def test_a_refused_manifest_is_another_version(bucket: Bucket) -> None:
    bucket.publish("someone-else")
    assert bucket.list().look(False)[::2] == ("other", ["its name is someone-else"])
    (bucket.work / "old.json").write_text("{")
    assert bucket.list().look(False)[0] == "other"


def test_a_key_that_would_end_a_command_is_refused(bucket: Bucket) -> None:
    bucket.objects = {"a'\nrm s3://b/*": b""}
    with pytest.raises(ManifestError, match="remove it"):
        bucket.list()


def test_the_manifest_is_sealed_only_over_the_folder_that_was_hashed(
    bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bucket.work), str(bucket.folder), PREFIX]
    assert main(["send", *arguments]) == 0
    assert capsys.readouterr().out.count("cp --raw") == 3
    assert main(["seal", *arguments]) == 0
    sealed = manifest.load_manifest(bucket.work / "new.json")
    assert capsys.readouterr().out.strip() == sealed.digest and not list(manifest.differences(sealed, bucket.folder))
    (bucket.folder / "late").write_bytes(b"")
    assert main(["seal", *arguments]) == 13
    assert "late" in capsys.readouterr().err


def test_nothing_to_publish_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert main(["survey", str(tmp_path), str(tmp_path / "m"), PREFIX]) == 13


def test_what_a_bucket_says_is_fit_for_a_terminal() -> None:
    assert publish.plain("a\x1b[2Jü") == "a?[2Jü"
