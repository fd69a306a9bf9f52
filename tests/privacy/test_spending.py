"""Charges add up to what the record that is worst off has paid."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from splitfed.privacy import CHANNELS, Charge, epsilon
from splitfed.privacy.spending import Spending, total_statement

FIELDS = {"run": "run", "round": 1, "step": 0, "kind": "train"}


def charge(records=("a",), *, z=1.0, channel="smashed", coupled=True, sequences=None):
    count = len(records) if sequences is None else sequences
    fields = {"records": tuple(records), "noise_multiplier": z, "channel": channel, "coupled": coupled}
    return Charge(**FIELDS, **fields, sequences=count)


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
    for channel in CHANNELS[:2]:
        per_record = []
        for record in "abcd":
            releases = Counter()
            for each in charges:
                if each.channel == channel:
                    own = each.records.count(record)
                    releases[each.noise_multiplier] += each.sequences if each.coupled else own
            per_record.append(epsilon(releases.items(), 1e-5))
        assert spending.epsilon(channel, 1e-5) == pytest.approx(max(per_record), rel=1e-9, abs=1e-12)


@given(charges=CHARGES, later=CHARGES)
@settings(max_examples=50, deadline=None)
def test_what_would_be_spent_is_never_less_than_what_is_spent_then(charges, later):
    spending = spending_of(charges)
    foreseen = {channel: spending.epsilon_after(later, channel, 1e-5) for channel in CHANNELS[:2]}
    after = spending_of([*charges, *later])
    for channel, value in foreseen.items():
        if all(each.coupled for each in charges + later):
            assert after.epsilon(channel, 1e-5) == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert after.epsilon(channel, 1e-5) <= value * (1 + 1e-9) + 1e-12
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


@pytest.mark.parametrize("coupled", [True, False])
def test_one_release_without_noise_leaves_nothing_guaranteed_for_good(coupled):
    spending = spending_of([charge(z=0.0, coupled=coupled), charge(z=5.0, coupled=coupled)])
    assert spending.epsilon("smashed", 1e-5) is None
    assert spending.unprotected() == ("smashed", "adapter")


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
    assert total_statement(unprotected) == statement


def test_no_total_is_claimed_over_channels_that_are_all_protected():
    with pytest.raises(ValueError, match="not stated"):
        total_statement([])


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
    ],
    ids=str,
)
def test_a_charge_with_a_wrong_field_is_refused(change):
    good = {**FIELDS, "channel": "smashed", "noise_multiplier": 1, "records": ("a", "b"), "sequences": 2}
    assert Charge(**good).noise_multiplier == 1.0
    with pytest.raises(ValidationError, match="1 validation error"):
        Charge(**{**good, **change})
