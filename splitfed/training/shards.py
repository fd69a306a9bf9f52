"""Who gets which examples, where one data set plays the data of many clients: alike, by labels, or as a mix of labels.

Every function gives each example to exactly one client, and is a function of its arguments alone.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence

import numpy as np


def iid_shards(n: int, clients: Sequence[str], seed: int, sizes: Sequence[int] | None = None) -> dict[str, list[int]]:
    """Deal examples at random: every client's data are alike.

    Args:
        n: Examples to deal.
        clients: Names of the clients.
        seed: Decides who gets what.
        sizes: Examples of each client, in the order of ``clients``, 1 or more each, together ``n``; left out: the same
            for all, up to one.

    Returns:
        Each client's indices below ``n``, ascending.

    Raises:
        ValueError: If a client would get nothing, a name occurs twice, or ``sizes`` do not add up.

    Guarantees:
        * Every index is given exactly once, and every client gets its size.
    """
    counts = _sizes(n, clients, sizes, least=1)
    order = _generator("iid", seed).permutation(n)
    parts = np.split(order, np.cumsum(counts)[:-1])
    return {client: sorted(part.tolist()) for client, part in zip(clients, parts, strict=True)}


def dirichlet_shards(
    labels: Sequence[str],
    clients: Sequence[str],
    alpha: float,
    seed: int,
    least: int = 1,
    sizes: Sequence[int] | None = None,
) -> dict[str, list[int]]:
    """Give every client a mix of labels of its own, drawn from a Dirichlet distribution around the mix of all.

    A client's mix is q ~ Dirichlet(alpha · p), p being the labels' shares of all examples. The clients take turns, and
    each takes an example of a label drawn from its mix, without replacement: among the labels that are left, in
    proportion to q, or to what is left of them where q has none of these.

    Args:
        labels: Label of each example.
        clients: Names of the clients.
        alpha: Above 0 and finite. Large: every mix is that of all. Small: a client has few labels. As labels run out,
            the last examples follow the mixes less.
        seed: Decides who gets what.
        least: Fewest examples that a client may get, 1 or more.
        sizes: Examples of each client, in the order of ``clients``, together ``len(labels)``; left out: the same for
            all, up to one, as the source has it.

    Returns:
        Each client's indices of ``labels``, ascending.

    Raises:
        ValueError: If ``alpha`` is out of its range, a client would get fewer than ``least``, a name occurs twice, or
            ``sizes`` do not add up.

    Guarantees:
        * Every index is given exactly once, and every client gets its size.

    Source: Hsu, Qi & Brown 2019, Measuring the effects of non-identical data distribution for federated visual
    classification, section 3. There one client is filled after the other; here they take turns, so that what remains
    at the end is not all the last one's.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(
            f"alpha is {alpha}; give a finite number above 0, or use iid_shards for clients that are alike."
        )
    counts = _sizes(len(labels), clients, sizes, least=least)
    generator = _generator("dirichlet", seed)
    left = _by_label(labels, generator)
    left_L = np.array([len(indices) for indices in left])
    mix_KL = generator.dirichlet(alpha * left_L / len(labels), size=len(clients))
    shards: list[list[int]] = [[] for _ in clients]
    waiting = list(range(len(clients)))
    while waiting := [place for place in waiting if len(shards[place]) < counts[place]]:
        for place in waiting:
            label = _drawn(mix_KL[place], left_L, generator.random())
            shards[place].append(left[label].pop())
            left_L[label] -= 1
    return {client: sorted(shard) for client, shard in zip(clients, shards, strict=True)}


def label_shards(
    labels: Sequence[str], clients: Sequence[str], labels_per_client: int, seed: int
) -> dict[str, list[int]]:
    """Give every client examples of a few labels only, and divide each label evenly among those that have it.

    Args:
        labels: Label of each example.
        clients: Names of the clients.
        labels_per_client: Labels that a client has, 1 or more; enough that every label has a client.
        seed: Decides who gets what.

    Returns:
        Each client's indices of ``labels``, ascending.

    Raises:
        ValueError: If there are too few or too many labels for a client, too few examples for every client to have
            one, or a name occurs twice.

    Guarantees:
        * Every index is given exactly once, and no client has more than ``labels_per_client`` labels.
        * Two clients' parts of a label differ by one example at most, and the numbers of clients of two labels by one.

    Source: after McMahan et al. 2017, Communication-efficient learning of deep networks from decentralized data,
    section 3, where examples sorted by label are cut into equal pieces, whose borders may fall inside a label.
    """
    _sizes(len(labels), clients, None, least=1)
    generator = _generator("labels", seed)
    by_label = _by_label(labels, generator)
    n_labels = len(by_label)
    if not 1 <= labels_per_client <= n_labels or labels_per_client * len(clients) < n_labels:
        raise ValueError(
            f"{len(clients)} clients with {labels_per_client} labels each cannot share {n_labels} labels; "
            f"labels_per_client must be from {max(1, -(-n_labels // len(clients)))} to {n_labels}."
        )
    generator.shuffle(by_label)
    holders: list[list[int]] = [[] for _ in by_label]
    for place, client in enumerate(generator.permutation(len(clients)).tolist()):
        for label in range(place * labels_per_client, (place + 1) * labels_per_client):
            holders[label % n_labels].append(client)
    shards: list[list[int]] = [[] for _ in clients]
    for indices, of_label in zip(by_label, holders, strict=True):
        of_label.sort(key=lambda client: len(shards[client]))  # whoever has least gets the odd ones
        for place, client in enumerate(of_label):
            shards[client] += indices[place :: len(of_label)]
    if not all(shards):
        raise ValueError("A label has fewer examples than clients, and a client gets none; use fewer clients.")
    return {client: sorted(shard) for client, shard in zip(clients, shards, strict=True)}


def topic_of(row_text: str, attribute: str) -> str:
    """Read one attribute of a meaning representation, to use it as the row's label.

    Args:
        row_text: Such as ``name[The Vaults], eatType[pub], food[French]``: the ``mr`` column of E2E-like data.
        attribute: Such as ``eatType``.

    Returns:
        Its value, or an empty text where the row has no such attribute.

    Source: the format is that of Novikova, Dušek & Rieser 2017, The E2E dataset: new challenges for end-to-end
    generation.
    """
    found = re.search(rf"(?:^|,)\s*{re.escape(attribute)}\s*\[([^\]]*)\]", row_text)
    return found[1].strip() if found else ""


def _sizes(n: int, clients: Sequence[str], sizes: Sequence[int] | None, *, least: int) -> list[int]:
    if not clients or len(set(clients)) < len(clients):
        raise ValueError(f"The clients are {list(clients)}; give at least one, and each a name of its own.")
    counts = [n // len(clients) + (place < n % len(clients)) for place in range(len(clients))]
    if sizes is not None:
        counts = list(sizes)
        if len(counts) != len(clients) or sum(counts) != n:
            raise ValueError(f"sizes are {counts}; give one for each of {len(clients)} clients, together {n}.")
    if least < 1 or min(counts) < least:
        raise ValueError(
            f"A client would get {min(counts)} of {n} examples, where the least is {least} (1 or more); "
            "use fewer clients or more examples."
        )
    return counts


def _by_label(labels: Sequence[str], generator: np.random.Generator) -> list[list[int]]:
    """Indices of each label in random order, the labels in alphabetical order."""
    indices: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
    for index in generator.permutation(len(labels)).tolist():
        indices[labels[index]].append(index)
    return list(indices.values())


def _drawn(mix_L: np.ndarray, left_L: np.ndarray, uniform: float) -> int:
    """Draw a label of which something is left."""
    weight_L = np.where(left_L > 0, mix_L, 0.0)
    if not weight_L.sum() > 0:
        weight_L = left_L.astype(np.float64)
    cumulative_L = weight_L.cumsum()
    drawn = int(np.searchsorted(cumulative_L, uniform * cumulative_L[-1], side="right"))
    return min(drawn, int(weight_L.nonzero()[0][-1]))  # where rounding would go past the end


def _generator(kind: str, seed: int) -> np.random.Generator:
    key = hashlib.sha256(json.dumps(["shards", kind, seed]).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key)))
