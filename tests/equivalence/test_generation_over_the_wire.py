"""Text through the daemons is the text of stock transformers and PEFT, token for token; so are loss and likeness."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitfed
from splitfed.agent.evaluate import evaluate_here, on_file
from splitfed.agent.generate import generate_here
from splitfed.config import AgentConfig, DataSection, ServerConfig
from splitfed.study.evaluate import evaluate_run
from splitfed.study.generate_run import generate_from_run
from splitfed.study.run_folder import open_run
from splitfed.training.prompts import Wanted
from tests.equivalence.tiny_models import tiny_model
from tests.service.conftest import server_config, write_texts
from tests.service.local import LocalServer, agent_config, serving, start_agent

MAX_TOKENS = 24
PROMPTS = ["a number", "times seven is forty two", "x"]
OWN = {
    "as-the-run": {},
    "inner": {"bottom_blocks": 2, "rank": 2},
    "outer": {"bottom_blocks": 0, "top_blocks": 2},
}
RULES = {"gpt2": "flexlora", "llama": "flora"}


@dataclass
class Trained:
    """A server that generates, after a run of one agent for each cut."""

    folder: Path
    config: ServerConfig
    server: LocalServer
    base: Path

    def agent(self, name: str, **own: Any) -> AgentConfig:
        return agent_config(self.folder, name, self.server.address, self.folder / f"{name}.jsonl", **own)

    def stock(self, *, adapter: str | None = "adapter") -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, self.config.run.directory / adapter).eval() if adapter else model

    def stock_texts(self, prompts: list[str], *, adapter: str | None = "adapter", **options: Any) -> list[list[int]]:
        model, tokenizer = self.stock(adapter=adapter), AutoTokenizer.from_pretrained(self.base)
        texts = []
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_length=MAX_TOKENS,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
            texts.append(whole[0, ids.shape[1] :].tolist())
        return texts


def save_tiny(family: str, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(splitfed.base_model_folder())
    tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp(request.param)
    base = save_tiny(request.param, folder / "base")
    config = server_config(
        folder,
        base,
        model={"least_bottom_blocks": 0},
        lora={"least_rank": 2},
        aggregation={"lora": RULES[request.param]},
        training={"rounds": 2, "learning_rate": 0.03},
        federation={"agents": len(OWN)},
        generation={"enabled": True, "max_tokens": 64},
    )
    with serving(config) as server:
        found = Trained(folder, config, server, base)
        ended = []
        for name, own in OWN.items():
            write_texts(folder / f"{name}.jsonl", name, 8)
            ended.append(start_agent(found.agent(name, **own)))
        for future in ended:
            future.result(240)
        yield found


@pytest.mark.parametrize("name", OWN)
def test_greedy_text_is_that_of_the_unsplit_model_with_the_exported_adapter(trained: Trained, name: str) -> None:
    written: list[str] = []
    texts = generate_here(
        trained.agent(name, **OWN[name]), Wanted(PROMPTS, max_tokens=MAX_TOKENS), write=written.append
    )
    wanted = trained.stock_texts(PROMPTS)
    assert texts == wanted
    assert trained.stock_texts(PROMPTS, adapter=None) != wanted
    assert len({tuple(text) for text in texts}) == len(PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    assert "".join(written) == "".join(f"{tokenizer.decode(text, skip_special_tokens=True)}\n" for text in wanted)


def test_a_run_directory_gives_the_same_text_without_daemons(trained: Trained) -> None:
    written: list[str] = []
    wanted = Wanted(PROMPTS, max_tokens=MAX_TOKENS)
    texts = generate_from_run(trained.config.run.directory, wanted, write=written.append)
    assert texts == trained.stock_texts(PROMPTS)
    assert "".join(written).count("\n") >= len(PROMPTS)


def test_a_run_directory_gives_the_text_of_an_earlier_round_and_of_the_base_model_to_compare(trained: Trained) -> None:
    wanted = Wanted(PROMPTS, max_tokens=MAX_TOKENS)

    def written(**which: Any) -> list[list[int]]:
        return generate_from_run(trained.config.run.directory, wanted, write=lambda text: None, **which)

    first = trained.stock_texts(PROMPTS, adapter="adapters/round-0001")
    assert written(round=1) == first != written(round=2)
    assert written(with_adapter=False, base=str(trained.base)) == trained.stock_texts(PROMPTS, adapter=None)


ROWS = [
    {"prompt": "A number says that", "completion": " times seven is forty two, and more than there is room for." * 2},
    {"prompt": "x", "completion": " is"},
    {"prompt": "times seven", "completion": " is forty two."},
]


@pytest.mark.parametrize("name", OWN)
def test_loss_and_likeness_are_those_of_the_unsplit_model_with_the_exported_adapter(
    trained: Trained, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    agent = trained.agent(name, **OWN[name])
    served = evaluate_here(agent, on_file(agent, str(file)), writes_texts=True, max_tokens=MAX_TOKENS)
    stock = evaluate_run(
        open_run(trained.config.run.directory),
        DataSection(path=str(file)),
        writes_texts=True,
        max_tokens=MAX_TOKENS,
    )
    assert served.figures.loss == pytest.approx(stock.adapted.loss, abs=1e-5)
    assert abs(stock.base.loss - stock.adapted.loss) > 1e-3
    assert served.figures.texts == stock.adapted.texts
    assert served.ground == stock.ground
    assert served.ground.shortened_rows == 1
    assert (served.run, served.round, served.texts) == (stock.run, 2, 3)
