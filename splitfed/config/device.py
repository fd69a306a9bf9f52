"""A device profile: what a device can compute and hold, and how it is connected, as a TOML file."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from splitfed.config.quantities import parse_rate, parse_time
from splitfed.config.section import Section
from splitfed.config.toml_file import read_toml
from splitfed.errors import ConfigError

MatmulDtype = Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")]
RatePoint = Annotated[list[float], Field(min_length=2, max_length=2)]
RateTable = Annotated[list[RatePoint], Field(min_length=1)]

_LEAST_RATE, _LARGEST_RATE = 1e6, 1e17
"""A microcontroller; a rack of accelerators."""

Seconds = Annotated[float, Field(ge=0, le=3600)]
PerSecond = Annotated[float, Field(ge=1e3, le=1e16)]
MemoryBytes = Annotated[int, Field(ge=1_000_000, le=10**15)]


class DeviceSection(Section):
    """Which device this is."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    """Name of the device."""
    source: Annotated[str, Field(min_length=1)]
    """Where the figures come from: measured when and how, or whose data sheet."""
    memory_bytes: MemoryBytes
    """Memory that a process may use."""


class ProcessSection(Section):
    """What a daemon needs before it holds a model."""

    memory_bytes: Annotated[int, Field(ge=0, le=10**12)] = 500_000_000
    """Memory of its libraries."""


class _RatesSection(Section):
    """For each number format, pairs of a size and of FLOP/s at that size."""

    @field_validator("float32", "bfloat16", "float16", check_fields=False)
    @classmethod
    def _is_a_table_of_rates(cls, value: list[list[float]] | None) -> list[list[float]] | None:
        for size, rate in value or ():
            if not size >= 1:
                raise ValueError(f"has the size {size:g}; give 1 or more")
            if not _LEAST_RATE <= rate <= _LARGEST_RATE:
                raise ValueError(
                    f"has a rate of {rate:g} FLOP/s, which no device has; give one from {_LEAST_RATE:g} to "
                    f"{_LARGEST_RATE:g}, or measure it with splitfed profile"
                )
        if value is not None and any(a[0] >= b[0] for a, b in pairwise(value)):
            raise ValueError("has sizes that do not grow; put them in order, each size once")
        return value


class MatmulSection(_RatesSection):
    """How fast matrix products are: for each number format, pairs of FLOPs of one product and FLOP/s."""

    float32: RateTable
    """Rates in float32, which adapters are in whatever the model is in."""
    bfloat16: RateTable | None = None
    """Rates in bfloat16; left out = not measured."""
    float16: RateTable | None = None
    """Rates in float16; left out = not measured."""


class AttentionSection(_RatesSection):
    """How fast a fused attention is: for each number format, pairs of elements of a head and FLOP/s."""

    float32: RateTable | None = None
    """Rates in float32; left out = those of matrix products."""
    bfloat16: RateTable | None = None
    """Rates in bfloat16; left out = those of matrix products."""
    float16: RateTable | None = None
    """Rates in float16; left out = those of matrix products."""


class ComputeSection(Section):
    """How fast everything else is."""

    bandwidth_bytes_per_s: Annotated[float, Field(ge=1e6, le=1e15)]
    """Bytes that elementwise operations read and write in a second."""
    call_s: Annotated[float, Field(ge=0, le=1)]
    """Seconds that calling one operation takes."""
    request_s: Annotated[float, Field(ge=0, le=10)] = 1e-3
    """Seconds that a request takes at its one end, agent or server, beside its computation, its tensors and the way."""
    noise_elements_per_s: PerSecond = 5e7
    """Elements that are clipped and noised in a second."""
    correction: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Measured ÷ computed, for one transformer block in training."""


class CodecRates(Section):
    """Elements that each codec encodes, or decodes, in a second."""

    none: PerSecond = 1e9
    """Rate of "none"."""
    bf16: PerSecond = 5e8
    """Rate of "bf16"."""
    fp16: PerSecond = 5e8
    """Rate of "fp16"."""
    int8: PerSecond = 2e8
    """Rate of "int8"."""

    def rate(self, codec: str) -> float:
        """Give the rate of a codec by its name; one that was never measured counts as the slowest."""
        rates = self.model_dump()
        return float(rates.get(codec, min(rates.values())))


class LinkSection(Section):
    """How a device reaches the server."""

    up_bits_per_s: Annotated[float, Field(ge=100, le=1e13)]
    """Bits per second, device to server."""
    down_bits_per_s: Annotated[float, Field(ge=100, le=1e13)]
    """Bits per second, server to device."""
    latency_s: Seconds
    """Seconds that a round trip of an empty message takes."""

    @property
    def up_bytes_per_s(self) -> float:
        """Bytes per second, device to server."""
        return self.up_bits_per_s / 8

    @property
    def down_bytes_per_s(self) -> float:
        """Bytes per second, server to device."""
        return self.down_bits_per_s / 8


class DeviceProfile(Section):
    """Everything in a device profile."""

    device: DeviceSection
    matmul: MatmulSection
    compute: ComputeSection
    attention: AttentionSection = AttentionSection()
    process: ProcessSection = ProcessSection()
    codecs: CodecRates = CodecRates()
    link: LinkSection | None = None

    def rate(self, dtype: str, flops: float, *, head_size: int = 0) -> float:
        """Give the rate of matrix products of some size, FLOP/s, between the sizes that were measured.

        Args:
            dtype: "float32", "bfloat16" or "float16".
            flops: FLOPs of one product.
            head_size: Elements of a head, for a fused attention; 0 for a plain product.

        Raises:
            ConfigError: If the profile has no rate for the dtype.
        """
        of_heads = getattr(self.attention, dtype, None) if head_size else None
        if of_heads is not None:
            return _between(of_heads, head_size)
        points = getattr(self.matmul, dtype, None)
        if points is None:
            raise ConfigError(
                f"The profile of {self.device.name!r} has no rate for {dtype}; add matmul.{dtype}, or measure the "
                "device with splitfed profile"
            )
        return _between(points, flops)


def _between(points: list[list[float]], size: float) -> float:
    """Give the rate at a size: on a straight line between its neighbours, with both axes logarithmic."""
    if size <= points[0][0]:
        return float(points[0][1])
    for (below, slow), (above, fast) in pairwise(points):
        if size <= above:
            part = math.log(size / below) / math.log(above / below)
            return float(slow * (fast / slow) ** part)
    return float(points[-1][1])


def load_profile(path: Path | str) -> DeviceProfile:
    """Read a device profile.

    Raises:
        ConfigError: If the file cannot be read, is not TOML, or has a key or a figure that is not allowed.
    """
    return read_toml(path, DeviceProfile, if_missing=f"make a profile with splitfed profile --output {path}")


def parse_link(text: str) -> LinkSection:
    """Read a link as people write it: ``20mbit,40ms``, or ``5mbit/50mbit,40ms`` for up and down; then a round trip.

    Raises:
        ConfigError: If it is no link.
    """
    wrong = ConfigError(
        f"The link is {text!r}; write bandwidth and round trip, such as 20mbit,40ms, or up and down, such as "
        "5mbit/50mbit,40ms"
    )
    rates, comma, latency = text.partition(",")
    try:
        up, *down = (parse_rate(rate) for rate in rates.split("/"))
        latency_s = parse_time(latency) if comma else 0.0
        if not comma or len(down) > 1:
            raise wrong
        return LinkSection(up_bits_per_s=up, down_bits_per_s=(down or [up])[0], latency_s=latency_s)
    except ValueError as error:
        raise wrong from error
