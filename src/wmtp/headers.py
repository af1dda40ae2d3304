"""What a model's files hold, without their weights: from a folder or from the bucket, by reads of the headers alone.

safetensors files begin with names, shapes and places; torch's zip files end with a directory, and their pickle has
shapes without data. Beside these only the listing, the JSON files and the tokenizer are read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wmtp.bucket import BucketError, asked, objects
from wmtp.manifest import MANIFEST, Manifest, ManifestError, hash_file, load_manifest
from wmtp.model import ModelError, ModelSpec
from wmtp.weights import Stored, model_state, read_spec, read_tensors, reward_state, rows_of_embedding

SMALL = 32 * 2**20
"""Bytes that a JSON or tokenizer file may have; a larger one is no header."""
MANIFEST_MOST = 64 * 2**20
SUFFIXES = (".json", "tokenizer.model")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Folder:
    """A model's folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.bytes_read = path, str(path), 0
        self.sizes = {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}

    def read(self, file: str, start: int, size: int) -> bytes:
        with (self.path / file).open("rb") as stream:
            stream.seek(start)
            data = stream.read(size)
        self.bytes_read += len(data)
        return data

    def small(self) -> Path:
        """A folder that has at least the JSON and tokenizer files."""
        return self.path

    def manifest(self) -> Manifest | None:
        """None: a folder has been proved by the sync, or is the user's own."""
        return None


class Bucket:
    """A model under ``s3://BUCKET/PREFIX/`` (default ``models/NAME``). ``into`` keeps its small files."""

    def __init__(self, client: Any, bucket: str, model: str, into: Path, prefix: str | None = None) -> None:
        self.client, self.bucket, self.into = client, bucket, into
        self.prefix = f"{prefix or f'models/{model}'}/"
        self.name, self.bytes_read = f"s3://{bucket}/{self.prefix}", 0
        self.sizes = {o["Key"].removeprefix(self.prefix): o["Size"] for o in objects(client, bucket, self.prefix)}

    def read(self, file: str, start: int, size: int) -> bytes:
        size = min(size, self.sizes[file] - start)
        if size <= 0:
            return b""
        key, span = self.prefix + file, f"bytes={start}-{start + size - 1}"
        data: bytes = asked(
            lambda: self.client.get_object(Bucket=self.bucket, Key=key, Range=span)["Body"].read(), self.name + file
        )
        self.bytes_read += len(data)
        return data

    def small(self) -> Path:
        """The small files, fetched whole."""
        for file, size in self.sizes.items():
            if "/" in file or not file.endswith(SUFFIXES) or (self.into / file).exists():
                continue
            most = MANIFEST_MOST if file == MANIFEST else SMALL
            if size > most:
                raise ModelError(
                    f"{self.name}{file}: {size} bytes",
                    f"a JSON or tokenizer file has at most {most}",
                    "publish it again",
                )
            self.into.mkdir(parents=True, exist_ok=True)
            (self.into / file).write_bytes(self.read(file, 0, size))
        return self.into

    def manifest(self) -> Manifest | None:
        """What was published; ModelError where nothing was."""
        file = self.small() / MANIFEST
        if not file.is_file():
            raise ModelError(
                f"{self.name}: no {MANIFEST}", "a model is published when its manifest is there", "make publish-models"
            )
        try:
            return load_manifest(file)
        except ManifestError as error:
            raise ModelError(
                f"{self.name}{MANIFEST}: {error}", "a manifest lists the files", "publish it again"
            ) from None


Source = Folder | Bucket


class _Ranged(io.RawIOBase):
    """A file of a source, read where it is looked at, in blocks that are kept."""

    BLOCK = 1 << 16

    def __init__(self, source: Source, file: str) -> None:
        self.source, self.file, self.size, self.at = source, file, source.sizes[file], 0
        self.blocks: dict[int, bytes] = {}

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self.size, self.at + size)
        data = b""
        while self.at < end:
            number = self.at // self.BLOCK
            if number not in self.blocks:
                self.blocks[number] = self.source.read(self.file, number * self.BLOCK, self.BLOCK)
            block = self.blocks[number][self.at - number * self.BLOCK : end - number * self.BLOCK]
            if not block:
                break
            data += block
            self.at += len(block)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def tensors(source: Source) -> dict[str, Stored]:
    """Every tensor of a model, without data, under its name in the files. Raises ModelError, BucketError."""

    def read(file: str) -> dict[str, Tensor]:
        return _safetensors(source, file) if file.endswith(".safetensors") else _zipped(source, file)

    return read_tensors(source.small(), source.name, source.sizes, read)


def _broken(source: Source, file: str, what: str) -> ModelError:
    return ModelError(f"{source.name}/{file}: {what}", "a whole file of weights", "publish or sync the model again")


def _safetensors(source: Source, file: str) -> dict[str, Tensor]:
    size = source.sizes[file]
    length = int.from_bytes(source.read(file, 0, 8), "little")
    if not 2 <= length <= min(size - 8, 100_000_000):
        raise _broken(source, file, f"no safetensors header in its {size} bytes")
    try:
        header: dict[str, Any] = json.loads(source.read(file, 8, length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        found = {
            name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
            for name, entry in header.items()
        }
        at = 0
        for name in sorted(header, key=lambda name: tuple(header[name]["data_offsets"])):
            start, stop = header[name]["data_offsets"]
            if start != at or stop - start != found[name].nbytes:
                raise _broken(source, file, f"{name} has bytes {start} to {stop}, its shape wants {found[name].nbytes}")
            at = stop
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        raise _broken(source, file, f"its header can't be read: {type(error).__name__} {error}") from None
    if 8 + length + end != size:
        raise _broken(source, file, f"{size} bytes, its header says {8 + length + end}")
    return found


def _zipped(source: Source, file: str) -> dict[str, Tensor]:
    if source.read(file, 0, 4) != b"PK\3\4":
        raise _broken(source, file, "no zip file: torch's old format can't be mapped; save it anew")
    try:
        with FakeTensorMode():  # torch reads no data then
            content = torch.load(cast(IO[bytes], _Ranged(source, file)), map_location="cpu", weights_only=True)
    except BucketError:
        raise
    except Exception as error:  # torch raises half a dozen types for a torn or unsafe file
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _broken(source, file, first[:200]) from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise _broken(source, file, "not a flat dictionary of tensors")
    return {name: torch.empty(v.shape, dtype=v.dtype, device="meta") for name, v in content.items()}


def spec_of(source: Source, raw: Mapping[str, Stored] | None = None) -> ModelSpec:
    """The shapes that the JSON says; a vocabulary of -1 is read from the embedding's header."""

    def rows() -> int:
        return rows_of_embedding(source.name, raw or tensors(source))

    return read_spec(source.small(), rows, source.sizes)


def check(source: Source, role: str) -> Iterator[str]:
    """What the loader would ask of the model, asked now: yields remarks; raises ModelError, BucketError."""
    manifest = source.manifest()
    if manifest is not None:
        _check_published(source, manifest)
    raw = tensors(source)
    spec = spec_of(source, raw)
    state = (reward_state if role == "rm" else model_state)(source.name, spec, raw)
    dtype = str(next((v.dtype for v in state.values() if len(v.shape) > 1), torch.float32)).removeprefix("torch.")
    total = sum(v.nbytes for v in raw.values())
    layers = f"{spec.trunk_layers} + {spec.heads} layers of {spec.hidden}"
    yield f"{len(raw)} tensors, {total / 1e9:.2f} GB of {dtype}; {layers}"


def _check_published(source: Source, manifest: Manifest) -> None:
    wrong = [
        f"{entry.path}: {'not there' if there is None else f'{there} bytes, published were {entry.bytes}'}"
        for entry in manifest.files
        if (there := source.sizes.get(entry.path)) != entry.bytes
    ]
    folder = source.small()
    wrong += [
        f"{entry.path}: not the content that was published"
        for entry in manifest.files
        if (folder / entry.path).is_file() and hash_file(folder / entry.path) != entry.blake3
    ]
    if wrong:
        raise ModelError(
            f"{source.name}: {len(wrong)} files are not as published: {'; '.join(wrong[:3])}",
            "the bucket has every file that the manifest lists",
            "make publish-models FROM=…",
        )
