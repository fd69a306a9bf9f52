"""A run with each protection, over real daemons: what the ledger says at its end, and what an owner refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from splitfed.config import AgentPrivacySection, PrivacySection, ServerConfig
from splitfed.errors import BudgetExhausted, ConfigError, JoinRefused
from splitfed.privacy import Composition, epsilon, read_ledger
from tests.service.conftest import server_config, write_texts
from tests.service.local import agent_config, run_agent_here, serving

ROUNDS, STEPS, B, ROWS = 2, 3, 4, 6
USES = ROUNDS * STEPS * B // ROWS
DELTA = 1e-5


def asking_for(folder: Path, **privacy: Any) -> ServerConfig:
    return server_config(folder).model_copy(update={"privacy": PrivacySection(**privacy)})


def take_part(folder: Path, asked: ServerConfig, **policy: Any) -> list[dict[str, Any]]:
    """Run a server and an agent whose data is six short rows; gives the agent's own lines."""
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {n} is {n}"}) + "\n" for n in range(ROWS)))
    with serving(asked) as server:
        run_agent_here(agent_config(folder, "a", server.address, file, privacy=AgentPrivacySection(**policy)))
    return [json.loads(line) for line in (folder / "a" / "metrics.jsonl").read_text().splitlines()]


def test_by_default_every_channel_is_protected_and_a_record_pays_for_its_own_uses(tmp_path: Path) -> None:
    lines = take_part(tmp_path, asking_for(tmp_path, noise_multiplier=0.5))
    assert [line["epsilon_total"] for line in lines][-1] == epsilon([(0.5, 3 * USES)], DELTA)
    one_channel = epsilon([(0.5, USES)], DELTA)
    assert lines[-1]["epsilon"] == {"smashed": one_channel, "output_gradient": one_channel, "adapter": one_channel}
    assert lines[-1]["total"].startswith("epsilon ")
    assert lines[-1]["total"].endswith(" at delta 1e-05, unit sequence, relation replace-one")


def test_a_run_may_ask_for_an_epsilon_and_costs_it(tmp_path: Path) -> None:
    lines = take_part(tmp_path, asking_for(tmp_path, epsilon=20.0))
    assert 19.9 < lines[-1]["epsilon_total"] <= 20.0


def test_an_update_is_protected_as_a_whole_and_all_else_counts_for_every_record(tmp_path: Path) -> None:
    asked = asking_for(tmp_path, noise_multiplier=0.5, adapter="update", noise_multiplier_adapter=2.0)
    lines = take_part(tmp_path, asked)
    everything = ROUNDS * STEPS * B
    assert lines[-1]["epsilon"]["adapter"] == epsilon([(2.0, ROUNDS)], DELTA)
    assert lines[-1]["epsilon"]["smashed"] == epsilon([(0.5, everything)], DELTA)
    together = epsilon([(0.5, 2 * everything), (2.0, ROUNDS)], DELTA)
    assert lines[-1]["epsilon_total"] == pytest.approx(together, rel=1e-9)


def test_a_secret_sample_is_charged_as_one_release_a_step(tmp_path: Path) -> None:
    asked = asking_for(tmp_path, noise_multiplier=2.0, sample_rate=0.01)
    lines = take_part(tmp_path, asked, relation="zero-out")
    rows = read_ledger(tmp_path / "a" / "ledger.jsonl").rows
    assert [(row.channel, row.records) for row in rows] == [("step", ())] * ROUNDS * STEPS
    composed = Composition(0.0, {(0.01, 3 / 2.0**2): ROUNDS * STEPS}, sum(row.overflow for row in rows))
    assert lines[-1]["epsilon_total"] == pytest.approx(composed.epsilon(DELTA, "zero-out"), rel=1e-6)
    assert lines[-1]["epsilon_total"] < epsilon([(4.0 / 3**0.5, ROUNDS * STEPS)], DELTA) / 3
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_tokens_are_a_unit_with_embeddings_and_head_only(tmp_path: Path) -> None:
    asked = server_config(tmp_path, model={"bottom_blocks": 0, "top_blocks": 0})
    privacy = PrivacySection(noise_multiplier=4.0, smashed="token", output_gradient="token")
    lines = take_part(tmp_path, asked.model_copy(update={"privacy": privacy}))
    T = asked.training.max_tokens
    assert lines[-1]["epsilon"]["adapter"] == 0
    assert lines[-1]["epsilon"]["smashed"] == pytest.approx(epsilon([(4.0, USES * T)], DELTA), rel=1e-9)
    assert lines[-1]["epsilon_total"] == pytest.approx(epsilon([(4.0, USES * (T + T // 2))], DELTA), rel=1e-9)


def test_metric_privacy_is_stated_as_such_and_makes_no_total(tmp_path: Path) -> None:
    asked = server_config(tmp_path, model={"bottom_blocks": 0, "top_blocks": 1})
    privacy = PrivacySection(noise_multiplier=4.0, smashed="metric", eta=50.0)
    policy = {"protected_channels": ["output_gradient", "adapter"]}
    lines = take_part(tmp_path, asked.model_copy(update={"privacy": privacy}), **policy)
    assert lines[-1]["epsilon"]["smashed"] is None
    assert lines[-1]["total"] == (
        f"none: the smashed data (metric privacy only: {50.0 * USES:.4g} · distance) is not protected"
    )


@pytest.mark.parametrize(
    ("asked", "policy", "error", "said"),
    [
        ({"noise_multiplier": 0.0}, {}, JoinRefused, "sends smashed data without noise"),
        ({"adapter": "none"}, {}, JoinRefused, "sends the adapter update without noise"),
        ({"noise_multiplier": 0.1}, {"least_noise_multiplier": 0.2}, JoinRefused, r"insists on 0\.2"),
        ({"epsilon": 1e6}, {"least_noise_multiplier": 5.0}, JoinRefused, "insists on 5 at least"),
        ({}, {"most_bottom_blocks": 0}, JoinRefused, "bottom_blocks = 1, but its owner allows 0"),
        ({}, {"smashed": "token"}, ConfigError, "needs bottom_blocks = 0, not 1"),
        ({"epsilon": 5.0}, {"adapter": "none"}, ConfigError, 'cannot be kept with adapter = "none"'),
        (
            {"adapter": "none"},
            {"epsilon_budget": 5.0, "protected_channels": ["smashed"]},
            ConfigError,
            "epsilon_budget = 5 cannot be kept",
        ),
        ({"noise_multiplier": 1.0}, {"epsilon_budget": 1e-3}, BudgetExhausted, r"Round 1 .* of which 0 is spent"),
    ],
    ids=str,
)
def test_an_owner_s_refusal_is_one_sentence_and_nothing_leaves(
    tmp_path: Path, asked: dict[str, Any], policy: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said) as refusal:
        take_part(tmp_path, asking_for(tmp_path, **asked), **policy)
    assert "\n" not in str(refusal.value)
    assert read_ledger(tmp_path / "a" / "ledger.jsonl").rows == []


def test_a_budget_that_is_spent_already_lets_nothing_leave(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "a.jsonl", "a", ROWS)
    privacy = AgentPrivacySection(noise_multiplier=0.5)
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        with serving(server_config(tmp_path / run)) as server:
            config = agent_config(tmp_path, "a", server.address, data, privacy=privacy)
            if run == "first":
                run_agent_here(config)
                before = (tmp_path / "a" / "ledger.jsonl").read_bytes()
                spent = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[-1])["epsilon_total"]
                privacy = privacy.model_copy(update={"epsilon_budget": spent * 1.001})
                continue
            with pytest.raises(BudgetExhausted, match=r"Round 1 .* would pass the epsilon budget"):
                run_agent_here(config)
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == before
