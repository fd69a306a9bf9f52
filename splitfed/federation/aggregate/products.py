"""The weighted mean of the clients' products B A, whatever their ranks, as stacked factors."""

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor

from splitfed.federation.aggregate.aggregator import Aggregate, Aggregator, Update
from splitfed.federation.aggregate.low_rank import A, B, at_rank, layers, stacked


class ProductAggregator(Aggregator):
    """Averages what the adapters do in place of what they consist of.

    It keeps every update of the round, 4 bytes an element and client, and works layer by layer in float64. The norm of
    a client's change is that of its factors, from ``at_rank`` of the base where its rank is smaller. A late update
    counts as the base's product + what the client changed in its own.
    """

    def _open(self) -> None:
        self._layers = layers(self._base)
        self._kept: dict[str, Update] = {}

    def _take(self, client: str, update: Update) -> None:
        layers(update.state)
        state = {key: tensor.clone() for key, tensor in update.state.items()}
        self._kept[client] = Update(state, update.weight, update.base)

    def _close(self) -> Aggregate:
        adapter, left_out = dict(self._base), 0.0
        for layer in self._layers:
            if terms := self._terms(layer):
                adapter[layer + A], adapter[layer + B], norm = self._combine(layer, *stacked(terms))
                left_out += norm**2
        return Aggregate(adapter, sorted(self._clients), {"truncated_norm": left_out**0.5})

    @abstractmethod
    def _combine(self, layer: str, left_OK: Tensor, right_KI: Tensor) -> tuple[Tensor, Tensor, float]:
        """Give a layer's next A and B for the mean of its products, and the norm of what that leaves out."""

    def _terms(self, layer: str) -> list[tuple[float, Tensor, Tensor]]:
        """Give the mean of a layer's products as weights, B and A; nothing where nobody trained it."""
        kept = [self._kept[client] for client in sorted(self._kept) if layer + A in self._kept[client].state]
        total = sum(update.weight for update in kept)
        terms = []
        for update in kept:
            share = update.weight / total
            terms.append((share, update.state[layer + B], update.state[layer + A]))
            if update.base is not None:
                terms.append((share, self._base[layer + B], self._base[layer + A]))
                terms.append((-share, update.base[layer + B], update.base[layer + A]))
        return terms

    def _start(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        start: dict[str, Tensor] = {}
        for layer in layers(state):
            of_layer = {key: self._base[key] for key in (layer + A, layer + B)}
            start |= at_rank(of_layer, len(state[layer + A]))
        return start

    def _on_the_base(self, late: Update) -> Update:
        return late

    def _has_right_shape(self, key: str, tensor: Tensor) -> bool:
        expected = self._base[key].shape
        if tensor.ndim != len(expected):
            return False
        if key.endswith(A):
            return tensor.shape[0] <= expected[0] and tensor.shape[1] == expected[1]
        return tensor.shape[0] == expected[0] and tensor.shape[1] <= expected[1]
