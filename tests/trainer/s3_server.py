"""A small server that speaks as much of S3's API as downloads need, and checks every signature by itself."""

import hashlib
import hmac
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "acme-models"
KEY = "AKIDEXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
SESSION = "session/token=="
PAGE = 3
"""Objects in one page of a listing."""


class S3Server(ThreadingHTTPServer):
    """Serves the files of one folder as the objects of BUCKET."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.region = "us-east-1"
        self.public = False
        """Unsigned requests are answered too."""
        self.session: str | None = None
        """A token that signed requests must have."""
        self.broken = False
        """Every answer is 503."""
        self.part: int | None = None
        """Objects were uploaded in parts of so many bytes."""
        self.tells_parts = True
        """Whether a HEAD of one part tells its size."""
        self.kms = False
        """Objects are encrypted with a key of KMS: an ETag says nothing of their content."""
        self.cut: dict[str, int] = {}
        """Key -> bytes of its next download after which the connection breaks."""
        self.spoil: set[str] = set()
        """Keys whose next download has a wrong byte."""
        self.extra: list[str] = []
        """Further keys that a listing has."""
        self.sent: Counter[str] = Counter()
        """Key -> bytes of its content that went out."""
        self.downloads: Counter[str] = Counter()
        self.refused: list[str] = []
        """Codes of refusals."""

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server_port}"

    def etag(self, content: bytes) -> str:
        """An object's ETag, without quotes."""
        if self.kms:
            return hashlib.md5(b"encrypted" + content).hexdigest()
        if self.part is None:
            return hashlib.md5(content).hexdigest()
        parts = [content[start : start + self.part] for start in range(0, len(content), self.part)]
        return f"{hashlib.md5(b''.join(hashlib.md5(part).digest() for part in parts)).hexdigest()}-{len(parts)}"


@contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """A running server."""
    with S3Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server

    def do_GET(self) -> None:
        bucket, _, key = unquote(urlsplit(self.path).path).removeprefix("/").partition("/")
        query = dict(parse_qsl(urlsplit(self.path).query, keep_blank_values=True))
        code = self._refusal()
        if self.server.broken:
            self._refuse(503, "SlowDown")
        elif code is not None:
            self._refuse(403, code)
        elif bucket != BUCKET:
            self._refuse(404, "NoSuchBucket")
        elif not key:
            self._list(query)
        else:
            self._object(key, query)

    do_HEAD = do_GET

    # --- signatures: Signature Version 4, as Amazon's guide describes it ---

    def _refusal(self) -> str | None:
        found = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([^/]+)/s3/aws4_request, "
            r"SignedHeaders=([^,]+), Signature=([0-9a-f]{64})",
            self.headers.get("Authorization", ""),
        )
        if found is None:
            return None if self.server.public else "AccessDenied"
        key, date, region, names, signature = found.groups()
        if key != KEY:
            return "InvalidAccessKeyId"
        if self.headers.get("x-amz-security-token") != self.server.session:
            return "InvalidToken"
        if region != self.server.region or "host" not in names.split(";"):
            return "SignatureDoesNotMatch"
        expected = self._signature(date, region, names)
        return None if hmac.compare_digest(signature, expected) else "SignatureDoesNotMatch"

    def _signature(self, date: str, region: str, names: str) -> str:
        url = urlsplit(self.path)
        pairs = sorted((quote(k, safe="-_.~"), quote(v, safe="-_.~")) for k, v in parse_qsl(url.query, True))
        headers = "".join(f"{name}:{' '.join(self.headers[name].split())}\n" for name in names.split(";"))
        lines = [self.command, url.path, "&".join(f"{k}={v}" for k, v in pairs), headers, names]
        request = "\n".join([*lines, self.headers["x-amz-content-sha256"]])
        scope = f"{date}/{region}/s3/aws4_request"
        digest = hashlib.sha256(request.encode()).hexdigest()
        text = "\n".join(["AWS4-HMAC-SHA256", self.headers["x-amz-date"], scope, digest])
        secret = f"AWS4{SECRET}".encode()
        for step in (date, region, "s3", "aws4_request"):
            secret = hmac.new(secret, step.encode(), hashlib.sha256).digest()
        return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()

    # --- objects ---

    def _list(self, query: dict[str, str]) -> None:
        files = (str(file.relative_to(self.server.folder)) for file in self.server.folder.rglob("*") if file.is_file())
        keys = sorted(key for key in [*files, *self.server.extra] if key.startswith(query.get("prefix", "")))
        start = int(query.get("continuation-token", 0))
        page = keys[start : start + PAGE]
        more = start + PAGE < len(keys)
        items = "".join(self._item(key) for key in page)
        following = f"<NextContinuationToken>{start + PAGE}</NextContinuationToken>" if more else ""
        self._send(
            200,
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(quote(query.get('prefix', '')))}</Prefix><MaxKeys>{PAGE}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated><EncodingType>url</EncodingType><KeyCount>{len(page)}</KeyCount>{following}{items}</ListBucketResult>",
        )

    def _item(self, key: str) -> str:
        file = self.server.folder / key
        content = file.read_bytes() if file.is_file() else b""
        return (
            f"<Contents><Key>{escape(quote(key))}</Key><Size>{len(content)}</Size>"
            f"<ETag>&quot;{self.server.etag(content)}&quot;</ETag><StorageClass>STANDARD</StorageClass>"
            "<LastModified>2030-01-01T12:00:00.000Z</LastModified></Contents>"
        )

    def _object(self, key: str, query: dict[str, str]) -> None:
        file = self.server.folder / key
        if not file.is_file():
            self._refuse(404, "NoSuchKey")
            return
        content = file.read_bytes()
        etag, stop = self.server.etag(content), len(content)
        if self.headers.get("If-Match", f'"{etag}"') != f'"{etag}"':
            self._refuse(412, "PreconditionFailed")
            return
        start = int(re.sub(r"bytes=(\d+)-.*", r"\1", self.headers.get("Range", "bytes=0-")))
        if query.get("partNumber") == "1" and self.server.part is not None and self.server.tells_parts:
            stop = min(stop, self.server.part)
        self.send_response(206 if (start, stop) != (0, len(content)) else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Last-Modified", "Tue, 01 Jan 2030 12:00:00 GMT")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        if self.server.kms:
            self.send_header("x-amz-server-side-encryption", "aws:kms")
        self.end_headers()
        if self.command == "GET":
            self._send_content(key, content[start:stop])

    def _send_content(self, key: str, content: bytes) -> None:
        self.server.downloads[key] += 1
        limit = self.server.cut.pop(key, None)
        part = content[:limit]
        if key in self.server.spoil:
            self.server.spoil.remove(key)
            part = part[:-1] + bytes([part[-1] ^ 1])
        self.server.sent[key] += len(part)
        self.wfile.write(part)
        self.close_connection = limit is not None

    def _refuse(self, status: int, code: str) -> None:
        self.server.refused.append(code)
        self._send(status, f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>no: {code}</Message></Error>')

    def _send(self, status: int, text: str) -> None:
        body = text.encode() if self.command == "GET" else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-amz-bucket-region", self.server.region)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
