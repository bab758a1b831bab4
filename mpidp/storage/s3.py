"""Folders in S3, or in a store with the same protocol. A range is read with one GetObject request with the header If-Match.

Credentials, region and endpoint are read where boto3 reads them: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_DEFAULT_REGION,
AWS_ENDPOINT_URL, and ~/.aws. FSSPEC_S3_ANON=true reads public buckets without credentials.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mpidp.errors import UsageError
from mpidp.storage.address import Address, credentials_from, named
from mpidp.storage.filesystem import FilesystemStore, open_filesystem
from mpidp.storage.store import Changed, Missing, Refused, Unreachable, Version, checked_length

SILENT_SECONDS = 20.0  # a server that sends no data for this time counts as not answering
REQUEST_SECONDS = 120.0  # the longest duration of one request
ACCESS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AllAccessDisabled",
          "AccountProblem", "401", "403"}
REGION = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301",
          "307"}
REPLACED = {"PreconditionFailed", "InvalidRange", "412", "416"}
PASSING = {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling",
           "ThrottlingException", "OperationAborted", "408", "429"}


class S3Store(FilesystemStore):
    """A folder in S3. See Store."""

    def __init__(self, address: Address, name: str) -> None:
        config = {
            "connect_timeout": SILENT_SECONDS, "read_timeout": SILENT_SECONDS, "retries": {"total_max_attempts": 1},
            "request_checksum_calculation": "when_required",  # not every store supports boto's newer checksums
        }
        self.address = address
        self._system, self._root = open_filesystem(address, name, config_kwargs=config, skip_instance_cache=True)
        self._system.retries = 1  # retry.py tries again, and logs this
        self._bucket, _, self._prefix = self._root.rstrip("/").partition("/")
        if not self._bucket:
            raise UsageError(f"{named(name, address)}: the bucket is missing. Write the address as in s3://bucket/prefix")

    def version(self, name: str) -> Version:
        """See Store. Raises Refused if there is no such bucket. Independent."""
        async def ask() -> Any:
            return await self._system._call_s3("head_object", Bucket=self._bucket, Key=self._key(name))

        async def ask_bucket() -> Any:
            return await self._system._call_s3("head_bucket", Bucket=self._bucket)

        try:
            found = self._wait(ask)
        except Missing as error:  # S3 gives the same answer if the bucket is missing
            try:
                self._wait(ask_bucket)
            except Missing:
                raise Refused(f"there is no bucket {self._bucket}") from None
            except Refused:
                pass  # the credentials do not permit a request about the bucket
            raise error from None
        return Version(int(found["ContentLength"]), str(found["ETag"]))

    def read(self, name: str, start: int, stop: int, version: Version) -> bytes:
        """See Store. Independent."""
        async def ask() -> tuple[Any, bytes]:
            answer = await self._system._call_s3(
                "get_object", Bucket=self._bucket, Key=self._key(name), Range=f"bytes={start}-{stop - 1}", IfMatch=version.tag
            )
            async with answer["Body"] as body:
                return answer, await body.read()

        answer, data = self._wait(ask)
        if answer.get("ETag") != version.tag:
            raise Changed(f"its ETag is {answer.get('ETag')}, but was {version.tag}")
        said = answer.get("ContentRange")
        if said is None and (start, stop) != (0, version.size):
            raise Refused("the server ignores the header Range and sends the whole file. Use a server that supports ranges")
        if said not in (None, f"bytes {start}-{stop - 1}/{version.size}"):
            raise Unreachable(f"the server sent the range {said!r} instead of bytes {start}-{stop - 1}/{version.size}")
        return checked_length(data, start, stop)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _wait(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        from fsspec.asyn import sync

        try:
            return sync(self._system.loop, ask, timeout=REQUEST_SECONDS)
        except Exception as error:
            raise self._translated(error) from None

    def _translated(self, error: Exception) -> Exception:
        from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

        if isinstance(error, (Unreachable, Refused)):
            return error
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (ClientError, BotoCoreError)):
            cause = cause.__cause__
        if isinstance(cause, ClientError):
            return _of_code(cause.response)
        if isinstance(cause, BotoCoreError) and not isinstance(cause, (ConnectionError, HTTPClientError)):
            return Refused(f"{str(cause).rstrip('.')}. Credentials are read from {credentials_from('s3')}".replace("\n", " "))
        if isinstance(error, (TypeError, ValueError, AttributeError, LookupError)):
            return Refused(f"{type(error).__name__}: {error}")
        return Unreachable(f"{type(error).__name__}: {error}".rstrip(": "))


def _of_code(response: dict[str, Any]) -> Exception:
    """Return the exception of store.py for an error answer of S3."""
    code, status = str(response.get("Error", {}).get("Code", "")), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = str(response.get("Error", {}).get("Message", "")).strip().rstrip(".")
    if code in PASSING or status >= 500 or status in (408, 429):
        return Unreachable(f"HTTP {status} ({code})")
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return Refused("there is no such bucket")
    if code in ("NoSuchKey", "404") or status == 404:
        return Missing("there is no such object")
    if code in REPLACED or status in (412, 416):
        return Changed(f"it was replaced on the server ({code})")
    if code in REGION or status in (301, 307):
        region = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", "")
        return Refused(f"the bucket is in another region{f', {region}' if region else ''} ({code}). Set AWS_DEFAULT_REGION")
    if code in ACCESS or status in (401, 403):
        return Refused(f"no access ({code}: {said}). Credentials are read from {credentials_from('s3')}, and the key needs the "
                       "right to read this bucket")
    return Refused(f"HTTP {status} ({code}: {said})" + ". Check that AWS_DEFAULT_REGION is the bucket's region" * (status == 400))
