"""Version 1 of the wire; never edited by hand."""
