"""The token tree: the input of one step.

Node 0, the root, is the current token. Every other node is a guess for the position after its parent's. A node sees the
committed prefix, its ancestors and itself, so one forward evaluates every path from the root at once. Window nodes
come first and candidate nodes after them; only candidate nodes are walked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Shard:
    """A part of a tree that holds every ancestor of its nodes, and so can be evaluated alone.

    Attributes:
        tree: the part, as a tree.
        nodes: for each of its nodes, the node of the whole tree, in ascending order.
    """

    tree: TokenTree
    nodes: tuple[int, ...]


@dataclass(frozen=True)
class TokenTree:
    """Tokens with their structure.

    Attributes:
        tokens: token id of each node.
        parents: parent of each node; -1 for the root. Parents stand before their children.
        last_row: nodes of the window's last row, left to right; their next tokens are the window's new row.
        first_candidate: nodes from here on are candidates, the ones before are the root and the window.

    Raises:
        ValueError: the sizes differ, a parent does not stand before its child, or window and candidates overlap.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    last_row: tuple[int, ...] = ()
    first_candidate: int = 1

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents) or not self.tokens:
            raise ValueError(f"a tree needs as many parents as tokens, got {len(self.parents)} and {len(self.tokens)}")
        if not 1 <= self.first_candidate <= len(self.tokens) or any(n >= self.first_candidate for n in self.last_row):
            raise ValueError("the window's nodes stand before the first candidate, and both inside the tree")
        if self.parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(self.parents) if i):
            raise ValueError("the root's parent is -1, and every other parent stands before its child")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def depths(self) -> list[int]:
        """Distance of each node from the root: its position id is the root's plus this."""
        depths = [0] * len(self.tokens)
        for node in range(1, len(depths)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    @property
    def mask(self) -> list[int]:
        """Ancestors-or-self of each node, as the bits of an integer: bit j of entry i says that i sees j."""
        seen = [1] * len(self.tokens)
        for node in range(1, len(seen)):
            seen[node] = seen[self.parents[node]] | 1 << node
        return seen

    @property
    def scored(self) -> list[int]:
        """Nodes whose next tokens the step needs: the root, the window's last row and the candidates."""
        return [0, *(n for n in self.last_row if n), *range(self.first_candidate, len(self.tokens))]

    def paths(self) -> list[list[int]]:
        """The nodes from the root to each leaf, leaves in ascending order."""
        inner = set(self.parents)
        found = []
        for leaf in range(len(self.tokens)):
            if leaf not in inner:
                found.append(self.path(leaf))
        return found

    def path(self, node: int) -> list[int]:
        """The nodes from the root to a node, both included."""
        path = [node]
        while path[-1]:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def shard(self, rank: int, world_size: int) -> Shard:
        """The part of the tree that one rank evaluates; see `shards`."""
        return self.shards([0] * world_size)[rank]

    def shards(self, burdens: Sequence[int]) -> list[Shard]:
        """Divide the tree among ranks (lookahead parallelism in arXiv 2402.02057).

        Every node is in at least one shard, and the root in all. Leaves are taken in the order of a depth-first walk, a
        run of them per rank, so that few ancestors are evaluated twice, and so that the rank with the most rows has as
        few as such runs allow. A tree smaller than the number of ranks leaves some with the root alone.

        Args:
            burdens: per rank, rows that it has to evaluate besides its shard.
        """
        size = len(self.tokens)
        order = self._depth_first()
        low, high = -(-(size + sum(burdens)) // len(burdens)), size + max(burdens)
        found = self._runs(order, burdens, high)
        assert found is not None
        while low < high:  # the least number of rows that suffices; more of them always do
            middle = (low + high) // 2
            runs = self._runs(order, burdens, middle)
            if runs is None:
                low = middle + 1
            else:
                found, high = runs, middle
        return [self._part(sorted(nodes)) for nodes in found]

    def _depth_first(self) -> list[int]:
        """The nodes but the root, each after its parent and with its descendants behind it."""
        children: list[list[int]] = [[] for _ in self.tokens]
        for node in range(1, len(self.tokens)):
            children[self.parents[node]].append(node)
        order, waiting = [], children[0][::-1]
        while waiting:
            node = waiting.pop()
            order.append(node)
            waiting += children[node][::-1]
        return order

    def _runs(self, order: Sequence[int], burdens: Sequence[int], most: int) -> list[set[int]] | None:
        """Runs of nodes with their ancestors, one per rank, of at most so many rows; None where they do not suffice."""
        runs: list[set[int]] = []
        at = 0
        for burden in burdens:
            run = {0}
            while at < len(order):
                above, node = [], order[at]
                while node not in run:
                    above.append(node)
                    node = self.parents[node]
                if burden + len(run) + len(above) > most:
                    break
                run.update(above)
                at += 1
            runs.append(run)
        return runs if at == len(order) else None

    def _part(self, nodes: Sequence[int]) -> Shard:
        place = {node: i for i, node in enumerate(nodes)}
        tree = TokenTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(place[self.parents[node]] if node else -1 for node in nodes),
            tuple(place[node] for node in self.last_row if node in place),
            sum(node < self.first_candidate for node in nodes),
        )
        return Shard(tree, tuple(nodes))

    def child(self, node: int, token: int) -> int | None:
        """The candidate node under `node` that holds `token`, or None."""
        for other in range(max(self.first_candidate, node + 1), len(self.tokens)):
            if self.parents[other] == node and self.tokens[other] == token:
                return other
        return None

    def drawing(self, names: Sequence[str] | None = None) -> str:
        """The tree and its mask as text, a line per node.

        Each line has the node, its token (or `names[token]`), its parent, its depth, and a column per node: `#` where
        it sees that node.
        """
        words = [names[t] if names else str(t) for t in self.tokens]
        width = max(map(len, words))
        lines = [f"{'node':<5}{'token':<{max(width, 5) + 2}}{'parent':<8}{'depth':<7}sees"]
        for node, (word, parent, depth, row) in enumerate(
            zip(words, self.parents, self.depths, self.mask, strict=True)
        ):
            seen = "".join("#" if row >> other & 1 else "." for other in range(len(self)))
            above = "" if parent < 0 else str(parent)
            lines.append(f"{node:<5}{word:<{max(width, 5) + 2}}{above:<8}{depth:<7}{seen}")
        return "\n".join(lines)


def build_tree(
    root: int,
    window: Sequence[Sequence[int]] = (),
    candidates: Iterable[Sequence[int]] = (),
    *,
    max_depth: int = 1 << 30,
    max_rows: int = 1 << 30,
) -> TokenTree:
    """The tree of one step (the paper's figure 3, as a tree).

    Row 0 of the window continues the root to the right; each further row hangs under the row above it, so that column
    i read downward is a chain. Row 0 column 0 is the root itself. Candidates hang under the root and share
    their common prefixes.

    Args:
        root: the current token.
        window: rows of equal length, oldest first; the first token of row 0 is ignored in favour of `root`.
        candidates: draft tokens of each candidate.
        max_depth: nodes deeper than this are left out.
        max_rows: candidates stop at this many nodes.
    """
    tokens, parents = [root], [-1]
    above: list[int] = []
    for depth, row in enumerate(window):
        nodes: list[int] = []
        for column, token in enumerate(row):
            if depth + column > max_depth:
                break
            if depth == 0 and column == 0:
                nodes.append(0)
                continue
            parents.append(above[column] if depth else nodes[-1])
            nodes.append(len(tokens))
            tokens.append(token)
        above = nodes
    first_candidate = len(tokens)
    children: dict[tuple[int, int], int] = {}
    for candidate in candidates:
        node = 0
        for token in candidate[:max_depth]:
            known = children.get((node, token))
            if known is None:
                if len(tokens) >= max_rows:
                    break
                known = children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = known
    return TokenTree(tuple(tokens), tuple(parents), tuple(above), first_candidate)
