"""A thin HTTP client of a running service, for the command line."""

from __future__ import annotations

from typing import Any

import httpx

from service.errors import DetotError, Unavailable


class Client:
    """Calls a service at `url` with an optional bearer key.

    All calls raise Unavailable when nothing answers there, and DetotError with the service's own words and status
    when it refuses.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 30.0) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = url
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        """The decoded JSON answer; an empty one gives {}."""
        response = self._send(method, path, **kwargs)
        return response.json() if response.content else {}

    def data(self, path: str) -> bytes:
        """The raw answer of a GET."""
        return self._send("GET", path).content

    def _send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **kwargs)
        except httpx.HTTPError as e:
            raise Unavailable(f"no service answers at {self._url} ({e}); start one with `detot serve`") from None
        if response.is_success:
            return response
        try:
            body = response.json()
            message = body.get("detail") or body["error"]["message"]
        except (ValueError, KeyError, TypeError, AttributeError):
            message = response.text[:200]
        error = DetotError(message)
        error.status = response.status_code
        raise error
