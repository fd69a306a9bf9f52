"""A whole audit of a small run: what is recovered, what is left out, and what is written."""

import json

import pytest

from splitfed.config import load_server_config
from splitfed.errors import ConfigError
from splitfed.privacy.leakage import AttackResult
from splitfed.study.audit import (
    Audit,
    AuditRow,
    AuditTerms,
    audit,
    check_folder,
    configured_noise,
    false_alarms,
    write_audit,
)
from tests.study.audited_run import setting_of, write_config, write_rows

SMALL = Audit(
    AuditTerms("a", "b", 4, 64, 1, 1, 8, 2, 8, 1e-5, "replace-one", False),
    (AuditRow(AttackResult("nearest neighbour", "tokens", 1, 2, 0.1), False),),
    (),
    1.0,
)


def test_a_head_on_the_device_hides_neither_labels_nor_mask(tmp_path):
    config = load_server_config(
        write_config(tmp_path / "server.toml", bottom_blocks=0, top_blocks=0, privacy="noise_multiplier = 0.0")
    )
    public = write_rows(tmp_path / "public.jsonl", 20, seed=1)
    private = write_rows(tmp_path / "private.jsonl", 8, seed=2)
    heard = []
    found = audit(config, public, str(private), examples=4, on_stage=lambda what, part: heard.append(part))
    rates = {row.result.attack: row.result.rate for row in found.rows}
    assert rates["known head"] == 1
    assert rates["nearest neighbour"] == 1
    assert not any(row.is_protected for row in found.rows)
    assert {row.result.target for row in found.rows} == {"tokens", "labels", "mask"}
    assert len(found.left_out) == 1
    assert "nothing to train" in found.left_out[0]
    assert (found.terms.private_sequences, found.terms.public_sequences) == (4, 20)
    assert heard == sorted(heard)
    assert (heard[0], heard[-1]) == (0.0, 1.0)


def test_an_audit_of_one_sequence_is_refused(tmp_path):
    config = load_server_config(write_config(tmp_path / "server.toml"))
    with pytest.raises(ValueError, match="2 sequences or more, not 1"):
        audit(config, tmp_path, tmp_path, examples=1)


def test_files_replace_those_of_an_earlier_audit_and_leave_nothing_else(tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / "audit.json").write_text("earlier")
    (folder / "notes.txt").write_text("kept")
    files = write_audit(SMALL, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["audit.csv", "audit.json", "audit.png", "notes.txt"]
    assert json.loads(files[0].read_text())["run"] == "a"


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"taken: cannot be written to \(File exists\)"):
        check_folder(tmp_path / "taken")


def test_what_cannot_be_replaced_leaves_no_draft(tmp_path):
    (tmp_path / "audit.csv").mkdir()
    with pytest.raises(ConfigError, match="cannot be written to"):
        write_audit(SMALL, tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (4, "4 members with no false alarm among 4 others"),
        (20, "20 members with 1 false alarm at most among 20 others"),
        (64, "64 members with 3 false alarms at most among 64 others"),
    ],
)
def test_false_alarms_are_counted_and_not_promised_by_a_share_that_so_few_cannot_give(members, said):
    assert false_alarms(members) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "noise multiplier 0.002, dp-sgd on the adapter update"),
        ({"bottom_blocks": 0, "top_blocks": 0, "privacy": "noise_multiplier = 0.5"}, "noise multiplier 0.5"),
        ({"privacy": 'adapter = "none"'}, "noise multiplier 0.002, none on the adapter update"),
        (
            {"bottom_blocks": 0, "privacy": 'smashed = "metric"\neta = 2\nnoise_multiplier_adapter = 0.25'},
            "metric privacy of eta 2 on smashed data, noise multiplier 0.002 elsewhere, dp-sgd of 0.25 on the adapter "
            "update",
        ),
    ],
    ids=str,
)
def test_which_noise_is_configured_is_said(tmp_path, options, said):
    assert configured_noise(setting_of(tmp_path, **options)) == said
