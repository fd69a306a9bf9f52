"""What an agent needs: its peak memory above the bare imports ÷ the bytes of its own segments' weights.

Llama-3.2-1B shape, random weights in bfloat16, bottom 1 and top 1, batch 1 × 64 tokens, a server on loopback.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from daemons import Daemons, machine
from shapes import write_words

from splitfed.models import Checkpoint, segment_tensor_names

TOKENS = 64

BARE = """
import splitfed.agent.main
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def segment_bytes(base: Path) -> int:
    """Add up the weights of bottom and top; a tied embedding counts once."""
    names = segment_tensor_names(base, bottom_blocks=1, top_blocks=1)
    checkpoint = Checkpoint(base)
    total = 0
    for name in names["bottom"] | names["top"]:
        tensor = checkpoint.read(name)
        total += tensor.numel() * tensor.element_size()
    return total


def main() -> None:
    """Run a few steps and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="a folder with such a model; made if left out")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = options.base
        if base is None:  # in a process of its own, so that its memory is not ours
            base = folder / "base"
            code = "import sys, torch; from shapes import *; write_model(Path(sys.argv[1]), llama_1b(), torch.bfloat16)"
            subprocess.run([sys.executable, "-c", code, str(base)], check=True, cwd=Path(__file__).parent)
        data = write_words(folder / "data.jsonl", rows=16, tokens=TOKENS - 1, vocabulary=128256)
        bare = subprocess.run([sys.executable, "-c", BARE], check=True, capture_output=True, text=True).stdout
        with Daemons(folder / "run") as daemons:
            address = daemons.serve(
                {
                    "model": {"base": str(base), "bottom_blocks": 1, "top_blocks": 1, "dtype": "bfloat16"},
                    "training": {"rounds": 1, "local_steps": options.steps, "batch_size": 1, "max_tokens": TOKENS},
                }
            )
            daemons.take_part("agent", address, {"agent": {"base": str(base)}, "data": {"path": str(data)}})
            daemons.wait()
            peak_bytes = daemons.peak_bytes("agent")
        weights_bytes = segment_bytes(base)
        above_bytes = peak_bytes - int(bare) * 1024
        result = {
            "machine": machine(),
            "dtype": str(torch.bfloat16),
            "segments_mb": round(weights_bytes / 1e6),
            "agent_peak_mb": round(peak_bytes / 1e6),
            "bare_imports_mb": round(int(bare) * 1024 / 1e6),
            "peak_above_imports_over_segments": round(above_bytes / weights_bytes, 3),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
