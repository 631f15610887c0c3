"""From one element of the file to a record or to the first reason why it is refused. Pure."""

import re
from datetime import UTC, datetime
from decimal import Context, Decimal, Inexact, Rounded
from typing import Final, NoReturn

from examples.batch_import.batch_file.records import (
    Fault,
    Line,
    OrderRecord,
    Status,
    SystemNeed,
    UserRecord,
)

MAX_LINES: Final = 500
MAX_SYSTEMS: Final = 8
STATUSES: Final[dict[str, Status]] = {
    "new": "new",
    "paid": "paid",
    "shipped": "shipped",
    "cancelled": "cancelled",
}
SPACE: Final = " \t\r\n"

# xs:dateTime with a zone: stricter than datetime.fromisoformat, which also takes week dates and more.
_DATETIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T([01][0-9]|2[0-3]):[0-9]{2}:[0-9]{2}(\.[0-9]+)?"
    r"(Z|[+-](0[0-9]|1[0-3]):[0-5][0-9]|[+-]14:00)"
)
_CURRENCY = re.compile(r"[A-Za-z]{3}")
_TOTAL = re.compile(r"[0-9]{1,10}(\.[0-9]{1,2})?")
# No price above the largest total can add up. The six places are ours: a column must be able to hold it.
_PRICE = re.compile(r"[0-9]{1,10}(\.[0-9]{1,6})?")
_QTY = re.compile(r"[0-9]{1,6}")
_UNFIT_FOR_ADDRESS = re.compile(r"[\s\x00-\x1f\x7f]")

# Wide enough for 500 lines of 100000 pieces at any price; anything inexact is a bug and raises.
_EXACT = Context(prec=40, traps=[Inexact, Rounded])


class Element:
    """A record, or a known element inside one, as the reader collected it.

    `children` holds at most `cap` elements, `count` says how many there were.
    """

    __slots__ = ("attributes", "children", "count", "name", "text")

    def __init__(self, name: str, attributes: dict[str, str]) -> None:
        self.name = name
        self.attributes = attributes
        self.text = ""
        self.children: list[Element] = []
        self.count = 0


class RecordFault(Exception):
    """The record is to be quarantined for `fault`; `reason` tells a person."""

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason)
        self.fault: Fault = fault
        self.reason = reason


def utc(text: str) -> datetime | None:
    """Return the instant of an xs:dateTime that has a zone, in UTC, or None if it is not one."""
    if _DATETIME.fullmatch(text) is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (
        ValueError,
        OverflowError,
    ):  # 30 February; year 1 or 9999 moved out of range by its zone
        return None


def ref_of(element: Element) -> str:
    """Return the record's ref, or raise `RecordFault`."""
    return _text(element.attributes.get("ref"), "ref", 1, 40, "bad-ref")


def user_from(element: Element, seq: int, line: int, ref: str) -> UserRecord:
    """Judge a `user` element; raise `RecordFault` for the first fault found."""
    updated = _updated(element)
    found = _leaves(element, required=("email", "name"))
    email = found["email"]
    _check_email(email)
    name = _text(found["name"], "name", 0, 200, "bad-name")
    phone, language = found.get("phone"), found.get("language")
    if phone is not None:
        _text(phone, "phone", 0, 32, "bad-phone")
    if language is not None:
        _text(language, "language", 2, 35, "bad-language")
    return UserRecord(seq, line, ref, updated, email, name, phone, language)


def order_from(
    element: Element, seq: int, line: int, ref: str, systems: frozenset[str]
) -> OrderRecord:
    """Judge an `order` element; raise `RecordFault` for the first fault found."""
    updated = _updated(element)
    user_ref = _text(element.attributes.get("user"), "user", 1, 40, "bad-user")
    found = _leaves(element, required=("status", "currency", "total"))
    status = STATUSES.get(found["status"])
    if status is None:
        _refuse(
            "bad-status", f"status is {_short(found['status'])}", "one of " + ", ".join(STATUSES)
        )
    currency = found["currency"]
    if _CURRENCY.fullmatch(currency) is None:
        _refuse("bad-currency", f"currency is {_short(currency)}", "three letters")
    total_text = found["total"]
    if _TOTAL.fullmatch(total_text) is None:
        _refuse("bad-total", f"total is {_short(total_text)}", "a decimal 12,2 of 0 or more")
    total = Decimal(total_text)
    lines = _lines(_container(element, "lines"))
    added = Decimal(0)
    for each in lines:
        added = _EXACT.fma(each.qty, each.price, added)
    if added != total:
        _refuse("total-mismatch", f"the lines add up to {added}", f"the total {total}")
    needs = _systems(_container(element, "accounts"), systems)
    return OrderRecord(seq, line, ref, user_ref, updated, status, currency, total, lines, needs)


def _lines(container: Element | None) -> tuple[Line, ...]:
    count = 0 if container is None else container.count
    if container is None or not 1 <= count <= MAX_LINES:
        _refuse("line-count", f"the order has {count} lines", f"1 to {MAX_LINES}")
    lines: list[Line] = []
    for number, element in enumerate(container.children, start=1):
        get = element.attributes.get
        sku = _text(get("sku"), f"sku of order line {number}", 1, 64, "bad-line")
        qty, price = (get("qty") or "").strip(SPACE), (get("price") or "").strip(SPACE)
        if _QTY.fullmatch(qty) is None or not 1 <= int(qty) <= 100_000:
            _refuse("bad-qty", f"qty of order line {number} is {_short(qty)}", "1 to 100000")
        if _PRICE.fullmatch(price) is None:
            _refuse(
                "bad-price",
                f"price of order line {number} is {_short(price)}",
                "a decimal of 0 or more with at most 10 digits before and 6 after the point",
            )
        lines.append(Line(sku, int(qty), Decimal(price)))
    return tuple(lines)


def _systems(container: Element | None, known: frozenset[str]) -> tuple[SystemNeed, ...]:
    if container is None:
        return ()
    if container.count > MAX_SYSTEMS:
        _refuse("system-count", f"the order names {container.count} systems", f"0 to {MAX_SYSTEMS}")
    needs: dict[str, SystemNeed] = {}
    for element in container.children:
        code = _text(element.attributes.get("code"), "system code", 1, 40, "bad-system")
        if code not in known:
            expected = "one of " + ", ".join(sorted(known))
            _refuse("unknown-system", f"the order names system {_short(code)}", expected)
        if code in needs:
            _refuse("repeated-system", f"system {code!r} is named twice", "distinct codes")
        plan = element.attributes.get("plan")
        if plan is not None:
            plan = _text(plan, f"plan of system {code}", 0, 40, "bad-plan")
        needs[code] = SystemNeed(code, plan)
    return tuple(needs.values())


def _updated(element: Element) -> datetime:
    text = element.attributes.get("updated", "").strip(SPACE)
    instant = utc(text)
    if instant is None:
        _refuse(
            "bad-updated",
            f"updated is {_short(text)}",
            "a dateTime with zone such as 2026-01-31T12:00:00Z",
        )
    return instant


def _leaves(element: Element, *, required: tuple[str, ...]) -> dict[str, str]:
    """Return the stripped texts of the record's children; every child may occur once."""
    found: dict[str, str] = {}
    for child in element.children:
        if child.name in found:
            _refuse("repeated-element", f"{child.name} occurs more than once", "one")
        found[child.name] = child.text.strip(SPACE)
    for name in required:
        if name not in found:
            _refuse("missing-element", f"{name} is missing", "one")
    return found


def _container(element: Element, name: str) -> Element | None:
    for child in element.children:
        if child.name == name:
            return child
    return None


def _check_email(email: str) -> None:
    local, at, domain = email.partition("@")
    if (
        len(email) > 254
        or not (local and at and domain)
        or "@" in domain
        or _UNFIT_FOR_ADDRESS.search(email) is not None
    ):
        _refuse(
            "bad-email",
            f"email is {_short(email)}",
            "at most 254 characters with one @ inside and no white space",
        )


def _text(value: str | None, what: str, least: int, most: int, fault: Fault) -> str:
    if value is None:
        _refuse(fault, f"{what} is missing", f"{least} to {most} characters")
    value = value.strip(SPACE)
    if not least <= len(value) <= most:
        _refuse(fault, f"{what} has {len(value)} characters", f"{least} to {most}")
    return value


def _short(value: str) -> str:
    """Quote a value from the file in a reason without letting it flood a report."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _refuse(fault: Fault, found: str, expected: str) -> NoReturn:
    raise RecordFault(fault, f"{found}; expected {expected}")
