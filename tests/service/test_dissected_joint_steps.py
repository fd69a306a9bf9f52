"""Every frame of agents that train one trunk together: what a step says is declared, clipped, noised and charged."""

import json
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from splitfed.agent.policy import agree
from splitfed.agent.server_calls import ServerCalls
from splitfed.compress import get_codec
from splitfed.config import AgentPrivacySection, CodecSection, PrivacySection
from splitfed.errors import JoinRefused, PrivacyError
from splitfed.privacy import Ledger, PerExampleMechanism, UpdateMechanism, epsilon, read_ledger
from splitfed.privacy.mechanisms import NoMechanism
from splitfed.training.releases import LedgeredReleases
from tests.service.conftest import server_config
from tests.service.cutting_proxy import CuttingProxy
from tests.service.local import agent_config, run_agent_here, serving, start_agent
from tests.service.overheard import (
    CHANGING,
    NAMES,
    Overheard,
    assert_fields_say_nothing,
    assert_headers_are_grpc_s_own,
    watch_gates,
)

ROWS, HELD_OUT = {"a": 8, "b": 16}, 3
B, T, STEPS = 4, 32, 2
Z, C, DELTA = 0.5, 1e-3, 0.05
BY_STEP = {"variant": "parallel", "merge_ends": "step"}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what the run says of its federation, and owners of privacy
    "parallel, merged at every step": (BY_STEP, {}),
    "parallel, merged at every step, examples drawn": (BY_STEP, {"sample_rate": 0.05, "relation": "zero-out"}),
    "parallel": ({"variant": "parallel"}, {}),
    "sflv2": ({"variant": "sflv2"}, {}),
    "async": ({"variant": "async"}, {}),
}
MERGED = list(RUNS)[:2]
NOISED = {"noise_multiplier": Z, "clipping_norm_adapter": C, "delta": DELTA}


def write_data(folder: Path) -> None:
    """Give a few short texts to one agent, and many long ones to the other."""
    for name, rows in ROWS.items():
        texts = [
            f"{n} is {n}" if name == "a" else f"Number {n} is not like a's: {'no, ' * (n % 5)}never so."
            for n in range(rows + HELD_OUT)
        ]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines[:rows]))
        (folder / f"{name}_held_out.jsonl").write_text("".join(lines[rows:]))


class JointRound:
    """A round of two agents, each behind a proxy of its own; no example is drawn for a, as many as fit for b.

    Attributes:
        merges: Gradients of bottom and top are merged at every step.
        agents: What each of them sent.
        raw: The norm of each row's gradient before it is clipped, by agent.
        clipped: The sum of each step's clipped gradients, before the noise, by agent.
        means: What came back of each step's, by agent.
        metrics: Each agent's own line.
    """

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, federation: dict[str, Any], **privacy: Any
    ) -> None:
        folder.mkdir(exist_ok=True)
        write_data(folder)
        self.raw: dict[str, list[float]] = defaultdict(list)
        self.clipped: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        self.means: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        released = watch_gates(monkeypatch)
        self._watch(monkeypatch)
        training = {"rounds": 1, "local_steps": STEPS, "micro_batch_size": 2, "max_tokens": T, "max_grad_norm": 1e-3}
        config = server_config(folder, training=training, federation={"agents": 2, **federation}, codecs=CodecSection())
        policy = AgentPrivacySection(**{**NOISED, **privacy})
        with serving(config) as server:
            proxies = {name: CuttingProxy(server.address) for name in ROWS}
            agents = [start_agent(self._agent(folder, name, proxies[name], policy)) for name in ROWS]
            for ended in wait(agents, 60, FIRST_EXCEPTION).done:
                ended.result()
            for proxy in proxies.values():
                proxy.close()
        monkeypatch.undo()
        self.merges = "merge_ends" in federation
        self.agents = {name: Overheard(proxies[name], folder / name, released[name]) for name in ROWS}
        self.metrics = {name: json.loads((folder / name / "metrics.jsonl").read_text()) for name in ROWS}

    @staticmethod
    def _agent(folder: Path, name: str, proxy: CuttingProxy, policy: AgentPrivacySection) -> Any:
        config = agent_config(folder, name, proxy.address, folder / f"{name}.jsonl", privacy=policy)
        data = config.data.model_copy(update={"held_out_path": str(folder / f"{name}_held_out.jsonl")})
        return config.model_copy(update={"data": data})

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clip, release, mean_gradient = PerExampleMechanism.clip, PerExampleMechanism.release, ServerCalls.mean_gradient

        def drawn(n_examples: int, *, sample_rate: float, capacity: int) -> list[int | None]:
            return list(range(capacity)) if _who() == "b" else [None] * capacity

        def watched_clip(mechanism: Any, per_example: dict[str, Tensor], **beside: Any) -> Any:
            self.raw[_who()] += [_norm({n: g[row] for n, g in per_example.items()}) for row in range(B // 2)]
            return clip(mechanism, per_example, **beside)

        def watched_release(mechanism: Any, sums: dict[str, Tensor]) -> Any:
            self.clipped[_who()].append({name: total.clone() for name, total in sums.items()})
            return release(mechanism, sums)

        def watched_mean(calls: Any, *given: Any, **named: Any) -> Any:
            mean = mean_gradient(calls, *given, **named)
            self.means[calls._client].append(mean)
            return mean

        monkeypatch.setattr("splitfed.agent.local_round.poisson_sample", drawn)
        monkeypatch.setattr(PerExampleMechanism, "clip", watched_clip)
        monkeypatch.setattr(PerExampleMechanism, "release", watched_release)
        monkeypatch.setattr(ServerCalls, "mean_gradient", watched_mean)


def _who() -> str:
    return threading.current_thread().name


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors.values()))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], JointRound]:
    """Give a round of a run, played once."""
    rounds: dict[str, JointRound] = {}

    def play(name: str) -> JointRound:
        if name not in rounds:
            federation, privacy = RUNS[name]
            with pytest.MonkeyPatch.context() as monkeypatch:
                rounds[name] = JointRound(tmp_path_factory.mktemp("r"), monkeypatch, federation, **privacy)
        return rounds[name]

    return play


@pytest.fixture(params=RUNS)
def seen(request: pytest.FixtureRequest, played: Callable[[str], JointRound]) -> JointRound:
    return played(request.param)


@pytest.fixture(params=MERGED)
def merged(request: pytest.FixtureRequest, played: Callable[[str], JointRound]) -> JointRound:
    return played(request.param)


def test_a_whole_round_was_seen(seen: JointRound) -> None:
    """Else the tests below would say nothing."""
    for agent in seen.agents.values():
        bodies = Counter(message.WhichOneof("body") for method, message in agent.messages() if method == "Train")
        assert (bodies["forward"], bodies["backward"], bodies["step"]) == (STEPS * 2 + 2, STEPS * 2, STEPS)
        calls = Counter(call.path.rpartition("/")[2] for call in agent.calls)
        assert calls["SubmitAdapter"] == 1
        assert calls["MeanGradient"] == (STEPS if seen.merges else 0)


def test_no_field_is_set_but_those_that_are_known_to_say_nothing(seen: JointRound) -> None:
    """What a step counts for is a constant, and no norm crosses although one is clipped to; no loss, mask or weight."""
    counts = {"weight": {1}, "forward.step_tokens": {B * T}, "header.tokens": {B * T, STEPS * B * T}}
    for agent in seen.agents.values():
        assert_fields_say_nothing(agent, counts, shapes={(2, T, 128), (1, T, 128)})
        assert_headers_are_grpc_s_own(agent)


def test_agents_with_other_texts_or_other_numbers_drawn_send_the_same_figures_and_sizes(seen: JointRound) -> None:
    """Calls, numbers and order of messages within one, every field, every header; but for their names."""
    assert seen.agents["a"].outside(but=CHANGING | NAMES) == seen.agents["b"].outside(but=CHANGING | NAMES)


def test_every_payload_is_what_the_gate_let_out_and_nothing_more(seen: JointRound) -> None:
    int8, none = get_codec("int8"), get_codec("none")
    for agent in seen.agents.values():
        sent, released = agent.payloads(), agent.released
        assert sent.keys() <= {"forward", "backward", "MeanGradient", "SubmitAdapter"}
        assert sent["forward"] == [int8.encode(each) for each in released["smashed"]]
        assert sent["backward"] == [int8.encode(each / B) for each in released["output_gradient"]]
        for method, of_gate in (("MeanGradient", "step_gradient"), ("SubmitAdapter", "adapter_update")):
            assert sent.get(method, []) == [none.encode(each[n]) for each in released[of_gate] for n in sorted(each)]


def test_what_is_merged_at_every_step_is_a_sum_of_clipped_gradients_under_its_noise(merged: JointRound) -> None:
    for name, agent in merged.agents.items():
        assert len(agent.released["step_gradient"]) == len(merged.clipped[name]) == STEPS
        assert all(norm > 2 * C for norm in merged.raw[name] if norm)  # the clip has something to do
        for crossed, clipped in zip(agent.released["step_gradient"], merged.clipped[name], strict=True):
            assert crossed.keys() == clipped.keys()
            assert _norm(clipped) <= B * C
            noise = torch.cat([(crossed[n].double() * B - clipped[n]).flatten() for n in crossed])
            assert noise.std().item() / (Z * 2 * C) == pytest.approx(1, abs=5 / math.sqrt(2 * len(noise)))
            assert _norm(crossed) * B > 10 * _norm(clipped)
    assert any(merged.raw["b"])


def test_an_agent_that_draws_no_example_sends_a_gradient_of_noise_alone(played: Callable[[str], JointRound]) -> None:
    """What no field tells, no size tells: its noise is that of the one that drew as many as there is room for."""
    seen = played(MERGED[1])
    assert not any(clipped.any() for each in seen.clipped["a"] for clipped in each.values())
    norms = [_norm(each) for agent in seen.agents.values() for each in agent.released["step_gradient"]]
    assert max(norms) / min(norms) < 1.05


def test_the_update_says_nothing_that_the_gradients_of_its_steps_did_not(merged: JointRound) -> None:
    """It is made of the means alone: the two agents, whose texts have nothing in common, send the same bytes."""
    a, b = (agent.payloads()["SubmitAdapter"] for agent in merged.agents.values())
    assert a == b


def test_the_update_of_a_round_merged_at_its_end_is_each_agent_s_own(played: Callable[[str], JointRound]) -> None:
    a, b = (agent.payloads()["SubmitAdapter"] for agent in played("parallel").agents.values())
    assert a != b


def test_of_two_agents_each_can_tell_the_other_s_noised_gradient_from_the_mean(merged: JointRound) -> None:
    own, other = (merged.agents[name].released["step_gradient"] for name in "ab")
    for mean, mine, theirs in zip(merged.means["a"], own, other, strict=True):
        for name in mean:
            assert torch.allclose(2 * mean[name] - mine[name], theirs[name], rtol=1e-3, atol=1e-3 * Z * C)


@pytest.mark.parametrize("name", [name for name in RUNS if name != MERGED[1]])
def test_every_gradient_of_a_step_is_charged_and_the_round_s_update_is_free(
    played: Callable[[str], JointRound], name: str
) -> None:
    """An agent that merges at its round's end pays the same: each step's gradient was always counted as if seen."""
    seen = played(name)
    for agent in seen.agents.values():
        charged = Counter[str]()
        for row in agent.rows:
            charged[row.channel] += row.sequences
        assert charged == {"smashed": STEPS * B + HELD_OUT, "output_gradient": STEPS * B, "adapter": STEPS * B}
        of_steps = [(row.step, row.noise_multiplier, row.unit) for row in agent.rows if row.channel == "adapter"]
        assert of_steps == [(step, Z, "sequence") for step in range(STEPS)]
    for line in seen.metrics.values():  # a record has been used in one step
        assert line["epsilon_total"] == epsilon([(Z, 3)], DELTA)
        assert line["epsilon"]["adapter"] == epsilon([(Z, 1)], DELTA)


def test_a_step_whose_examples_are_drawn_is_charged_to_all_whoever_was_drawn(
    played: Callable[[str], JointRound],
) -> None:
    seen = played(MERGED[1])
    for agent in seen.agents.values():
        steps = [row for row in agent.rows if row.kind == "train"]
        assert [(row.channel, row.step, row.records) for row in steps] == [("step", step, ()) for step in range(STEPS)]
        for row in steps:
            assert row.channels == {"smashed": Z, "output_gradient": Z, "adapter": Z}
            assert row.noise_multiplier == pytest.approx(Z / math.sqrt(3))


def test_without_noise_the_dissector_sees_norms_and_how_many_tokens_a_step_counts_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not find above, it can find."""
    bare = JointRound(tmp_path, monkeypatch, BY_STEP, noise_multiplier=0.0, clipping_norm_adapter=0.1)
    a, b = (agent.fields() for agent in bare.agents.values())
    for name in ("forward.step_tokens", "header.tokens"):
        assert a[name]
        assert a[name].isdisjoint(b[name])
    assert len(a["step.squared_norm"]) == STEPS
    assert not bare.clipped


# What would leave without noise


@pytest.mark.parametrize("who", ["owner", "run"])
def test_noise_on_the_update_is_refused_where_every_step_sends_a_gradient(tmp_path: Path, who: str) -> None:
    """An owner may ask for it, and so may a server that does not look at its own configuration."""
    weak = {"noise_multiplier": Z, "adapter": "update"}
    asked = server_config(tmp_path, federation=BY_STEP).model_copy(
        update={"privacy": PrivacySection(**weak if who == "run" else {})}
    )
    write_data(tmp_path)
    policy = AgentPrivacySection(**weak if who == "owner" else {})
    with serving(asked) as server:
        agent = agent_config(tmp_path, "a", server.address, tmp_path / "a.jsonl", privacy=policy)
        with pytest.raises(
            JoinRefused, match=r'merges bottom and top at every step, but adapter = "update" protects no'
        ):
            run_agent_here(agent)
    assert read_ledger(tmp_path / "a" / "ledger.jsonl").rows == []


def test_noise_on_the_update_is_welcome_where_nothing_is_merged_before_it(tmp_path: Path) -> None:
    run = server_config(tmp_path, federation={"variant": "parallel"}).shared()
    assert agree(AgentPrivacySection(adapter="update"), run).adapter == "update"


def test_the_gate_keeps_a_step_s_gradient_back_that_has_no_noise_yet(tmp_path: Path) -> None:
    """Whoever comes to it without an agent's refusal."""
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        gate = LedgeredReleases(NoMechanism(), NoMechanism(), ledger, "run", update=UpdateMechanism(1.0, Z))
        with pytest.raises(PrivacyError, match=r"would leave without noise: .* set adapter = \"dp-sgd\""):
            gate.step_gradient({"w": torch.ones(3)}, round=1)
    assert read_ledger(tmp_path / "ledger.jsonl").rows == []


def test_a_gradient_that_leaves_without_noise_is_in_the_ledger_before_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that dies with the first one under way has no epsilon afterwards."""

    class Died(Exception):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Died

    monkeypatch.setattr(ServerCalls, "mean_gradient", die)
    write_data(tmp_path)
    policy = AgentPrivacySection(noise_multiplier=Z, adapter="none")
    with serving(server_config(tmp_path, federation=BY_STEP)) as server:
        agent = agent_config(tmp_path, "a", server.address, tmp_path / "a.jsonl", privacy=policy)
        with pytest.raises(Died):
            run_agent_here(agent)
    rows = [row for row in read_ledger(tmp_path / "a" / "ledger.jsonl").rows if row.channel == "adapter"]
    assert [(row.noise_multiplier, row.round) for row in rows] == [(0.0, 1)]


def test_gradients_that_leave_without_noise_are_in_the_ledger_once_a_round(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        gate = LedgeredReleases(NoMechanism(), NoMechanism(), ledger, "run")
        for round in (1, 2):
            for _ in range(STEPS):
                gate.step_gradient({"w": torch.ones(3)}, round=round)
            gate.adapter_update({"w": torch.zeros(3)}, {"w": torch.ones(3)}, round=round)
    charged = [(row.channel, row.noise_multiplier, row.round) for row in read_ledger(tmp_path / "ledger.jsonl").rows]
    assert charged == [("adapter", 0.0, 1), ("adapter", 0.0, 2)]
