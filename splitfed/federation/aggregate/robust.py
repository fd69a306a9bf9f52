"""Rules that stand clients which send anything at all, as long as they are few.

All of them take every client as one, as their sources do: a weight is the client's own word. They work on all updates
of a round at once. What they promise holds tensor by tensor among the clients that trained it.

Shapes: N clients, P elements of a tensor.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def coordinate_median(updates: Mapping[str, State], base: State) -> tuple[dict[str, Tensor], list[str]]:
    """Take the median of every element; of an even number, the mean of the two in the middle.

    Args:
        updates: Adapters by client, float32.
        base: What the round started from.

    Returns:
        The medians, float32, and all clients.

    Guarantees:
        * With fewer than half of the clients arbitrary, every element is between two of the others'.

    Source: Yin, Chen, Ramchandran & Bartlett 2018, Byzantine-robust distributed learning, Definition 1.
    """
    return _by_element(updates, base, lambda x_NP: (x_NP[(len(x_NP) - 1) // 2] + x_NP[len(x_NP) // 2]) / 2)


def trimmed_mean(updates: Mapping[str, State], base: State, *, trim: float) -> tuple[dict[str, Tensor], list[str]]:
    """Take the mean of every element without its ⌊trim · N⌋ smallest and as many of the largest values.

    Args:
        updates: Adapters by client, float32.
        base: What the round started from.
        trim: Fraction at each end, in [0, 0.5); below 1 / N nothing is cut off.

    Returns:
        The means, float32, and all clients.

    Guarantees:
        * With a fraction of up to ``trim`` of the clients arbitrary, every element is between two of the others'.

    Source: Yin, Chen, Ramchandran & Bartlett 2018, Byzantine-robust distributed learning, Definition 2.
    """

    def mean_without_ends(x_NP: Tensor) -> Tensor:
        cut = int(Fraction(str(trim)) * len(x_NP))  # as it is written: 0.29 of 100 is 29
        return x_NP[cut : len(x_NP) - cut].mean(dim=0)

    return _by_element(updates, base, mean_without_ends)


def multi_krum(updates: Mapping[str, State], base: State, *, byzantine: int) -> tuple[dict[str, Tensor], list[str]]:
    """Take the mean of the N - f updates that are nearest to their neighbours.

    An update's score is the sum of its squared distances to its N - f - 2 nearest neighbours, all tensors together; one
    that it does not hold counts as unchanged. Of equal scores the first in the order of names is taken.

    Args:
        updates: Adapters by client, float32, in the order of names.
        base: What the round started from.
        byzantine: f, the clients that may be arbitrary.

    Returns:
        The mean over those that were taken, float32, and these clients.

    Raises:
        ValueError: If there are fewer than 2f + 3 updates.

    Source: Blanchard, El Mhamdi, Guerraoui & Stainer 2017, Machine learning with adversaries: Krum, which asks for
    2f + 2 < N, and Multi-Krum, with m = N - f.
    """
    if len(updates) < 2 * byzantine + 3:
        raise ValueError(
            f"Multi-Krum with byzantine = {byzantine} takes {2 * byzantine + 3} updates or more, and the round has "
            f"{len(updates)}; raise the quorum, or lower byzantine."
        )
    distance_NN = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for key, tensor in base.items():
        x_NP = torch.stack([state.get(key, tensor).flatten() for state in updates.values()]).double()
        for i, x_P in enumerate(x_NP):
            distance_NN[i] += (x_NP - x_P).square().sum(dim=1)
    distance_NN.fill_diagonal_(torch.inf)
    nearest = distance_NN.sort(dim=1).values[:, : len(updates) - byzantine - 2]
    ranking = nearest.sum(dim=1).argsort(stable=True)
    names = list(updates)
    taken = sorted(names[i] for i in ranking[: len(updates) - byzantine].tolist())
    mean, _ = _by_element({name: updates[name] for name in taken}, base, lambda x_NP: x_NP.mean(dim=0))
    return mean, taken


def _by_element(
    updates: Mapping[str, State], base: State, centre: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Apply a function to the values of each element, [N, P], float64 and sorted, whosever they are."""
    result = {}
    for key in base:
        if values := [state[key] for state in updates.values() if key in state]:
            result[key] = centre(torch.stack(values).double().sort(dim=0).values).float()
    return result, sorted(updates)
