"""s3fs that bears what object storage does on a bad day: one layer of retries, bounded in time, and lengths that are checked.

Left alone, botocore repeats a request up to 5 times and s3fs that up to 5 times again, for minutes, and what they raise
names no file. A body of more than 50 MB is read without either layer, with zeros where a part came short (s3fs 2026.9,
`_cat_file_concurrent`), and nothing ends an upload that the server does not read, or an answer that trickles. Here both
try once, and every request, with the body of its answer, goes through `S3._with_retries`.

Waits are drawn uniformly from 0 to FIRST_WAIT_S × 2^faults, at most LONGEST_WAIT_S ("full jitter": M. Brooker, Exponential
Backoff And Jitter, AWS Architecture Blog 2015). Error codes: docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html.
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

from pipeline.errors import RunError, UserError

PATIENCE = "RAYDML_S3_PATIENCE_S"  # environment variable: how long the faults of one request may last
PATIENCE_S = 60.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 8.0
READ_TIMEOUT_S = 15.0  # of silence of the server are a fault
WARN_AFTER_S = 5.0  # of faults, a warning is logged at each
PART_BYTES = 32 << 20  # larger objects are read and written in parts
PARTS_AT_ONCE = 4
CONNECTIONS = 64  # more than are used at a time: a request that waits for one would look like a silent server
MIN_BYTES_PER_S = 64 << 10  # a body below this rate, sent or received, counts as stuck

CREDENTIALS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN (or AWS_PROFILE)"
TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {"BadDigest", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable",
                 "SlowDown", "Throttling", "XAmzContentSHA256Mismatch"}  # fmt: skip
# The answer to a HEAD has no body to say why: 400 is what it gives for an expired token.
REFUSED_CODES = {"400", "AccessDenied", "AccountProblem", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
REFUSED_STATUS = {401, 403}
REGION_CODES = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301", "307"}

logger = logging.getLogger(__name__)
jitter = random.Random()  # not the global generator
Result = TypeVar("Result")


class IncompleteBody(Exception):
    """An answer ended before its length, without an error of the connection."""


class MultipartObject(NamedTuple):
    """What is known of an object that has to be read in parts, all of one version."""

    size: int
    version: str


def retry_timeout() -> float:
    """Seconds that the faults of one request may last: $RAYDML_S3_PATIENCE_S, else 60."""
    text = os.environ.get(PATIENCE, "")
    try:
        seconds = float(text or PATIENCE_S)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise UserError(f"{PATIENCE} is {text!r}, expected seconds, 0 or more")
    return seconds


class S3(S3FileSystem):
    """Object storage; credentials, endpoint and region come from the environment.

    Args:
        retry_timeout_s: how long the faults of one request may last before it fails; 0 tries once.

    Raises:
        RunError: faults lasted longer than that, or the storage cannot do what was asked; the object is named.
        UserError: credentials, bucket, region or endpoint are wrong; at once.
        FileNotFoundError: there is no such object.
    """

    retries = 1  # s3fs's own

    def __init__(self, retry_timeout_s: float | int = PATIENCE_S, **options: Any) -> None:
        self.retry_timeout_s = retry_timeout_s
        once = {"total_max_attempts": 1, "mode": "standard"}
        settings = {
            "retries": once,
            "connect_timeout": READ_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": CONNECTIONS,
        }
        super().__init__(config_kwargs=settings, use_listings_cache=False, **options)

    async def _call_s3(self, method: str, *more: Any, **request: Any) -> Any:
        async def once() -> Any:
            response = await self._once(method, *more, **request)
            if response.get("Errors"):  # delete_objects: what could not be removed, in an answer of status 200
                raise ClientError({"Error": response["Errors"][0], **response}, method)
            return response

        return await self._with_retries(method, request, once)

    call_s3 = sync_wrapper(_call_s3)

    async def _once(self, method: str, *more: Any, **request: Any) -> Any:
        async with _time_for(len(request.get("Body", b""))):
            return await super()._call_s3(method, *more, **request)

    async def _cat_file(
        self, path: str, version_id: Any = None, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """An object, or its bytes from `start` to `end`; never less than that."""
        if (start is None) != (end is None):
            raise ValueError(f"got start={start} and end={end}, expected both or none")
        bucket, key, _version = self.split_path(path)
        place = {"Bucket": bucket, "Key": key}
        found = await self._get(place, None if start is None or end is None else (start, end))
        if isinstance(found, bytes):
            return found
        place["IfMatch"] = found.version
        some = asyncio.Semaphore(PARTS_AT_ONCE)

        async def part(first: int) -> bytes:
            async with some:
                data = await self._get(place, (first, min(first + PART_BYTES, found.size)))
                assert isinstance(data, bytes)  # a part is never too large
                return data

        return b"".join(await asyncio.gather(*(part(first) for first in range(0, found.size, PART_BYTES))))

    async def _get(self, request: Mapping[str, str], part: tuple[int, int] | None) -> bytes | MultipartObject:
        """A part, or a whole object unless that is large."""
        if part is not None:
            request = {**request, "Range": f"bytes={part[0]}-{part[1] - 1}"}

        async def once() -> bytes | MultipartObject:
            response = await self._once("get_object", **request)
            size = response["ContentLength"] if part is None else part[1] - part[0]
            async with _time_for(size), response["Body"] as body:
                if part is None and size > PART_BYTES:
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
        except FileNotFoundError:  # NoSuchUpload: it was completed and the answer lost, or was it? Once more
            await super()._pipe_file(path, data, **options)

    async def _exists(self, path: str) -> bool:
        """s3fs's own takes every fault for "no" when it is asked about a bucket."""
        try:
            await self._info(path)
        except FileNotFoundError:
            return False
        return True

    exists = sync_wrapper(_exists)

    async def _with_retries(
        self, method: str, request: Mapping[str, Any], once: Callable[[], Awaitable[Result]]
    ) -> Result:
        """Does `once` until it succeeds, cannot succeed, or `retry_timeout_s` have passed since its first fault."""
        uri, first, tries = _uri(request), 0.0, 0
        while True:
            tries += 1
            try:
                return await once()
            except Exception as error:
                cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error  # s3fs translates
                if not _is_transient(cause):
                    refusal = _permanent_error(uri, method, cause)
                    if refusal is None:
                        raise
                    raise refusal from error
                now = time.monotonic()
                first = first or now
                wait = jitter.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (tries - 1)))
                if now + wait - first > self.retry_timeout_s:
                    raise RunError(
                        f"{uri}: {method} failed, {tries} tries in {now - first:.0f} s, at last with {_reason(cause)}: see to the "
                        f"storage, then run the same command again ({PATIENCE} is how long faults may last, now {self.retry_timeout_s:g} s)"
                    ) from error
                if now - first > WARN_AFTER_S:
                    logger.warning("%s: %s failed, %d tries, %s: trying again", uri, method, tries, _reason(cause))
                await asyncio.sleep(wait)


def _time_for(size: int) -> asyncio.Timeout:
    """Ends the block with TimeoutError when it takes longer than a body of `size` bytes may."""
    return asyncio.timeout(2 * READ_TIMEOUT_S + size / MIN_BYTES_PER_S)


def _uri(request: Mapping[str, Any]) -> str:
    """The object that a request is about; of several the first."""
    removed = request.get("Delete", {}).get("Objects", [{}])[0].get("Key", "")
    return f"s3://{request.get('Bucket', '')}/{request.get('Key') or request.get('Prefix') or removed}".rstrip("/")


def _code(error: ClientError) -> tuple[int, str]:
    """HTTP status and S3's error code."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(error.response.get("Error", {}).get("Code", ""))


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, ClientError):
        status, code = _code(error)
        return status in TRANSIENT_STATUS or code in TRANSIENT_CODES
    connection = (boto.HTTPClientError, boto.ConnectionError, aiohttp.ClientError, ConnectionError, TimeoutError)
    damaged = (IncompleteBody, boto.IncompleteReadError, boto.FlexibleChecksumError, ResponseParserError)
    return isinstance(error, connection + damaged)


def _permanent_error(uri: str, method: str, cause: BaseException) -> Exception | None:
    """What is raised for an error that does not pass; None: that there is no such object, or what is not of storage."""
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
    """In one line."""
    if isinstance(error, ClientError):
        status, code = _code(error)
        text = f"{status} {'' if code == str(status) else code} {error.response.get('Error', {}).get('Message', '')}"
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(text.split())
