"""Small requests to a bucket from Python: a client that gives up soon, and what lies under a prefix. Imports no torch.

    python -m wmtp.bucket NAME s3://BUCKET/PREFIX

lists the objects of a model that was never published: path, bytes, ETag and the bucket's own full-object checksum
(x-amz-checksum-crc64nvme), as JSON. Exit codes: 0 done, 3 the bucket says no, 11 no answer, 13 nothing there.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class BucketError(RuntimeError):
    """The bucket gave no answer that could be used; str() says why, ``refused`` whether it said no."""

    def __init__(self, what: str, refused: bool = False) -> None:
        super().__init__(what)
        self.refused = refused


def client_of(endpoint: str | None, region: str) -> Any:
    """A client of the bucket that gives up soon. BucketError without credentials."""
    import awscli  # noqa: F401 - it brings botocore, and lets it be imported under its name
    import botocore.session
    from botocore.config import Config as Options
    from botocore.exceptions import BotoCoreError

    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    once = {"total_max_attempts": 2}
    options = Options(connect_timeout=3, read_timeout=5, retries=once, s3={"addressing_style": "path"})
    try:
        session = botocore.session.get_session()
        if session.get_credentials() is None:
            raise BucketError(
                "no credentials of the bucket here: set AWS_ACCESS_KEY_ID, or scripts/test_vessl_config.sh --offline"
            )
        return session.create_client("s3", region_name=region, endpoint_url=endpoint, config=options)
    except (BotoCoreError, ValueError) as error:  # a profile, a region, an address that can't be used
        raise BucketError(" ".join(str(error).split())[:160], refused=True) from None


def asked(call: Any, what: str) -> Any:
    """The answer of a request; what the client raises becomes a BucketError."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return call()
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        raise BucketError(f"{what}: {code or error}", refused=True) from None
    except BotoCoreError as error:
        raise BucketError(f"{what} does not answer: {' '.join(str(error).split())[:160]}") from None


def objects(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """What the bucket lists under a prefix, in its own words."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [o for page in asked(lambda: list(pages), f"bucket {bucket}") for o in page.get("Contents", [])]


def listed(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """The objects under a prefix that ends with `/`: path, bytes, etag, crc64nvme (empty where there is none)."""
    found = objects(client, bucket, prefix)

    def looked_at(item: dict[str, Any]) -> dict[str, Any]:
        head = asked(lambda: client.head_object(Bucket=bucket, Key=item["Key"], ChecksumMode="ENABLED"), item["Key"])
        whole = head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
        crc = head.get("ChecksumCRC64NVME", "") if whole else ""
        path = item["Key"].removeprefix(prefix)
        return {"path": path, "bytes": item["Size"], "etag": item["ETag"].strip('"'), "crc64nvme": crc}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(looked_at, (o for o in found if not o["Key"].endswith(("/", "/.publishing")))))


def main(argv: Sequence[str] | None = None) -> int:
    name, uri = argv or sys.argv[1:]
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "eu-north-1"
    try:
        files = listed(client_of(os.environ.get("S3_ENDPOINT_URL") or None, region), bucket, prefix.rstrip("/") + "/")
    except BucketError as error:
        print(f"bucket    FAIL  {error}", file=sys.stderr)
        return 3 if error.refused else 11
    print(json.dumps({"name": name, "files": files}, indent=1))
    return 0 if files else 13


if __name__ == "__main__":
    sys.exit(main())
