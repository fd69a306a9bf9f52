"""Charges add up to what the record that is worst off has paid."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from splitfed.privacy import CHANNELS, Charge, epsilon, format_epsilon
from splitfed.privacy.accounting import Composition
from splitfed.privacy.spending import Spending

FIELDS = {"run": "run", "round": 1, "step": 0, "kind": "train"}


def charge(records=("a",), *, z=1.0, channel="smashed", coupled=True, sequences=None, **more):
    count = len(records) if sequences is None else sequences
    fields = {"records": tuple(records), "noise_multiplier": z, "channel": channel, "coupled": coupled}
    return Charge(**FIELDS, **fields, sequences=count, **more)


def step(q=0.01, **multipliers):
    together = sum(z**-2 for z in multipliers.values()) ** -0.5
    return charge((), z=together, channel="step", coupled=False, sequences=1, sample_rate=q, channels=multipliers)


def spending_of(charges):
    spending = Spending()
    for each in charges:
        spending.add(each)
    return spending


CHARGES = st.lists(
    st.builds(
        charge,
        st.lists(st.sampled_from("abcd"), min_size=1, max_size=5),
        z=st.sampled_from([0.5, 1.0, 3.0]),
        channel=st.sampled_from(CHANNELS[:2]),
        coupled=st.booleans(),
    ),
    max_size=12,
)


@given(charges=CHARGES)
@settings(max_examples=100, deadline=None)
def test_epsilon_is_the_largest_of_all_records_counted_one_by_one(charges):
    spending = spending_of(charges)
    for channel in (*CHANNELS[:2], None):
        per_record = []
        for record in "abcd":
            releases = Counter()
            for each in charges:
                if channel in (each.channel, None):
                    own = each.records.count(record)
                    releases[each.noise_multiplier] += each.sequences if each.coupled else own
            per_record.append(epsilon(releases.items(), 1e-5))
        assert spending.epsilon(channel, 1e-5) == pytest.approx(max(per_record), rel=1e-9, abs=1e-12)


@given(charges=CHARGES, later=CHARGES)
@settings(max_examples=50, deadline=None)
def test_what_would_be_spent_is_what_is_spent_then(charges, later):
    spending = spending_of(charges)
    foreseen = {channel: spending.epsilon_after(later, channel, 1e-5) for channel in (*CHANNELS[:2], None)}
    after = spending_of([*charges, *later])
    for channel, value in foreseen.items():
        assert after.epsilon(channel, 1e-5) == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert value >= spending.epsilon(channel, 1e-5) * (1 - 1e-9)


def test_a_coupled_release_counts_for_records_that_are_not_in_it():
    spending = spending_of([charge("ab"), charge("c", coupled=False)])
    assert spending.epsilon("smashed", 1e-5) == epsilon([(1.0, 3)], 1e-5)


def test_uncoupled_releases_count_for_their_own_records_only():
    spending = spending_of([charge(record, coupled=False) for record in "abcab"])
    assert spending.epsilon("smashed", 1e-5) == epsilon([(1.0, 2)], 1e-5)


def test_a_record_of_several_sequences_is_charged_for_each():
    assert spending_of([charge("aaab", coupled=False)]).epsilon("smashed", 1e-5) == epsilon([(1.0, 3)], 1e-5)


def test_rows_without_a_record_count_where_all_is_coupled():
    assert spending_of([charge("a", sequences=4)]).epsilon("smashed", 1e-5) == epsilon([(1.0, 4)], 1e-5)


def test_channels_are_counted_apart():
    spending = spending_of([charge(channel="output_gradient")])
    assert spending.epsilon("smashed", 1e-5) == 0
    assert spending.epsilon("output_gradient", 1e-5) == epsilon([(1.0, 1)], 1e-5)


def test_the_channels_of_a_step_are_one_release_in_total():
    """Squared signals add up: 1/1² + 1/2² + 1/0.5²."""
    multipliers = {"smashed": 1.0, "output_gradient": 2.0, "adapter": 0.5}
    spending = spending_of([charge(z=z, channel=channel, coupled=False) for channel, z in multipliers.items()])
    assert spending.epsilon(None, 1e-5) == pytest.approx(epsilon([(5.25**-0.5, 1)], 1e-5), rel=1e-9)


def test_the_total_is_of_one_record_and_not_of_the_worst_of_each_channel():
    charges = [charge("aa", coupled=False), charge("bb", channel="output_gradient", coupled=False)]
    assert spending_of(charges).epsilon(None, 1e-5) == epsilon([(1.0, 2)], 1e-5)


@pytest.mark.parametrize("coupled", [True, False])
def test_one_release_without_noise_leaves_nothing_guaranteed_for_good(coupled):
    spending = spending_of([charge(z=0.0, coupled=coupled), charge(z=5.0, coupled=coupled)])
    assert spending.epsilon("smashed", 1e-5) is None
    assert spending.epsilon(None, 1e-5) is None
    assert spending.unprotected() == ("smashed",)


def test_a_sequence_becomes_nothing_more_cheaply_than_any_other():
    """Its clipped contribution moves half as far, so its squared signal is a quarter."""
    spending = spending_of([charge(z=1.0, coupled=False)])
    assert spending.epsilon(None, 1e-5, relation="zero-out") == pytest.approx(epsilon([(2.0, 1)], 1e-5), rel=1e-9)


def test_what_a_record_changes_through_trained_adapters_moves_as_far_under_either_relation():
    """Zeroing a record moves another's release, or an update, from one clipped value to another."""
    spending = spending_of([charge(z=1.0), charge((), z=2.0, channel="adapter", unit="client", sequences=1)])
    both = epsilon([(1.0, 1), (2.0, 1)], 1e-5)
    assert spending.epsilon(None, 1e-5, relation="zero-out") == pytest.approx(both, rel=1e-9)
    spending.add(charge(z=1.0, coupled=False))
    mixed = epsilon([(1.0, 1), (2.0, 1), (2.0, 1)], 1e-5)
    assert spending.epsilon(None, 1e-5, relation="zero-out") == pytest.approx(mixed, rel=1e-9)


# Units


def test_a_token_is_charged_for_its_row_and_its_sequence_for_all_of_them():
    spending = spending_of([charge(z=2.0, unit="token", units=16.0)])
    assert spending.epsilon("smashed", 1e-5, unit="token") == epsilon([(2.0, 1)], 1e-5)
    assert spending.epsilon("smashed", 1e-5) == epsilon([(0.5, 1)], 1e-5)
    assert spending.epsilon(None, 1e-5) == epsilon([(0.5, 1)], 1e-5)


@pytest.mark.parametrize("token_first", [True, False])
def test_what_protects_a_sequence_protects_its_tokens(token_first):
    charges = [charge(z=2.0, unit="token", units=16.0), charge(z=1.0, channel="output_gradient")]
    spending = spending_of(charges if token_first else charges[::-1])
    assert spending.epsilon("output_gradient", 1e-5, unit="token") == epsilon([(1.0, 1)], 1e-5)
    assert spending.epsilon(None, 1e-5, unit="token") == epsilon([(2.0, 1), (1.0, 1)], 1e-5)


def test_noise_that_hides_a_client_hides_each_of_its_records():
    spending = spending_of([charge((), z=1.0, channel="adapter", unit="client", sequences=1)])
    assert spending.epsilon("adapter", 1e-5) == epsilon([(1.0, 1)], 1e-5)


def test_metric_privacy_adds_up_for_itself_and_is_never_an_epsilon():
    spending = spending_of([charge("ab", z=0.0, unit="token", eta=2.5, coupled=False) for _ in range(3)])
    assert spending.eta("smashed") == 7.5
    assert spending.eta("output_gradient") is None
    assert spending.epsilon("smashed", 1e-5) is None
    assert spending.total_statement(1e-5) == (
        "none: the smashed data (metric privacy only: 7.5 · distance) is not protected"
    )


# Steps whose examples were drawn in secret


def test_a_secret_sample_costs_less_where_a_sequence_becomes_nothing():
    spending = spending_of([step(smashed=2.0, output_gradient=2.0, adapter=2.0)] * 50)
    composed = Composition(0.0, {(0.01, 0.75): 50})
    amplified = spending.epsilon(None, 1e-5, relation="zero-out")
    assert amplified == pytest.approx(composed.epsilon(1e-5, "zero-out"), rel=1e-9)
    assert amplified < epsilon([(2 / 0.75**0.5, 50)], 1e-5) / 2
    assert spending.epsilon("smashed", 1e-5, relation="zero-out") < amplified


def test_a_secret_sample_buys_nothing_under_replace_one():
    spending = spending_of([step(smashed=2.0, output_gradient=2.0)] * 3)
    assert spending.epsilon(None, 1e-5) == pytest.approx(epsilon([(2.0, 6)], 1e-5), rel=1e-6)


def test_the_probability_that_a_sample_does_not_fit_is_taken_from_delta():
    kept, lost = (
        spending_of([step(smashed=2.0).model_copy(update={"overflow": overflow})] * 4).epsilon(
            None, 1e-5, relation="zero-out"
        )
        for overflow in (0.0, 2e-6)
    )
    assert lost > kept
    assert spending_of([step(smashed=2.0).model_copy(update={"overflow": 1e-5})]).epsilon(
        None, 1e-5, relation="zero-out"
    ) == pytest.approx(epsilon([(4.0, 1)], 1e-5), rel=1e-6)


# What is said


def test_an_unknown_channel_is_refused():
    with pytest.raises(ValueError, match="no channel 'weights'; choose one of smashed, output_gradient, adapter, loss"):
        Spending().epsilon("weights", 1e-5)


@pytest.mark.parametrize(
    ("unprotected", "statement"),
    [
        (["adapter"], "none: the adapter update is not protected"),
        (["adapter", "smashed"], "none: the smashed data and the adapter update are not protected"),
        (CHANNELS[:3], "none: the smashed data, the output gradient and the adapter update are not protected"),
    ],
)
def test_the_total_names_what_is_not_protected(unprotected, statement):
    charges = [charge(z=0.0 if channel in unprotected else 1.0, channel=channel) for channel in CHANNELS[:3]]
    assert spending_of(charges).total_statement(1e-5) == statement


def test_the_total_of_protected_channels_states_delta_unit_and_relation():
    statement = spending_of([charge(z=1.0, coupled=False)]).total_statement(1e-6, relation="zero-out")
    figure = format_epsilon(epsilon([(2.0, 1)], 1e-6))
    assert statement == f"epsilon {figure} at delta 1e-06, unit sequence, relation zero-out"


@pytest.mark.parametrize(
    "change",
    [
        {"channel": "weights"},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"noise_multiplier": "1"},
        {"sequences": 0},
        {"sequences": 1.5},
        {"sequences": 1},
        {"records": ("",)},
        {"records": "ab"},
        {"round": -1},
        {"step": -1},
        {"kind": "sell"},
        {"text": "secret"},
        {"unit": "row"},
        {"units": 0.5},
        {"eta": 0.0},
        {"sample_rate": 0.5},
        {"channel": "step"},
        {"channel": "step", "sample_rate": 0.5, "channels": {"smashed": 1.0}, "coupled": True},
        {"channel": "step", "sample_rate": 0.5, "channels": {"smashed": 0.0}, "coupled": False},
        {"channel": "step", "sample_rate": 1.0, "channels": {"smashed": 1.0}, "coupled": False},
        {"overflow": 1.5},
    ],
    ids=str,
)
def test_a_charge_with_a_wrong_field_is_refused(change):
    good = {**FIELDS, "channel": "smashed", "noise_multiplier": 1, "records": ("a", "b"), "sequences": 2}
    assert Charge(**good).noise_multiplier == 1.0
    with pytest.raises(ValidationError, match="validation error"):
        Charge(**{**good, **change})
