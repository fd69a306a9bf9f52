"""An audit is made of the run's own settings, with public text that is not the private one."""

import json

import pytest
import torch

from splitfed.errors import ConfigError, DataError, SplitPointError, WeightsError
from splitfed.study.audit_setting import open_setting
from tests.study.audited_run import DataSection, load_server_config, setting_of, write_config, write_rows


def test_rows_are_set_against_the_token_that_their_logits_predict(tmp_path):
    setting = setting_of(tmp_path)
    texts = setting.texts(setting.private)
    assert texts.input_ids_BT.shape == texts.targets_BT.shape == (4, 14)
    for row, example in enumerate(setting.private):
        n_tokens = len(example.input_ids)
        assert texts.lengths_B[row] == n_tokens
        assert texts.targets_BT[row, : n_tokens - 1].tolist() == example.labels[1:]
        assert (texts.targets_BT[row, n_tokens - 1 :] == -100).all()
    assert torch.equal(texts.carries_loss, texts.targets_BT != -100)


def test_public_text_that_is_private_too_is_left_out(tmp_path):
    write_config(tmp_path / "server.toml")
    private = write_rows(tmp_path / "private.jsonl", 12, seed=1)
    public = write_rows(tmp_path / "public.jsonl", 10, seed=2)
    public.write_text(private.read_text() + public.read_text())
    setting = open_setting(
        load_server_config(tmp_path / "server.toml"),
        public=DataSection(path=str(public)),
        private=DataSection(path=str(private)),
        examples=12,
    )
    assert len(setting.public) == 10
    assert not {example.record for example in setting.public} & {example.record for example in setting.private}


def test_records_to_judge_are_different_ones_and_hold_those_that_are_attacked(tmp_path):
    setting = setting_of(tmp_path, private=30, examples=5)
    records = [example.record for example in setting.records]
    assert len(set(records)) == len(records) == 4 * 5
    assert {example.record for example in setting.private} <= set(records)


def test_what_the_run_leaves_to_be_calculated_is_filled_in(tmp_path):
    setting = setting_of(tmp_path, privacy="epsilon = 8.0")
    assert setting.privacy.noise_multiplier > 0
    assert setting.privacy.clipping_norm_smashed > 0
    assert setting.adapts
    assert not setting_of(tmp_path, bottom_blocks=0, top_blocks=0).adapts


def test_the_same_run_gives_the_same_examples(tmp_path):
    one, other = setting_of(tmp_path), setting_of(tmp_path)
    assert one.private == other.private
    assert one.public == other.public
    assert one.records == other.records


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"private": 1}, DataError, "private.jsonl: has 1 sequence, but an audit needs 2 or more there"),
        ({"public": 5}, DataError, "public.jsonl: has 5 sequences, but an audit needs 8 or more there"),
        ({"bottom_blocks": 4, "top_blocks": 3}, SplitPointError, "do not split a model of 6 blocks"),
    ],
)
def test_what_cannot_be_audited_is_refused_in_one_sentence(tmp_path, options, error, said):
    with pytest.raises(error, match=said):
        setting_of(tmp_path, **options)


def test_public_text_that_is_all_private_is_refused(tmp_path):
    file = DataSection(path=str(write_rows(tmp_path / "rows.jsonl", 20, seed=1)))
    config = load_server_config(write_config(tmp_path / "server.toml"))
    with pytest.raises(DataError, match="only 0 of its 20 sequences are not in"):
        open_setting(config, public=file, private=file, examples=4)


def test_adapter_targets_that_the_model_lacks_are_refused(tmp_path):
    path = write_config(tmp_path / "server.toml")
    path.write_text(path.read_text().replace("rank = 2", 'rank = 2\ntargets = ["nosuch"]'))
    rows = DataSection(path=str(write_rows(tmp_path / "rows.jsonl", 20, seed=1)))
    with pytest.raises(ConfigError, match=r"\[lora\] targets: .*nosuch"):
        open_setting(load_server_config(path), public=rows, private=rows, examples=4)


def test_a_base_with_damaged_weights_is_refused(tmp_path):
    import splitfed

    base = tmp_path / "base"
    base.mkdir()
    for file in splitfed.base_model_folder().iterdir():
        if file.suffix == ".json":
            (base / file.name).write_bytes(file.read_bytes())
    (base / "model.safetensors").write_bytes(b"damaged")
    path = write_config(tmp_path / "server.toml")
    path.write_text(path.read_text().replace('"demo"', json.dumps(str(base))))
    rows = DataSection(path=str(write_rows(tmp_path / "rows.jsonl", 20, seed=1)))
    with pytest.raises(WeightsError, match="cannot be read"):
        open_setting(load_server_config(path), public=rows, private=rows, examples=4)
