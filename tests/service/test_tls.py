"""Mutual TLS: who has no certificate, or another's, stays outside."""

from pathlib import Path

import pytest

from splitfed.config import AgentConfig, TlsSection
from splitfed.errors import ConfigError, JoinRefused, LinkError
from tests.service.certificates import Authority
from tests.service.conftest import server_config, write_texts
from tests.service.cutting_proxy import CuttingProxy
from tests.service.local import agent_config, run_agent_here, serving, start_agent, wait_until


def secure(config: AgentConfig, tls: TlsSection | None) -> AgentConfig:
    return config.model_copy(update={"tls": tls})


def test_a_run_over_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    config = server_config(tmp_path, tls=authority.issue("server"), training={"rounds": 1})
    with serving(config) as server:
        run_agent_here(secure(agent_config(tmp_path, "a", server.address, data), authority.issue("a")))
    assert (config.run.directory / "adapter" / "adapter_model.safetensors").is_file()


def test_an_agent_cannot_take_anothers_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with serving(server_config(tmp_path, tls=authority.issue("server"))) as server:
        thief = secure(agent_config(tmp_path, "a", server.address, data), authority.issue("b"))
        with pytest.raises(JoinRefused, match="certificate is for 'b', not for 'a'"):
            run_agent_here(thief)


@pytest.mark.parametrize("whose", ["nobody's", "another authority's"])
def test_an_agent_without_a_certificate_of_the_authority_stays_outside(tmp_path: Path, whose: str) -> None:
    authority = Authority(tmp_path)
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    tls = None if whose == "nobody's" else Authority(tmp_path, "other").issue("a")
    with serving(server_config(tmp_path, tls=authority.issue("server"))) as server:
        stranger = secure(agent_config(tmp_path, "a", server.address, data, retry_for_s=1), tls)
        with pytest.raises(LinkError, match=r"\[tls\]"):
            run_agent_here(stranger)


def test_a_device_that_lost_its_state_is_known_by_its_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    config = server_config(tmp_path, tls=authority.issue("server"), training={"rounds": 1}, federation={"agents": 2})
    with serving(config) as server:
        proxy = CuttingProxy(server.address)
        lost = start_agent(
            secure(agent_config(tmp_path, "a", proxy.address, data, retry_for_s=0), authority.issue("a"))
        )
        wait_until(lambda: server.daemon.coordinator.rounds.members == ["a"])
        proxy.close()
        with pytest.raises(LinkError):
            lost.result(60)
        again = start_agent(secure(agent_config(tmp_path / "new", "a", server.address, data), authority.issue("a")))
        run_agent_here(secure(agent_config(tmp_path, "b", server.address, data), authority.issue("b")))
        again.result(60)


def test_a_missing_certificate_file_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    tls = authority.issue("a").model_copy(update={"key": tmp_path / "lost.key"})
    config = secure(agent_config(tmp_path, "a", "127.0.0.1:1", data), tls)
    with pytest.raises(ConfigError, match=r"lost\.key cannot be read"):
        run_agent_here(config)
