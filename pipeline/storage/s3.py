"""s3fs made robust against faults of object storage: one layer of retries, bounded in time, and lengths that are checked.

By default botocore repeats a request up to 5 times and s3fs that up to 5 times again, for minutes, and their errors do not
name the file. A body of more than 50 MB is read without either layer, with zeros where a part was too short (s3fs 2026.9,
`_cat_file_concurrent`), and nothing ends an upload that the server does not read, or a response that stalls. Here both
try once, and every request, with the body of its response, goes through `S3._with_retries`.

Waits are drawn uniformly from 0 to FIRST_WAIT_S × 2^faults, at most LONGEST_WAIT_S ("full jitter":
M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog 2015). Error codes:
docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import aiohttp
from botocore import exceptions as boto
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from pipeline.errors import RunError, UserError, masked

RETRY_TIMEOUT = "RAYDML_S3_RETRY_TIMEOUT_S"  # environment variable: seconds that the faults of one request may last
RETRY_TIMEOUT_ALIAS = "RAYDML_S3_PATIENCE_S"  # its name in earlier versions
RETRY_TIMEOUT_S = 60.0  # default
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 8.0
READ_TIMEOUT_S = 15.0  # a server that sends nothing for so long counts as a fault
WARN_AFTER_S = 5.0  # once faults have lasted so long, each is logged as a warning
PART_BYTES = 32 << 20  # larger objects are read and written in parts
PARTS_AT_ONCE = 4
CONNECTIONS = 64  # more than are used at a time: waiting for a connection would look like a server that sends nothing
MIN_BYTES_PER_S = 64 << 10  # a body below this rate, sent or received, counts as a fault

CREDENTIALS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN (or AWS_PROFILE)"
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
# The response to a HEAD has no body that tells the reason: for an expired token it has status 400.
REFUSED_CODES = {"400", "AccessDenied", "AccountProblem", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
REFUSED_STATUS = {401, 403}
REGION_CODES = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301", "307"}

logger = logging.getLogger(__name__)
jitter = random.Random()  # not the global generator
Result = TypeVar("Result")


class IncompleteBody(Exception):
    """A response body was shorter than its length, without an error of the connection."""


class MultipartObject(NamedTuple):
    """Size and version of an object that has to be read in parts, all of one version."""

    size: int
    version: str


def retry_timeout() -> float:
    """Seconds that the faults of one request may last: $RAYDML_S3_RETRY_TIMEOUT_S, else 60.

    Raises:
        UserError: The variable is not a number of seconds, 0 or more.
    """
    variable = RETRY_TIMEOUT if os.environ.get(RETRY_TIMEOUT) else RETRY_TIMEOUT_ALIAS
    text = os.environ.get(variable, "")
    try:
        seconds = float(text or RETRY_TIMEOUT_S)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise UserError(f"{variable} is {text!r}, expected seconds, 0 or more")
    return seconds


class S3(S3FileSystem):
    """Object storage; credentials, endpoint and region come from the environment.

    Args:
        retry_timeout_s: How long the faults of one request may last before it fails; 0 tries once.

    Raises:
        RunError: Faults lasted longer than that, or the storage refuses the request; the object is
            named.
        UserError: Credentials, bucket, region or endpoint are wrong; at once.
        FileNotFoundError: There is no such object.
    """

    retries = 1  # s3fs's own

    def __init__(self, retry_timeout_s: float | int = RETRY_TIMEOUT_S, **options: Any) -> None:
        self.retry_timeout_s = retry_timeout_s
        once = {"total_max_attempts": 1, "mode": "standard"}
        settings = {
            "retries": once,
            "connect_timeout": READ_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": CONNECTIONS,
        }
        super().__init__(config_kwargs=settings, use_listings_cache=False, **options)

    async def _call_s3(self, method: str, *args: Any, **request: Any) -> Any:
        async def once() -> Any:
            response = await self._once(method, *args, **request)
            if response.get("Errors"):  # delete_objects: objects that were not removed, in a response of status 200
                raise ClientError({"Error": response["Errors"][0], **response}, method)
            return response

        return await self._with_retries(method, request, once)

    call_s3 = sync_wrapper(_call_s3)

    async def _once(self, method: str, *args: Any, **request: Any) -> Any:
        async with _body_timeout(len(request.get("Body", b""))):
            return await super()._call_s3(method, *args, **request)

    async def _cat_file(
        self, path: str, version_id: Any = None, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Reads an object, or its bytes from `start` to `end`; never fewer."""
        if (start is None) != (end is None):
            raise ValueError(f"got start={start} and end={end}, expected both or none")
        bucket, key, _version = self.split_path(path)
        request = {"Bucket": bucket, "Key": key}
        content = await self._get(request, None if start is None or end is None else (start, end))
        if isinstance(content, bytes):
            return content
        request["IfMatch"] = content.version
        semaphore = asyncio.Semaphore(PARTS_AT_ONCE)

        async def read_part(first: int) -> bytes:
            async with semaphore:
                data = await self._get(request, (first, min(first + PART_BYTES, content.size)))
                assert isinstance(data, bytes)  # a part is never too large
                return data

        return b"".join(await asyncio.gather(*(read_part(first) for first in range(0, content.size, PART_BYTES))))

    async def _get(self, request: Mapping[str, str], span: tuple[int, int] | None) -> bytes | MultipartObject:
        """Reads a range of bytes, or a whole object; a large object is not read, its size and version are returned."""
        if span is not None:
            request = {**request, "Range": f"bytes={span[0]}-{span[1] - 1}"}

        async def once() -> bytes | MultipartObject:
            response = await self._once("get_object", **request)
            size = response["ContentLength"] if span is None else span[1] - span[0]
            async with _body_timeout(size), response["Body"] as body:
                if span is None and size > PART_BYTES:
                    return MultipartObject(size, response["ETag"])
                data = await body.read()
            if len(data) != size:
                raise IncompleteBody(f"got {len(data)} of {size} bytes")
            return data

        return await self._with_retries("get_object", request, once)

    async def _pipe_file(self, path: str, data: bytes, **options: Any) -> None:
        options |= {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
        try:
            await super()._pipe_file(path, data, **options)
        except FileNotFoundError:  # NoSuchUpload: perhaps it was completed and the response was lost; write again
            await super()._pipe_file(path, data, **options)

    async def _exists(self, path: str) -> bool:
        """True if the object exists; s3fs's own method answers no for a bucket at every fault."""
        try:
            await self._info(path)
        except FileNotFoundError:
            return False
        return True

    exists = sync_wrapper(_exists)

    async def _with_retries(
        self, method: str, request: Mapping[str, Any], once: Callable[[], Awaitable[Result]]
    ) -> Result:
        """Calls `once` until it succeeds, fails for good, or `retry_timeout_s` have passed since its first fault."""
        uri = _uri(request)
        first_fault = 0.0
        tries = 0
        while True:
            tries += 1
            try:
                return await once()
            except Exception as error:
                cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error  # s3fs translates
                if not _is_transient(cause):
                    permanent_error = _permanent_error(uri, method, cause)
                    if permanent_error is None:
                        raise
                    raise permanent_error from error
                now = time.monotonic()
                first_fault = first_fault or now
                wait = jitter.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)))
                if now + wait - first_fault > self.retry_timeout_s:
                    raise RunError(
                        f"{uri}: {method} failed, {tries} tries in {now - first_fault:.0f} s, at last with "
                        f"{_reason(cause)}: check the storage service, then run the same command again "
                        f"({RETRY_TIMEOUT}, how long faults may last, is {self.retry_timeout_s:g} s)"
                    ) from error
                if now - first_fault > WARN_AFTER_S:
                    logger.warning("%s: %s failed, %d tries, %s: trying again", uri, method, tries, _reason(cause))
                await asyncio.sleep(wait)


def _body_timeout(size: int) -> asyncio.Timeout:
    """Raises TimeoutError in a block that takes longer than a body of `size` bytes may."""
    return asyncio.timeout(2 * READ_TIMEOUT_S + size / MIN_BYTES_PER_S)


def _uri(request: Mapping[str, Any]) -> str:
    """URI of the object that a request names; of several, the first."""
    removed = request.get("Delete", {}).get("Objects", [{}])[0].get("Key", "")
    return f"s3://{request.get('Bucket', '')}/{request.get('Key') or request.get('Prefix') or removed}".rstrip("/")


def _code(error: ClientError) -> tuple[int, str]:
    """HTTP status and S3's error code."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(error.response.get("Error", {}).get("Code", ""))


def _is_transient(error: BaseException) -> bool:
    """True if the same request may succeed later."""
    if isinstance(error, ClientError):
        status, code = _code(error)
        return status in TRANSIENT_STATUS or code in TRANSIENT_CODES
    connection = (boto.HTTPClientError, boto.ConnectionError, aiohttp.ClientError, ConnectionError, TimeoutError)
    damaged = (IncompleteBody, boto.IncompleteReadError, boto.FlexibleChecksumError, ResponseParserError)
    return isinstance(error, connection + damaged)


def _permanent_error(uri: str, method: str, cause: BaseException) -> Exception | None:
    """The error to raise for a fault that is not transient; None for a missing object, or an error of the program."""
    what = f"{uri}: {method} failed ({_reason(cause)})"
    status, code = _code(cause) if isinstance(cause, ClientError) else (0, "")
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return UserError(f"{what}: check the name of the bucket, AWS_ENDPOINT_URL and AWS_DEFAULT_REGION")
    if code in REGION_CODES:
        return UserError(f"{what}: check AWS_DEFAULT_REGION and AWS_ENDPOINT_URL")
    if code in REFUSED_CODES or status in REFUSED_STATUS:
        return UserError(f"{what}: check {CREDENTIALS}, AWS_ENDPOINT_URL, and what this key may do in the bucket")
    if isinstance(cause, (boto.BotoCoreError, ValueError)):  # raised before anything is sent
        return UserError(f"{what}: check {CREDENTIALS}, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL")
    return RunError(what) if isinstance(cause, ClientError) and status != 404 else None


def _reason(error: BaseException) -> str:
    """The reason of a fault, in one line."""
    if isinstance(error, ClientError):
        status, code = _code(error)
        text = f"{status} {'' if code == str(status) else code} {error.response.get('Error', {}).get('Message', '')}"
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return masked(" ".join(text.split()))
