import errno
import json
from collections import namedtuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import splitfed
from splitfed import cli
from splitfed.errors import ConfigError, FingerprintMismatch, OutputError, RunDirectoryError
from splitfed.study.export import export_run
from splitfed.study.run_folder import open_run
from tests.study.small_run import write_finished_run, write_gpt2

IDS = torch.arange(2, 34).reshape(2, 16)


@pytest.fixture(params=["demo", "gpt2"])
def run_and_base(request, tmp_path):
    base = "demo" if request.param == "demo" else write_gpt2(tmp_path / "base")
    folder = splitfed.base_model_folder() if base == "demo" else base
    return write_finished_run(tmp_path, base), folder


@pytest.fixture
def run(tmp_path):
    return write_finished_run(tmp_path)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def test_a_merged_checkpoint_has_the_logits_of_base_and_adapter_without_peft(run_and_base, tmp_path):
    run, base = run_and_base
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    expected = logits(adapted)
    export_run(open_run(run), tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(merged, PreTrainedModel)
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    assert (logits(merged) - expected).abs().max() < 1e-5 * expected.abs().max()  # float32: 6e-8 an operation
    assert (expected - plain).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("A word") == AutoTokenizer.from_pretrained(base)("A word")
    own = base / "generation_config.json"
    assert (tmp_path / "out" / own.name).read_bytes() == own.read_bytes()
    assert not list((tmp_path / "out").glob("adapter*"))


def test_an_adapter_is_that_of_the_round_that_is_asked_for(run, tmp_path):
    (tmp_path / "first").mkdir()
    export_run(open_run(run, round=1), tmp_path / "first")
    export_run(open_run(run), tmp_path / "last")
    for folder, number in (("first", 1), ("last", 2)):
        there = run / "adapters" / f"round-000{number}" / "adapter_model.safetensors"
        assert (tmp_path / folder / there.name).read_bytes() == there.read_bytes()
        assert (tmp_path / folder / "adapter_config.json").is_file()


def test_a_round_that_was_not_written_to_its_end_is_not_used(run):
    (run / "checkpoints" / "round-0002").rename(run / "checkpoints" / ".round-0002")
    assert open_run(run).round == 1
    with pytest.raises(ConfigError, match=r"--round is 2, but the run in .* has whole rounds from 1 to 1"):
        open_run(run, round=2)


def test_a_merged_checkpoint_has_the_numbers_that_are_asked_for(run, tmp_path):
    export_run(open_run(run), tmp_path / "out", merge=True, dtype="bfloat16")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    with pytest.raises(ConfigError, match="give --merge, too"):
        export_run(open_run(run), tmp_path / "other", dtype="bfloat16")


def test_what_is_there_already_stays_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for output in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(OutputError, match="is there already; give an empty or a new folder"):
            export_run(open_run(run), output)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_another_base_model_is_refused_by_its_configuration_and_by_its_tensors(tmp_path):
    base = write_gpt2(tmp_path / "base")
    run = write_finished_run(tmp_path, base)
    with pytest.raises(FingerprintMismatch, match="has another configuration than the one of the run small"):
        export_run(open_run(run), tmp_path / "out", merge=True, base="demo")
    tensors = load_file(base / "model.safetensors")
    tensors["transformer.wte.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FingerprintMismatch, match=r"differs in the tensor 'transformer\.wte\.weight'"):
        export_run(open_run(run), tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_anything_is_written(run, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "free")(1_000_000)
    monkeypatch.setattr("splitfed.study.export.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match="needs 38 MB, and 1 MB are free there; make room"):
        export_run(open_run(run), tmp_path / "place" / "out", merge=True)
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.parametrize("merge", [False, True])
def test_a_disk_that_becomes_full_leaves_nothing_behind(run, tmp_path, monkeypatch, merge):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        "splitfed.study.export.shutil.copyfile" if merge else "splitfed.study.export.shutil.copytree", full
    )
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\); give a folder with room"):
        export_run(open_run(run), tmp_path / "place" / "out", merge=merge)
    assert list((tmp_path / "place").iterdir()) == []


def test_what_holds_no_run_or_no_whole_round_is_refused_in_one_sentence(run, tmp_path, capsys):
    for folder, said in ((tmp_path, "there is no run.toml"), (run, "holds no adapter yet")):
        for checkpoint in (run / "checkpoints").iterdir():
            checkpoint.rmdir()
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", str(folder), str(tmp_path / "out")])
        assert ended.value.code == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_named(run):
    (run / "adapters" / "round-0002" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunDirectoryError, match=r"round-0002/adapter_model\.safetensors cannot be read"):
        open_run(run).adapter()


def test_the_command_says_what_it_wrote(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(run), str(tmp_path / "out")])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: adapter of round 2 of small\n"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
