"""The generator of batch files, judged by the reader."""

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.batch_import.batch_file import (
    SYSTEMS,
    BatchHead,
    BatchItem,
    BatchTail,
    FileRefused,
    OrderRecord,
    RefusedRecord,
    UserRecord,
    digest,
    read_batch,
)
from examples.batch_import.generate import (
    FILE_FAULTS,
    LATER_FAULTS,
    RECORD_FAULTS,
    SIZES,
    Generated,
    Plan,
    generate,
    main,
)

SMALL = Plan(users=10, orders=20)


def written(path: Path, plan: Plan) -> tuple[Generated, list[BatchItem]]:
    return generate(path, plan), list(read_batch(path))


def orders_of(items: list[BatchItem]) -> list[OrderRecord]:
    return [item for item in items if isinstance(item, OrderRecord)]


def users_of(items: list[BatchItem]) -> list[UserRecord]:
    return [item for item in items if isinstance(item, UserRecord)]


def test_the_file_holds_what_was_asked_for(tmp_path: Path) -> None:
    created = datetime(2026, 5, 1, 8, tzinfo=UTC)
    plan = Plan(
        users=30, orders=70, batch_id="b.7", source="logistics", created=created, first_user=5
    )
    generated, items = written(tmp_path / "b.xml", plan)
    assert generated == Generated(str(tmp_path / "b.xml"), 30, 70, (), (), None)
    assert items[0] == BatchHead("b.7", "logistics", created)
    assert items[-1] == BatchTail(users=30, orders=70, refused=0, unknown={})
    users = users_of(items)
    assert {user.ref for user in users} == {f"u-{n:07d}" for n in range(5, 35)}
    assert {order.user_ref for order in orders_of(items)} <= {user.ref for user in users}
    assert all(created - timedelta(days=1) < user.updated <= created for user in users)
    assert len({user.email for user in users}) == 30


def test_the_same_plan_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        generate(path, msgspec.structs.replace(SMALL, seed=seed))
    first, second, third = map(digest, paths)
    assert first == second != third


@pytest.mark.parametrize(
    ("share", "least", "most"), [(0.0, 0, 0), (0.3, 240, 360), (1.0, 1e3, 1e3)]
)
def test_the_share_of_orders_that_name_systems(
    tmp_path: Path, share: float, least: float, most: float
) -> None:
    _, items = written(tmp_path / "b.xml", Plan(users=5, orders=1000, naming_share=share))
    naming = [order for order in orders_of(items) if order.systems]
    assert least <= len(naming) <= most
    if naming:
        assert {need.code for order in naming for need in order.systems} == SYSTEMS
        assert {len(order.systems) for order in naming} == {1, 2, 3}


def test_a_user_has_one_plan_per_system(tmp_path: Path) -> None:
    _, items = written(tmp_path / "b.xml", Plan(users=5, orders=500, naming_share=1))
    plans = {
        (order.user_ref, need.code, need.plan)
        for order in orders_of(items)
        for need in order.systems
    }
    assert len(plans) == len({plan[:2] for plan in plans})


def test_cancelled_orders_come_on_request(tmp_path: Path) -> None:
    _, none = written(tmp_path / "a.xml", Plan(users=5, orders=200))
    _, some = written(tmp_path / "b.xml", Plan(users=5, orders=200, cancelled_share=0.5))
    assert not [order for order in orders_of(none) if order.status == "cancelled"]
    assert 60 < len([order for order in orders_of(some) if order.status == "cancelled"]) < 140


def test_a_file_of_orders_alone_names_users_of_earlier_files(tmp_path: Path) -> None:
    _, items = written(tmp_path / "b.xml", Plan(users=0, orders=50, known_users=3))
    assert {order.user_ref for order in orders_of(items)} == {f"u-{n:07d}" for n in (1, 2, 3)}


def test_every_record_fault_is_refused_where_the_generator_put_it(tmp_path: Path) -> None:
    plan = Plan(users=60, orders=90, faults=dict.fromkeys(RECORD_FAULTS, 2))
    generated, items = written(tmp_path / "b.xml", plan)
    refused = [item for item in items if isinstance(item, RefusedRecord)]
    assert [(r.line, r.kind, r.ref, r.fault) for r in refused] == [
        (s.line, s.kind, s.ref, s.fault) for s in generated.refused
    ]
    assert Counter(r.fault for r in refused) == Counter(
        word for _, word, _ in RECORD_FAULTS.values() for _ in range(2)
    )
    tail = items[-1]
    assert isinstance(tail, BatchTail)
    assert tail.users + tail.orders + tail.refused == 150
    accepted = {user.ref for user in users_of(items)}
    assert {order.user_ref for order in orders_of(items)} <= accepted


def test_faults_change_only_the_records_they_strike(tmp_path: Path) -> None:
    _, sound = written(tmp_path / "a.xml", SMALL)
    faulty = msgspec.structs.replace(SMALL, faults={"bad-total": 3})
    generated, items = written(tmp_path / "b.xml", faulty)
    struck = {fault.ref for fault in generated.refused}
    assert len(struck) == 3
    kept = [
        item for item in sound if not isinstance(item, BatchTail) and ref_of(item) not in struck
    ]
    assert kept == [item for item in items if not isinstance(item, BatchTail | RefusedRecord)]


def ref_of(item: BatchItem) -> str:
    return item.ref if isinstance(item, UserRecord | OrderRecord) else ""


def test_faults_for_the_database_pass_the_reader(tmp_path: Path) -> None:
    plan = msgspec.structs.replace(SMALL, faults=dict.fromkeys(LATER_FAULTS, 2))
    generated, items = written(tmp_path / "b.xml", plan)
    assert items[-1] == BatchTail(users=10, orders=20, refused=0, unknown={})
    later = {fault.ref: fault.fault for fault in generated.later}
    assert Counter(later.values()) == {"unknown-user": 2, "shared-address": 2}
    users, orders = users_of(items), orders_of(items)
    known = {user.ref for user in users}
    assert {o.ref for o in orders if o.user_ref not in known} == {
        ref for ref, fault in later.items() if fault == "unknown-user"
    }
    assert {user.ref for user in users[1:] if user.email == users[0].email} == {
        ref for ref, fault in later.items() if fault == "shared-address"
    }


@pytest.mark.parametrize("fault", sorted(FILE_FAULTS))
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_file_fault_refuses_the_file(tmp_path: Path, fault: str, seed: int) -> None:
    plan = msgspec.structs.replace(SMALL, seed=seed, faults={fault: 1})
    generated = generate(tmp_path / "b.xml", plan)
    assert generated.file_fault == fault
    with pytest.raises(FileRefused):
        list(read_batch(tmp_path / "b.xml"))


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Plan,
        users=st.integers(1, 20),
        orders=st.integers(0, 30),
        seed=st.integers(),
        source=st.sampled_from(["crm", "logistics"]),
        naming_share=st.floats(0, 1),
        cancelled_share=st.floats(0, 1),
    )
)
def test_every_plan_gives_an_acceptable_file(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    _, items = written(tmp_path_factory.mktemp("plan") / "b.xml", plan)
    assert items[-1] == BatchTail(users=plan.users, orders=plan.orders, refused=0, unknown={})


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"bad-luck": 1}, r"no fault is called \['bad-luck'\]"),
        ({"nul": 1, "doctype": 1}, r"at most one"),
        ({"bad-email": 10}, r"10 faults for 10 users"),
    ],
)
def test_impossible_wishes_are_refused(tmp_path: Path, faults: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        generate(tmp_path / "b.xml", msgspec.structs.replace(SMALL, faults=faults))


def test_the_command_writes_the_file_and_says_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "b.xml"
    result = CliRunner().invoke(
        main,
        [str(path), "--size", "S", "--orders", "5", "--fault", "bad-email", "--fault", "bad-qty=2"],
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert (told["users"], told["orders"], len(told["refused"])) == (SIZES["S"][0], 5, 3)
    tail = list(read_batch(path))[-1]
    assert isinstance(tail, BatchTail)
    assert tail.refused == 3


def test_the_command_explains_a_wrong_fault_name(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "b.xml"), "--fault", "bad-luck"])
    assert result.exit_code == 2
    assert "no fault is called ['bad-luck']; expected some of" in result.output
