"""The server command: from a configuration to a finished run, or a clean stop."""

import asyncio
import logging
import signal
from contextlib import ExitStack
from pathlib import Path

from splitfed.config import ServerConfig, refuse_plain_text
from splitfed.errors import ConfigError
from splitfed.models import (
    Partition,
    Trunk,
    adapter_parameters,
    adapter_state,
    load_config,
    resolve_base,
    trunk_slice,
)
from splitfed.server.base import BaseFolder
from splitfed.server.daemon import Daemon
from splitfed.server.devices import Devices, shapes_of
from splitfed.server.store import RunState, RunStore
from splitfed.training.denoising import FitDenoiser, entrance_of_run
from splitfed.training.fits import check_fit
from splitfed.training.runtime import prepare_process
from splitfed.training.setup import open_bottom_and_top, open_trunk, start_of_run
from splitfed.training.trunk_step import TrunkTrainer

_TIMING = {
    "training": ("max_in_flight",),
    "federation": ("agent_timeout_s", "straggler_margin", "population"),
    "aggregation": ("refuse_norm",),
}
"""What may change in a run that goes on: when things happen and who may take part, not what is computed."""

_log = logging.getLogger(__name__)


def run_server(config: ServerConfig, *, resume: bool = False, overwrite: bool = False, insecure: bool = False) -> int:
    """Serve one run until it is over or a signal asks to stop.

    Args:
        config: The server's configuration.
        resume: Go on with the run in the directory.
        overwrite: Remove the run in the directory.
        insecure: Allow plain text beyond this machine.

    Returns:
        The exit status: 0 when the run is over or was drained, 3 if agents are gone for good or refused, so that it
        cannot go on.

    Raises:
        SplitFedError: What keeps the daemon from serving.
    """
    refuse_plain_text(
        {"server.address": config.server.address, "server.fed_address": config.server.fed_address},
        has_tls=config.tls is not None,
        insecure=insecure,
    )
    prepare_process(config.server.threads)
    daemon = open_daemon(config, resume=resume, overwrite=overwrite)
    return 0 if daemon is None else asyncio.run(_serve_until_signal(daemon))


def open_daemon(config: ServerConfig, *, resume: bool = False, overwrite: bool = False) -> Daemon | None:
    """Load what a run needs and open its directory.

    Args:
        config: The server's configuration.
        resume: Go on with the run in the directory.
        overwrite: Remove the run in the directory.

    Returns:
        The daemon, ready to serve; None if the run to go on with is over already, and no text is to be generated.

    Raises:
        SplitFedError: If the base model cannot be loaded or the run does not fit it, or the directory holds another
            run.
    """
    folder = resolve_base(config.model.base, config.model.revision)
    _check_positions(folder, "training.max_tokens", config.training.max_tokens)
    if config.generation.max_tokens is not None:
        _check_positions(folder, "generation.max_tokens", config.generation.max_tokens)
    check_fit(folder, config.model, config.lora, residual_rank=config.shared().residual_rank)
    base = BaseFolder(folder)
    store = RunStore(config.run.directory, _identity(config, base), resume=resume, overwrite=overwrite)
    with ExitStack() as opened:
        opened.callback(store.close)
        store.write_config(config)
        state = store.load()
        is_over = state is not None and state.round >= config.training.rounds
        if is_over and not config.generation.enabled:
            _log.info("the run %s is over; its adapter is in %s", config.run_id, store.final_adapter)
            return None
        residual_rank = config.shared().residual_rank
        trunk = open_trunk(folder, config.model.widest, config.lora, seed=config.run.seed, residual_rank=residual_rank)
        if state is None:
            adapter = adapter_state(trunk)
            state = RunState(0, adapter, start_of_run(folder, config.lora, adapter, seed=config.run.seed))
        elif not is_over:
            _log.info("going on after round %d of %d", state.round, config.training.rounds)
        trainer = TrunkTrainer(trunk, config.training, seed=config.run.seed)
        needs_entrance = config.privacy.denoise and config.privacy.is_on and not is_over
        fit_denoiser = _entrance(folder, config, trunk) if needs_entrance else None
        opened.pop_all()
        devices = Devices(config.shared(), shapes_of(state.ends), _shapes_of_blocks(trunk))
        return Daemon(config, state, trainer, store, base, fit_denoiser=fit_denoiser, devices=devices)


def _shapes_of_blocks(trunk: Trunk) -> dict[int, dict[str, tuple[int, ...]]]:
    """Give the shapes of each block's adapter."""
    return {block: shapes_of(adapter_parameters(trunk_slice(trunk, range(block, block + 1)))) for block in trunk.blocks}


def _entrance(folder: Path, config: ServerConfig, trunk: Trunk) -> FitDenoiser:
    """Prepare to take noise away: the server holds the whole base model, so it knows what comes without noise."""
    _log.info("learning from the base model what smashed data looks like without noise")
    bottom, top = open_bottom_and_top(folder, config.model, config.lora, seed=config.run.seed)
    parts = Partition(bottom, trunk, top, config.model.bottom_blocks, config.model.top_blocks)
    return entrance_of_run(parts, config.privacy, max_tokens=config.training.max_tokens)


def _check_positions(folder: Path, key: str, max_tokens: int) -> None:
    """Refuse sequences that are longer than the base model can count."""
    positions = getattr(load_config(folder), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_tokens:
        raise ConfigError(f"{key} is {max_tokens}, but the base has {positions} positions; lower it")


async def _serve_until_signal(daemon: Daemon) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return await daemon.serve(stop)


def _identity(config: ServerConfig, base: BaseFolder) -> dict[str, object]:
    """Give what makes two runs the same: everything that changes the numbers."""
    shared = config.shared().model_dump(mode="json")
    del shared["model"]["base"], shared["model"]["revision"]  # a folder may move
    for section, keys in _TIMING.items():
        for key in keys:
            del shared[section][key]
    return {"name": config.run_id, "base": base.config_sha256, **shared}
