"""Messages and services of the wire, generated from proto/."""
