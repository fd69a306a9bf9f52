"""Schedules, accumulation, clipping and weight decay are those of transformers' own Trainer, step for step."""

from collections.abc import Callable, Mapping
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import splitfed
from splitfed.config import CodecSection, FederationSection, LoraSection, TrainingSection
from splitfed.training.data import Example
from splitfed.training.simulate import Simulation, simulate
from tests.equivalence.by_trainer import TrainerRun, trainer_run
from tests.equivalence.central import batches_of
from tests.equivalence.tiny_models import VOCABULARY, tiny_model

TOLERANCE = 1e-5
"""Largest difference of a step's mean loss, in nats, and of an element of the adapter."""

SEED = 5
OPEN = CodecSection(smashed="none", trunk_output="none", output_gradient="none", smashed_gradient="none")
LORA = LoraSection(rank=4, alpha=8.0)
TRAINING = TrainingSection(rounds=3, local_steps=2, batch_size=4, max_tokens=20, learning_rate=1e-3)
LENGTHS = [2, 19, 5, 11, 3, 16, 7, 20, 4, 13, 9]
SCHEDULES = [("constant", 0), *product(("constant_with_warmup", "linear", "cosine"), (0, 3))]
"""The longer warm-up ends in the middle of the second round."""


def row(n_tokens: int) -> Example:
    """Every other row begins with a prompt, which carries no loss."""
    ids = torch.randint(VOCABULARY, (n_tokens,), generator=torch.Generator().manual_seed(n_tokens)).tolist()
    n_prompt = n_tokens // 4 if n_tokens % 2 else 0
    return Example(ids, [-100] * n_prompt + ids[n_prompt:], f"{n_tokens} tokens")


ROWS = [row(n_tokens) for n_tokens in LENGTHS]


def settings(**changes: object) -> TrainingSection:
    return TrainingSection.model_validate({**TRAINING.model_dump(), **changes})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(splitfed.base_model_folder())


@pytest.fixture(scope="module")
def split_run(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Simulation]:
    def run(training: TrainingSection, *, cut: tuple[int, int] = (1, 1)) -> Simulation:
        return simulate(
            splitfed.partition(tiny_model("llama", num_hidden_layers=3), bottom_blocks=cut[0], top_blocks=cut[1]),
            tokenizer,
            {"a": ROWS},
            training=training,
            lora=LORA,
            codecs=OPEN,
            federation=FederationSection(agents=1),
            seed=SEED,
        )

    return run


@pytest.fixture
def by_trainer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Callable[..., TrainerRun]:
    def run(training: TrainingSection, *, averages_means: bool = False) -> TrainerRun:
        batches = batches_of(ROWS, training, client="a", seed=SEED)
        return trainer_run(
            tiny_model("llama", num_hidden_layers=3),
            tokenizer,
            batches,
            training,
            LORA,
            seed=SEED,
            folder=tmp_path,
            averages_means=averages_means,
        )

    return run


@pytest.fixture(scope="module")
def by_schedule(split_run: Callable[..., Simulation]) -> dict[tuple[str, int], Simulation]:
    return {each: split_run(settings(schedule=each[0], warmup_steps=each[1])) for each in SCHEDULES}


@pytest.fixture(scope="module")
def plain(by_schedule: Mapping[tuple[str, int], Simulation]) -> Simulation:
    return by_schedule[TRAINING.schedule, TRAINING.warmup_steps]


def assert_same_run(run: Simulation, expected: TrainerRun) -> None:
    assert run.losses["a"] == pytest.approx(expected.losses, rel=0, abs=TOLERANCE)
    assert run.adapter.keys() == expected.adapter.keys()
    assert difference(run.adapter, expected.adapter) <= TOLERANCE


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Give the largest of any element."""
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize(("schedule", "warmup_steps"), SCHEDULES)
def test_a_schedule_goes_over_all_rounds_as_the_trainers_over_all_steps(
    by_schedule: Mapping[tuple[str, int], Simulation],
    by_trainer: Callable[..., TrainerRun],
    schedule: str,
    warmup_steps: int,
) -> None:
    expected = by_trainer(settings(schedule=schedule, warmup_steps=warmup_steps))
    assert_same_run(by_schedule[schedule, warmup_steps], expected)


def test_schedules_differ_but_a_warm_up_of_no_steps_is_none(
    by_schedule: Mapping[tuple[str, int], Simulation],
) -> None:
    alike = [
        (first, second)
        for first, second in combinations(SCHEDULES, 2)
        if difference(by_schedule[first].adapter, by_schedule[second].adapter) <= 5 * TOLERANCE
    ]
    assert alike == [(("constant", 0), ("constant_with_warmup", 0))]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_micro_batches_are_the_trainers_accumulation(
    split_run: Callable[..., Simulation], by_trainer: Callable[..., TrainerRun], micro_batch_size: int
) -> None:
    training = settings(micro_batch_size=micro_batch_size)
    assert_same_run(split_run(training), by_trainer(training))


def test_a_mean_of_the_micro_batches_means_would_be_something_else(
    plain: Simulation, by_trainer: Callable[..., TrainerRun]
) -> None:
    of_means = by_trainer(settings(micro_batch_size=2), averages_means=True)
    assert all(abs(a - b) > 50 * TOLERANCE for a, b in zip(plain.losses["a"], of_means.losses, strict=True))
    assert difference(plain.adapter, of_means.adapter) > 5 * TOLERANCE


@pytest.mark.parametrize(
    ("max_grad_norm", "clipped_steps"),
    [
        pytest.param(1.5, 4, id="some steps"),
        pytest.param(0.2, 6, id="every step"),
        pytest.param(1e-5, 6, id="down to the size of AdamW's epsilon"),
    ],
)
def test_clipping_is_the_trainers(
    split_run: Callable[..., Simulation],
    by_trainer: Callable[..., TrainerRun],
    plain: Simulation,
    max_grad_norm: float,
    clipped_steps: int,
) -> None:
    training = settings(max_grad_norm=max_grad_norm, micro_batch_size=2)
    run, expected = split_run(training), by_trainer(training)
    assert_same_run(run, expected)
    assert sum(norm > max_grad_norm for norm in expected.norms) == clipped_steps
    assert difference(run.adapter, plain.adapter) > 5 * TOLERANCE


@pytest.mark.parametrize("weight_decay", [0.1, 1.0])
def test_weight_decay_is_the_trainers_and_reaches_every_factor(
    split_run: Callable[..., Simulation], by_trainer: Callable[..., TrainerRun], plain: Simulation, weight_decay: float
) -> None:
    training = settings(weight_decay=weight_decay)
    run, expected = split_run(training), by_trainer(training)
    assert_same_run(run, expected)
    assert expected.decayed == run.adapter.keys()
    assert difference(run.adapter, plain.adapter) > 5 * TOLERANCE


@pytest.mark.parametrize("cut", [(0, 0), (1, 1), (2, 0)])
def test_all_of_them_together_are_the_trainers_at_any_cut(
    split_run: Callable[..., Simulation], by_trainer: Callable[..., TrainerRun], cut: tuple[int, int]
) -> None:
    training = settings(schedule="cosine", warmup_steps=3, micro_batch_size=2, max_grad_norm=0.5, weight_decay=0.5)
    assert_same_run(split_run(training, cut=cut), by_trainer(training))
