"""Files from a bucket that speaks S3: Amazon's, MinIO, Ceph and others.

The client is MinIO's own, imported when a source is in a bucket. Nothing here imports torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Final

from kubetune_trainer.remote import SourceDeniedError, SourceUnavailableError, Words
from kubetune_trainer.transfer import PARALLEL, Digest, RemoteFile

_CHUNK: Final = 1 << 16
"""Bytes that a broken connection may cost."""
_CONNECT_SECONDS: Final = 15
_READ_SECONDS: Final = 60
_TRIES: Final = 4
_RETRIED: Final = (500, 502, 503, 504)
_AMAZON: Final = "https://s3.amazonaws.com"
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
            for item in self._client.list_objects(self.source.name, prefix=prefix, recursive=True):
                key = item.object_name
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
        etag = item.etag.strip('"')
        return RemoteFile(
            path=path,
            size=item.size,
            version=etag,
            digest=self._digest(item.object_name, item.size, etag),
            bring=partial(self._bring, item.object_name, etag),
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
            part = {"partNumber": "1"} if count else None
            head = self._client.stat_object(self.source.name, key, extra_query_params=part)
        if head.metadata.get("x-amz-server-side-encryption", "").startswith("aws:kms"):
            return None
        if not count:
            return Digest("md5", known[1])
        return Digest("md5", known[1], head.size) if head.size and -(-size // head.size) == count else None

    def _bring(self, key: str, etag: str, stream: BinaryIO, start: int) -> None:
        with self._errors():
            same = {"If-Match": f'"{etag}"'}
            answer = self._client.get_object(self.source.name, key, offset=start, request_headers=same)
            try:
                for chunk in answer.stream(_CHUNK):
                    stream.write(chunk)
            finally:
                answer.close()
                answer.release_conn()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The client's errors become SourceDeniedError or SourceUnavailableError."""
        from minio.error import InvalidResponseError, S3Error, ServerError
        from urllib3.exceptions import HTTPError

        try:
            yield
        except S3Error as error:
            raise self._refusal(error.response.status, error.code or "", error.response.headers) from error
        except (ServerError, InvalidResponseError) as error:
            told = SourceUnavailableError if getattr(error, "status_code", 0) >= 500 else SourceDeniedError
            raise told(f"{self.source} does not answer as S3 does: {error}") from error
        except ValueError as error:
            raise SourceDeniedError(f"{self.source} does not answer as S3 does: {error}") from error
        except HTTPError as error:
            raise SourceUnavailableError(f"{self.source} cannot be reached: {error}") from error

    def _refusal(self, status: int, code: str, headers: Mapping[str, str]) -> Exception:
        region = headers.get("x-amz-bucket-region")
        if region is not None and region != self.source.region and status in (301, 400):
            return SourceDeniedError(f"{self.source} is in region {region}: set {self._words.region}")
        told = f"(HTTP {status}{f', {code}' if code else ''})"
        if status in (401, 403):
            return SourceDeniedError(
                f"{self.source} may not be read {told}: {self._words.authorize.format(which='keys that may')}"
            )
        if status == 404:
            return SourceDeniedError(f"{self.source} does not exist {told}: correct {self._words.place}")
        if status == 412:
            return SourceUnavailableError(f"{self.source} has changed meanwhile; a retry takes it as it is then")
        if 300 <= status < 500 and status not in (408, 429):
            return SourceDeniedError(f"{self.source} cannot be read {told}: check {self._words.place}")
        return SourceUnavailableError(f"{self.source} is not served now {told}")


def _client(source: Bucket, environment: Mapping[str, str]) -> Any:
    import certifi
    from minio import Minio
    from urllib3 import PoolManager, Retry, Timeout

    endpoint = source.endpoint or _AMAZON
    retry = Retry(total=_TRIES - 1, backoff_factor=0.5, status_forcelist=_RETRIED, raise_on_status=False)
    return Minio(
        endpoint.partition("://")[2].rstrip("/"),
        access_key=environment.get("AWS_ACCESS_KEY_ID"),
        secret_key=environment.get("AWS_SECRET_ACCESS_KEY"),
        session_token=environment.get("AWS_SESSION_TOKEN"),
        secure=endpoint.startswith("https://"),
        region=source.region,
        http_client=PoolManager(
            timeout=Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
            maxsize=PARALLEL,
            cert_reqs="CERT_REQUIRED",
            ca_certs=environment.get("SSL_CERT_FILE") or certifi.where(),
            retries=retry,
        ),
    )
