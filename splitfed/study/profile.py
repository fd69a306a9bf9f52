"""Measure a device: matrix products in the shapes that a step has, memory, calls, codecs, noise.

Each figure is the best of several tries: what else runs on a machine only ever makes it slower.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from typing import Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from splitfed.compress import CODECS
from splitfed.config import TrainingSection
from splitfed.config.device import (
    AttentionSection,
    CodecRates,
    ComputeSection,
    DeviceProfile,
    DeviceSection,
    LinkSection,
    MatmulSection,
    ProcessSection,
)
from splitfed.models import LoraSettings, Trunk, adapter_parameters, add_adapter, partition
from splitfed.privacy import GaussianSequenceMechanism
from splitfed.study.cost.parts import block_cost
from splitfed.study.cost.shape import DTYPES, ModelShape, model_shape
from splitfed.study.cost.timing import compute_s
from splitfed.study.cost.workload import Workload
from splitfed.study.profile_request import request_s
from splitfed.training.optimiser import StepOptimiser
from splitfed.training.runtime import prepare_process

Progress = Callable[[str], None]

_ROWS: Final = 512
_WIDTH, _NARROW = 384, 64
_WIDTHS: Final = (16, 64, 256, 768, 2048)
_ATTENTION: Final = (2, 8, 128)
_HEAD_SIZES: Final = (8, 32, 128)
_PRODUCTS: Final = 2 + 5  # of an attention's forward, and of its backward
_CROSSING: Final = (4, 128, 768)
_CHAIN_ELEMENTS: Final = 1 << 21
_TRY_S: Final = 0.005
_ENOUGH_S: Final = 0.5
_LONG_S: Final = 0.03
_TRIES: Final = 20
_BARE = """
import resource, splitfed.agent.main
from splitfed.study.profile import tiny_step
tiny_step()
try:
    status = open("/proc/self/status").read()  # the largest so far of this program alone, not of who started it
    print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure_device(
    *, threads: int | None = None, link: LinkSection | None = None, on_progress: Progress = lambda what: None
) -> DeviceProfile:
    """Measure this device, in ten to twenty seconds.

    Args:
        threads: CPU threads for arithmetic; None: torch's choice, which is also the daemons'.
        link: What was measured of the way to a server; None: nothing was.
        on_progress: Told what is measured now.
    """
    prepare_process(threads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        products, attentions = {}, {}
        for dtype in DTYPES:
            on_progress(f"matrix products in {dtype}")
            products[dtype] = _rates(dtype)
            attentions[dtype] = _attention_rates(dtype)
        on_progress("memory")
        bandwidth = _bandwidth()
        on_progress("codecs and noise")
        codecs = CodecRates(**{name: _codec_rate(name) for name in CODECS if name in CodecRates.model_fields})
        noise = _noise_rate()
        on_progress("a transformer block")
        call_s = _call_s()
    on_progress("memory of a process")
    process = ProcessSection(memory_bytes=_bare_process_bytes())
    profile = DeviceProfile(
        device=DeviceSection(name=platform.node() or "this device", source=_source(), memory_bytes=_memory_bytes()),
        matmul=MatmulSection(**products),
        attention=AttentionSection(**attentions),
        compute=ComputeSection(bandwidth_bytes_per_s=bandwidth, call_s=call_s, noise_elements_per_s=noise),
        process=process,
        codecs=codecs,
        link=link,
    )
    on_progress("a larger transformer block")
    profile = _corrected(profile)
    on_progress("requests")
    return _with(profile, request_s=request_s(_model(_NARROW, blocks=3), profile))


def _rates(dtype: str) -> list[list[float]]:
    """Measure products of [512, K] and [K, K], for several K; gives pairs of FLOPs and FLOP/s, rising in FLOPs."""
    points = []
    for width in _WIDTHS:
        a, b = (torch.randn(rows, width).to(DTYPES[dtype]) for rows in (_ROWS, width))
        flops = 2.0 * _ROWS * width * width
        points.append([flops, flops / _best_s(lambda a=a, b=b: a @ b)])  # type: ignore[misc]
        if points[-1][0] / points[-1][1] > _LONG_S:
            break  # larger ones are no faster, and take long
    return points


def _attention_rates(dtype: str) -> list[list[float]]:
    """Measure a fused attention, forward and backward; gives pairs of elements of a head and FLOP/s."""
    sequences, heads, tokens = _ATTENTION
    points = []
    for size in _HEAD_SIZES:
        query, key, value, gradient = (
            torch.randn(sequences, tokens, heads, size).to(DTYPES[dtype]).transpose(1, 2) for _ in range(4)
        )
        for each in (query, key, value):
            each.requires_grad_()

        def both_ways(query=query, key=key, value=value, gradient=gradient) -> None:  # type: ignore[no-untyped-def]
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.autograd.grad(output, (query, key, value), gradient)

        flops = _PRODUCTS * 2.0 * sequences * heads * tokens * tokens * size
        points.append([size, flops / _best_s(both_ways)])
    return points


def _bandwidth() -> float:
    """Measure bytes per second of what stands between matrix products: sums, products, norms, activations."""
    x, y = torch.randn(2, _CHAIN_ELEMENTS // 1024, 1024).unbind()

    def chain() -> None:
        torch.tanh(x * y + x)
        torch.nn.functional.layer_norm(x, (1024,))

    traffic_bytes = (3 + 3 + 2 + 2) * _CHAIN_ELEMENTS * x.element_size()
    return traffic_bytes / _best_s(chain)


def _codec_rate(name: str) -> float:
    codec, x_BTD = CODECS[name], torch.randn(_CROSSING)

    def there_and_back() -> None:
        codec.decode(codec.encode(x_BTD), _CROSSING)

    return 2 * x_BTD.numel() / _best_s(there_and_back)


def _noise_rate() -> float:
    mechanism, x_BTD = GaussianSequenceMechanism(1.0, 1.0), torch.randn(_CROSSING)
    return x_BTD.numel() / _best_s(lambda: mechanism.release(x_BTD), enough_s=2 * _ENOUGH_S)


def _call_s() -> float:
    """Measure what a call takes: a block so small that nothing else counts."""
    shape = _block_of(_NARROW)
    workload = Workload(batch_size=1, tokens=8)
    cost = block_cost(shape, 0, workload, goes_on=True)
    return _block_s(_NARROW, workload) / (cost.forward + cost.backward).operations


def _corrected(profile: DeviceProfile) -> DeviceProfile:
    """Note by how much a block in training takes longer, or less long, than its parts."""
    workload = Workload(batch_size=2, tokens=128)
    cost = block_cost(_block_of(_WIDTH), 0, workload, goes_on=True)
    computed_s = compute_s(cost.forward + cost.backward, profile)
    correction = min(max(_block_s(_WIDTH, workload) / computed_s, 0.1), 10.0)
    return _with(profile, correction=correction)


def _with(profile: DeviceProfile, **figures: float) -> DeviceProfile:
    return profile.model_copy(update={"compute": profile.compute.model_copy(update=figures)})


def _config_of(width: int, *, blocks: int = 1) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )


def _model(width: int, *, blocks: int = 1) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(_config_of(width, blocks=blocks))


def _block_of(width: int) -> ModelShape:
    return model_shape(_config_of(width))


def _block_s(width: int, workload: Workload) -> float:
    """Time a real block with its adapter, forward and backward."""
    trunk, hidden_BTD, gradient_BTD = _block(width, workload)
    return _best_s(lambda: trunk(hidden_BTD).backward(gradient_BTD), enough_s=4 * _ENOUGH_S)


def _block(width: int, workload: Workload) -> tuple[Trunk, Tensor, Tensor]:
    """Give a real block with its adapter, what enters it, and a gradient of what leaves it."""
    trunk = partition(_model(width), bottom_blocks=0, top_blocks=0).trunk
    add_adapter(trunk, LoraSettings(), seed=0)
    trunk.train()
    hidden_BTD, gradient_BTD = torch.randn(2, workload.sequences, workload.tokens, width).unbind()
    return trunk, hidden_BTD.requires_grad_(), gradient_BTD


def _best_s(work: Callable[[], object], *, enough_s: float = _ENOUGH_S) -> float:
    """Give the seconds of the fastest try, after a warm-up; short work is done often in a try, long work tried less.

    With one thread it is the seconds on the processor, which other processes take none of.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    begun_s, started_s = time.perf_counter(), clock()
    work()
    best_s = clock() - started_s
    times = max(1, round(_TRY_S / max(best_s, 1e-9)))
    for _ in range(_TRIES):
        if time.perf_counter() - begun_s > enough_s:
            break
        started_s = clock()
        for _ in range(times):
            work()
        best_s = min(best_s, (clock() - started_s) / times)
    return best_s


def tiny_step() -> None:
    """Make a step of a block so small that what it takes is what its libraries take."""
    prepare_process(1)
    trunk, hidden_BTD, gradient_BTD = _block(_NARROW, Workload(batch_size=1, tokens=8))
    trunk(hidden_BTD).backward(gradient_BTD)
    StepOptimiser(adapter_parameters(trunk), training=TrainingSection()).step(0)


def _memory_bytes() -> int:
    """Give the memory that is there for a process now; where the system does not say, all that is installed."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bare_process_bytes() -> int:
    """Give the memory of an agent whose model is too small to count, with all that its first step loads."""
    kib = subprocess.run([sys.executable, "-c", _BARE], check=True, capture_output=True, text=True).stdout
    return int(kib) * (1 if sys.platform == "darwin" else 1024)


def _source() -> str:
    from splitfed import __version__

    return (
        f"splitfed {__version__} profile, {date.today().isoformat()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}"
    )
