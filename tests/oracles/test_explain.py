"""What torch says of a loss that it cannot differentiate becomes one sentence with its remedy, before the work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel.oracles.autograd_errors import DerivativeError, explain

F64 = torch.float64
GD = bl.GradientDescent(step_size=0.01, steps=3)
U = torch.tensor(0.3, dtype=F64)
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randn(2, 1, 4, 6, generator=GENERATOR, dtype=F64)
W = 0.3 * torch.randn(6, 6, generator=GENERATOR, dtype=F64)


def problem(loss: Callable[[Tensor], Tensor], params: Any = W) -> bl.BilevelProblem:
    return bl.BilevelProblem(lambda w, u: loss(w) + u * (w**2).sum(), lambda w, u: (w**2).sum(), params)


def refused(text: str, *arguments: Any, estimator: Any = None) -> ValueError:
    """Check the sentence of `hypergradient`, and return the error."""
    case, *hparams = arguments
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        bl.hypergradient(case, GD, estimator or bl.Implicit(), *(hparams or [U]))
    return caught.value


class Cube(torch.autograd.Function):
    """x ** 3 with a backward that is not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the cube."""
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        """Return its VJP."""
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


class TwiceCube(Cube):
    """The same without the mark."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        """Return its VJP."""
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


def overwritten(w: Tensor) -> Tensor:
    y = w.exp()
    y.mul_(2.0)
    return y.sum()


def moved(w: Tensor) -> Tensor:
    w.mul_(2.0)
    return (w**2).sum()


def moved_row(w: Tensor) -> Tensor:
    w[0] += 1.0
    return (w**2).sum()


def attention(w: Tensor) -> Tensor:
    return (torch.nn.functional.scaled_dot_product_attention(TOKENS @ w, TOKENS, TOKENS) ** 2).sum()


def backward_inside(w: Tensor) -> Tensor:
    value = (w**3).sum()
    value.backward()
    return value


def math_attention(w: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return attention(w)


def reentrant(w: Tensor) -> Tensor:
    value: Tensor = torch.utils.checkpoint.checkpoint(lambda v: (v**3).sum(), w, use_reentrant=True)
    return value


with torch.inference_mode():
    MADE_IN_INFERENCE = torch.ones(6, 6, dtype=F64)

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "`inner_loss` changes the result of Exp in place, but its derivative needs that result: write y = y * 2 instead of "
    "y *= 2 or y.mul_(2), and leave out inplace=True of layers.": overwritten,
    "`inner_loss` changes its params or hparams in place: write w = w * 2 instead of w *= 2 or w.mul_(2), or work on "
    "w.clone().": moved,
    "`inner_loss` changes its params or hparams in place": moved_row,
    "`inner_loss` cannot be differentiated twice, as fused attention (_scaled_dot_product_flash_attention_for_cpu_"
    "backward) has no second derivative: evaluate the model inside `with torch.nn.attention.sdpa_kernel("
    "torch.nn.attention.SDPBackend.MATH):`, around nn.MultiheadAttention": attention,
    "`inner_loss` cannot be differentiated twice, as torch has no derivative of _cdist_backward: write that operation "
    "in terms of others, or use FiniteDifference().": lambda w: (torch.cdist(w, W + 1) ** 2).sum(),
    "`inner_loss` cannot be differentiated twice, as `Cube.backward` is marked @once_differentiable, which would make "
    "its Hessian zero: write that backward in torch operations and leave out the mark.": lambda w: Cube.apply(w).sum(),
    "`inner_loss` uses an autograd graph that an earlier call has freed: call no .backward() inside": backward_inside,
    "`inner_loss` uses a tensor that was made under torch.inference_mode(): clone it": lambda w: (
        w**2 * MADE_IN_INFERENCE
    ).sum(),
    "`inner_loss` uses torch.utils.checkpoint with use_reentrant=True, which cannot be differentiated twice": reentrant,
}


@pytest.mark.parametrize("text", LOSSES)
def test_a_loss_that_torch_cannot_differentiate_is_refused_with_the_remedy_before_the_work(text: str) -> None:
    steps = []

    class Watched(bl.GradientDescent):
        """Gradient descent that tells of its steps."""

        def step(self, inner: Any, state: Any) -> Any:
            """Take a step."""
            steps.append(state)
            return super().step(inner, state)

    for estimator in (bl.Implicit(), bl.FullUnroll()):
        with pytest.raises(DerivativeError, match=re.escape(text)):
            bl.hypergradient(problem(LOSSES[text]), Watched(step_size=0.01, steps=3), estimator, U)
    assert not steps


def test_an_outer_loss_that_torch_cannot_differentiate_is_named_before_the_work() -> None:
    case = bl.BilevelProblem(lambda w, u: u.exp() * (w**2).sum(), lambda w, u: overwritten(w), W)
    refused("`outer_loss` changes the result of Exp in place", case)
    # Its first derivatives are enough.
    once = bl.BilevelProblem(lambda w, u: u.exp() * (w**2).sum(), lambda w, u: attention(w), W)
    assert bl.hypergradient(once, GD, bl.Implicit(), U).status.usable


def test_the_error_of_torch_stays_the_cause_of_the_sentence() -> None:
    assert "is not implemented" in str(refused("fused attention", problem(attention)).__cause__)


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_refused_only_where_it_is_fused(need_weights: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, batch_first=True, dtype=F64)

    def loss(model: Any, params: Any, u: Tensor) -> Tensor:
        tokens = TOKENS[:, 0]
        attended, _ = model(tokens, tokens, tokens, need_weights=need_weights)
        return (attended**2).sum() + u.exp() * sum((p**2).sum() for p in params.values())

    case = bl.ModuleProblem(layer, loss, loss)
    if need_weights:
        assert bl.hypergradient(case, GD, bl.FullUnroll(), U).status.usable
    else:
        refused("`inner_loss` cannot be differentiated twice, as fused attention", case)


def test_the_math_backend_makes_a_transformer_layer_work_to_the_same_number_as_differences() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True, dtype=F64).eval()

    def loss(model: Any, params: Any, u: Tensor) -> Tensor:
        return (model(TOKENS[:, 0]) ** 2).mean() + u.exp() * sum((p**2).sum() for p in params.values())

    def with_math(model: Any, params: Any, u: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return loss(model, params, u)

    fused, math = (bl.ModuleProblem(layer, inner, with_math) for inner in (loss, with_math))
    refused("around nn.MultiheadAttention and nn.TransformerEncoderLayer, too.", fused)
    ours = bl.hypergradient(math, GD, bl.FullUnroll(), U).hypergradient
    # Differences take no second derivatives, so the fused kernel is good enough for them.
    differences = bl.hypergradient(fused, GD, bl.FiniteDifference(), U).hypergradient
    torch.testing.assert_close(ours, differences, rtol=1e-6, atol=1e-9)


def test_a_custom_function_without_the_mark_has_the_hessian_of_the_formula() -> None:
    for loss in (lambda w: TwiceCube.apply(w).sum(), lambda w: (w**3).sum()):
        point = problem(loss).bind(U).linearize(W)
        torch.testing.assert_close(point.hvp(torch.ones_like(W)), 6 * W + 2 * U)
    assert bl.hypergradient(problem(lambda w: TwiceCube.apply(w).sum()), GD, bl.FullUnroll(), U).status.usable


def test_an_error_that_appears_only_in_the_loop_is_explained_too() -> None:
    def later(w: Tensor) -> Tensor:
        return (w**2).sum() if torch.equal(w, W) else overwritten(w)

    # The check sees the start alone, which is fine.
    for estimator in (bl.Implicit(), bl.FullUnroll()):
        refused("a loss changes the result of Exp in place", problem(later), estimator=estimator)
    u = U.clone().requires_grad_()
    with pytest.raises(DerivativeError, match="a loss changes the result of Exp in place"):
        bl.solution(problem(later), GD, bl.Implicit(), u)


def test_an_error_in_the_backward_pass_of_the_layer_is_explained_too() -> None:
    u = U.clone().requires_grad_()
    x = bl.solution(problem(attention), GD, bl.Implicit(), u, check=False)
    with pytest.raises(DerivativeError, match="a loss cannot be differentiated twice, as fused attention"):
        x.sum().backward()


MESSAGES = {
    "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported for CuDNN RNNs": (
        "a loss cannot be differentiated twice, as cuDNN's recurrent layers (_cudnn_rnn_backward) have no second "
        "derivative: evaluate the model inside `with torch.backends.cudnn.flags(enabled=False):`."
    ),
    "torch.compile with aot_autograd does not currently support double backward": (
        "a loss cannot be differentiated twice, as it calls what torch.compile has compiled: leave torch.compile out "
        "and record the oracles instead, bilevel.trace(problem)."
    ),
    "trying to differentiate twice a function that was marked with @once_differentiable": (
        "a loss cannot be differentiated twice, as it calls a torch.autograd.Function whose backward is marked "
        "@once_differentiable: write that backward in torch operations and leave out the mark."
    ),
    "element 0 of tensors does not require grad and does not have a grad_fn": (
        "a loss does not depend on what it should be differentiated by: is the computation detached, under "
        "torch.no_grad(), or turned into numbers?"
    ),
    "one of the variables needed for gradient computation has been modified by an inplace operation: [torch.Float": (
        "a loss changes a tensor in place that its derivative needs: write y = y * 2 instead of y *= 2 or y.mul_(2), "
        "and leave out inplace=True of layers."
    ),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_errors_that_this_machine_may_not_raise_are_explained_by_their_text(message: str) -> None:
    assert explain(RuntimeError(message)) == MESSAGES[message]


def test_other_errors_are_left_as_they_are() -> None:
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")) is None
    assert explain(KeyError("derivative for aten::x is not implemented")) is None


# Params that nobody uses ---------------------------------------------------------------------------------------------

PARTS = {"w": W[0], "head": {"bias": W[1]}}


def test_params_that_neither_loss_uses_are_named() -> None:
    text = "`params['head']['bias']` is used by neither loss: leave it out of `params`, or in a module freeze it by"
    case = bl.BilevelProblem(lambda p, u: (u.exp() * p["w"] ** 2).sum(), lambda p, u: p["w"].sum(), PARTS)
    refused(text, case)


def test_a_modules_parameter_that_neither_loss_uses_is_named_and_freezing_it_helps() -> None:
    module = nn.ModuleDict({"body": nn.Linear(6, 1, dtype=F64), "head": nn.Linear(6, 1, dtype=F64)})
    module.forward = lambda X: module["body"](X)  # type: ignore[method-assign,assignment]

    def loss(model: Any, params: Any, u: Tensor) -> Tensor:
        return ((model(W) - 1.0) ** 2).mean() + u.exp() * (params["body.weight"] ** 2).sum()

    refused("`params['head.weight']` is used by neither loss", bl.ModuleProblem(module, loss, loss))
    module["head"].requires_grad_(False)
    assert bl.hypergradient(bl.ModuleProblem(module, loss, loss), GD, bl.FullUnroll(), U).status.usable


USED: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "in the outer loss alone": (
        lambda p, u: (u.exp() * p["w"] ** 2).sum(),
        lambda p, u: (p["w"] * p["head"]["bias"]).sum(),
    ),
    "behind a dead rectifier": (
        lambda p, u: (u.exp() * p["w"] ** 2).sum() + torch.relu(p["head"]["bias"] - 99.0).sum(),
        lambda p, u: p["w"].sum(),
    ),
    "behind weights of zero": (
        lambda p, u: (u.exp() * p["w"] ** 2).sum() + (0.0 * p["head"]["bias"]).sum(),
        lambda p, u: p["w"].sum(),
    ),
}


@pytest.mark.parametrize("how", USED)
def test_params_whose_gradient_is_merely_zero_at_the_start_are_accepted(how: str) -> None:
    inner, outer = USED[how]
    assert bl.hypergradient(bl.BilevelProblem(inner, outer, PARTS), GD, bl.FullUnroll(), U).status.usable
