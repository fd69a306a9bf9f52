"""Put notebooks into the form that is committed: no outputs, one kernel, one way to write the file."""

import json
import sys
from pathlib import Path
from typing import Any

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def stripped(notebook: dict[str, Any]) -> str:
    """Give the text of a notebook's file.

    Args:
        notebook: The notebook, as its JSON has it.
    """
    cells = []
    for cell in notebook["cells"]:
        source = cell["source"]
        lines = ("".join(source) if isinstance(source, list) else source).rstrip("\n").splitlines(keepends=True)
        of_code = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        kept = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}, **of_code, "source": lines}
        cells.append(dict(sorted(kept.items())))
    content = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Strip the notebooks that are named, or all in this folder."""
    for path in map(Path, sys.argv[1:] or sorted(Path(__file__).parent.glob("*.ipynb"))):
        path.write_text(stripped(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
