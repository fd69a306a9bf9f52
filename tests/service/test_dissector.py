"""Every frame that an agent sends in a whole round, taken apart: with noise on, only noised payloads know the data."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf.message import Message

from splitfed.compress import get_codec
from splitfed.config import AgentPrivacySection, CodecSection
from splitfed.privacy import read_ledger
from splitfed.training.releases import LedgeredReleases
from tests.service.conftest import server_config
from tests.service.cutting_proxy import CuttingProxy
from tests.service.dissector import Call, dissect, leaves
from tests.service.local import agent_config, run_agent_here, serving

ROWS, HELD_OUT = 9, 3
B, T, STEPS = 4, 32, 2
INT8 = CodecSection()

FREE = {  # what an agent may say of itself and of its place in the run
    "protocol_version", "run_id", "client", "agent_id", "config_sha256", "file", "tensor", "codecs", "round",
    "bottom_blocks", "top_blocks", "rank", "personal",
    "tensors[].name", "tensors[].dtype", "tensors[].shape", "tensors[].sha256", "number", "received_below",
    "open.run_id", "open.client", "open.agent_id", "open.round", "open.first_block", "open.end_block",
    "forward.kind", "forward.step", "forward.micro_batch", "forward.wants_smashed_gradient",
    "backward.step", "backward.micro_batch", "step.step",
    "header.run_id", "header.client", "header.agent_id", "header.round", "header.tensors",
    "tensor.name", "tensor.tensor.shape", "tensor.tensor.dtype", "tensor.tensor.codec", "tensor.tensor.payload_bytes",
}  # fmt: skip
PAYLOAD = {"forward.smashed.data", "backward.output_gradient.data", "tensor.tensor.data", "chunk"}
SHAPED = ("forward.smashed", "backward.output_gradient")
CHANGING = {"agent_id", "open.agent_id", "header.agent_id", "received_below"}  # random, or of the server's answers
HEADERS = {
    ":scheme": "http", ":method": "POST", "te": "trailers", "content-type": "application/grpc",
    "grpc-accept-encoding": None, "accept-encoding": None, "user-agent": None, "grpc-timeout": None,
    ":path": None, ":authority": None,
}  # fmt: skip


class Round:
    """One agent's whole round, as it crossed the network."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], **privacy: Any) -> None:
        folder.mkdir()
        train, held_out = folder / "a.jsonl", folder / "held_out.jsonl"
        train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:ROWS]))
        held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[ROWS:]))
        self.released: dict[str, list[Any]] = {"smashed": [], "output_gradient": [], "adapter_update": []}
        for name, found in self.released.items():
            monkeypatch.setattr(LedgeredReleases, name, _remembering(getattr(LedgeredReleases, name), found))
        training = {"rounds": 1, "local_steps": STEPS, "batch_size": B, "micro_batch_size": 2, "max_tokens": T}
        config = server_config(folder, training=training, codecs=INT8)
        policy = AgentPrivacySection(**{"noise_multiplier": 0.5, **privacy})
        with serving(config) as server:
            proxy = CuttingProxy(server.address)
            agent = agent_config(folder, "a", proxy.address, train, privacy=policy)
            data = agent.data.model_copy(update={"held_out_path": str(held_out)})
            run_agent_here(agent.model_copy(update={"data": data}))
            proxy.close()
        monkeypatch.undo()
        self.calls: list[Call] = [call for sent in proxy.sent for call in dissect(bytes(sent))]
        self.rows = read_ledger(folder / "a" / "ledger.jsonl").rows

    def messages(self) -> list[tuple[str, Message]]:
        return [(call.path, message) for call in self.calls for message in call.messages()]


def _remembering(method: Any, found: list[Any]) -> Any:
    def remember(self: Any, *arguments: Any, **named: Any) -> Any:
        released = method(self, *arguments, **named)
        found.append({n: t.clone() for n, t in released.items()} if isinstance(released, dict) else released.detach())
        return released

    return remember


SHORT = [f"{n} is {n}" for n in range(ROWS + HELD_OUT)]
LONG = [f"A different text, number {n}: {'no, ' * (n % 4)}never." for n in range(ROWS + HELD_OUT)]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[Round]:
    """The same agent in the same run, twice: its texts differ in length, in tokens, and in what carries loss."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return [Round(tmp_path_factory.mktemp("r") / name, monkeypatch, texts) for name, texts in
                (("short", SHORT), ("long", LONG))]  # fmt: skip


def test_a_whole_round_was_seen(rounds: list[Round]) -> None:
    """Else the tests below would say nothing."""
    for seen in rounds:
        bodies = Counter(message.WhichOneof("body") for path, message in seen.messages() if path.endswith("/Train"))
        assert bodies["forward"] == STEPS * 2 + 2  # two micro-batches a step, and three held-out examples in two
        assert bodies["backward"] == STEPS * 2
        assert bodies["step"] == STEPS
        paths = {call.path.rpartition("/")[2] for call in seen.calls}
        assert paths >= {"Describe", "Join", "Watch", "FetchAdapter", "Train", "SubmitAdapter"}


def test_no_field_is_set_but_those_that_are_known_to_say_nothing(rounds: list[Round]) -> None:
    """No token ids, no labels, no loss, no mask, no positions, no weight and no count that depends on the data."""
    for seen in rounds:
        for path, message in seen.messages():
            for name, value in leaves(message):
                if name in FREE | PAYLOAD:
                    continue
                if name == "weight":
                    assert value == 1
                elif name == "header.tokens":
                    assert value == STEPS * B * T
                else:
                    tensor, _, attribute = name.rpartition(".")
                    assert tensor in SHAPED, f"{path} says {name} = {value!r}"
                    if attribute == "shape":
                        assert value in ([2, T, 128], [1, T, 128]), f"{name} = {value!r}"
                    else:
                        assert attribute in ("dtype", "codec", "payload_bytes"), f"{path} says {name} = {value!r}"


def test_all_but_the_payloads_is_the_same_whatever_the_text(rounds: list[Round]) -> None:
    """Calls and their order within a stream, numbers of messages, sizes, every field, every header."""
    seen = []
    for one in rounds:
        calls = []
        for call in one.calls:
            outside = [
                [(name, value if name not in PAYLOAD else len(value)) for name, value in leaves(message)
                 if name not in CHANGING]
                for message in call.messages()
            ]  # fmt: skip
            headers = [(name, value) for name, value in call.headers if HEADERS.get(name, value) is not None]
            calls.append((call.path, headers, outside))
        seen.append(sorted(calls, key=str))
    assert seen[0] == seen[1]


def test_headers_are_grpc_s_own(rounds: list[Round]) -> None:
    for seen in rounds:
        for call in seen.calls:
            for name, value in call.headers:
                assert name in HEADERS
                assert HEADERS[name] in (None, value)


def test_every_payload_is_what_the_gate_let_out_and_nothing_more(rounds: list[Round]) -> None:
    for seen in rounds:
        payloads: dict[str, list[bytes]] = {"forward": [], "backward": [], "adapter": []}
        current = payloads["forward"]
        for path, message in seen.messages():
            fields = dict(leaves(message))
            if "chunk" in fields:
                current[-1] += fields["chunk"]
            elif path.endswith("/SubmitAdapter") and "tensor.name" in fields:
                current = payloads["adapter"]
                current.append(fields["tensor.tensor.data"])
            for body, tensor in (("forward", SHAPED[0]), ("backward", SHAPED[1])):
                if f"{tensor}.data" in fields:
                    current = payloads[body]
                    current.append(fields[f"{tensor}.data"])
        codec = get_codec("int8")
        assert payloads["forward"] == [codec.encode(released) for released in seen.released["smashed"]]
        assert payloads["backward"] == [codec.encode(released / B) for released in seen.released["output_gradient"]]
        (update,) = seen.released["adapter_update"]
        assert sorted(payloads["adapter"]) == sorted(
            bytes(get_codec("none").encode(tensor)) for tensor in update.values()
        )


def test_no_row_on_the_wire_is_zero_or_repeated(rounds: list[Round]) -> None:
    """Texts of five tokens leave 27 rows of padding, alike before the noise; so are rows without a label."""
    for seen in rounds:
        for channel in ("smashed", "output_gradient"):
            rows = torch.cat([released.flatten(0, 1) for released in seen.released[channel]])
            codec = get_codec("int8")
            crossed = codec.decode(codec.encode(rows), tuple(rows.shape), rows.dtype)
            assert len(torch.unique(crossed, dim=0)) == len(crossed)
            assert crossed.count_nonzero(dim=1).min() > 0


def test_every_payload_has_its_line_in_the_ledger(rounds: list[Round]) -> None:
    for seen in rounds:
        charged = Counter[str]()
        for row in seen.rows:
            charged[row.channel] += row.sequences
        sent = {channel: sum(map(len, seen.released[channel])) for channel in ("smashed", "output_gradient")}
        assert sent == {"smashed": STEPS * B + HELD_OUT, "output_gradient": STEPS * B}
        assert charged == {**sent, "adapter": STEPS * B}
        assert all(row.noise_multiplier > 0 for row in seen.rows)


def test_without_noise_the_dissector_sees_lengths_and_the_number_of_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not find above, it can find."""
    seen = [
        Round(tmp_path / name, monkeypatch, texts, noise_multiplier=0.0) for name, texts in (("s", SHORT), ("l", LONG))
    ]
    told = [{name: value for _, message in one.messages() for name, value in leaves(message)} for one in seen]
    assert told[0]["forward.smashed.shape"] != told[1]["forward.smashed.shape"]
    assert told[0]["header.tokens"] != told[1]["header.tokens"]
    assert told[0]["weight"] == ROWS
