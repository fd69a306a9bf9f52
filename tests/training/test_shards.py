import csv
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfed.training.shards import dirichlet_shards, iid_shards, label_shards, topic_of

E2E = Path(__file__).parents[2].parent / "shared" / "data" / "e2e" / "train.csv"
CLIENTS = ["bank", "clinic", "phone"]

labels_and_clients = st.tuples(
    st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), min_size=1, max_size=60), st.integers(1, 8)
).filter(lambda drawn: len(drawn[0]) >= drawn[1])


def names(n_clients: int) -> list[str]:
    return [f"client-{index}" for index in range(n_clients)]


def assert_each_given_once(shards: dict[str, list[int]], n: int, clients: list[str]) -> None:
    assert list(shards) == clients
    assert sorted(index for shard in shards.values() for index in shard) == list(range(n))
    assert all(a < b for shard in shards.values() for a, b in pairwise(shard))


def labels_of(shard: list[int], labels: list[str]) -> Counter[str]:
    return Counter(labels[index] for index in shard)


@given(st.integers(1, 50), st.integers(1, 50), st.integers())
def test_iid_shards_give_every_example_once_and_the_same_to_all_up_to_one(n: int, n_clients: int, seed: int) -> None:
    n, clients = max(n, n_clients), names(n_clients)
    shards = iid_shards(n, clients, seed)
    assert_each_given_once(shards, n, clients)
    assert max(map(len, shards.values())) - min(map(len, shards.values())) <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_every_client_gets_its_size(sizes: list[int], seed: int) -> None:
    clients, n = names(len(sizes)), sum(sizes)
    for shards in (
        iid_shards(n, clients, seed, sizes),
        dirichlet_shards(["x", "y"] * n, clients, 0.3, seed, sizes=[2 * size for size in sizes]),
    ):
        assert_each_given_once(shards, sum(map(len, shards.values())), clients)
        factor = sum(map(len, shards.values())) // n
        assert [len(shard) for shard in shards.values()] == [factor * size for size in sizes]


@given(labels_and_clients, st.floats(1e-8, 1e8), st.integers(0, 9))
def test_dirichlet_shards_give_every_example_once(drawn: tuple[list[str], int], alpha: float, seed: int) -> None:
    labels, clients = drawn[0], names(drawn[1])
    shards = dirichlet_shards(labels, clients, alpha, seed, least=len(labels) // len(clients))
    assert_each_given_once(shards, len(labels), clients)


@given(labels_and_clients, st.integers(1, 5), st.integers(0, 9))
def test_label_shards_give_every_example_once_and_few_labels_to_a_client(
    drawn: tuple[list[str], int], labels_per_client: int, seed: int
) -> None:
    labels, clients = drawn[0], names(drawn[1])
    try:
        shards = label_shards(labels, clients, labels_per_client, seed)
    except ValueError as error:
        few = "A label has fewer examples than clients" in str(error)
        assert few == (labels_per_client <= len(set(labels)) <= labels_per_client * len(clients))
        return
    assert_each_given_once(shards, len(labels), clients)
    assert all(1 <= len(labels_of(shard, labels)) <= labels_per_client for shard in shards.values())


def test_a_label_is_divided_evenly_among_its_clients_and_labels_have_as_many_clients() -> None:
    labels = ["a"] * 41 + ["b"] * 23 + ["c"] * 17 + ["d"] * 30
    shards = label_shards(labels, names(7), 2, seed=3)
    held = [labels_of(shard, labels) for shard in shards.values()]
    assert all(len(counts) == 2 for counts in held)
    for label in "abcd":
        parts = [counts[label] for counts in held if label in counts]
        assert len(parts) in {3, 4}
        assert max(parts) - min(parts) <= 1


def test_the_odd_examples_of_labels_go_to_different_clients() -> None:
    shards = label_shards(["a", "b"] * 4, CLIENTS, 2, seed=0)  # 4 of each for 3 clients
    assert sorted(map(len, shards.values())) == [2, 3, 3]


def test_shards_are_a_function_of_the_seed() -> None:
    labels = ["a", "b", "c"] * 20
    for shards in (
        lambda seed: iid_shards(60, CLIENTS, seed),
        lambda seed: dirichlet_shards(labels, CLIENTS, 0.5, seed),
        lambda seed: label_shards(labels, CLIENTS, 2, seed),
    ):
        assert shards(1) == shards(1)
        assert shards(1) != shards(2)


def test_a_mix_is_a_draw_of_the_dirichlet_distribution_around_the_mix_of_all() -> None:
    """With 3 labels of 2 : 1 : 1, a client's share of the first has mean p and variance p (1 - p) / (alpha + 1)."""
    labels = ["a", "a", "b", "c"] * 20_000  # so many that labels do not run out in what is looked at
    n_clients, alpha, taken = 400, 2.0, 40
    shards = dirichlet_shards(labels, [*names(n_clients), "rest"], alpha, 1, sizes=[taken] * n_clients + [64_000])
    share = np.array([labels_of(shards[name], labels)["a"] / taken for name in names(n_clients)])
    p = 0.5
    of_mix = p * (1 - p) / (alpha + 1)
    of_draws = (p * (1 - p) - of_mix) / taken
    assert share.mean() == pytest.approx(p, abs=4 * ((of_mix + of_draws) / n_clients) ** 0.5)
    assert share.var() == pytest.approx(of_mix + of_draws, rel=4 * (2 / n_clients) ** 0.5)


@pytest.mark.parametrize(("alpha", "least_share", "most_share"), [(1e-3, 0.8, 1.0), (1e6, 0.2, 0.45)])
def test_a_small_alpha_gives_a_client_one_label_and_a_large_one_the_mix_of_all(
    alpha: float, least_share: float, most_share: float
) -> None:
    labels = ["a", "b", "c", "d"] * 1000
    clients = names(10)
    shards = dirichlet_shards(labels, [*clients, "rest"], alpha, 0, sizes=[100] * 10 + [3000])
    for name in clients:
        share = labels_of(shards[name], labels).most_common(1)[0][1] / 100
        assert least_share <= share <= most_share


def test_clients_are_skewed_also_where_every_example_is_dealt() -> None:
    labels = ["a", "b", "c", "d"] * 250
    shards = dirichlet_shards(labels, names(10), 0.05, 1)
    most = [labels_of(shard, labels).most_common(1)[0][1] / len(shard) for shard in shards.values()]
    assert np.mean(most) > 0.6


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"clients": []}, "at least one"),
        ({"clients": ["a", "a"]}, "a name of its own"),
        ({"clients": names(7)}, "A client would get 0 of 6 examples"),
        ({"sizes": [3, 3]}, "one for each of 3 clients, together 6"),
        ({"sizes": [3, 2, 2]}, "together 6"),
        ({"sizes": [6, 1, -1]}, "A client would get -1"),
        ({"least": 3}, "the least is 3"),
        ({"least": 0}, "the least is 0"),
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": float("inf")}, "use iid_shards"),
        ({"alpha": float("nan")}, "above 0"),
    ],
)
def test_what_cannot_be_dealt_is_refused(arguments: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        dirichlet_shards(**{"labels": ["a", "b"] * 3, "clients": CLIENTS, "alpha": 1.0, "seed": 0, **arguments})


@pytest.mark.parametrize("labels_per_client", [0, 1, 6])
def test_labels_that_cannot_be_dealt_are_refused_with_the_range(labels_per_client: int) -> None:
    with pytest.raises(ValueError, match="from 2 to 5"):
        label_shards(["a", "b", "c", "d", "e"] * 4, CLIENTS, labels_per_client, 0)


@pytest.mark.parametrize(
    ("attribute", "topic"),
    [
        ("eatType", "coffee shop"),
        ("customer rating", "5 out of 5"),
        ("name", "The Vaults"),
        ("near", "Café, 2"),
        ("area", ""),
    ],
)
def test_a_topic_is_the_attributes_value(attribute: str, topic: str) -> None:
    row_text = "name[The Vaults], eatType[coffee shop], customer rating[5 out of 5], near[Café, 2], food[]"
    assert topic_of(row_text, attribute) == topic


def test_an_attribute_is_not_found_in_the_name_or_value_of_another() -> None:
    assert topic_of("customer rating[high], near[area[x]", "rating") == ""
    assert topic_of("customer rating[high], near[area[x]", "area") == ""
    assert topic_of("name[.], eat.ype[x]", "eat.ype") == "x"
    assert topic_of("name[.], eatType[x]", "eat.ype") == ""


@pytest.mark.skipif(not E2E.exists(), reason="the E2E data set is not here")
def test_rows_of_e2e_have_the_topics_that_their_paper_lists() -> None:
    with E2E.open(newline="", encoding="utf-8") as lines:
        topics = [topic_of(row["mr"], "eatType") for row in csv.DictReader(lines)]
    assert set(topics) == {"pub", "coffee shop", "restaurant", ""}
