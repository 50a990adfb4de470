"""A grid whose best candidate lies at an edge is widened beyond that edge."""

from collections.abc import Callable, Sequence

from .grid import Flags


def edges(tried: Sequence[Flags], scores: Sequence[float]) -> list[str]:
    """The names whose best value is the smallest or the largest of those tried."""
    best = tried[best_of(scores)]
    at_edge = []
    for name, value in best.items():
        values = {candidate[name] for candidate in tried}
        if len(values) > 1 and value in (min(values), max(values)):
            at_edge.append(name)
    return at_edge


def next_candidate(
    tried: Sequence[Flags],
    scores: Sequence[float],
    allowed: Callable[[Flags], bool] = lambda candidate: True,
) -> Flags | None:
    """The best candidate with one value moved beyond an edge of the grid; None if there is none.

    The step is that between the last two values, as a ratio. Values of 0 or less have no ratio and
    are not moved. The first such name in the file's order is taken of which the result is allowed.
    """
    best = tried[best_of(scores)]
    for name in edges(tried, scores):
        values = sorted({candidate[name] for candidate in tried})
        edge, inner = (values[0], values[1]) if best[name] == values[0] else values[:-3:-1]
        if edge <= 0 or inner <= 0:
            continue
        moved = edge * edge / inner
        whole = all(isinstance(v, int) for v in values)
        candidate = {**best, name: max(1, round(moved)) if whole else float(f"{moved:.6g}")}
        if candidate not in tried and allowed(candidate):
            return candidate
    return None


def best_of(scores: Sequence[float]) -> int:
    """The place of the highest score, the first of equal ones."""
    return max(range(len(scores)), key=lambda i: (scores[i], -i))
