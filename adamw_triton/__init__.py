"""AdamW for training on GPUs: torch.optim.AdamW's interface, results and checkpoints in one Triton kernel."""

from .functional import adamw_
from .optimizer import AdamW
from .param_groups import param_groups_master_weights, param_groups_weight_decay
from .release import register_gradient_release

__version__ = "0.1.0"
__all__ = ["AdamW", "adamw_", "param_groups_master_weights", "param_groups_weight_decay", "register_gradient_release"]
