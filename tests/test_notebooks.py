"""The notebooks as they are in git: stripped, stable, one question each. `make notebooks` executes them."""

import ast
import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
stripped = runpy.run_path(str(FOLDER / "strip.py"))["stripped"]
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURE = re.compile(r"(?<![(\w.])\d+\.\d+\b(?! billion| million)|\d+ ?%")
"""A fraction or a share; sizes of models and arguments, such as Dirichlet(0.1), are chosen and not found."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def markdown_of(notebook: dict) -> str:
    return "\n\n".join(text_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def code_of(notebook: dict) -> str:
    return "\n\n".join(text_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code")


def test_there_are_notebooks_and_all_have_a_number() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}_" for number in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 5


def test_a_notebook_has_the_format_that_every_jupyter_reads(path: Path, notebook: dict) -> None:
    nbformat.validate(nbformat.read(path, nbformat.NO_CONVERT))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)


def test_outputs_are_stripped(notebook: dict) -> None:
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_the_kernel_is_that_of_whoever_opens_it(notebook: dict) -> None:
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_the_file_is_written_as_strip_writes_it(path: Path, notebook: dict) -> None:
    assert path.read_text(encoding="utf-8") == stripped(notebook)
    for cell in notebook["cells"]:
        *lines, last = cell["source"]
        assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
        assert last
        assert "\n" not in last


def test_strip_gives_back_what_jupyter_has_run_and_saved(notebook: dict) -> None:
    before = stripped(notebook)
    notebook["metadata"]["language_info"]["version"] = "3.13.1"
    for cell in notebook["cells"]:
        cell["source"] = text_of(cell)
        if cell["cell_type"] == "code":
            cell |= {"execution_count": 3, "outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}
            cell["metadata"] = {"execution": {"iopub.status.busy": "now"}}
    assert stripped(notebook) == before


def test_cells_have_short_names_of_their_own(notebook: dict) -> None:
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{1,31}", name) for name in names)


def test_no_place_on_somebodys_machine_is_named(path: Path) -> None:
    assert not re.findall(r"/(?:home|tmp|root|work|Users|mnt)/|[A-Z]:\\\\", path.read_text(encoding="utf-8"))


def test_it_begins_with_its_question_and_asks_no_other(notebook: dict) -> None:
    first, *others = notebook["cells"]
    assert first["cell_type"] == "markdown"
    title, *rest = text_of(first).splitlines()
    assert re.fullmatch(r"# [^?]+\?", title)
    assert markdown_of(notebook).count("?") == 1
    assert "**Computed here:**" in "\n".join(rest)
    assert not any(text_of(cell).startswith("# ") for cell in others if cell["cell_type"] == "markdown")


def test_it_ends_with_an_answer_in_numbers_that_are_computed(notebook: dict) -> None:
    last = notebook["cells"][-1]
    assert (last["cell_type"], last["id"]) == ("code", "answer")
    printed = [
        node for node in ast.walk(ast.parse(text_of(last))) if isinstance(node, ast.Call) and _name(node) == "print"
    ]
    assert len(printed) >= 2
    for call in printed:
        assert any(isinstance(each, ast.FormattedValue | ast.Name) for each in ast.walk(call.args[0]))
        assert not FIGURE.findall(" ".join(_said(call.args[0])))


def test_the_text_states_no_figure_that_a_rerun_could_change(notebook: dict) -> None:
    assert not FIGURE.findall(markdown_of(notebook))


def test_a_figure_has_names_on_its_axes(notebook: dict) -> None:
    for cell in notebook["cells"]:
        code = text_of(cell)
        if "plt.subplots" in code:
            assert re.search(r"xlabel|set_xticks|noise_axis", code), cell["id"]
            assert re.search(r"ylabel|set_yticks", code), cell["id"]
            assert code.endswith("plt.show()"), cell["id"]


def test_tables_that_it_reads_are_committed_ones_and_are_named_in_the_first_cell(notebook: dict) -> None:
    said = text_of(notebook["cells"][0])
    for name in re.findall(r'read_results\("(\w+)"\)', code_of(notebook)):
        assert f"`{name}.csv`" in said


def test_what_takes_time_comes_after_the_tables_are_found(notebook: dict) -> None:
    """So that outside of the repository the sentence comes at once."""
    code = code_of(notebook)
    found = code.find("read_results(")
    if found >= 0:
        assert all(found < code.find(call) for call in ("run_sweep(", "simulate(", "glance(") if call in code)


def test_the_readme_names_every_notebook_with_its_question(path: Path, notebook: dict) -> None:
    question = text_of(notebook["cells"][0]).splitlines()[0].removeprefix("# ")
    assert f"[{path.stem}]({path.name}) | {question} |" in (FOLDER / "README.md").read_text(encoding="utf-8")


def _said(text: ast.expr) -> list[str]:
    """What a print says that is not computed."""
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""
