"""AdamW for training on GPUs: torch.optim.AdamW's interface, results and checkpoints in one Triton kernel."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

if not Path(__file__).with_name("kernels").exists():
    # A checkout keeps the kernels beside this package. Nothing but them is to be found through it.
    _spec = ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).parents[1] / "kernels")]
    sys.modules[_spec.name] = module_from_spec(_spec)

from .extras.gradient_release import register_gradient_release
from .extras.replace_param import replace_param
from .functional import adamw_
from .optimizer import AdamW
from .param_groups import param_groups_master_weights, param_groups_weight_decay

__version__ = "0.1.0"
__all__ = [
    "AdamW",
    "adamw_",
    "param_groups_master_weights",
    "param_groups_weight_decay",
    "register_gradient_release",
    "replace_param",
]
