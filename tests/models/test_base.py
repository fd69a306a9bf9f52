from pathlib import Path

import pytest

from splitfed.assets import base_model_folder
from splitfed.errors import WeightsError
from splitfed.models import resolve_base


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_base(str(tmp_path)) == tmp_path


def test_demo_is_the_model_that_comes_with_splitfed() -> None:
    assert resolve_base("demo") == base_model_folder()


@pytest.mark.parametrize("base", ["nobody/nothing-here", "/no/such/folder", "../nor/this/one", ""])
def test_what_is_neither_folder_nor_known_to_the_hub_is_refused_by_name(base: str) -> None:
    with pytest.raises(WeightsError, match=f"base model {base!r}"):
        resolve_base(base)
