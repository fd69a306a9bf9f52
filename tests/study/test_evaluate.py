import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitfed
from splitfed import cli
from splitfed.training.likeness import Asked, likeness
from tests.study.small_run import write_finished_run

ROWS = [
    {"prompt": "The statement", "completion": " is a list of names."},
    {"prompt": "A function", "completion": " returns its value to the caller, and more."},
    {"prompt": "If the class", "completion": " has no name, it is not found."},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def evaluate(*words):
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *map(str, words)])
    return ended.value.code


def stock(run, number):
    """Base model, and base model with adapter, as anyone would load them."""
    base = splitfed.base_model_folder()
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), run / "adapters" / f"round-000{number}"
    )
    return AutoModelForCausalLM.from_pretrained(base).eval(), adapted.eval(), AutoTokenizer.from_pretrained(base)


@torch.no_grad()
def completion_loss(model, tokenizer):
    """Mean over the tokens of completions, end of text included, one row after the other."""
    total, tokens = 0.0, 0
    start = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    for row in ROWS:
        prompt, learned = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in row)
        prompt, learned = start + prompt, [*learned, tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + learned])
        loss = model(torch.tensor([prompt + learned]), labels=labels).loss
        total, tokens = total + loss.item() * len(learned), tokens + len(learned)
    return total / tokens, tokens


def test_losses_are_those_of_stock_transformers_and_peft(run, data, capsys):
    assert evaluate(run, "--data", data, "--json", "--round", "1") == 0
    found = json.loads(capsys.readouterr().out)
    plain, adapted, tokenizer = stock(run, 1)
    for name, model in (("base", plain), ("adapted", adapted)):
        loss, tokens = completion_loss(model, tokenizer)
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found[name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found["tokens"] == tokens
    assert abs(found["base"]["loss"] - found["adapted"]["loss"]) > 0.1
    assert (found["round"], found["rows"], found["texts"]) == (1, 3, 0)


def test_texts_are_the_greedy_ones_and_compared_with_the_files(run, data, capsys):
    assert evaluate(run, "--data", data, "--json", "--generate", "--max-tokens", "16") == 0
    found = json.loads(capsys.readouterr().out)
    plain, adapted, tokenizer = stock(run, 2)
    for name, model in (("base", plain), ("adapted", adapted)):
        texts = []
        for row in ROWS:
            inputs = tokenizer(row["prompt"], return_tensors="pt")
            whole = model.generate(**inputs, do_sample=False, max_length=16, pad_token_id=0)
            texts.append(tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        expected = likeness(texts, [Asked([1], "a record", row["completion"]) for row in ROWS])
        assert found[name]["bleu"] == pytest.approx(expected.bleu)
        assert found[name]["rouge_l"] == pytest.approx(expected.rouge_l)
    assert found["texts"] == 3
    assert found["signature"].startswith("nrefs:1|")


def test_a_text_like_the_files_is_worth_100_and_half_of_it_what_the_definition_says():
    asked = [Asked([1], "a record", " one two three four ")]
    assert likeness(["one two three four"], asked).bleu == pytest.approx(100)
    assert likeness(["one two three four"], asked).rouge_l == 100
    assert likeness(["one two"], asked).rouge_l == pytest.approx(100 * 2 / 3)  # precision 1, recall 1/2
    assert likeness(["семь восемь"], [Asked([1], "a record", "Семь, восемь")]).rouge_l == 100


def test_a_person_is_shown_a_table_and_how_far_it_is(run, data, capsys):
    assert evaluate(run, "--data", data, "--limit", "2") == 0
    said = capsys.readouterr()
    assert "base + adapter of round 2" in said.out
    assert "from 2 rows of" in said.out
    assert "loss, base + adapter" in said.err


def test_columns_are_named_as_for_an_audit(run, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("mr,ref\nA name,a text\n")
    words = (run, "--data", tmp_path / "rows.csv")
    assert evaluate(*words) == 2
    assert "name the right ones with --prompt-column and --completion-column" in capsys.readouterr().err
    assert evaluate(*words, "--prompt-column", "mr", "--completion-column", "ref", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--limit", "0"], 2, "--limit is 0; give 1 or more"),
        (["--max-tokens", "9"], 2, "--max-tokens says how long texts become; give --generate, too"),
        (["--generate", "--max-tokens", "2"], 2, "leaves no room for text in 2 (--max-tokens, the prompt included)"),
        (["--generate", "--max-tokens", "99999"], 2, "but the base model counts to"),
        (["--round", "7"], 2, "--round is 7, but the run in"),
        (["--base", "nowhere/at/all"], 1, "'nowhere/at/all' is neither a folder nor available"),
        (["--data", "gone.jsonl"], 2, "gone.jsonl: no such file; give --data the path of one"),
        (
            ["--generate", "--text-column", "prompt", "--prompt-column", "none"],
            2,
            "--generate compares with completions",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(run, data, words, status, said, capsys):
    assert evaluate(run, "--data", data, *words) == status
    err = capsys.readouterr().err
    assert said in err
    assert (err.count("\n"), err.startswith("splitfed: ")) == (1, True)
