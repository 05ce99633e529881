"""Storage formats of parameters and moments, in eager torch: the specification of kernels/storage.py."""

from .eight_bit import CODED, GROUP_SIZE, decode, encode, n_groups, scale_shape
from .formats import ROUNDED_PARAMS, Formats, StateTensors, entry_names
from .master_weights import ENTRIES as MASTER_ENTRIES
from .master_weights import join, master_weight, remainder_entry, remainder_of, split
from .options import StorageOptions, moment
from .rounding import PHILOX_ROUNDS, JoinedKeys, NoiseKey, noise, round_to_bfloat16
from .state_bytes import StateBytes

__all__ = [
    "CODED",
    "GROUP_SIZE",
    "MASTER_ENTRIES",
    "PHILOX_ROUNDS",
    "ROUNDED_PARAMS",
    "Formats",
    "JoinedKeys",
    "NoiseKey",
    "StateBytes",
    "StateTensors",
    "StorageOptions",
    "decode",
    "encode",
    "entry_names",
    "join",
    "master_weight",
    "moment",
    "n_groups",
    "noise",
    "remainder_entry",
    "remainder_of",
    "round_to_bfloat16",
    "scale_shape",
    "split",
]
