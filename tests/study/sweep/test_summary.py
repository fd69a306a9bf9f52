"""A sweep in a few lines."""

from typing import Any

from splitfed.study.sweep.command import about
from splitfed.study.sweep.summary import summary
from splitfed.study.sweep.table import FIGURES, columns_of


def row(seed: int, codec: str | None = "int8", **figures: Any) -> dict[str, Any]:
    zeros = dict.fromkeys(FIGURES, 0) | {"epsilon": None, "delta": None, "relation": None, "error": None}
    return dict.fromkeys(columns_of([])) | {"codec": codec, "seed": seed} | zeros | figures


def test_seeds_are_put_together_with_their_spread() -> None:
    rows = [row(0, held_out_loss=1.0, epsilon=2.0, delta=1e-5, relation="replace-one"), row(1, held_out_loss=3.0)]
    rows += [row(0, None, held_out_loss=5.0, activation_up_bytes=2000), row(1, None, error="It broke.")]
    headings, lines, sentences = summary(rows)
    first, second = (dict(zip(headings, line, strict=True)) for line in lines)
    assert (first["codec"], first["runs"], first["loss"], first["epsilon"]) == (
        "int8",
        "2",
        "2.0000 ± 1.4142",  # the sample's: √2
        "2",
    )
    assert (second["codec"], second["runs"], second["loss"]) == ("", "1 of 2", "5.0000")
    assert (second["up kB"], second["down kB"]) == ("2", "0")
    assert "seed" not in headings
    assert sentences[0].startswith("Failed: 1 of 4 runs; ")
    assert sentences[0].endswith("The first: It broke.")
    assert "at delta 1e-05, relation replace-one" in sentences[1]


def test_a_point_at_which_every_run_failed_has_a_line_without_figures() -> None:
    _, lines, _ = summary([row(0, error="It broke.")])
    assert lines == [["int8", "0 of 1", *[""] * 6]]


def test_a_time_is_told_as_roughly_as_it_is_known() -> None:
    assert [about(seconds) for seconds in (7.4, 150, 9000)] == [
        "about 7 s left",
        "about 2 min left",
        "about 2.5 h left",
    ]
