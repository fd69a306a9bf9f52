"""The daemon on a device: its loop, its gate, its state."""
