"""What a plan promises ÷ what a run does: weights, bytes, step time and peak memory, predicted and measured.

In each turn the device and its link are measured first, then real daemons run on loopback, so that both meet the same
machine. One CPU thread for each process. Weights are those of the checkpoint's own tensors; bytes are what the agent
counted; memory is the kernel's largest of each process. A step's time is that of the rounds after the first, divided by
their steps; what a round takes besides is in it, so that there are the more steps the shorter they are.

Shapes: the Llama of 260 thousand parameters beside the repository (shared/); a Llama of 8 blocks with hidden size 512,
and GPT-2 small, both with random weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agent_memory import segment_bytes
from daemons import Daemons, machine
from shapes import write_words
from transformers import LlamaConfig

from splitfed.config import load_server_config
from splitfed.config.device import DeviceProfile, load_profile
from splitfed.study.cost import SplitPoint, Workload, cost_of, model_shape, peak_memory_bytes, step_time
from splitfed.study.profile_link import measure_link

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260k"
WRITE = "import sys, torch, cost_model; from shapes import *; write_model(Path(sys.argv[1]), {}, torch.float32)"
WRITTEN = {"llama-512": "cost_model.llama_512()", "gpt2-small": "gpt2_small()"}
ROUNDS = 3
VOCABULARY = 32000
SHAPES: dict[str, dict[str, Any]] = {
    "stories260k": {"batch_size": 8, "max_tokens": 128, "local_steps": 40},
    "llama-512": {"batch_size": 4, "max_tokens": 128, "local_steps": 10},
    "gpt2-small": {"batch_size": 4, "max_tokens": 128, "local_steps": 5},
}


def llama_512() -> LlamaConfig:
    """A Llama between the two others: 8 blocks, hidden 512, 32,000 tokens."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )


def measured_device(file: Path) -> DeviceProfile:
    """Measure the device as a user does."""
    command = [sys.executable, "-m", "splitfed", "profile", "--threads", "1", "--output", str(file)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return load_profile(file)


def ratios(folder: Path, base: Path, data: Path, training: dict[str, Any], noise: float) -> dict[str, Any]:
    """Predict and run once; gives predicted ÷ measured, and the times in seconds."""
    folder.mkdir()
    steps = training["local_steps"]
    device = measured_device(folder / "profile.toml")
    with Daemons(folder) as daemons:
        address = daemons.serve(
            {
                "model": {"base": str(base), "bottom_blocks": 1, "top_blocks": 1},
                "training": {"rounds": ROUNDS, **training},
                "privacy": {"noise_multiplier": noise},
                "server": {"threads": 1},
            }
        )
        link = measure_link(address, None)
        own = {
            "agent": {"base": str(base), "threads": 1},
            "data": {"path": str(data)},
            "privacy": {} if noise else {"noise_multiplier": 0.0},
        }
        daemons.take_part("agent", address, own)
        daemons.wait()
        lines = daemons.metrics("agent")
        peaks = {name: daemons.peak_bytes(name) for name in ("agent", "server")}
    workload = Workload.of(load_server_config(folder / "server.toml").shared())
    costs = cost_of(model_shape(base), SplitPoint(1, 1), workload)
    predicted = step_time(costs, device, device, link)
    step_s = statistics.median(line["seconds"] / steps for line in lines[1:])
    crossed = {way: lines[-1][f"bytes_{way}"] - lines[-1][f"adapter_bytes_{way}"] for way in ("up", "down")}
    return {
        "agent's weights": costs.agent.weight_bytes / segment_bytes(base),
        "bytes up": steps * costs.link.up_bytes / crossed["up"],
        "bytes down": steps * costs.link.down_bytes / crossed["down"],
        "adapter up": costs.link.adapter_up_bytes / lines[-1]["adapter_bytes_up"],
        "step time": predicted.step_s / step_s,
        "agent's peak": peak_memory_bytes(costs.agent, device) / peaks["agent"],
        "server's peak": peak_memory_bytes(costs.server, device) / peaks["server"],
        "step_s": step_s,
        "of it agent, server, link": [round(x, 4) for x in (predicted.agent_s, predicted.server_s, predicted.link_s)],
        "agent_peak_mb": peaks["agent"] / 1e6,
        "server_peak_mb": peaks["server"] / 1e6,
        "correction": device.compute.correction,
        "request_s": device.compute.request_s,
    }


def main() -> None:
    """Run every shape in turn, without noise and with it, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=tuple(SHAPES))
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = {shape: folder / shape if shape in WRITTEN else STORIES for shape in SHAPES}
        for shape in WRITTEN.keys() & set(options.shapes):  # in a process of its own, so that its memory is not ours
            command = [sys.executable, "-c", WRITE.format(WRITTEN[shape]), str(bases[shape])]
            subprocess.run(command, check=True, cwd=Path(__file__).parent)
        words = write_words(folder / "words.jsonl", rows=64, tokens=256, vocabulary=VOCABULARY)
        for turn in range(options.turns):
            for shape in options.shapes:
                if not bases[shape].is_dir():
                    print(f"{shape}: skipped, {bases[shape]} is not there")
                    continue
                for noise in (0.0, 0.002):
                    run = folder / f"{turn}-{shape}-{noise}"
                    one = ratios(run, bases[shape], words, SHAPES[shape], noise)
                    key = f"{shape}, {'noise' if noise else 'no noise'}"
                    found.setdefault(key, []).append(one)
                    print(f"turn {turn + 1}, {key}: {json.dumps(_rounded(one))}", flush=True)
    table = {
        key: {
            what: round(statistics.median(one[what] for one in several), 3)
            for what, value in several[0].items()
            if isinstance(value, float)
        }
        for key, several in found.items()
    }
    print(json.dumps({"machine": machine(), "predicted_over_measured": table}, indent=1))


def _rounded(one: dict[str, Any]) -> dict[str, Any]:
    return {what: round(value, 4) if isinstance(value, float) else value for what, value in one.items()}


if __name__ == "__main__":
    main()
