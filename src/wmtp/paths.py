"""`PathResolver`: what a `file://` or `s3://` address of a configuration means on this machine."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

APP = "/app"


class PathError(ValueError):
    """An address that means no place."""


def repository_root() -> Path:
    """The checkout that this package stands in, or the current folder for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() or (root / "configs").is_dir() else Path.cwd()


def split(uri: str) -> tuple[str, str]:
    """`("file", path)` or `("s3", uri)` without any reading of the environment.

    A `file://` path comes back normalised: absolute with three slashes, relative with two.
    Raises PathError for another scheme, an empty path, or an S3 key that climbs (`..`).
    """
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in ("file", "s3"):
        raise PathError(f"{uri!r} begins with neither file:// nor s3://")
    if "\0" in rest or "\n" in rest:
        raise PathError(f"{uri!r} has a control character")
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        if not bucket:
            raise PathError(f"{uri!r} names no bucket")
        if ".." in key.split("/"):
            raise PathError(f"{uri!r} climbs out of its prefix")
        return "s3", uri
    if not rest:
        raise PathError(f"{uri!r} names no path")
    path = posixpath.normpath(rest)
    return "file", "/" + path.lstrip("/") if rest.startswith("/") else path


def synced(uri: str, what: str) -> str:
    """Where the sync puts what an `s3://` address of `paths.models` or `paths.datasets` (``what``) names."""
    folder = "models" if what.startswith("paths.models") else "datasets/.synced"
    return f"file://{APP}/{folder}/{uri.rstrip('/').rpartition('/')[2]}"


def under_app(path: str) -> bool:
    """Whether a normalised path is the work folder of the image or lies in it."""
    return path == APP or path.startswith(APP + "/")


class PathResolver:
    """Addresses to places. `/app` becomes `WMTP_APP_ROOT` where that is set."""

    def resolve(self, uri: str) -> tuple[str, str]:
        """`("file", absolute path)` or `("s3", the uri as it came)`.

        `file://tests/x`, with two slashes, is relative to the repository; whether a configuration may
        say so is decided in `wmtp.config`.
        """
        kind, path = split(uri)
        if kind == "s3":
            return kind, path
        if not path.startswith("/"):
            return kind, posixpath.normpath(f"{repository_root()}/{path}")
        return kind, self._moved(path)

    def local(self, uri: str, what: str) -> str:
        """The absolute path at which a model or dataset (``what``: its key) is read: an `s3://` one is synced there."""
        kind, path = self.resolve(uri)
        return path if kind == "file" else self.resolve(synced(uri, what))[1]

    def resolve_tracking(self, uri: str) -> str:
        """A tracking URI with `/app` moved likewise; `http(s)://` and `s3://` stay as they are."""
        if uri.startswith("file://"):
            return f"file://{self.resolve(uri)[1]}"
        if uri.startswith("sqlite:////"):
            return f"sqlite:///{self._moved('/' + uri.removeprefix('sqlite:////'))}"
        return uri

    @staticmethod
    def _moved(path: str) -> str:
        root = os.environ.get("WMTP_APP_ROOT")
        if root and under_app(path):
            return posixpath.normpath(os.path.abspath(root) + path.removeprefix(APP))  # noqa: PTH100 - joined as text
        return path


def open_to_all(file: Path) -> None:
    """Give ``file`` the mode that a new file has here: what safetensors writes, its owner alone could read."""
    umask = os.umask(0o077)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
