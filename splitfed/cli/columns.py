"""Options that name the columns of a data file."""

from typing import Annotated

import typer

TextColumn = Annotated[str, typer.Option("--text-column", help="Column of plain text.")]
PromptColumn = Annotated[str, typer.Option("--prompt-column", help="Column of prompts.")]
CompletionColumn = Annotated[str, typer.Option("--completion-column", help="Column of completions.")]
MessagesColumn = Annotated[str, typer.Option("--messages-column", help="Column of conversations.")]
