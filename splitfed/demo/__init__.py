"""The embedded demonstration: the real daemons on this machine, on a model and a text that need no download."""

from splitfed.demo.main import run_demo

__all__ = ["run_demo"]
