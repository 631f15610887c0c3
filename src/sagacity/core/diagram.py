"""The transition table as a picture: Mermaid text, which many tools render.

The same class gives the same text each time, so that it can be kept beside the code and compared.
"""

from __future__ import annotations

from collections.abc import Mapping

from sagacity.core.definition import Definition, Handler


def mermaid(definition: Definition, counts: Mapping[str, int] | None = None) -> str:
    """A saga as a Mermaid ``stateDiagram-v2``, with a line feed at the end.

    Edges carry the last part of the message's name; ``failed:``, ``done:`` and ``timeout:`` stand
    before other triggers. A dashed note names the states from which the saga may compensate on its
    own account; it may also be cancelled anywhere. `counts` maps states to numbers to show in them,
    such as how many instances are there now; a state it does not name shows none.
    """
    lines = ["stateDiagram-v2", "    direction LR"]
    for name in definition.states:
        shown = name if counts is None or name not in counts else f"{name} ({counts[name]})"
        lines.append(f'    state "{_text(shown)}" as {_id(name)}')
    edges: dict[tuple[str, str], list[str]] = {}
    for handler in definition.handlers:
        label = _label(handler)
        if handler.starts:
            for target in handler.goto:
                edges.setdefault(("[*]", _id(target)), []).append(label)
        for state in handler.when:
            for target in handler.targets(state):
                edges.setdefault((_id(state), _id(target)), []).append(label)
    places = ["[*]", *(_id(name) for name in definition.states)]
    for (source, target), labels in sorted(
        edges.items(), key=lambda edge: tuple(places.index(end) for end in edge[0])
    ):
        lines.append(f"    {source} --> {target} : {', '.join(dict.fromkeys(labels))}")
    lines += [f"    {_id(name)} --> [*]" for name in definition.states if name in definition.final]
    for name in definition.states:
        causes = [
            _label(handler)
            for handler in definition.handlers
            if handler.compensates and name in handler.when
        ]
        if causes:
            lines += [
                f"    note right of {_id(name)}",
                f"        may compensate on {', '.join(dict.fromkeys(causes))}",
                "    end note",
            ]
    return "\n".join([*lines, ""])


_PREFIX = {"event": "", "failure": "failed: ", "done": "done: ", "timeout": "timeout: "}


def _label(handler: Handler) -> str:
    trigger = handler.trigger
    if handler.kind != "timeout":
        trigger = trigger.rpartition(".")[2]
    return _PREFIX[handler.kind] + _text(trigger)


def _id(state: str) -> str:
    """Mermaid has words of its own, such as ``end`` and ``state``."""
    return f"s_{state}"


def _text(text: str) -> str:
    """Text without what Mermaid takes for its own signs."""
    return "".join(c if c.isalnum() or c in " _-.()" else f"#{ord(c)};" for c in text)
