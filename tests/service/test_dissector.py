"""Every frame that an agent sends in a whole round, taken apart: with noise on, only noised payloads know the data."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from splitfed.compress import get_codec
from splitfed.config import AgentPrivacySection, CodecSection
from tests.service.conftest import server_config
from tests.service.cutting_proxy import CuttingProxy
from tests.service.local import agent_config, run_agent_here, serving
from tests.service.overheard import Overheard, assert_fields_say_nothing, assert_headers_are_grpc_s_own, watch_gates

ROWS, HELD_OUT = 9, 3
B, T, STEPS = 4, 32, 2
INT8 = CodecSection()


def whole_round(folder: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], **privacy: Any) -> Overheard:
    """Run one agent for a round, and give what crossed the network."""
    folder.mkdir()
    train, held_out = folder / "a.jsonl", folder / "held_out.jsonl"
    train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:ROWS]))
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[ROWS:]))
    training = {"rounds": 1, "local_steps": STEPS, "batch_size": B, "micro_batch_size": 2, "max_tokens": T}
    config = server_config(folder, training=training, codecs=INT8)
    policy = AgentPrivacySection(**{"noise_multiplier": 0.5, **privacy})
    released = watch_gates(monkeypatch)
    with serving(config) as server:
        proxy = CuttingProxy(server.address)
        agent = agent_config(folder, "a", proxy.address, train, privacy=policy)
        data = agent.data.model_copy(update={"held_out_path": str(held_out)})
        run_agent_here(agent.model_copy(update={"data": data}))
        proxy.close()
    monkeypatch.undo()
    return Overheard(proxy, folder / "a", released[threading.current_thread().name])


SHORT = [f"{n} is {n}" for n in range(ROWS + HELD_OUT)]
LONG = [f"A different text, number {n}: {'no, ' * (n % 4)}never." for n in range(ROWS + HELD_OUT)]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> list[Overheard]:
    """The same agent in the same run, twice: its texts differ in length, in tokens, and in what carries loss."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return [whole_round(tmp_path_factory.mktemp("r") / name, monkeypatch, texts) for name, texts in
                (("short", SHORT), ("long", LONG))]  # fmt: skip


def test_a_whole_round_was_seen(rounds: list[Overheard]) -> None:
    """Else the tests below would say nothing."""
    for seen in rounds:
        bodies = Counter(message.WhichOneof("body") for method, message in seen.messages() if method == "Train")
        assert bodies["forward"] == STEPS * 2 + 2  # two micro-batches a step, and three held-out examples in two
        assert bodies["backward"] == STEPS * 2
        assert bodies["step"] == STEPS
        methods = {method for method, _ in seen.messages()}
        assert methods >= {"Describe", "Join", "Watch", "FetchAdapter", "Train", "SubmitAdapter"}


def test_no_field_is_set_but_those_that_are_known_to_say_nothing(rounds: list[Overheard]) -> None:
    """No token ids, no labels, no loss, no mask, no positions, no weight and no count that depends on the data."""
    for seen in rounds:
        assert_fields_say_nothing(
            seen, {"weight": {1}, "header.tokens": {STEPS * B * T}}, shapes={(2, T, 128), (1, T, 128)}
        )


def test_all_but_the_payloads_is_the_same_whatever_the_text(rounds: list[Overheard]) -> None:
    """Calls and their order within a stream, numbers of messages, sizes, every field, every header."""
    assert rounds[0].outside() == rounds[1].outside()


def test_headers_are_grpc_s_own(rounds: list[Overheard]) -> None:
    for seen in rounds:
        assert_headers_are_grpc_s_own(seen)


def test_every_payload_is_what_the_gate_let_out_and_nothing_more(rounds: list[Overheard]) -> None:
    codec = get_codec("int8")
    for seen in rounds:
        payloads = seen.payloads()
        assert payloads.keys() == {"forward", "backward", "SubmitAdapter"}
        assert payloads["forward"] == [codec.encode(released) for released in seen.released["smashed"]]
        assert payloads["backward"] == [codec.encode(released / B) for released in seen.released["output_gradient"]]
        (update,) = seen.released["adapter_update"]
        assert payloads["SubmitAdapter"] == [get_codec("none").encode(update[name]) for name in sorted(update)]


def test_no_row_on_the_wire_is_zero_or_repeated(rounds: list[Overheard]) -> None:
    """Texts of five tokens leave 27 rows of padding, alike before the noise; so are rows without a label."""
    for seen in rounds:
        for channel in ("smashed", "output_gradient"):
            rows = torch.cat([released.flatten(0, 1) for released in seen.released[channel]])
            codec = get_codec("int8")
            crossed = codec.decode(codec.encode(rows), tuple(rows.shape), rows.dtype)
            assert len(torch.unique(crossed, dim=0)) == len(crossed)
            assert crossed.count_nonzero(dim=1).min() > 0


def test_every_payload_has_its_line_in_the_ledger(rounds: list[Overheard]) -> None:
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
        whole_round(tmp_path / name, monkeypatch, texts, noise_multiplier=0.0)
        for name, texts in (("s", SHORT), ("l", LONG))
    ]
    told = [one.fields() for one in seen]
    assert told[0]["forward.smashed.shape"].isdisjoint(told[1]["forward.smashed.shape"])
    assert told[0]["header.tokens"].isdisjoint(told[1]["header.tokens"])
    assert told[0]["weight"] == {ROWS}
