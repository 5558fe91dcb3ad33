"""What a party of an intersection must have sent and got: it follows from the steps' set sizes and from the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from psi.align import Step
from psi.exchange import TO_HUB, Way, What, judge_of
from psi.group import POINT_BYTES, token_width
from psi.inputs import CANARIES
from psi.messages import PART, part_count
from psi.reveal import POSITIONS

SENT: dict[What, tuple[str, int]] = {  # the kind of message that carries a list, and how many of its items at the most
    "points": ("MaskedPoints", PART),
    "tokens": ("Tokens", PART),
    "positions": ("Positions", POSITIONS),
}


def due_flows(party: str, steps: list[Step], result: str) -> Iterator[tuple[int, Way, str, What, str, int]]:
    """Step, direction, peer, content, owner and length of every list that `party` must have sent or got."""
    names = list(steps[0].set_sizes)
    k, place = len(names), names.index(party)
    hub, at = names[0], [names[(place + offset) % k] for offset in range(k + 1)]
    following, previous = at[1], at[-2]
    lists: list[tuple[Way, str, What, str]] = []
    for hop in range(1, k):
        lists += [("sent", following, "points", at[(1 - hop) % k]), ("received", previous, "points", at[-hop % k])]
    judge = judge_of(result, k)
    if place != judge:
        lists.append(("sent", names[judge], "tokens", following))
    else:
        lists += [("received", at[holder], "tokens", at[holder + 1]) for holder in range(1, k)]
    if result == "rows" and place:
        lists.append(("received", hub, "positions", following))
    elif result == "rows":
        lists += [("sent", at[holder], "positions", at[holder + 1]) for holder in range(1, k)]
    if result == "rows":
        for step in range(1, k):
            lists += [("sent", previous, "positions", at[step]), ("received", following, "positions", at[step + 1])]
    elif result == TO_HUB:
        lists += [("sent", previous, "positions", hub)] if place else []
        lists += [("received", following, "positions", hub)] if place != judge else []
    for number, one in enumerate(steps):
        for way, peer, what, owner in lists:
            count = one.size + CANARIES if what == "positions" else one.set_sizes[owner]
            yield number, way, peer, what, owner, count


def due_messages(party: str, steps: list[Step], result: str) -> Counter[tuple[str, str]]:
    """How many messages of a kind `party` must have sent to a peer, by (peer, kind)."""
    names, count = list(steps[0].set_sizes), len(steps)
    often = {"Hello": 1, "InputCommitment": 1, "SeedReveal": 1, "SetSize": count, "Seen": count, "Gate": 2 * count}
    if result == "rows":
        often |= {"Gate": 3 * count, "OrderPoint": count, "OrderTag": count}
    if party == names[judge_of(result, len(names))]:
        often["IntersectionSize"] = count
    due = Counter({(peer, kind): number for peer in names if peer != party for kind, number in often.items()})
    for _, way, peer, what, _, length in due_flows(party, steps, result):
        if way == "sent":
            kind, most = SENT[what]
            due[peer, kind] += part_count(length, most)
    return due


def predicted_arrays(party: str, steps: list[Step], result: str) -> dict[tuple[str, str], int]:
    """Bytes of points, tokens and positions that `party` sends, by (peer, kind)."""
    out = Counter[tuple[str, str]]()
    for number, way, peer, what, _, length in due_flows(party, steps, result):
        if way == "sent":
            token = token_width(sum(steps[number].set_sizes.values()))
            out[peer, SENT[what][0]] += length * {"points": POINT_BYTES, "tokens": token, "positions": 4}[what]
    return dict(out)
