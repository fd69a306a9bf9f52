"""Codecs: how a tensor becomes bytes for the wire, and tensors again."""

from splitfed.compress.codec import CODECS, Codec, get_codec
from splitfed.compress.float_codec import FloatCodec, RawCodec
from splitfed.compress.int8_codec import BLOCK, Int8Codec
from splitfed.compress.payload import Payload

__all__ = ["BLOCK", "CODECS", "Codec", "FloatCodec", "Int8Codec", "Payload", "RawCodec", "get_codec"]
