"""What the notebooks' figures share."""

import math

import matplotlib
import pytest
from matplotlib.figure import Figure

from splitfed.study.figures import COLOURS, MARKS, interval_line, noise_axis, spread_line, use_style
from splitfed.study.spread import Spread


@pytest.fixture
def axes():
    return Figure().subplots()


def test_the_style_is_one_that_matplotlib_takes() -> None:
    with matplotlib.rc_context():
        use_style()
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(COLOURS)


def test_colours_and_marks_differ() -> None:
    assert len(set(COLOURS)) == len(COLOURS)
    assert len(set(MARKS)) == len(MARKS) >= len(COLOURS)


@pytest.mark.parametrize("is_joined", [True, False])
def test_a_line_of_spreads_has_means_deviations_and_its_shift(axes, is_joined: bool) -> None:
    spread_line(axes, {0: Spread(1.0, 0.5, 3), 2: Spread(3.0, 0.25, 3)}, "one", 1, shift=0.1, is_joined=is_joined)
    (drawn,) = axes.containers
    line, _, (bars,) = drawn.lines
    assert line.get_xdata().tolist() == [0.1, 2.1]
    assert line.get_ydata().tolist() == [1.0, 3.0]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.5, 1.5], [2.75, 3.25]]
    assert (line.get_color(), line.get_marker()) == (COLOURS[1], MARKS[1])
    assert (line.get_linestyle() == "-") is is_joined


def test_a_line_of_rates_is_in_percent_with_its_intervals(axes) -> None:
    rows = [{"recovered": 0.5, "low": 0.4, "high": 0.7}, {"recovered": 1.0, "low": 0.9, "high": 1.0}]
    interval_line(axes, [0, 3], rows, "attack", 0)
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_ydata().tolist() == [50.0, 100.0]
    assert band.get_paths()[0].get_extents().bounds == pytest.approx((0, 40, 3, 60))


def test_noise_multipliers_stand_at_even_distances_with_epsilon_below(axes) -> None:
    noise_axis(axes, [0, 0.001, 0.02], {0: math.inf, 0.001: 504263.89, 0.02: None})
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0\nε none", "0.001\nε 504,300", "0.02\nε none"]
    assert axes.get_xticks().tolist() == [0, 1, 2]


def test_without_epsilons_the_multipliers_stand_alone(axes) -> None:
    noise_axis(axes, [0, 0.5])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.5"]
    assert "ε" not in axes.get_xlabel()
