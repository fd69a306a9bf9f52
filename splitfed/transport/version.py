"""The version of the wire."""

PROTOCOL_VERSION = 2
"""Both sides must agree; it changes with every change that an older peer would misread."""
