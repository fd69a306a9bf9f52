"""FlexLoRA: the mean of the products, cut to the run's rank, for agents of any rank up to it."""

from torch import Tensor

from splitfed.federation.aggregate.low_rank import A, truncated
from splitfed.federation.aggregate.products import ProductAggregator


class FlexLora(ProductAggregator):
    """Gives the best factors of the base's rank for the weighted mean of the clients' products.

    An agent of smaller rank starts from ``at_rank`` of the result. What is cut off is lost: ``truncated_norm`` in the
    notes is its Frobenius norm over all layers, without the adapter's scale. The factors turn from round to round, so
    what an optimiser remembers of their elements is of little use in the next.

    Guarantees:
        * The product of a layer's factors is the best of its rank for the mean of the products, up to rounding.
        * Clients that agree leave their product as it is, up to rounding.

    Source: Bai, Chen, Qian, Yao & Li 2024, Federated fine-tuning of large language models under heterogeneous tasks and
    client resources; where the singular values go, and the decomposition without a dense matrix, are ours.
    """

    def _combine(self, layer: str, left_OK: Tensor, right_KI: Tensor) -> tuple[Tensor, Tensor, float]:
        spare_A = self._base[layer + A]
        b_OR, a_RI, left_out = truncated(left_OK, right_KI, len(spare_A), spare_A=spare_A)
        return a_RI, b_OR, left_out
