"""The tree of errors."""

import inspect

import pytest

from splitfed import errors
from splitfed.errors import ConfigError, SplitFedError, SplitPointError

EVERY_ERROR = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_every_error_is_in_the_tree_that_the_module_draws(error: type[Exception]) -> None:
    assert issubclass(error, SplitFedError)
    drawn = [line.strip(" ├└│─").split(" ")[0] for line in (errors.__doc__ or "").splitlines()]
    assert drawn.count(error.__name__) == 1


@pytest.mark.parametrize("error", EVERY_ERROR)
def test_the_exit_status_tells_a_wrong_configuration_and_a_stop_for_good_from_all_else(
    error: type[SplitFedError],
) -> None:
    for_good = {errors.PrivacyError, errors.BudgetExhausted, errors.NonFiniteLoss, errors.JoinRefused}
    is_of_the_file = issubclass(error, ConfigError | SplitPointError)
    assert error.exit_code == (2 if is_of_the_file else 3 if error in for_good else 1)


def test_a_wrong_split_point_is_also_a_wrong_argument() -> None:
    assert issubclass(SplitPointError, ValueError)
