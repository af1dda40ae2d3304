"""What several modules of tests share."""

from __future__ import annotations

import os
import uuid

import pytest


@pytest.fixture
def prefix() -> str:
    if "S3_ENDPOINT_URL" not in os.environ:
        pytest.skip("no bucket in the environment: run through `make test`, which starts one")
    return f"s3://{os.environ['S3_BUCKET_NAME']}/test-{uuid.uuid4().hex}"
