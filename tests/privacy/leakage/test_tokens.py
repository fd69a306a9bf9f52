"""All attacks on tokens: in a small world, and against a pretrained model on real text."""

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from splitfed.models import partition
from splitfed.privacy import GaussianSequenceMechanism, NoiseStream, clip
from splitfed.privacy.leakage import Embedding, Texts, TokenKnowledge, attack_tokens, gaussian_log_density
from splitfed.privacy.leakage.estimate import AttackResult
from tests.privacy.leakage.token_world import make_world, mix

T, V = 64, 512
BLOCKS = 5


def attacked(world, **options):
    return {each.attack: each for each in attack_tokens(world.knowledge, world.smashed_BTD, world.private, **options)}


def test_with_noise_off_there_are_three_attacks_and_a_fourth_where_the_bottom_comes_in_two_parts():
    world = make_world(blocks=mix)
    results = attacked(world, max_steps=20)
    assert list(results) == ["nearest neighbour", "linear probe", "transformer"]
    results = attacked(world, max_steps=20, embedding=Embedding(world.table_VD, mix))
    assert list(results)[3:] == ["gradient descent"]
    assert results["gradient descent"].trials == int(world.private.lengths_B[:16].sum())
    assert all(each.target == "tokens" and each.beats_chance() for each in results.values())


def test_with_noise_on_the_most_likely_token_joins_them():
    results = attacked(make_world(0.8), max_steps=20)
    assert list(results) == ["nearest neighbour", "bayes", "bayes in context", "linear probe", "transformer"]
    assert len({each.chance for each in results.values()}) == 1


def test_results_come_one_by_one_and_progress_is_told():
    told = []
    world = make_world(n_public=50)
    results = attack_tokens(
        world.knowledge,
        world.smashed_BTD,
        world.private,
        embedding=Embedding(world.table_VD, torch.nn.Identity()),
        max_steps=5,
        progress=lambda name, part: told.append(name),
    )
    assert next(results).attack == "nearest neighbour"
    assert told == []
    list(results)
    assert sorted(set(told)) == ["gradient descent", "linear probe", "transformer"]


class Reality:
    """A pretrained model, its own tokenizer, and text: public rows of train.csv, private rows of dev.csv."""

    def __init__(self, model_folder: Path, data_folder: Path, *, public: int, private: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.public = self.texts(data_folder / "train.csv", public)
        self.private = self.texts(data_folder / "dev.csv", private)

    def texts(self, file: Path, count: int) -> Texts:
        """Take rows from all over a file, whose neighbouring rows are alike."""
        with file.open(newline="") as lines:
            rows = [row["ref"] for row in csv.DictReader(lines)]
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
        tokenized = [self.tokenizer(rows[place])["input_ids"][:T] for place in chosen.tolist()]
        ids = torch.zeros(count, T, dtype=torch.int64)
        for row, tokens in zip(ids, tokenized, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return Texts(ids, torch.tensor([len(tokens) for tokens in tokenized]))

    def embedding(self, cut: int) -> Embedding:
        """Cut after the fifth block too, where no trunk would be left to split off."""
        if cut == 0:
            return Embedding(self.model.get_input_embeddings().weight, torch.nn.Identity())
        blocks = partition(self.model, bottom_blocks=0, top_blocks=BLOCKS - cut).trunk
        return Embedding(self.model.get_input_embeddings().weight, blocks)

    def knowledge(self, cut: int, noise_multiplier: float) -> TokenKnowledge:
        table_VD, blocks = self.embedding(cut).table_VD, self.embedding(cut).blocks

        def bottom(input_ids_BT):
            return blocks(table_VD[input_ids_BT])

        with torch.no_grad():
            hidden_BTD = bottom(self.public.input_ids_BT[:100])
        norm = hidden_BTD[self.public.is_real[:100]].norm(dim=-1).median().item()
        std = noise_multiplier * 2 * norm * T**0.5

        def clipped(x_BTD):
            return clip(x_BTD, norm, per="token")

        release = clipped
        if noise_multiplier:
            stream = NoiseStream(bytes(32))
            release = GaussianSequenceMechanism(norm, noise_multiplier, stream=stream).release
        return TokenKnowledge(
            bottom=bottom,
            release=release,
            clip=clipped,
            public=self.public,
            vocabulary=V,
            log_density=gaussian_log_density(std) if std else None,
            is_row_by_row=cut == 0,
        )

    def smashed(self, knowledge: TokenKnowledge) -> torch.Tensor:
        return knowledge.release(knowledge.hidden(self.private.input_ids_BT))

    def attack_all(self, cut: int, noise_multiplier: float, *, max_steps: int) -> dict[str, AttackResult]:
        knowledge = self.knowledge(cut, noise_multiplier)
        smashed, embedding = self.smashed(knowledge), self.embedding(cut)
        results = attack_tokens(knowledge, smashed, self.private, embedding=embedding, max_steps=max_steps)
        return {each.attack: each for each in results}


@pytest.fixture(scope="module")
def few(stories260k: Path, e2e: Path) -> Reality:
    """For attacks whose hits are nearly all or none, gradient descent through the blocks among them."""
    return Reality(stories260k, e2e, public=300, private=8)


@pytest.fixture(scope="module")
def many(stories260k: Path, e2e: Path) -> Reality:
    """For hits that are compared with each other, of which there must be enough."""
    return Reality(stories260k, e2e, public=300, private=40)


@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_without_noise_a_pretrained_models_tokens_are_recovered_at_every_cut(few: Reality, cut: int) -> None:
    results = few.attack_all(cut, 0.0, max_steps=20)
    assert max(each.rate for each in results.values()) >= 0.98
    assert min(results[name].rate for name in ("nearest neighbour", "linear probe", "transformer")) >= 0.98
    assert results["gradient descent"].rate >= 0.5
    assert max(each.chance for each in results.values()) < 0.15


@pytest.mark.parametrize(("noise_multiplier", "least", "most"), [(0.02, 0.9, 1), (0.04, 0.5, 0.9), (0.1, 0, 0.3)])
def test_under_noise_at_cut_0_what_learns_comes_within_2_points_of_the_most_likely_token(
    many: Reality, noise_multiplier: float, least: float, most: float
) -> None:
    results = many.attack_all(0, noise_multiplier, max_steps=50)
    yardstick = results["bayes in context"].rate
    assert least < yardstick <= most
    assert results["linear probe"].rate >= yardstick - 0.02
    assert results["transformer"].rate >= yardstick - 0.02
    assert max(results["nearest neighbour"].rate, results["bayes"].rate) <= yardstick


@pytest.mark.parametrize("cut", [0, 3])
def test_overwhelming_noise_leaves_chance(few: Reality, cut: int) -> None:
    results = few.attack_all(cut, 100.0, max_steps=50)
    for result in results.values():
        assert not result.beats_chance(), result.attack
    low, high = results["transformer"].interval()
    assert low <= results["transformer"].chance <= high
