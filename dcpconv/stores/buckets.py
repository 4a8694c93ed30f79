"""Ways to buckets and static servers: where they are, and with whose credentials.

Source:
    obstore 0.12 over Rust's object_store: credentials come from the environment (``AWS_*``,
    ``GOOGLE_*``, ``AZURE_*``) or from the machine's own identity.  Profiles and single sign-on of
    AWS are read by boto3, where it is installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import urlsplit

from dcpconv.stores.answers import in_short
from dcpconv.stores.objects import TRIES, GoogleStore, HttpStore, ObjectsStore
from dcpconv.stores.store import StoreError, without_secrets

PATIENCE: Final[dict[str, Any]] = {
    "max_retries": TRIES - 1,
    "retry_timeout": timedelta(seconds=180),
    "backoff": {
        "init_backoff": timedelta(seconds=0.1),
        "max_backoff": timedelta(seconds=8),
        "base": 2,
    },
}

_COPIES: Final = {"s3": 5 << 30, "gs": 5 << 40}
"""Bytes of an object that a store copies on condition, in one request.  Source: the limits of S3's
``UploadPartCopy`` and of Google's objects; Azure may answer before it has copied."""

_SET_UP: Final = {
    "s3": "AWS_REGION and AWS_ENDPOINT_URL say where it is, AWS_ACCESS_KEY_ID who you are",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS names a file that says who you are",
    "az": "AZURE_STORAGE_ACCOUNT_NAME says whose it is, or abfss://CONTAINER@ACCOUNT/NAME",
}


def open_objects(url: str, scheme: str) -> tuple[ObjectsStore, str]:
    """The store that a URL names, and the key in it.

    Args:
        url: The URL.
        scheme: ``s3``, ``gs``, ``az``, ``http`` or ``https``, however the URL spells it.

    Raises:
        StoreError: obstore is not installed, or the URL names no bucket.
    """
    found = urlsplit(url)
    if find_spec("obstore") is None:
        raise StoreError(
            f"{scheme}:// is read through obstore, which is not installed",
            [("found", without_secrets(url))],
            hint="pip install 'dcpconv[remote]'",
        )
    if scheme not in {"http", "https"}:
        return _bucket(url, scheme)
    if found.query or found.username:
        raise StoreError(
            "a URL with a password or a query is not read: it is no name that errors could say",
            [("found", without_secrets(url))],
            hint="use the store's own scheme (s3://, gs://, az://) and its credentials",
        )
    root = f"{scheme}://{found.netloc}"
    from obstore.store import HTTPStore  # noqa: PLC0415  slow import

    options: Any = {"allow_http": True, "timeout": "60s", "connect_timeout": "10s"}
    reading = HTTPStore.from_url(root, client_options=options, retry_config={"max_retries": 0})
    return HttpStore(root, reading, reading), found.path.strip("/")


def _bucket(url: str, scheme: str) -> tuple[ObjectsStore, str]:
    found = urlsplit(url)
    # abfss://container@account.dfs.core.windows.net/key has the container before the host
    bucket = found.username or found.netloc
    if not bucket:
        facts = [("found", without_secrets(url)), ("expected", f"{scheme}://bucket/name")]
        raise StoreError("the URL names no bucket", facts)
    import obstore.store as stores  # noqa: PLC0415  slow import

    kinds: Mapping[str, Any] = {
        "s3": stores.S3Store,
        "gs": stores.GCSStore,
        "az": stores.AzureStore,
    }
    options: Any = {"timeout": "120s", "connect_timeout": "10s"}
    named: dict[str, Any] = {}
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            named["endpoint"] = endpoint
            options["allow_http"] = endpoint.startswith("http://")
        named |= {"copy_if_not_exists": "multipart", **_credentials_of_boto3()}
    if scheme == "az" and os.environ.get("AZURE_STORAGE_USE_EMULATOR"):
        options["allow_http"] = True
    if scheme == "az" and found.username and found.hostname:
        named["account_name"] = found.hostname.partition(".")[0]
    if scheme == "gs" and os.environ.get("STORAGE_EMULATOR_HOST"):
        options["allow_http"] = True
        named |= _emulator()
    from obstore.exceptions import BaseError  # noqa: PLC0415  slow import

    try:
        made = [
            kinds[scheme](bucket, client_options=options, retry_config=retries, **named)
            for retries in ({"max_retries": 0}, PATIENCE)
        ]
    except (BaseError, ValueError) as error:
        raise StoreError(
            f"{scheme}:// cannot be reached as it is set up",
            [("found", without_secrets(url)), ("because", in_short(error))],
            hint=_SET_UP[scheme],
        ) from None
    store, root = (
        GoogleStore if scheme == "gs" else ObjectsStore,
        f"{found.scheme}://{found.netloc}",
    )
    return store(root, *made, copies=_COPIES.get(scheme, 0)), found.path.strip("/")


def _emulator() -> dict[str, Any]:
    """An account of nobody, at the place that Google's own clients take from the same variable."""
    host = os.environ["STORAGE_EMULATOR_HOST"]
    url = host if "://" in host else f"http://{host}"
    nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
    account = json.dumps({**nobody, "gcs_base_url": url, "disable_oauth": True})
    return {"config": {"base_url": url, "service_account_key": account}}


def _credentials_of_boto3() -> dict[str, Any]:
    """Profiles and single sign-on, which only boto3 reads, where the environment has no key."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or find_spec("boto3") is None:
        return {}
    configured = os.path.expanduser("~/.aws")  # noqa: PTH111  as boto3 spells it
    if not (os.environ.get("AWS_PROFILE") or os.path.isdir(configured)):  # noqa: PTH112
        return {}
    from boto3 import Session  # noqa: PLC0415  slow import
    from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415  slow import

    session = Session()
    if session.get_credentials() is None:
        return {}
    region = {"region": session.region_name} if session.region_name else {}
    return {"credential_provider": Boto3CredentialProvider(session), **region}
