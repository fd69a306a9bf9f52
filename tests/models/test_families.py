import pytest

from splitfed.errors import UnsupportedFamily
from splitfed.models.families import FAMILIES, family_of

PROMISED = """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj opt bloom falcon mpt olmo2 granite
    cohere starcoder2 stablelm mixtral qwen3_moe gpt_oss
"""


def test_the_promised_families_are_supported() -> None:
    assert set(PROMISED.split()) <= FAMILIES.keys()


@pytest.mark.parametrize("model_type", ["bert", "t5", "zamba2", "gemma3n_text", "recurrent_gemma", ""])
def test_another_family_is_refused_with_its_name_and_the_list(model_type: str) -> None:
    with pytest.raises(UnsupportedFamily) as caught:
        family_of(model_type)
    assert repr(model_type) in str(caught.value)
    assert "llama" in str(caught.value)
