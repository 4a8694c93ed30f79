"""What the answers of buckets mean: obstore's errors have types for what is absent, denied or
changed; of all others only the text has the status.

Source: obstore 0.12 over Rust's object_store.
"""

from __future__ import annotations

import re

from dcpconv.stores.store import without_secrets

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")


def status_of(error: Exception) -> int:
    """The HTTP status that an error tells of, or 0."""
    text = str(error)
    found = _STATUS.search(text)
    if found is None and "redirect without LOCATION" in text:
        return 301  # S3 does not say where the bucket is
    return int(found[1]) if found else 0


def code_of(error: Exception) -> str:
    """The name that S3 gives to what is wrong, or an empty string."""
    found = _CODE.search(str(error))
    return found[1] if found else ""


def may_pass(error: Exception) -> bool:
    """Whether another try can help: too many requests, a fault of the server, a cut connection."""
    status = status_of(error)
    named = type(error).__name__ in {"PermissionDeniedError", "UnauthenticatedError"}
    unfit = type(error).__name__ in {"NotSupportedError", "InvalidPathError"}
    return not named and not unfit and (status == 0 or status in {408, 429} or status >= 500)


def in_short(error: Exception) -> str:
    """The status and its name, or the first line; nothing in which a credential could be."""
    status, code = status_of(error), code_of(error)
    if status:
        return f"status {status}" + (f", {code}" if code else "")
    line = without_secrets(str(error).partition("\n")[0])
    return line.rpartition(" - ")[2].rpartition(": ")[2][:160] or line[:160]


def meaning(kind: str, status: int, code: str) -> tuple[str, str | None]:
    """What an answer means, and what to do."""
    if code == "NoSuchBucket":
        return "there is no such bucket", "is its name right, and the endpoint (AWS_ENDPOINT_URL)?"
    if code in {"PermanentRedirect", "AuthorizationHeaderMalformed"} or status in {301, 307}:
        return "the bucket is in another region", "say which: AWS_REGION=eu-central-1"
    if kind in {"PermissionDeniedError", "UnauthenticatedError"} or status in {401, 403}:
        return (
            "access was denied",
            "the credentials that were found may not do this; are they set, and of this account?",
        )
    if status in {408, 429} or status >= 500:
        return "the store does not answer as it should", "it may be overloaded; run this again"
    if kind == "NotSupportedError":
        return "the server cannot do what is needed", "ranges of bytes have to be served"
    return "the store does not answer as it should", "is the name right, and the endpoint?"
