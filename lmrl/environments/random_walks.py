"""Random walks: find the shortest path to a goal on a graph known only from experience.

The task of trlx's example of the same name (the idea is from Chen et al., "Decision Transformer", arXiv 2106.01345,
section 3): a directed graph of `nodes` nodes called a, b, c, ...; the goal is `a`. The observation is a start node, the
action is the rest of the walk, at most `max_length` nodes in all, for instance `f` -> `kca`. The reward is the walk's
optimality, (max_length - length) / (max_length - shortest), and 0 for a walk that takes a missing edge or does not end
at the goal, which no edge leaves. Start nodes without a path shorter than `max_length` are left out.

With `stepwise` a walk is many turns: the observation is the node one is at, the action the next node, and arriving
earns 1, whatever the length (a discount makes short walks worth more). A state is then a node, however it was reached,
so that pieces of different walks fit together.

Players: `random` follows edges at random until the goal or `max_length`; `optimal` takes a shortest path; `suboptimal`
is `random` without the shortest paths, for data from which the optimum can only be stitched together (Fu et al.,
"D4RL", arXiv 2004.07219, section 4: undirected and suboptimal data).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from lmrl.environments.base import TextEnvironment
from lmrl.errors import RecipeError

GOAL = 0
REDRAWS = 100


class RandomWalks(TextEnvironment):
    """One graph, drawn from its number exactly as in trlx, so graph numbers mean the same in both.

    If the first graph drawn from a number has no start node that can reach the goal, the next one that has is taken.
    """

    players = ("random", "suboptimal", "optimal")
    metric_limits = {"return": (0.0, 1.0), "optimality": (0.0, 1.0), "arrived": (0.0, 1.0)}

    def __init__(
        self,
        graph: int = 1000,
        nodes: int = 21,
        max_length: int = 10,
        edge_probability: float = 0.1,
        stepwise: bool = False,
    ):
        self.max_length, self.stepwise = max_length, stepwise
        random = np.random.RandomState(graph)
        for _ in range(1000):
            self.edges = _draw_graph(random, nodes, edge_probability)
            self.distance = _distances_to_goal(self.edges)
            # A path of d edges has d + 1 nodes; one of max_length nodes earns 0, so it is useless as an optimum.
            self.starts = [node for node in range(nodes) if node != GOAL and self.distance[node] + 1 < max_length]
            if self.starts:
                break
        else:
            raise RecipeError("task: no graph of this kind has a start node with a short path to the goal")
        self.num_starts = len(self.starts)

    # ------------------------------------------------------------------------------------------------------ gymnasium
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        index = (options or {}).get("start")
        self.start = self.starts[self.np_random.integers(len(self.starts)) if index is None else index]
        self.walked = ""
        self.plan: str | None = None
        return _name(self.start), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self.stepwise:
            optimality, metrics = self._judge(action)
            return "", optimality, True, False, {"metrics": metrics}
        here, move = self._observation, action.strip()
        self.walked += move
        optimality, metrics = self._judge(self.walked)
        there = ord(move) - ord("a") if len(move) == 1 else -1
        possible = 0 <= there < len(self.edges) and self.edges[ord(here) - ord("a"), there]
        over = not possible or there == GOAL or len(self.walked) + 1 >= self.max_length
        return "" if over else move, metrics["arrived"], over, False, {"metrics": metrics}

    @property
    def _observation(self) -> str:
        return (self.walked or _name(self.start))[-1]

    def allowed_actions(self) -> list[str] | None:
        """Stepwise, the nodes that an edge leads to; a walk in one action is free text."""
        return (
            [_name(int(node)) for node in np.nonzero(self.edges[ord(self._observation) - ord("a")])[0]]
            if self.stepwise
            else None
        )

    def _judge(self, walk: str) -> tuple[float, dict[str, float]]:
        length = self._arrival(walk)
        shortest = int(self.distance[self.start]) + 1
        optimality = 0.0 if length is None else (self.max_length - length) / (self.max_length - shortest)
        metrics = {"optimality": optimality, "arrived": float(length is not None)}
        return optimality, metrics

    def _arrival(self, action: str) -> int | None:
        """Nodes of the walk, the start included, or None for a walk that does not end at the goal."""
        node, letters = self.start, "".join(action.split())
        for letter in letters:
            following = ord(letter) - ord("a")
            if not 0 <= following < len(self.edges) or not self.edges[node, following]:
                return None
            node = following
        length = len(letters) + 1
        return length if node == GOAL and length <= self.max_length else None

    # ---------------------------------------------------------------------------------------------------------- extras
    def act(self, player: str, rng: np.random.Generator) -> str:
        if not self.stepwise:
            return self._plan(player, rng)
        if self.plan is None:
            self.plan = self._plan(player, rng)
        return self.plan[len(self.walked) : len(self.walked) + 1]

    def _plan(self, player: str, rng: np.random.Generator) -> str:
        if player != "suboptimal":
            return self._walk(rng, shortest=player == "optimal")
        for _ in range(REDRAWS):
            walk = self._walk(rng)
            if self._arrival(walk) != self.distance[self.start] + 1:
                return walk
        return walk[:-1]  # every path is a shortest one: stop before the goal, so that the walk fails

    def _walk(self, rng: np.random.Generator, shortest: bool = False) -> str:
        """Nodes after the start, along random edges (shortest: only those that lead closer to the goal)."""
        node, walk = self.start, list[str]()
        while node != GOAL and len(walk) < self.max_length - 1:
            following = np.nonzero(self.edges[node])[0]
            if shortest:
                following = following[self.distance[following] == self.distance[node] - 1]
            node = int(rng.choice(following))
            walk.append(_name(node))
        return "".join(walk)

    def texts(self) -> Iterable[str]:
        return [_name(node) for node in range(len(self.edges))]


def _name(node: int) -> str:
    return chr(ord("a") + node)


def _draw_graph(random: np.random.RandomState, nodes: int, edge_probability: float) -> np.ndarray:
    """Directed edges, none from a node to itself; drawn again until every node has an outgoing edge."""
    while True:
        edges = random.rand(nodes, nodes) > 1 - edge_probability
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            edges[GOAL] = False
            return edges


def _distances_to_goal(edges: np.ndarray) -> np.ndarray:
    """Edges on the shortest path from each node to the goal, by breadth-first search; a huge number if there is
    none."""
    distance = np.full(len(edges), np.iinfo(np.int32).max // 2)
    distance[GOAL] = 0
    queue = deque([GOAL])
    while queue:
        node = queue.popleft()
        for before in np.nonzero(edges[:, node])[0]:
            if distance[before] > distance[node] + 1:
                distance[before] = distance[node] + 1
                queue.append(int(before))
    return distance
