"""The version of the wire."""

PROTOCOL_VERSION = 1
"""Both sides must agree; it changes with every change that an older peer would misread."""
