"""Storage formats of parameters and moments, in eager torch: the specification of kernels/storage.py."""

from .eight_bit import CODES, GROUP_SIZE, SCALES, decode, encode
from .formats import Formats, StateBytes, StateTensors, StorageOptions, entry_names
from .master_weights import join, master_weight, split
from .rounding import PHILOX_ROUNDS, NoiseKey, noise, round_to_bfloat16

__all__ = [
    "CODES",
    "GROUP_SIZE",
    "PHILOX_ROUNDS",
    "SCALES",
    "Formats",
    "NoiseKey",
    "StateBytes",
    "StateTensors",
    "StorageOptions",
    "decode",
    "encode",
    "entry_names",
    "join",
    "master_weight",
    "noise",
    "round_to_bfloat16",
    "split",
]
