"""Write batch files of any size, the same bytes for the same plan, with chosen faults in them.

`python -m examples.batch_import.generate big.xml --size L --seed 7 --fault bad-email=3`
"""

import random
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

import click
import msgspec

from examples.batch_import.batch_file.records import NAMESPACE, VERSION, Fault, Kind, Source

SIZES: Final = {
    "S": (10, 20),
    "M": (1_000, 5_000),
    "L": (100_000, 500_000),
    "XL": (200_000, 1_000_000),
}
"""Users and orders of the named sizes."""

FILE_FAULTS: Final = frozenset(
    {
        "truncated",
        "not-well-formed",
        "wrong-root",
        "wrong-namespace",
        "wrong-version",
        "bad-batch-id",
        "doctype",
        "bad-encoding",
        "nul",
        "orders-first",
        "too-deep",
        "text-too-long",
    }
)
"""Faults for which the whole file is refused."""

LATER_FAULTS: Final = {"unknown-user": "order", "shared-address": "user"}
"""Faults that only the importer's database can tell, and the kind of record they strike."""

_NAMES: Final = ("Ada", "Björn", "Chloé", "Dmitri", "Eun-ji", "Fatima", "Grace", "Ned & Co")
_LANGUAGES: Final = ("en", "de", "fr", "pt-BR")
_SYSTEMS: Final = ("billing", "shipping", "loyalty")
_PLANS: Final = ("basic", "plus")
_CURRENCIES: Final = ("EUR", "USD", "CHF")
_STATUSES: Final = {"crm": ("new", "new", "paid"), "logistics": ("paid", "shipped")}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the file shall contain.

    `naming_share` of the orders name one to three systems, `cancelled_share` are cancelled. Refs
    count from `first_user` and `first_order`; with no users of its own, a file's orders belong to
    users 1 to `known_users` of earlier files. Records carry an `updated` within the day before
    `created`. `faults` says how often each fault is put in; the first user and the first order
    are always sound, and orders avoid the users that a fault struck.
    """

    users: int
    orders: int
    seed: int = 1
    batch_id: str = "batch-1"
    source: Source = "crm"
    created: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    naming_share: float = 0.5
    cancelled_share: float = 0.0
    first_user: int = 1
    first_order: int = 1
    known_users: int = 0
    faults: Mapping[str, int] = {}


class Struck(msgspec.Struct, frozen=True):
    """One record that got a fault; `ref` is empty where the fault is that it has none."""

    line: int
    kind: str
    ref: str
    fault: str


class Generated(msgspec.Struct, frozen=True):
    """What was written: all records, those the reader must refuse, those judged later."""

    path: str
    users: int
    orders: int
    refused: tuple[Struck, ...]
    later: tuple[Struck, ...]
    file_fault: str | None


class _Draft:
    """One record before it is written; faults change it."""

    def __init__(self, kind: Kind, ref: str, updated: str) -> None:
        self.kind: Kind = kind
        self.attributes: dict[str, str] = {"ref": ref, "updated": updated}
        self.leaves: dict[str, str] = {}
        self.lines: list[dict[str, str]] = []
        self.systems: list[dict[str, str]] = []
        self.twice = ""

    def xml(self) -> str:
        leaves = "".join(f"<{name}>{escape(text)}</{name}>" for name, text in self.leaves.items())
        if self.twice:
            leaves += f"<{self.twice}>again</{self.twice}>"
        if self.kind == "order":
            lines = "".join(f"<line{_attributes(line)}/>" for line in self.lines)
            leaves += f"<lines>{lines}</lines>"
        if self.systems:
            systems = "".join(f"<system{_attributes(system)}/>" for system in self.systems)
            leaves += f"<accounts>{systems}</accounts>"
        return f"<{self.kind}{_attributes(self.attributes)}>{leaves}</{self.kind}>\n"


def _kind_of(fault: str) -> str | None:
    return RECORD_FAULTS[fault][0] if fault in RECORD_FAULTS else LATER_FAULTS.get(fault)


def _attributes(values: Mapping[str, str]) -> str:
    return "".join(
        f' {name}="{escape(value, {chr(34): "&quot;"})}"' for name, value in values.items()
    )


# How each record fault is made. A name ending in a kind tells apart what both kinds can have.
_Strike = Callable[[_Draft], object]
RECORD_FAULTS: Final[Mapping[str, tuple[Kind, Fault, _Strike]]] = {
    "bad-ref": ("user", "bad-ref", lambda d: d.attributes.pop("ref")),
    "bad-updated": ("user", "bad-updated", lambda d: d.attributes.update(updated="yesterday")),
    "bad-email": ("user", "bad-email", lambda d: d.leaves.update(email="nobody at example.test")),
    "bad-name": ("user", "bad-name", lambda d: d.leaves.update(name="n" * 201)),
    "bad-phone": ("user", "bad-phone", lambda d: d.leaves.update(phone="5" * 33)),
    "bad-language": ("user", "bad-language", lambda d: d.leaves.update(language="x")),
    "missing-element": ("user", "missing-element", lambda d: d.leaves.pop("email")),
    "repeated-element": ("user", "repeated-element", lambda d: setattr(d, "twice", "email")),
    "duplicate-user": ("user", "duplicate-ref", lambda _: None),  # the ref is set by the writer
    "duplicate-order": ("order", "duplicate-ref", lambda _: None),
    "bad-user": ("order", "bad-user", lambda d: d.attributes.update(user="")),
    "bad-status": ("order", "bad-status", lambda d: d.leaves.update(status="lost")),
    "bad-currency": ("order", "bad-currency", lambda d: d.leaves.update(currency="EURO")),
    "bad-total": ("order", "bad-total", lambda d: d.leaves.update(total="1.234")),
    "total-mismatch": (
        "order",
        "total-mismatch",
        lambda d: d.leaves.update(total=f"9{d.leaves['total']}"),
    ),
    "bad-line": ("order", "bad-line", lambda d: d.lines[0].update(sku="")),
    "bad-qty": ("order", "bad-qty", lambda d: d.lines[0].update(qty="0")),
    "bad-price": ("order", "bad-price", lambda d: d.lines[0].update(price="-1.00")),
    "line-count": ("order", "line-count", lambda d: d.lines.extend([d.lines[0]] * 500)),
    "unknown-system": ("order", "unknown-system", lambda d: d.systems.append({"code": "fax"})),
    "bad-system": ("order", "bad-system", lambda d: d.systems.append({"plan": "basic"})),
    "bad-plan": (
        "order",
        "bad-plan",
        lambda d: setattr(d, "systems", [{"code": "billing", "plan": "p" * 41}]),
    ),
    "repeated-system": (
        "order",
        "repeated-system",
        lambda d: setattr(d, "systems", [{"code": "billing"}, {"code": "billing"}]),
    ),
    "system-count": (
        "order",
        "system-count",
        lambda d: setattr(d, "systems", [{"code": f"system{n}"} for n in range(9)]),
    ),
}
"""Every fault of one record that the file alone shows: its kind, the reader's word for it, its making."""


def generate(path: str | Path, plan: Plan) -> Generated:
    """Write the file that `plan` describes and say what is in it; flat memory, same plan same bytes.

    Raises ValueError for a fault name it does not know, or more faults than there are records.
    """
    writing = _Writing(plan)
    path = Path(path)
    with path.open("wb") as file:
        for text in writing.texts():
            file.write(text)
        if writing.file_fault == "truncated":
            # Somewhere inside the document: its last byte that matters is the final ">".
            file.truncate(writing.chance.randrange(1, file.tell() - 1))
    return Generated(
        path=str(path),
        users=plan.users,
        orders=plan.orders,
        refused=tuple(writing.refused),
        later=tuple(writing.later),
        file_fault=writing.file_fault,
    )


class _Writing:
    """The state of writing one file."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        # Two sources of chance, so that faults change nothing but the records they strike.
        self.content = random.Random(plan.seed)
        self.chance = random.Random(f"faults of {plan.seed}")
        self.refused: list[Struck] = []
        self.later: list[Struck] = []
        self.line = 0
        self.file_fault = self._choose_file_fault()
        self.struck: dict[Kind, dict[int, str]] = {
            "user": self._choose_records("user", plan.users),
            "order": self._choose_records("order", plan.orders),
        }

    def _choose_file_fault(self) -> str | None:
        known = FILE_FAULTS | LATER_FAULTS.keys() | RECORD_FAULTS.keys()
        if unknown := self.plan.faults.keys() - known:
            raise ValueError(
                f"no fault is called {sorted(unknown)}; expected some of {sorted(known)}"
            )
        chosen = sorted(FILE_FAULTS & self.plan.faults.keys())
        if len(chosen) > 1:
            raise ValueError(f"file faults {chosen} in one file; expected at most one")
        return chosen[0] if chosen else None

    def _choose_records(self, kind: Kind, count: int) -> dict[int, str]:
        wanted = [
            fault
            for fault, times in sorted(self.plan.faults.items())
            if _kind_of(fault) == kind
            for _ in range(times)
        ]
        if wanted and len(wanted) >= count:
            raise ValueError(
                f"{len(wanted)} faults for {count} {kind}s; expected fewer than {kind}s"
            )
        return dict(zip(self.chance.sample(range(1, count), len(wanted)), wanted, strict=True))

    def texts(self) -> Iterator[bytes]:
        fault = self.file_fault
        yield self._written(self._opening())
        sections = (
            self._section("user", self.plan.users),
            self._section("order", self.plan.orders),
        )
        for section in reversed(sections) if fault == "orders-first" else sections:
            yield from section
        if fault == "too-deep":
            yield self._written("<a>" * 8 + "</a>" * 8 + "\n")
        elif fault == "text-too-long":
            yield self._written(f"<note>{'n' * 4097}</note>\n")
        elif fault == "not-well-formed":
            yield self._written("<note>R&D</note>\n")
        elif fault == "nul":
            yield b"<note>\0</note>\n"
        elif fault == "bad-encoding":
            yield "<note>Zürich</note>\n".encode("latin-1")
        yield self._written("</order>" if fault == "wrong-root" else "</batch>")
        yield b"\n"

    def _opening(self) -> str:
        fault, plan = self.file_fault, self.plan
        doctype = '<!DOCTYPE batch [<!ENTITY a "aaaa">]>\n' if fault == "doctype" else ""
        root = "order" if fault == "wrong-root" else "batch"
        namespace = "urn:batch-import:2" if fault == "wrong-namespace" else NAMESPACE
        attributes = {
            "xmlns": namespace,
            "id": "no such id" if fault == "bad-batch-id" else plan.batch_id,
            "source": plan.source,
            "created": _instant(plan.created),
            "version": "2" if fault == "wrong-version" else VERSION,
        }
        return (
            f'<?xml version="1.0" encoding="UTF-8"?>\n{doctype}<{root}{_attributes(attributes)}>\n'
        )

    def _section(self, kind: Kind, count: int) -> Iterator[bytes]:
        draft_of = self._user if kind == "user" else self._order
        yield self._written(f"<{kind}s>\n")
        for index in range(count):
            draft = draft_of(index)
            fault = self.struck[kind].get(index)
            if fault is not None:
                self._strike(draft, fault)
            yield self._written(draft.xml())
        yield self._written(f"</{kind}s>\n")

    def _strike(self, draft: _Draft, fault: str) -> None:
        if fault == "unknown-user":
            draft.attributes["user"] = f"nobody-{draft.attributes['ref']}"
        elif fault == "shared-address":
            draft.leaves["email"] = f"{self._ref('user', 0)}@example.test"
        elif fault.startswith("duplicate-"):
            draft.attributes["ref"] = self._ref(draft.kind, 0)
        ref = draft.attributes["ref"]
        if fault in RECORD_FAULTS:
            _, word, make = RECORD_FAULTS[fault]
            make(draft)
            ref = draft.attributes.get("ref", "")
            self.refused.append(Struck(self.line + 1, draft.kind, ref, word))
        else:
            self.later.append(Struck(self.line + 1, draft.kind, ref, fault))

    def _user(self, index: int) -> _Draft:
        draw = self.content
        ref = self._ref("user", index)
        draft = _Draft("user", ref, self._updated())
        draft.leaves = {"email": f"{ref}@example.test", "name": f"{draw.choice(_NAMES)} {ref}"}
        if draw.random() < 0.5:
            draft.leaves["phone"] = f"+1 555 {draw.randrange(10**7):07d}"
        if draw.random() < 0.5:
            draft.leaves["language"] = draw.choice(_LANGUAGES)
        return draft

    def _order(self, index: int) -> _Draft:
        plan, draw = self.plan, self.content
        user = self._user_of_order()
        draft = _Draft("order", self._ref("order", index), self._updated())
        draft.attributes["user"] = f"u-{user:07d}"
        cents = 0
        for _ in range(draw.choice((1, 1, 2, 2, 3, 5))):
            qty, price = draw.randrange(1, 10), draw.randrange(1, 50_000)
            cents += qty * price
            sku = f"sku-{draw.randrange(5000)}"
            draft.lines.append({"sku": sku, "qty": str(qty), "price": _money(price)})
        cancelled = draw.random() < plan.cancelled_share
        draft.leaves = {
            "status": "cancelled" if cancelled else draw.choice(_STATUSES[plan.source]),
            "currency": draw.choice(_CURRENCIES),
            "total": _money(cents),
        }
        if draw.random() < plan.naming_share:
            # The plan depends on the user alone: all orders share one account per system.
            draft.systems = [
                {"code": code, "plan": _PLANS[user % 2]}
                for code in draw.sample(_SYSTEMS, draw.randrange(1, 4))
            ]
        return draft

    def _user_of_order(self) -> int:
        plan = self.plan
        if not plan.users:
            return self.content.randrange(plan.known_users) + 1 if plan.known_users else 1
        index = self.content.randrange(plan.users)
        while index in self.struck["user"]:
            index = (index + 1) % plan.users
        return plan.first_user + index

    def _ref(self, kind: Kind, index: int) -> str:
        if kind == "user":
            return f"u-{self.plan.first_user + index:07d}"
        return f"o-{self.plan.first_order + index:08d}"

    def _updated(self) -> str:
        return _instant(self.plan.created - timedelta(seconds=self.content.randrange(86_400)))

    def _written(self, text: str) -> bytes:
        self.line += text.count("\n")
        return text.encode()


def _instant(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--size", type=click.Choice(list(SIZES)), default="S", show_default=True)
@click.option("--users", type=click.IntRange(min=0), help="Instead of the size's number of users.")
@click.option("--orders", type=click.IntRange(min=0), help="Instead of the size's orders.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--batch-id", default="batch-1", show_default=True)
@click.option("--source", type=click.Choice(["crm", "logistics"]), default="crm", show_default=True)
@click.option("--naming-share", type=click.FloatRange(0, 1), default=0.5, show_default=True)
@click.option("--cancelled-share", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--fault", "faults", multiple=True, metavar="NAME[=COUNT]", help="May be repeated.")
def main(
    path: Path,
    size: str,
    users: int | None,
    orders: int | None,
    seed: int,
    batch_id: str,
    source: Source,
    naming_share: float,
    cancelled_share: float,
    faults: tuple[str, ...],
) -> None:
    """Write a batch file to PATH and print what is in it as JSON."""
    counted: dict[str, int] = {}
    for fault in faults:
        name, _, count = fault.partition("=")
        counted[name] = int(count or 1)
    plan = Plan(
        users=SIZES[size][0] if users is None else users,
        orders=SIZES[size][1] if orders is None else orders,
        seed=seed,
        batch_id=batch_id,
        source=source,
        naming_share=naming_share,
        cancelled_share=cancelled_share,
        faults=counted,
    )
    try:
        generated = generate(path, plan)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(msgspec.json.encode(generated))


if __name__ == "__main__":
    main()
