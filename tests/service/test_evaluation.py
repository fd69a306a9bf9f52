"""`splitfed evaluate --config` against a real server: what it says, what leaves, what it costs, and what it refuses."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from splitfed import cli
from splitfed.agent.evaluate import ServedEvaluation, evaluate_here, on_file
from splitfed.agent.state import PERSONAL
from splitfed.config import AgentConfig, AgentPrivacySection, DataSection, to_toml
from splitfed.errors import BudgetExhausted, ConfigError, NonFiniteLoss
from splitfed.privacy import gaussian_epsilon
from splitfed.study.evaluate import evaluate_run
from splitfed.study.run_folder import open_run
from tests.service.cutting_proxy import CuttingProxy
from tests.service.dissector import dissect, leaves
from tests.service.served import Served, serving_a_finished_run

T = 32
ROWS = [
    {"prompt": "A number says that", "completion": " times seven is forty two."},
    {"prompt": "x", "completion": " is"},
    {"prompt": "times seven", "completion": " is forty two, and more than there is room for in a sequence." * 3},
]
NOISY = AgentPrivacySection(noise_multiplier=2.0, clipping_norm_smashed=3.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_a_finished_run(tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def evaluated(config: AgentConfig, rows: Path, **wanted: Any) -> ServedEvaluation:
    return evaluate_here(config, on_file(config, str(rows)), **wanted)


def sent_rows(proxy: CuttingProxy) -> list[Any]:
    """Give the tensors of rows that went through a proxy."""
    calls = [call for sent in proxy.sent for call in dissect(bytes(sent)) if call.path.endswith("/Generate")]
    return [message.smashed for call in calls for message in call.messages() if message.HasField("smashed")]


def test_without_noise_no_row_leaves_that_is_not_needed_and_the_ledger_says_that_nothing_is_guaranteed(
    served: Served, rows: Path
) -> None:
    proxy = CuttingProxy(served.server.address)
    found = evaluated(served.agent(address=proxy.address), rows)
    proxy.close()
    stock = evaluate_run(open_run(served.config.run.directory), DataSection(path=str(rows)))
    assert found.figures.loss == pytest.approx(stock.adapted.loss, abs=1e-5)
    lengths = [tensor.shape[1] for tensor in sent_rows(proxy)]
    assert len(lengths) == found.ground.sequences
    assert lengths[1] < lengths[0] < lengths[2] == T - 1
    (row,) = [row for row in served.ledger("a") if row.kind == "evaluate"][-1:]
    assert (row.channel, row.noise_multiplier) == ("smashed", 0.0)
    assert found.charges == {"evaluate": {"sequences": 3, "tokens": T, "noise_multiplier": 0.0}}
    assert found.summary()[-1].startswith("Noise was off: all text can be read from what left")


def test_with_noise_nothing_that_leaves_depends_on_the_text_but_the_noised_rows(served: Served, tmp_path: Path) -> None:
    seen = []
    for name, text in (("long", "and a number of branches says that it is not a number"), ("short", "a word")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps({"text": text}) + "\n")
        proxy = CuttingProxy(served.server.address)
        found = evaluated(served.member(name, address=proxy.address, privacy=NOISY), file)
        proxy.close()
        assert math.isfinite(found.figures.loss)
        calls = [call for connection in proxy.sent for call in dissect(bytes(connection))]
        seen.append(
            [
                (call.path, field, len(value) if field.endswith("data") else value)
                for call in calls
                for message in call.messages()
                for field, value in leaves(message)
                if field not in {"client", "agent_id", "open.client", "open.agent_id"}
            ]
        )
        (row,) = served.ledger(name)
        assert (row.kind, row.channel, row.noise_multiplier, row.sequences) == ("evaluate", "smashed", 2.0, 1)
        assert found.charges == {"evaluate": {"sequences": 1, "tokens": T, "noise_multiplier": 2.0}}
        assert found.summary()[-2].startswith(f"Charged: 1 sequences of {T} tokens with noise multiplier 2, unit seq")
        assert found.summary()[-1].startswith("Privacy in total: epsilon ")
    assert seen[0] == seen[1]
    assert [value for _, field, value in seen[0] if field == "smashed.shape"] == [[1, T - 1, 128]]


def test_the_noise_that_leaves_is_that_of_the_declared_length(served: Served, rows: Path) -> None:
    proxy = CuttingProxy(served.server.address)
    loud = AgentPrivacySection(noise_multiplier=50.0, clipping_norm_smashed=3.0)
    evaluated(served.member("loud", address=proxy.address, privacy=loud), rows)
    proxy.close()
    values = torch.frombuffer(bytearray(b"".join(tensor.data for tensor in sent_rows(proxy))), dtype=torch.float32)
    assert values.std().item() == pytest.approx(50.0 * 2 * 3.0 * math.sqrt(T), rel=0.05)


def test_the_budget_refuses_all_of_it_before_a_row_leaves(served: Served, rows: Path) -> None:
    proxy = CuttingProxy(served.server.address)
    once = gaussian_epsilon(1 / 2.0**2, 1e-5)
    frugal = NOISY.model_copy(update={"epsilon_budget": once * 1.01})
    config = served.member("frugal", address=proxy.address, privacy=frugal)
    with pytest.raises(BudgetExhausted, match=r"What is to be measured \(smashed\) would pass the epsilon budget"):
        evaluated(config, rows, writes_texts=True)  # each row twice: for its loss, and for a text
    assert (served.ledger("frugal"), sent_rows(proxy)) == ([], [])
    evaluated(config, rows)
    assert [row.kind for row in served.ledger("frugal")] == ["evaluate"] * 3
    with pytest.raises(BudgetExhausted):
        evaluated(config, rows)
    proxy.close()
    assert len(sent_rows(proxy)) == 3


def test_a_row_is_the_record_that_it_is_in_training_and_texts_are_charged_beside_losses(
    served: Served, rows: Path
) -> None:
    found = evaluated(served.member("both", privacy=NOISY), rows, writes_texts=True, max_tokens=24)
    ledger = served.ledger("both")
    assert [row.kind for row in ledger] == ["evaluate"] * 3 + ["generate"] * 3
    assert [row.records for row in ledger[:3]] == [row.records for row in ledger[3:]]
    assert found.charges["generate"] == {"sequences": 3, "tokens": 24, "noise_multiplier": 2.0}
    assert len([line for line in found.summary() if line.startswith("Charged: ")]) == 2
    assert found.figures.texts is not None


def test_with_noise_what_is_not_finite_is_told_of_after_the_last_sequence(
    served: Served, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = CuttingProxy(served.server.address)
    config = served.member("failing", address=proxy.address, privacy=NOISY)
    monkeypatch.setattr(
        "splitfed.agent.generate_setup.Generator.begin",
        lambda generator, *_: generator.bottom.register_forward_hook(lambda module, given, output: output * math.nan),
    )
    with pytest.raises(NonFiniteLoss, match="not finite and left as noise alone"):
        evaluated(config, rows)
    proxy.close()
    assert [tensor.shape[1] for tensor in sent_rows(proxy)] == [T - 1] * 3


def test_with_noise_off_what_is_not_finite_does_not_leave(
    served: Served, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = CuttingProxy(served.server.address)
    monkeypatch.setattr(
        "splitfed.agent.generate_setup.Generator.begin",
        lambda generator, *_: generator.bottom.register_forward_hook(lambda module, given, output: output * math.nan),
    )
    with pytest.raises(NonFiniteLoss, match="not finite, so it was not sent"):
        evaluated(served.agent(address=proxy.address), rows)
    proxy.close()
    assert sent_rows(proxy) == []


def test_a_prompt_that_leaves_no_room_is_named_before_anything_leaves(served: Served, rows: Path) -> None:
    with pytest.raises(ConfigError, match="leaves no room for text in 3"):
        evaluated(served.agent(), rows, writes_texts=True, max_tokens=3)


def test_with_a_personal_top_the_loss_is_told_with_the_runs_top_too(served: Served, rows: Path) -> None:
    """Its own top is given to it here: the adapter of the first round, which differs from the last one's."""
    (last,) = (served.folder / "a" / "state").glob("*/after-round-0002.safetensors")
    first = load_file(served.config.run.directory / "adapters" / "round-0001" / "adapter_model.safetensors")
    own = {f"{PERSONAL}{name.removeprefix('base_model.model.')}": tensor for name, tensor in first.items()}
    save_file({**load_file(last), **own}, last)
    proxy = CuttingProxy(served.server.address)
    found = evaluated(served.agent(address=proxy.address, personal=["top"]), rows)
    proxy.close()
    assert len(sent_rows(proxy)) == found.ground.sequences
    stock = evaluate_run(open_run(served.config.run.directory), DataSection(path=str(rows)))
    assert found.merged is not None
    assert found.merged.loss == pytest.approx(stock.adapted.loss, abs=1e-5)
    assert abs(found.figures.loss - found.merged.loss) > 0.01
    _, (with_own, with_runs) = found.table()
    assert with_own[0].endswith("own top")
    assert with_runs[0].endswith("the run's top")
    assert json.loads(found.as_json())["adapted_merged"]["loss"] == found.merged.loss


def test_the_command_prints_what_was_found_and_what_was_charged(
    served: Served, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfed.agent.generate_session.prepare_process", lambda threads: None)
    own = served.agent()
    own = own.model_copy(update={"data": own.data.model_copy(update={"held_out_path": str(rows)})})
    config = tmp_path / "agent.toml"
    config.write_text(to_toml(own))

    def said(*options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", "--config", str(config), *options])
        assert ended.value.code == 0
        return capsys.readouterr().out

    shown = said()
    assert "split model after round 2" in shown
    assert f"from 3 rows of {rows}" in shown
    assert "Noise was off" in shown
    found = json.loads(said("--json", "--data", str(rows), "--limit", "2"))
    assert (found["rows"], found["round"], found["charged"]["evaluate"]["sequences"]) == (2, 2, 2)
    stock = evaluate_run(open_run(served.config.run.directory), DataSection(path=str(rows), max_rows=2))
    assert found["adapted"]["loss"] == pytest.approx(stock.adapted.loss, abs=1e-5)
