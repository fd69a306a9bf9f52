"""Device classes that come with splitfed: profiles from data sheets, for plans before a device is at hand."""

from importlib import resources
from pathlib import Path

from splitfed.config.device import DeviceProfile, load_profile
from splitfed.errors import ConfigError


def device_classes() -> list[str]:
    """List the device classes, by name."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def device_profile(name: str) -> DeviceProfile:
    """Open a profile: a file, or a device class by its name.

    Args:
        name: The file's path, or the class.

    Raises:
        ConfigError: If there is no such file or class, or the file is no profile.
    """
    if name in device_classes():
        with resources.as_file(_folder() / f"{name}.toml") as file:
            return load_profile(file)
    if not Path(name).is_file():
        raise ConfigError(
            f"{name}: is neither a file nor one of the device classes {', '.join(device_classes())}; make a profile "
            "with splitfed profile --output FILE"
        )
    return load_profile(name)


def _folder() -> resources.abc.Traversable:
    return resources.files("splitfed.assets").joinpath("profiles")
