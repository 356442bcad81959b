"""Who measures with whom: neighbours on a ring of nodes, in rounds in which every node has at most one partner."""


def rounds(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Each link of the ring once: [[(0, 1), (2, 3)], [(1, 2), (3, 0)]] for four nodes; a third round for an odd number.

    So each node is measured with two others, and a bad one differs from its neighbours by having two bad links.
    """
    if num_nodes < 2:
        return []
    if num_nodes == 2:
        return [[(0, 1)]]
    even = [(node, node + 1) for node in range(0, num_nodes - 1, 2)]
    odd = [(node, node + 1) for node in range(1, num_nodes - 1, 2)]
    last = (num_nodes - 1, 0)
    return [even, [*odd, last]] if num_nodes % 2 == 0 else [even, odd, [last]]


def partner(pairs: list[tuple[int, int]], node: int) -> int | None:
    """Of a node in one round."""
    return next((pair[1 - pair.index(node)] for pair in pairs if node in pair), None)
