"""What several modules of tests share."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from wmtp.model import MTPModel

GENERATE = Path(__file__).parent / "test_models" / "generate.py"


LONGEST = ("test_train.py", "test_twin.py", "test_causes.py", "test_mlstore.py", "test_export.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def prefix() -> str:
    if "S3_ENDPOINT_URL" not in os.environ:
        pytest.skip("no bucket in the environment: run through `make test`, which starts one")
    return f"s3://{os.environ['S3_BUCKET_NAME']}/test-{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models with space")
    subprocess.run([sys.executable, GENERATE, "--out", out], check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def base(models: Path) -> MTPModel:
    from wmtp.weights import load_model

    return load_model(models / "test-llama-mtp", "cpu").eval()
