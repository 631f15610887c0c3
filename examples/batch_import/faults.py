"""The runtime fault plan of the simulated remote systems: which request shall go wrong, and how."""

from collections.abc import Mapping

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fault: `action` strikes requests of kind `on` (None: any) whose attributes equal `match`.

    It strikes `times` times (None: until the plan is replaced). `seconds` bounds actions that wait.
    """

    action: str
    on: str | None = None
    match: Mapping[str, str] = {}
    times: int | None = None
    seconds: float = 30.0


class RuleState(msgspec.Struct):
    """A rule in force: how often it struck, and how many requests it makes wait right now."""

    rule: Rule
    used: int = 0
    waiting: int = 0


class FaultPlan:
    """The rules in force; the first one that fits a request and is not used up strikes it.

    `actions` maps each action the server knows to the kinds of request it can strike.
    """

    def __init__(self, actions: Mapping[str, frozenset[str]]) -> None:
        self._actions = actions
        self._states: list[RuleState] = []
        self._replaced = anyio.Event()

    def replace(self, rules: list[Rule]) -> None:
        """Put new rules in force and let go whatever the old ones made wait.

        Raises ValueError for an unknown action or a kind of request it cannot strike.
        """
        for rule in rules:
            if rule.action not in self._actions:
                raise ValueError(
                    f"no action is called {rule.action!r}; expected one of {sorted(self._actions)}"
                )
            kinds = self._actions[rule.action]
            if rule.on is not None and rule.on not in kinds:
                raise ValueError(
                    f"{rule.action!r} cannot strike {rule.on!r}; expected one of {sorted(kinds)}"
                )
        self._states = [RuleState(rule) for rule in rules]
        self._replaced.set()
        self._replaced = anyio.Event()

    def take(self, on: str, attributes: Mapping[str, str | None]) -> RuleState | None:
        """Return the rule that strikes this request, counted as used, or None."""
        for state in self._states:
            rule = state.rule
            if (
                on in self._actions[rule.action]
                and rule.on in {None, on}
                and (rule.times is None or state.used < rule.times)
                and all(attributes.get(name) == value for name, value in rule.match.items())
            ):
                state.used += 1
                return state
        return None

    async def wait(self, state: RuleState) -> None:
        """Wait until the plan is replaced, at most the rule's `seconds`."""
        replaced = self._replaced
        state.waiting += 1
        try:
            with anyio.move_on_after(state.rule.seconds):
                await replaced.wait()
        finally:
            state.waiting -= 1

    def routes(self) -> list[Route]:
        """Return `GET /faults` (rules, used, waiting) and `PUT /faults` (a JSON list of rules)."""
        return [
            Route("/faults", self._show, methods=["GET"]),
            Route("/faults", self._put, methods=["PUT"]),
        ]

    async def _show(self, _request: Request) -> Response:
        return json_response(self._states)

    async def _put(self, request: Request) -> Response:
        try:
            self.replace(msgspec.json.decode(await request.body(), type=list[Rule]))
        except ValueError as error:  # msgspec's errors are ValueErrors
            return json_response({"error": str(error)}, 400)
        return json_response(self._states)


def json_response(value: object, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")
