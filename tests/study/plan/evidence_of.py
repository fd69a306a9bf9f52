"""Evidence that is made up, so that what follows from it is known."""

from collections.abc import Mapping
from dataclasses import replace

from splitfed.study.plan import Evidence, LeakagePoint, LeakageTable, LossPoint, LossTable

N_BLOCKS, D, T = 4, 64, 16
POINT = LossPoint(N_BLOCKS, D, T, 1, 1, 0.0, "int8", 8, base_loss=4.0, loss=2.0, spread=0.03, runs=3)
LEAK = LeakagePoint(N_BLOCKS, D, T, 1, 1, 0.0, "tokens", "probe", recovered=1.0, chance=0.1)


def loss_point(loss: float, **changes: object) -> LossPoint:
    return replace(POINT, loss=loss, **changes)  # type: ignore[arg-type]


def leakage_points(recovered: Mapping[float, tuple[float, float]]) -> list[LeakagePoint]:
    """Tokens and labels that were recovered, by noise, whatever the cut."""
    return [
        replace(LEAK, noise_multiplier=noise, recovers=target, recovered=share)
        for noise, shares in recovered.items()
        for target, share in zip(("tokens", "labels"), shares, strict=True)
    ]


def made_up() -> Evidence:
    """Noise costs loss and hides; a cut at 0 + 0 costs a little less; codecs and ranks hardly matter."""
    losses = [
        loss_point(loss - easier, noise_multiplier=noise, bottom_blocks=blocks, top_blocks=blocks)
        for noise, loss in ((0.0, 2.0), (0.002, 2.4), (0.02, 3.0), (0.2, 4.2))
        for blocks, easier in ((0, 0.1), (1, 0.0), (2, 0.0))
    ]
    losses += [loss_point(1.99, codec="none"), loss_point(2.3, rank=4), loss_point(1.9, rank=16)]
    leaks = leakage_points({0.0: (1.0, 1.0), 0.002: (0.9, 0.8), 0.02: (0.5, 0.3), 0.2: (0.1, 0.1)})
    return Evidence(LossTable(losses), LeakageTable(leaks), "a model", "a model")
