"""`splitfed generate` against real servers: what it writes, what leaves, what it costs, and whom it refuses."""

import json
import math
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitfed
from splitfed.agent.generate import generate_here
from splitfed.agent.state import AgentState
from splitfed.config import AgentConfig, AgentPrivacySection, ServerConfig
from splitfed.errors import BudgetExhausted, ConfigError, JoinRefused, NonFiniteLoss, ServerUnreachable
from splitfed.privacy import gaussian_epsilon
from splitfed.proto.v1 import generation_pb2_grpc
from splitfed.training.prompts import Wanted
from tests.service.certificates import Authority
from tests.service.conftest import OPEN, server_config, write_texts
from tests.service.cutting_proxy import CuttingProxy
from tests.service.daemons import Daemons
from tests.service.dissector import dissect, leaves
from tests.service.local import LocalServer, agent_config, run_agent_here, serving, start_agent, wait_until
from tests.service.served import Served, serving_a_finished_run

T = 32
PROMPTS = ["A number says that", "and times seven"]
NOISY = AgentPrivacySection(noise_multiplier=2.0, clipping_norm_smashed=3.0)
ONCE = gaussian_epsilon(1 / 2.0**2, 1e-5)


def generated(config: AgentConfig, *prompts: str, **wanted: Any) -> list[list[int]]:
    return generate_here(config, Wanted(prompts or PROMPTS, **wanted), write=lambda text: None)


def stock_model(run: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(splitfed.base_model_folder(), dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / "adapter").eval()


def stock(config: ServerConfig, prompt: str, max_tokens: int) -> list[int]:
    return stock_text(stock_model(config.run.directory), prompt, max_tokens)


def stock_text(model: Any, prompt: str, max_tokens: int) -> list[int]:
    ids = AutoTokenizer.from_pretrained(splitfed.base_model_folder())(prompt, return_tensors="pt")["input_ids"]
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_length=max_tokens, do_sample=False, pad_token_id=0
    )
    return whole[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_a_finished_run(tmp_path_factory.mktemp("served")) as served:
        yield served


def test_a_run_that_is_over_is_served_until_its_server_is_stopped(served: Served) -> None:
    for _ in range(2):
        assert generated(served.agent()) == [stock(served.config, prompt, T) for prompt in PROMPTS]
    assert not served.server.ended.done()
    rows = [row for row in served.ledger("a") if row.kind == "generate"]
    assert [(row.channel, row.noise_multiplier, row.round) for row in rows] == [("smashed", 0.0, 2)] * 2


def test_the_adapter_takes_part(served: Served) -> None:
    base = AutoModelForCausalLM.from_pretrained(splitfed.base_model_folder(), dtype=torch.float32)
    assert stock(served.config, PROMPTS[0], T) != stock_text(base, PROMPTS[0], T)


def test_text_comes_piece_by_piece_and_prompts_of_a_file_come_in_their_order(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    pieces: list[str] = []
    wanted = Wanted(files=[str(file)], max_tokens=24)
    texts = generate_here(served.agent(), wanted, write=pieces.append)
    assert texts == [stock(served.config, prompt, 24) for prompt in PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(splitfed.base_model_folder())
    assert "".join(pieces) == "".join(f"{tokenizer.decode(text, skip_special_tokens=True)}\n" for text in texts)
    assert len(pieces) > 2 * len(PROMPTS)


def rows_sent(proxy: CuttingProxy) -> list[list[bytes]]:
    """Give the rows of each stream of a sequence, in the order of connections."""
    found = []
    for sent in proxy.sent:
        for call in dissect(bytes(sent)):
            if call.path.endswith("/Generate"):
                whole, rest = b"", call.body
                while len(rest) >= 5 and len(rest) >= 5 + struct.unpack(">I", rest[1:5])[0]:
                    size = 5 + struct.unpack(">I", rest[1:5])[0]
                    whole, rest = whole + rest[:size], rest[size:]
                call.body = whole
                messages = [message for message in call.messages() if message.WhichOneof("body") == "smashed"]
                found.append([message.SerializeToString() for message in messages])
    return found


@pytest.mark.parametrize("privacy", [None, NOISY], ids=["open", "noisy"])
def test_a_stream_that_breaks_gets_the_same_bytes_again_and_nothing_is_charged_twice(
    served: Served, privacy: AgentPrivacySection | None
) -> None:
    proxy = CuttingProxy(served.server.address, cut_after_bytes=8_000, cuts=3)
    name = f"cut-{privacy is None}"
    texts = generated(served.member(name, address=proxy.address, privacy=privacy, retry_for_s=20), PROMPTS[0])
    proxy.close()
    streams = rows_sent(proxy)
    assert proxy.cuts_left == 0
    assert len(streams) == 4
    assert all(stream == streams[-1][: len(stream)] for stream in streams)
    assert len([row for row in served.ledger(name) if row.kind == "generate"]) == 1
    if privacy is None:
        assert texts == [stock(served.config, PROMPTS[0], T)]
    else:
        assert len(streams[-1]) == T - 1


def test_with_noise_nothing_that_leaves_depends_on_the_text_but_the_noised_rows(served: Served) -> None:
    seen = []
    for name, prompt in (("long", "and a number of branches says that it is not"), ("short", "a")):
        proxy = CuttingProxy(served.server.address)
        generated(served.member(name, address=proxy.address, privacy=NOISY), prompt)
        proxy.close()
        sent = [call for connection in proxy.sent for call in dissect(bytes(connection))]
        fields = [
            (call.path, [(field, len(value) if field.endswith("data") else value) for field, value in leaves(message)])
            for call in sent
            for message in call.messages()
        ]
        is_own = {"client", "agent_id", "open.client", "open.agent_id"}
        seen.append([(path, [each for each in each_field if each[0] not in is_own]) for path, each_field in fields])
        (row,) = served.ledger(name)
        assert (row.kind, row.noise_multiplier, row.sequences, len(row.records)) == ("generate", 2.0, 1, 1)
    assert seen[0] == seen[1]
    rows = [dict(fields) for path, fields in seen[0] if path.endswith("/Generate")]
    assert rows[0].keys() <= {f"open.{name}" for name in ("run_id", "round", "first_block", "end_block", "max_tokens")}
    assert len(rows) == 1 + T - 1
    assert all(row["smashed.shape"] == [1, 1, 128] for row in rows[1:])


def test_the_noise_that_leaves_is_that_of_the_declared_length(served: Served) -> None:
    proxy = CuttingProxy(served.server.address)
    loud = AgentPrivacySection(noise_multiplier=50.0, clipping_norm_smashed=3.0)
    generated(served.member("loud", address=proxy.address, privacy=loud), PROMPTS[0])
    proxy.close()
    calls = [call for sent in proxy.sent for call in dissect(bytes(sent)) if call.path.endswith("/Generate")]
    rows = [message.smashed.data for call in calls for message in call.messages() if message.HasField("smashed")]
    values = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.float32)
    assert values.std().item() == pytest.approx(50.0 * 2 * 3.0 * math.sqrt(T), rel=0.05)


def test_a_run_that_clips_sequences_clips_tokens_here(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    from splitfed.training import generated_releases

    real = generated_releases.RowByRowMechanism
    monkeypatch.setattr(
        generated_releases,
        "RowByRowMechanism",
        lambda *norm, **said: (seen.append((*norm, said)), real(*norm, **said))[1],
    )
    own = AgentPrivacySection(noise_multiplier=2.0, clip="sequence", clipping_norm_smashed=40.0)
    generated(served.member("clipping", privacy=own), PROMPTS[0])
    ((norm, noise_multiplier, said),) = seen
    assert (noise_multiplier, said) == (2.0, {"tokens": T})
    assert norm < 40.0


def test_the_budget_refuses_before_anything_of_a_text_leaves(served: Served, tmp_path: Path) -> None:
    proxy = CuttingProxy(served.server.address)
    own = AgentPrivacySection(noise_multiplier=2.0, clipping_norm_smashed=3.0, epsilon_budget=ONCE * 1.01)
    config = served.member("frugal", address=proxy.address, privacy=own)
    with pytest.raises(BudgetExhausted, match=r"What is to be generated \(smashed\) would pass the epsilon budget"):
        generated(config, "one", "two", "one")
    assert served.ledger("frugal") == []
    generated(config, "one", "two")
    with pytest.raises(BudgetExhausted):
        generated(config, "two")
    proxy.close()
    assert len(rows_sent(proxy)) == 2
    assert len(served.ledger("frugal")) == 2


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"max_tokens": T + 1}, JoinRefused, r"a sequence of 33 tokens was asked for|A sequence of 33 tokens"),
        ({"max_tokens": 100_000}, ConfigError, r"--max-tokens is 100000, but the base model counts to \d+; lower it"),
        ({"max_tokens": 3}, ConfigError, r"a prompt has \d+ tokens, which leaves no room for text in 3 \(--max-tokens"),
    ],
    ids=str,
)
def test_a_length_that_cannot_be_is_refused(
    served: Served, wanted: dict[str, int], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        generated(served.agent(), "A prompt of some more words than three", **wanted)


def test_the_owners_policy_outranks_the_run(served: Served) -> None:
    with pytest.raises(JoinRefused, match="asks this device to hold bottom_blocks = 1, but its owner allows 0"):
        generated(served.agent("owner", privacy=AgentPrivacySection(most_bottom_blocks=0)))
    own = AgentPrivacySection(least_noise_multiplier=3.0)
    with pytest.raises(JoinRefused, match=r"asks for noise_multiplier = 0\.002, but this device's owner insists on 3"):
        generated(served.agent("owner", privacy=own))
    assert served.ledger("owner") == []


def test_whoever_is_no_member_is_refused(served: Served) -> None:
    with pytest.raises(JoinRefused, match="'stranger' is not a member of the run 'small'; only an agent that has"):
        generated(served.agent("stranger"))


def test_a_state_directory_that_an_agent_uses_is_refused(served: Served) -> None:
    state = AgentState(served.agent().agent.state_directory)
    with closing(state), pytest.raises(ConfigError, match="Another agent uses"):
        generated(served.agent())


def test_a_server_that_is_not_there_is_named(served: Served) -> None:
    with pytest.raises(ServerUnreachable, match=r"No server answered at 127\.0\.0\.1:1 \(tries: 1, over 0 s\)"):
        generated(served.agent(address="127.0.0.1:1", retry_for_s=0))


def test_with_noise_a_text_that_fails_stops_none_of_the_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = CuttingProxy(served.server.address)
    config = served.member("failing", address=proxy.address, privacy=NOISY)
    monkeypatch.setattr(
        "splitfed.agent.generate_setup.Generator.begin",
        lambda generator, *_: generator.bottom.register_forward_hook(to_nan),
    )
    with pytest.raises(NonFiniteLoss, match="not finite and left as noise alone"):
        generated(config)
    proxy.close()
    assert [len(rows) for rows in rows_sent(proxy)] == [T - 1] * len(PROMPTS)


def to_nan(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
    return output * math.nan


def test_a_server_of_an_older_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_pb2_grpc, "add_GenerationServicer_to_server", lambda service, server: None)
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with (
        serving(server_config(tmp_path)) as server,
        pytest.raises(JoinRefused, match="cannot generate text; it needs a newer splitfed"),
    ):
        generated(agent_config(tmp_path, "a", server.address, data))


def test_a_server_that_does_not_generate_says_how_it_would(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with (
        serving(server_config(tmp_path)) as server,
        pytest.raises(JoinRefused, match=r"does not generate text; its operator can allow it with \[generation\]"),
    ):
        generated(agent_config(tmp_path, "a", server.address, data))


def test_a_personal_top_is_the_agents_own(tmp_path: Path) -> None:
    config = server_config(
        tmp_path,
        federation={"agents": 2},
        training={"rounds": 2, "learning_rate": 0.03},
        generation={"enabled": True},
    )
    for name in ("a", "b"):
        write_texts(tmp_path / f"{name}.jsonl", name, 8)
    with serving(config) as server:
        agents = {
            name: agent_config(tmp_path, name, server.address, tmp_path / f"{name}.jsonl", personal=personal)
            for name, personal in (("a", ["top"]), ("b", []))
        }
        for ended in [start_agent(agent) for agent in agents.values()]:
            ended.result(120)
        texts = {name: generated(agent, PROMPTS[0]) for name, agent in agents.items()}
    (kept,) = (tmp_path / "a" / "state").iterdir()
    own = load_file(kept / "after-round-0002.safetensors")
    personal = {name.removeprefix("personal/"): t for name, t in own.items() if name.startswith("personal/")}
    assert personal
    model = stock_model(config.run.directory)
    for name in ("b", "a"):
        if name == "a":
            missing = {f"base_model.model.{k}".replace(".weight", ".default.weight"): t for k, t in personal.items()}
            assert model.load_state_dict(missing, strict=False).unexpected_keys == []
        assert texts[name] == [stock_text(model, PROMPTS[0], T)]
    assert texts["a"] != texts["b"]


def test_generation_goes_over_mutual_tls_and_a_name_is_its_certificates(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    config = server_config(
        tmp_path, tls=authority.issue("server"), training={"rounds": 1}, generation={"enabled": True}
    )
    with serving(config) as server:
        own = agent_config(tmp_path, "a", server.address, data).model_copy(update={"tls": authority.issue("a")})
        run_agent_here(own)
        assert generated(own, PROMPTS[0]) == [stock(config, PROMPTS[0], T)]
        with pytest.raises(JoinRefused, match="certificate is for 'b', not for 'a'"):
            generated(own.model_copy(update={"tls": authority.issue("b")}), PROMPTS[0])


def test_a_server_that_starts_again_amid_a_text_goes_on_with_it(served: Served, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    config = server_config(tmp_path, training={"rounds": 1}, generation={"enabled": True})
    server = LocalServer(config)
    proxy = CuttingProxy(server.address)
    own = agent_config(tmp_path, "a", proxy.address, data, retry_for_s=60)
    run_agent_here(own)
    pieces: list[str] = []
    stopped: list[LocalServer] = []

    def start_again(text: str) -> None:
        pieces.append(text)
        if text.strip() and not stopped:
            server.stop()
            stopped.append(LocalServer(config, resume=True))
            host, _, port = stopped[0].address.rpartition(":")
            proxy._target = (host, int(port))

    texts = generate_here(own, Wanted([PROMPTS[0]]), write=start_again)
    assert stopped
    stopped[0].stop()
    proxy.close()
    assert texts == [stock(config, PROMPTS[0], T)]
    wait_until(lambda: stopped[0].ended.done())


@pytest.mark.service
def test_the_commands_themselves(tmp_path: Path) -> None:
    daemons = Daemons(tmp_path, is_warm=False)
    write_texts(tmp_path / "a.jsonl", "a", 6)
    tables = {
        "model": {"base": "demo"},
        "training": {"rounds": 1, "local_steps": 2, "max_tokens": T},
        "codecs": OPEN.model_dump(),
        "generation": {"enabled": True},
    }
    try:
        address = daemons.start_server(tables)
        daemons.start_agent("a", address, {"data": {"path": "a.jsonl"}, "privacy": {"noise_multiplier": 0.0}})
        assert daemons.wait("a") == 0, daemons.log("a")
        command = [sys.executable, "-m", "splitfed", "generate", "--config", str(tmp_path / "a.toml")]
        asked = [*command, "--prompt", PROMPTS[0], "--max-tokens", "24"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        text = stock_text(stock_model(daemons.run), PROMPTS[0], 24)
        tokenizer = AutoTokenizer.from_pretrained(splitfed.base_model_folder())
        assert done.stdout == tokenizer.decode(text, skip_special_tokens=True) + "\n"
        assert "generating with round 1 of the run run" in done.stderr
        daemons.wait_for_log("server", "the run is over; its members can generate until this server is stopped")
        assert daemons.processes["server"].poll() is None
        assert daemons.kill("server", signal.SIGTERM) == 0
    finally:
        daemons.end()
