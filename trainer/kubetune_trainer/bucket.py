"""Files from a bucket that speaks S3: Amazon's, MinIO, Ceph and others.

The client is botocore, imported when a source is in a bucket. Nothing here imports torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Final

from kubetune_trainer.remote import SourceDeniedError, SourceUnavailableError, Words
from kubetune_trainer.transfer import Digest, RemoteFile

_CHUNK: Final = 1 << 20
_CONNECT_SECONDS: Final = 15
_READ_SECONDS: Final = 60
_TRIES: Final = 4
_MD5: Final = re.compile(r"([0-9a-f]{32})(?:-([0-9]+))?")


@dataclass(frozen=True)
class Bucket:
    """The objects below a prefix, or the one object of that name."""

    uri: str
    """As s3://bucket/prefix."""
    endpoint: str | None = None
    """Base URL of another service than Amazon's."""
    region: str = "us-east-1"

    def __str__(self) -> str:
        return self.uri if self.endpoint is None else f"{self.uri} at {self.endpoint}"

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self.uri.removeprefix("s3://").partition("/")[0]

    @property
    def prefix(self) -> str:
        """The prefix, without a slash at its end."""
        return self.uri.removeprefix("s3://").partition("/")[2].rstrip("/")


class BucketReader:
    """A bucket as somebody with these credentials sees it.

    `environment` has AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and maybe AWS_SESSION_TOKEN; without them requests are
    not signed. Nothing else is looked at for credentials.
    """

    def __init__(self, source: Bucket, environment: Mapping[str, str], words: Words) -> None:
        self.source = source
        self._words = words
        self._client = _client(source, environment)

    def names(self) -> dict[str, Any]:
        """Path below the prefix -> what the listing says of the object. Raises JobError."""
        found: dict[str, Any] = {}
        prefix = self.source.prefix
        with self._errors():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.source.name, Prefix=prefix):
                for item in page.get("Contents", ()):
                    key = item["Key"]
                    if key == prefix:
                        found[key.rpartition("/")[2]] = item
                    elif not key.endswith("/") and key.startswith(f"{prefix}/" if prefix else ""):
                        found[key.removeprefix(prefix).removeprefix("/")] = item
        if not found:
            raise SourceDeniedError(f"{self.source} holds no objects: correct {self._words.place}")
        return found

    def files(self, chosen: Sequence[str], listed: Mapping[str, Any]) -> list[RemoteFile]:
        """The chosen paths, to be brought. Raises JobError."""
        return [self._file(path, listed[path]) for path in chosen]

    def _file(self, path: str, item: Any) -> RemoteFile:
        etag = item["ETag"].strip('"')
        return RemoteFile(
            path=path,
            size=item["Size"],
            version=etag,
            digest=self._digest(item["Key"], item["Size"], etag),
            bring=partial(self._bring, item["Key"], item["ETag"]),
        )

    def _digest(self, key: str, size: int, etag: str) -> Digest | None:
        """An ETag is an MD5 where the object is not encrypted with a key of KMS.

        Of an object that came in parts it is the MD5 of the parts' MD5s; how large they are, the first one tells.
        """
        known = _MD5.fullmatch(etag)
        if known is None:
            return None
        count = int(known[2] or 0)
        with self._errors():
            part = {"PartNumber": 1} if count else {}
            head = self._client.head_object(Bucket=self.source.name, Key=key, **part)
        if str(head.get("ServerSideEncryption", "")).startswith("aws:kms"):
            return None
        if not count:
            return Digest("md5", known[1])
        first = head["ContentLength"]
        return Digest("md5", known[1], first) if first and -(-size // first) == count else None

    def _bring(self, key: str, etag: str, stream: BinaryIO, start: int) -> None:
        with self._errors():
            wanted = {"Range": f"bytes={start}-"} if start else {}
            answer = self._client.get_object(Bucket=self.source.name, Key=key, IfMatch=etag, **wanted)
            for chunk in answer["Body"].iter_chunks(_CHUNK):
                stream.write(chunk)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The client's errors become SourceDeniedError or SourceUnavailableError."""
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        try:
            yield
        except ClientError as error:
            raise self._refusal(error.response) from error
        except (BotoCoreError, HTTPClientError) as error:
            raise SourceUnavailableError(f"{self.source} cannot be reached: {error}") from error

    def _refusal(self, response: Any) -> Exception:
        status, code = response["ResponseMetadata"]["HTTPStatusCode"], response["Error"].get("Code", "")
        region = response["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
        if region is not None and region != self.source.region and status in (301, 400):
            return SourceDeniedError(f"{self.source} is in region {region}: set {self._words.region}")
        told = f"(HTTP {status}{'' if code == str(status) else f', {code}'})"
        if status in (401, 403):
            return SourceDeniedError(
                f"{self.source} may not be read {told}: {self._words.authorize.format(which='keys that may')}"
            )
        if status == 404:
            return SourceDeniedError(f"{self.source} does not exist {told}: correct {self._words.place}")
        if status == 412:
            return SourceUnavailableError(f"{self.source} has changed meanwhile; a retry takes it as it is then")
        if 400 <= status < 500 and status not in (408, 429):
            words = response["Error"].get("Message", "")
            return SourceDeniedError(f"{self.source} cannot be read {told}: {words}; check {self._words.place}")
        return SourceUnavailableError(f"{self.source} is not served now {told}")


def _client(source: Bucket, environment: Mapping[str, str]) -> Any:
    import botocore
    from botocore.config import Config
    from botocore.session import Session

    keys = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
    return Session().create_client(
        "s3",
        region_name=source.region,
        endpoint_url=source.endpoint,
        aws_access_key_id=keys[0],
        aws_secret_access_key=keys[1],
        aws_session_token=environment.get("AWS_SESSION_TOKEN"),
        config=Config(
            signature_version="s3v4" if all(keys) else botocore.UNSIGNED,
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": _TRIES},
            s3={"addressing_style": "path" if source.endpoint else "auto"},
            response_checksum_validation="when_required",  # the whole object's; a part of it has none
        ),
    )
