"""Device profiles: what is read back, what is refused, and the rates between those that were measured."""

from pathlib import Path

import pytest

from splitfed.config import to_toml
from splitfed.config.device import load_profile, parse_link
from splitfed.errors import ConfigError

GOOD = """
[device]
name = "phone"
source = "data sheet"
memory_bytes = 4000000000

[matmul]
float32 = [[1e6, 1e9], [1e8, 4e9]]

[compute]
bandwidth_bytes_per_s = 1e10
call_s = 1e-5

[link]
up_bits_per_s = 20e6
down_bits_per_s = 50e6
latency_s = 0.04
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "phone.toml").write_text(GOOD)
    return tmp_path / "phone.toml"


def test_a_profile_is_written_as_it_is_read(file: Path, tmp_path: Path) -> None:
    profile = load_profile(file)
    (tmp_path / "copy.toml").write_text(to_toml(profile))
    assert load_profile(tmp_path / "copy.toml") == profile


def test_rates_lie_between_those_of_the_next_sizes(file: Path) -> None:
    profile = load_profile(file)
    rates = [profile.rate("float32", flops) for flops in (1, 1e6, 1e7, 1e8, 1e12)]
    assert rates == pytest.approx([1e9, 1e9, 2e9, 4e9, 4e9])


def test_attention_has_rates_by_size_of_head_where_they_were_measured(file: Path) -> None:
    assert load_profile(file).rate("float32", 1e8, head_size=8) == pytest.approx(4e9)
    file.write_text(GOOD + "\n[attention]\nfloat32 = [[8, 1e8], [32, 4e8]]\n")
    profile = load_profile(file)
    rates = [profile.rate("float32", 1e8, head_size=size) for size in (0, 4, 8, 16, 32, 256)]
    assert rates == pytest.approx([4e9, 1e8, 1e8, 2e8, 4e8, 4e8])


def test_a_number_format_that_was_not_measured_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"phone.*bfloat16.*splitfed profile"):
        load_profile(file).rate("bfloat16", 1e6)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("memory_bytes = 4000000000", "memory_bytes = 0", "device.memory_bytes must be at least 1000000"),
        ("memory_bytes = 4000000000", "memory_bytes = -5", "device.memory_bytes must be at least 1000000"),
        ("memory_bytes = 4000000000", "", "device.memory_bytes is missing"),
        ("1e8, 4e9", "1e8, 1e30", "1e+30 FLOP/s, which no device has"),
        ("1e8, 4e9", "1e8, 0.0", "0 FLOP/s, which no device has"),
        ("1e8, 4e9", "1e8, nan", "must be a finite number"),
        ("1e8, 4e9", "1e5, 4e9", "sizes that do not grow"),
        ("[[1e6, 1e9], [1e8, 4e9]]", "[]", "must be a list that is not empty"),
        ("call_s = 1e-5", "call_s = inf", "must be a finite number"),
        ("call_s = 1e-5", "calls_s = 1e-5", "did you mean compute.call_s?"),
        ("latency_s = 0.04", "latency_s = -0.04", "link.latency_s must be at least 0"),
        ("up_bits_per_s = 20e6", 'up_bits_per_s = "20mbit"', "link.up_bits_per_s must be a number"),
        ("call_s = 1e-5", "call_s = 1e-5\nrequest_s = 60", "compute.request_s must be at most 10"),
        ("[link]", "[attention]\nfloat16 = [[0, 1e9]]\n[link]", "has the size 0; give 1 or more"),
        ('source = "data sheet"', "", "device.source is missing"),
        ("[compute]", "[compute", "is not valid TOML"),
    ],
)
def test_a_figure_that_no_device_has_is_refused_in_a_sentence(file: Path, before: str, after: str, said: str) -> None:
    assert before in GOOD
    file.write_text(GOOD.replace(before, after))
    with pytest.raises(ConfigError) as refused:
        load_profile(file)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_profile_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; make a profile with splitfed profile --output"):
        load_profile(tmp_path / "gone.toml")


def test_a_link_is_bandwidth_and_round_trip() -> None:
    link = parse_link("20mbit,40ms")
    assert (link.up_bytes_per_s, link.down_bytes_per_s, link.latency_s) == (2.5e6, 2.5e6, 0.04)
    link = parse_link("5mbit/50mbit,10ms")
    assert (link.up_bits_per_s, link.down_bits_per_s) == (5e6, 50e6)


@pytest.mark.parametrize(
    "text", ["", "20mbit", "20mbit,", "40ms,20mbit", "1mbit/2mbit/3mbit,1ms", "1bit,1ms", "1gbit,9h"]
)
def test_what_is_no_link_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="20mbit,40ms"):
        parse_link(text)
