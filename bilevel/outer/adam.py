"""The Adam that moves hyperparameters by default: that of torch to the same numbers, without what torch puts around it.

torch imports its compiler, 1.3 s of processor time, at the first optimizer that it makes and the first step that it
takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_scalar_dtype


class Adam(torch.optim.Adam):
    """`torch.optim.Adam`; its groups, options, state and what it saves are those of that class.

        m += (1 - b1) (g - m),   s = b2 s + (1 - b2) g^2,   z -= lr / (1 - b1^t) m / (sqrt(s / (1 - b2^t)) + eps)

    Kingma & Ba 2015 (arXiv 1412.6980). Other options than lr, betas and eps, set later on, are left to torch's step.

    >>> leaf = torch.zeros(2)
    >>> leaf.grad = torch.tensor([1.0, -3.0])
    >>> Adam([leaf], lr=0.1).step()
    >>> leaf
    tensor([-0.1000,  0.1000])
    """

    # As torch wrote them, below the decorators that import the compiler.
    add_param_group = Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    state_dict = Optimizer.state_dict.__wrapped__  # type: ignore[attr-defined]
    load_state_dict = Optimizer.load_state_dict.__wrapped__  # type: ignore[attr-defined]

    def step(self, closure: Any = None) -> Any:
        if closure is not None or not all(map(_is_plain, self.param_groups)):
            theirs = torch.optim.Adam.step
            # torch runs the hooks of a step around this one; an Adam made before has had them put around its own too.
            return (theirs.__wrapped__ if hasattr(theirs, "hooked") else theirs)(self, closure)  # type: ignore[attr-defined]
        with torch.no_grad():
            for group in self.param_groups:
                leaves = [leaf for leaf in group["params"] if leaf.grad is not None]
                _move(leaves, [self.state[leaf] or _first(self.state[leaf], leaf) for leaf in leaves], group)
        return None


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether a group has the options with which `Adam` is made by default, but for its rates."""
    return type(group["lr"]) is float and not (
        group["weight_decay"]
        or group["maximize"]
        or group["amsgrad"]
        or group["foreach"]
        or group["capturable"]
        or group["differentiable"]
        or group["fused"]
    )


def _first(state: dict[str, Tensor], leaf: Tensor) -> dict[str, Tensor]:
    """Return the state of a leaf before its first step, in the order that torch gives it."""
    state["step"] = torch.tensor(0.0, dtype=_get_scalar_dtype())  # type: ignore[no-untyped-call]
    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(leaf), torch.zeros_like(leaf)
    return state


def _move(leaves: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> None:
    """Take a step, by the operations of torch in their order."""
    means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    gradients: Any = [leaf.grad for leaf in leaves]
    first, second = group["betas"]
    counts = [float(state["step"].add_(1.0)) for state in states]  # on the host
    torch._foreach_lerp_(means, gradients, 1.0 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - second)
    sizes = torch._foreach_sqrt(squares)
    torch._foreach_div_(sizes, [(1.0 - second**count) ** 0.5 for count in counts])
    torch._foreach_add_(sizes, group["eps"])
    torch._foreach_addcdiv_(leaves, means, sizes, [-group["lr"] / (1.0 - first**count) for count in counts])
