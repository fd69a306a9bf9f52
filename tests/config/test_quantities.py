"""Sizes, times and rates as people write them."""

import pytest

from splitfed.config.quantities import parse_rate, parse_size, parse_time


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1.5 gib", 3 * 2**29), ("300b", 300), (" 2 TB ", 2 * 10**12)],
)
def test_sizes_are_decimal_or_binary_by_their_unit(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5), ("40ms", 0.04), ("2min", 120), ("250us", 2.5e-4)])
def test_times_are_seconds(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


def test_rates_are_bits_per_second() -> None:
    assert parse_rate("20mbit") == 20e6
    assert parse_rate("1.5Gbit") == 1.5e9


@pytest.mark.parametrize(
    "text", ["", "4", "GB", "-4GB", "0GB", "4 apples", "4e9GB", "1" * 400 + "GB", "nan GB", "inf s"]
)
def test_what_is_no_quantity_is_refused_with_an_example(text: str) -> None:
    for parse, example in ((parse_size, "4GB"), (parse_time, "5s"), (parse_rate, "20mbit")):
        with pytest.raises(ValueError, match=example):
            parse(text)
