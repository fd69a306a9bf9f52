"""The end of a report: the configuration that every agent was told."""

from splitfed.study.page import Html, element, table
from splitfed.study.record import RunRecord

_LEFT_OUT = {
    ("lora", "targets"): "all linear layers of the blocks",
    ("training", "micro_batch_size"): "the whole batch",
    ("model", "revision"): "the default",
}


def settings_section(record: RunRecord) -> Html:
    """Give every setting of the run, defaults included; nothing about the machine that the server runs on."""
    groups = [
        element(
            "div",
            element("h3", f"[{section}]"),
            table([], [[name, _value(section, name, value)] for name, value in settings.items()], kind="words"),
        )
        for section, settings in record.config.shared().model_dump().items()
    ]
    return element(
        "section",
        element("h2", "Configuration"),
        element("p", f"Connections: {'mutual TLS' if record.config.tls else 'no TLS'}.", kind="note"),
        element("div", *groups, kind="settings"),
    )


def _value(section: str, name: str, value: object) -> str:
    if value is None:
        return _LEFT_OUT.get((section, name), "not set")
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
