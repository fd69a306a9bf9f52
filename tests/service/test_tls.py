"""Mutual TLS: who has no certificate, or another's, stays outside."""

from pathlib import Path

import pytest

from splitfed.config import AgentConfig, TlsSection
from splitfed.errors import ConfigError, JoinRefused, LinkError, ServerUnreachable
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


@pytest.mark.parametrize(
    ("certificate", "authority", "words"),
    [
        (None, None, r"takes no plain text; give this agent a \[tls\] section"),
        ("other", "right", r"does not accept this agent's certificate .*other-a\.pem"),
        ("right", "other", r"server's certificate is not accepted: \[tls\] authority"),
    ],
    ids=["no certificate", "another authority's", "the server's is another authority's"],
)
def test_an_agent_without_a_certificate_of_the_authority_is_told_so_at_once(
    tmp_path: Path, certificate: str | None, authority: str | None, words: str
) -> None:
    authorities = {name: Authority(tmp_path, name) for name in ("right", "other")}
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    tls = None
    if certificate is not None and authority is not None:
        tls = authorities[certificate].issue("a").model_copy(update={"authority": authorities[authority].file})
    with (
        serving(server_config(tmp_path, tls=authorities["right"].issue("server"))) as server,
        pytest.raises(LinkError, match=words) as refusal,
    ):
        run_agent_here(secure(agent_config(tmp_path, "a", server.address, data, retry_for_s=600), tls))
    assert not isinstance(refusal.value, ServerUnreachable)


def test_a_server_without_tls_is_told_from_one_that_is_down(tmp_path: Path) -> None:
    tls = Authority(tmp_path).issue("a")
    data = write_texts(tmp_path / "a.jsonl", "a", 6)
    with (
        serving(server_config(tmp_path)) as server,
        pytest.raises(LinkError, match=r"does not speak TLS: .* give the server a \[tls\] section too"),
    ):
        run_agent_here(secure(agent_config(tmp_path, "a", server.address, data, retry_for_s=600), tls))


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
