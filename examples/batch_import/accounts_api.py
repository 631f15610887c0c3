"""Clients of the three remote systems: one way to ask, each system's own way to be safe to repeat."""

import json
import uuid
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote
from weakref import WeakValueDictionary

import anyio
import httpx
import msgspec

_SHIPPING_IDS: Final = uuid.UUID("5d8b8d5e-9d0c-5a58-8a44-0f2b7f3a8f21")
T = TypeVar("T")
_TRANSIENT: Final = frozenset({408, 425, 429})


class PermanentRefusal(Exception):
    """The remote system says no and will say no again; `reason` is its answer."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unavailable(Exception):
    """No usable answer: try again later. Whether the request was carried out is unknown."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AccountsApi(Protocol):
    """One remote system. Every call may be repeated and raises only PermanentRefusal or Unavailable."""

    async def create(self, user_ref: str, plan: str | None, command_id: str) -> str:
        """Open the user's account and return its remote id; the same again returns the same id.

        `command_id` is equal in every attempt of one command and in no other command.
        """
        ...

    async def delete(self, user_ref: str, remote_id: str | None) -> None:
        """Close the account; one that is gone is closed.

        Without a `remote_id`, because the answer to the create was lost, closes whatever the
        user has there.
        """
        ...

    async def find(self, user_ref: str) -> str | None:
        """Return the id of the user's live account, the oldest if there are several."""
        ...


class _Found(msgspec.Struct, frozen=True):
    id: str


class _OverHttp:
    """What the three have in common; `client` stays the caller's to close."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url.rstrip("/")

    async def delete(self, user_ref: str, remote_id: str | None) -> None:
        ids = [remote_id] if remote_id is not None else await self._all_of(user_ref)
        for account_id in ids:
            await self._request("DELETE", self._account(account_id), gone_is_fine=True)

    async def find(self, user_ref: str) -> str | None:
        ids = await self._all_of(user_ref)
        return ids[0] if ids else None

    async def _all_of(self, user_ref: str) -> list[str]:
        answer = await self._request("GET", "/accounts", params={"external_ref": user_ref})
        return [found.id for found in _decoded(answer, list[_Found])]

    async def _create(
        self, method: str, path: str, user_ref: str, plan: str | None, **options: Any
    ) -> str:
        body = {"external_ref": user_ref, "plan": plan}
        return _decoded(await self._request(method, path, json=body, **options), _Found).id

    async def _request(
        self, method: str, path: str, *, gone_is_fine: bool = False, **options: Any
    ) -> httpx.Response:
        try:
            answer = await self._client.request(method, self._url + path, **options)
        except httpx.TransportError as error:  # timeouts too
            raise Unavailable(f"{method} {self._url}{path}: {error!r}") from error
        status = answer.status_code
        if answer.is_success or (gone_is_fine and status == 404):
            return answer
        reason = f"{method} {self._url}{path} answered {status}: {_error(answer)}"
        if answer.is_client_error and status not in _TRANSIENT:
            raise PermanentRefusal(reason)
        raise Unavailable(reason)

    @staticmethod
    def _account(account_id: str) -> str:
        return f"/accounts/{quote(account_id, safe='')}"


class BillingApi(_OverHttp):
    """Billing takes an idempotency key: the command's id."""

    async def create(self, user_ref: str, plan: str | None, command_id: str) -> str:
        headers = {"Idempotency-Key": command_id}
        return await self._create("POST", "/accounts", user_ref, plan, headers=headers)


class ShippingApi(_OverHttp):
    """Shipping lets the client choose the id: one derived from the user, so any repetition meets it."""

    async def create(self, user_ref: str, plan: str | None, command_id: str) -> str:
        del command_id  # the id says it all
        path = self._account(self.account_id(user_ref))
        return await self._create("PUT", path, user_ref, plan)

    @staticmethod
    def account_id(user_ref: str) -> str:
        """Return the id of the user's account, whether it exists or not."""
        return str(uuid.uuid5(_SHIPPING_IDS, user_ref))


class LoyaltyApi(_OverHttp):
    """Loyalty only creates and searches: look before you create, one at a time per user.

    The lock holds within this object. Callers in several processes must exclude each other, for
    example by a row lock on the local account.
    """

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        super().__init__(client, url)
        self._locks: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def create(self, user_ref: str, plan: str | None, command_id: str) -> str:
        del command_id  # there is nowhere to put it
        lock = self._locks.setdefault(user_ref, anyio.Lock())
        async with lock:
            present = await self.find(user_ref)
            if present is not None:
                return present
            return await self._create("POST", "/accounts", user_ref, plan)


def accounts_api(system: str, client: httpx.AsyncClient, url: str) -> AccountsApi:
    """Return the client of `system` at `url`; raises KeyError for a system it does not know."""
    apis: dict[str, type[BillingApi | ShippingApi | LoyaltyApi]] = {
        "billing": BillingApi,
        "shipping": ShippingApi,
        "loyalty": LoyaltyApi,
    }
    return apis[system](client, url)


def _decoded(answer: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except msgspec.DecodeError as error:
        raise Unavailable(f"{answer.request.url} answered nonsense: {error}") from error


def _error(answer: httpx.Response) -> str:
    try:
        return str(json.loads(answer.content)["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
