"""Random walks against hand-computed rewards and an independent shortest-path search."""

import numpy as np
import pytest

from lmrl.environments.random_walks import RandomWalks, _distances_to_goal


@pytest.fixture
def square():
    """b -> c -> a, b -> d -> c, and d -> a does not exist."""
    world = RandomWalks(graph=0, nodes=4, max_length=10)
    world.edges = np.zeros((4, 4), dtype=bool)
    for before, after in ("bc", "bd", "ca", "dc"):
        world.edges[ord(before) - 97, ord(after) - 97] = True
    world.distance = _distances_to_goal(world.edges)
    world.starts, world.num_starts = [1, 2, 3], 3
    return world


@pytest.mark.parametrize(
    ("walk", "optimality"),
    [
        ("ca", 1.0),  # three nodes, the shortest
        ("dca", (10 - 4) / (10 - 3)),
        ("c a", 1.0),  # white space between nodes is allowed
        ("da", 0.0),  # missing edge
        ("c", 0.0),  # does not arrive
        ("cab", 0.0),  # goes on past the goal
        ("c?", 0.0),
        ("", 0.0),
    ],
)
def test_reward_by_hand(square, walk, optimality):
    assert square.reset(options={"start": 0}) == ("b", {})
    observation, reward, terminated, truncated, info = square.step(walk)
    assert (observation, terminated, truncated) == ("", True, False)
    assert reward == info["metrics"]["optimality"] == pytest.approx(optimality)


@pytest.mark.parametrize("graph", [1000, 1001, 1002, 1003, 3])
def test_distances_equal_matrix_powers(graph):
    """Node i reaches the goal in at most d edges exactly if (I + A)^d has an entry there."""
    world = RandomWalks(graph)
    reach, power = np.eye(21, dtype=bool), {}
    for edges in range(1, 21):
        reach = reach | (reach.astype(int) @ world.edges.astype(int) > 0)
        for node in np.nonzero(reach[:, 0])[0]:
            power.setdefault(int(node), edges)
    expected = [node for node in range(1, 21) if power.get(node, 99) + 1 < 10]
    assert world.starts == expected
    assert all(world.distance[node] == power[node] for node in expected)


def test_players_and_starts():
    world = RandomWalks(1000)
    rng = np.random.default_rng(0)
    for start in range(world.num_starts):
        world.reset(options={"start": start})
        assert world.step(world.act("optimal", rng))[1] == 1.0
        walk = world.act("random", rng)
        assert world.step(walk)[1] < 1.0 or len(walk) <= 9
    rewards = []
    for _ in range(300):
        world.reset(seed=int(rng.integers(2**31)))
        rewards.append(world.step(world.act("random", rng))[1])
    assert 0.2 < np.mean(rewards) < 0.5


def test_suboptimal_walks_hold_the_pieces_of_the_shortest():
    """No shortest walk among 1,000, though some arrive; their edges join to a shortest path from every start."""
    world, rng = RandomWalks(1000), np.random.default_rng(0)
    optimalities, seen = [], np.zeros_like(world.edges)
    for episode in range(1000):
        world.reset(options={"start": episode % world.num_starts})
        walk = world.act("suboptimal", rng)
        optimalities.append(world.step(walk)[1])
        nodes = [world.start, *(ord(letter) - ord("a") for letter in walk)]
        seen[nodes[:-1], nodes[1:]] = True
    assert not (seen & ~world.edges).any()
    assert max(optimalities) < 1 and 0.1 < np.mean(optimalities) < 0.3
    assert (_distances_to_goal(seen)[world.starts] == world.distance[world.starts]).all()


def test_a_start_with_no_other_way_fails(square):
    """d -> c -> a is the only walk from d, and from c only the goal is left."""
    for start, walk in ((2, ""), (3, "c")):
        square.reset(options={"start": start - 1})
        assert square.act("suboptimal", np.random.default_rng(0)) == walk
        assert square.step(walk)[1] == 0.0
    square.reset(options={"start": 0})
    assert square.act("suboptimal", np.random.default_rng(0)) == "dca"  # and never the shorter "ca"


def test_graph_number_is_the_graph():
    assert (RandomWalks(7).edges == RandomWalks(7).edges).all()
    assert (RandomWalks(7).edges != RandomWalks(8).edges).any()
