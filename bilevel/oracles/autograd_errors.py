"""Torch's errors about derivatives of a user's loss, each turned into one sentence with its remedy."""

from __future__ import annotations

import re
from contextlib import ContextDecorator
from typing import Any

from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel.core.autograd import graph_nodes

COPY = "write y = y * 2 instead of y *= 2 or y.mul_(2), and leave out inplace=True of layers"
SENTENCES = (
    (
        r"modified by an inplace operation.*which is output \d+ of (\w+)",
        f"{{what}} changes the result of {{0}} in place, but its derivative needs that result: {COPY}.",
    ),
    (r"modified by an inplace operation", f"{{what}} changes a tensor in place that its derivative needs: {COPY}."),
    (
        r"leaf Variable that requires grad is being used in an in-place operation",
        "{what} changes its params or hparams in place: write w = w * 2 instead of w *= 2 or w.mul_(2), "
        "or work on w.clone().",
    ),
    (
        r"derivative for '?(?:aten::)?(\w*attention\w*)'? is not implemented",
        "{what} cannot be differentiated twice, as fused attention ({0}) has no second derivative: evaluate the "
        "model inside `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`, around "
        "nn.MultiheadAttention and nn.TransformerEncoderLayer, too.",
    ),
    (
        r"derivative for '?(?:aten::)?(\w*cudnn_rnn\w*)'? is not implemented",
        "{what} cannot be differentiated twice, as cuDNN's recurrent layers ({0}) have no second derivative: evaluate "
        "the model inside `with torch.backends.cudnn.flags(enabled=False):`.",
    ),
    (
        r"derivative for '?(?:aten::)?(\w+)'? is not implemented",
        "{what} cannot be differentiated twice, as torch has no derivative of {0}: write that operation in terms of "
        "others, or use FiniteDifference().",
    ),
    (
        r"aot_autograd does not currently support double backward",
        "{what} cannot be differentiated twice, as it calls what torch.compile has compiled: leave torch.compile out "
        "and record the oracles instead, bilevel.trace(problem).",
    ),
    (
        r"differentiate twice a function that was marked with @once_differentiable",
        "{what} cannot be differentiated twice, as it calls a torch.autograd.Function whose backward is marked "
        "@once_differentiable: write that backward in torch operations and leave out the mark.",
    ),
    (
        r"element \d+ of tensors does not require grad",
        "{what} does not depend on what it should be differentiated by: is the computation detached, under "
        "torch.no_grad(), or turned into numbers?",
    ),
    (
        r"backward through the graph a second time",
        "{what} uses an autograd graph that an earlier call has freed: call no .backward() inside a loss, and detach "
        "what is computed once outside of it.",
    ),
    (
        r"Inference tensors cannot be saved for backward",
        "{what} uses a tensor that was made under torch.inference_mode(): clone it, or use torch.no_grad() there.",
    ),
    (
        r"checkpoint is incompatible with \.grad\(\)",
        "{what} uses torch.utils.checkpoint with use_reentrant=True, which cannot be differentiated twice: "
        "use_reentrant=False can.",
    ),
)
"""Pairs of (what torch says, what it means); groups of the first fill the second."""


class DerivativeError(ValueError):
    """A loss whose derivatives torch cannot take, though its values may be right."""


def explain(error: BaseException, what: str = "a loss") -> str | None:
    """Return what torch's error about the derivatives of a loss means, with the remedy; None for any other error.

    >>> explain(RuntimeError("derivative for aten::_ctc_loss_backward is not implemented"), "the loss").split(",")[0]
    'the loss cannot be differentiated twice'
    >>> explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    True
    """
    if not isinstance(error, RuntimeError):
        return None
    for pattern, sentence in SENTENCES:
        result = re.search(pattern, str(error), re.DOTALL)
        if result:
            return sentence.format(*result.groups(), what=what)
    return None


class explained(ContextDecorator):
    """Raise what `explain` says of an error that passes through, as a DerivativeError; others pass unchanged."""

    def __init__(self, what: str = "a loss") -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        sentence = None if error is None else explain(error, self._what)
        if sentence is not None:
            raise DerivativeError(sentence) from error


def check_second_derivatives(what: str, loss: Tensor) -> None:
    """Refuse a loss through a function that is differentiable once, of which autograd makes a Hessian of zeros.

    A backward that is marked ``@once_differentiable`` cuts the graph of the gradient, and torch raises only where
    something asks for a derivative at the cut; an HVP stops before it.

    Raises:
        DerivativeError: with the name of the function's class.
    """
    for node in graph_nodes([loss]):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        # The mark leaves no flag: it is the code of the wrapper that it puts around a backward.
        if getattr(backward, "__code__", None) in once_differentiable.__code__.co_consts and backward is not None:
            raise DerivativeError(
                f"{what} cannot be differentiated twice, as `{node._forward_cls.__name__}.backward` is marked "
                "@once_differentiable, which would make its Hessian zero: write that backward in torch operations and "
                "leave out the mark."
            )
