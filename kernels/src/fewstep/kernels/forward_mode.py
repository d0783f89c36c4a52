"""Ways to differentiate that fused operations cannot serve: they have no rule for them, or drop the tangent."""

import torch
from torch.autograd import forward_ad


def forward_mode_is_on() -> bool:
    """Return whether tensors may be dual (`torch.func.jvp`, `torch.autograd.forward_ad`); operations then run plainly.

    Asked of the level and not of the tensors: `unpack_dual` does not see a tangent inside the wrapper that
    `torch.func.grad` puts around it, as in a Hessian-vector product. If torch renames this field, the answer is yes.
    """
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def functional_transform_is_on() -> bool:
    """Return whether a transform of `torch.func` (grad, vmap and what is made of them) is under way.

    Operators of `torch.library.custom_op` refuse to be differentiated inside one.
    """
    return torch._C._are_functorch_transforms_active()
