"""`BilevelProblem`: two losses, and where the inner variable starts.

min over hparams   outer_loss(params*(hparams), hparams)
subject to         params*(hparams) = argmin over params of inner_loss(params, hparams)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bilevel import tree
from bilevel.modules import functional_model
from bilevel.options import require_arguments
from bilevel.oracles import InnerProblem
from bilevel.samplers import Sampler
from bilevel.spectral import Eigenbasis
from bilevel.traced import Traces, traced
from bilevel.tree import Tree

Loss: TypeAlias = Callable[[Tree, Tree], Tensor]


class BilevelProblem:
    """An inner and an outer loss over trees of tensors.

    Both losses are called as ``loss(params, hparams)`` and return a scalar Tensor; data are captured by the functions.
    The inner loss must be twice differentiable in ``(params, hparams)`` for anything but `FiniteDifference`.

    With a sampler the inner loss is called as ``inner_loss(params, hparams, batch)``, and inner step k sees the batch
    ``sampler(k)``: unrolling differentiates exactly those steps. Whatever is no step (the residual in the certificate,
    a measured step size, the linear systems of `Implicit`) is evaluated on ``sampler.full()``, and the outer loss has
    no batch. A cold start begins at batch 0, so the outer objective is one fixed function of the hyperparameters; a
    warm start goes on to the batches after those of the carried state. Costs count calls, whatever the size of a batch.

    Args:
        inner_loss: the loss that the inner solver minimises over params.
        outer_loss: the loss whose gradient over hparams is wanted.
        params: where the inner solver starts, unless a call says otherwise.
        optimality: instead of an inner loss, a map whose zero over params is the inner solution, such as
            ``params - update(params, hparams)`` or a KKT residual; it returns a tree shaped as params. Its Jacobian
            need not be symmetric: use GMRES for implicit differentiation.
        sampler: the batches of the inner steps, such as ``MiniBatches((X, y), batch_size=64)``.

    Raises:
        ValueError: unless exactly one of `inner_loss` and `optimality` is given, every function takes its arguments,
            and params are tensors; for a sampler that is none, or without an inner loss to hand its batches to.

    >>> data = torch.tensor([1.0, 3.0], dtype=torch.float64)
    >>> problem = BilevelProblem(
    ...     inner_loss=lambda w, penalty: ((w - data) ** 2).mean() + penalty * w**2,
    ...     outer_loss=lambda w, penalty: (w - 1.0) ** 2,
    ...     params=torch.tensor(0.0, dtype=torch.float64),
    ... )
    >>> problem.bind(torch.tensor(1.0, dtype=torch.float64)).grad(problem.params)
    tensor(-4., dtype=torch.float64)
    """

    inner_problem: type[InnerProblem] = InnerProblem
    """The class of the bound problem; a structured problem names its own."""

    quadratic: bool = False
    """Whether the inner loss is quadratic in params for every hparams, so that one linear solve gives its minimiser."""

    inner_loss: Loss
    outer_loss: Loss
    optimality: Callable[[Tree, Tree], Tree] | None
    sampler: Sampler | None = None
    batch: Tree = ()
    """The batch that `inner_loss` is evaluated on; an empty tree without a sampler."""
    traces: Traces | None = None
    """The traced oracles of a problem that `traced` made."""

    def __init__(
        self,
        inner_loss: Callable[..., Tensor] | None = None,
        outer_loss: Loss | None = None,
        params: Tree = None,
        *,
        optimality: Callable[[Tree, Tree], Tree] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        batched = () if sampler is None else ("batch",)
        for what, function, more in (
            ("inner_loss", inner_loss, batched),
            ("outer_loss", outer_loss, ()),
            ("optimality", optimality, ()),
        ):
            if function is not None:
                require_arguments(what, function, "params", "hparams", *more)
        if params is not None:
            check_tensors("params", params)
        # Structured problems define the losses as methods and pass none.
        if inner_loss is not None:
            self.inner_loss = inner_loss
        if outer_loss is not None:
            self.outer_loss = outer_loss
        self.optimality = optimality
        if (getattr(self, "inner_loss", None) is None) == (optimality is None):
            raise ValueError("a BilevelProblem needs exactly one of `inner_loss` and `optimality`.")
        if not callable(getattr(self, "outer_loss", None)):
            raise ValueError("a BilevelProblem needs an `outer_loss`, a function (params, hparams) -> scalar Tensor.")
        self.params = params
        if sampler is not None:
            if inner_loss is None or not isinstance(sampler, Sampler):
                raise ValueError(
                    "`sampler` needs an `inner_loss` (params, hparams, batch), and must be a function of the step "
                    "with a method `full()`, such as MiniBatches((X, y), batch_size=64)."
                )
            self.sampler, self._loss_of_batch = sampler, inner_loss
            self.batch, self.inner_loss = sampler.full(), _on_batch(inner_loss, sampler.full())

    @property
    def symmetric(self) -> bool:
        """Whether the Jacobian of the optimality map is a Hessian, hence symmetric."""
        return self.optimality is None

    def bind(self, hparams: Tree, counts: Counter[str] | None = None) -> InnerProblem:
        """Return the inner problem at fixed hyperparameters.

        Args:
            hparams: hyperparameters.
            counts: where its oracle calls are counted; a new counter by default.
        """
        return self.inner_problem(self, hparams, counts)

    def on_batch(self, batch: Tree) -> BilevelProblem:
        """Return a view of this problem whose inner loss is that of `batch`; without a sampler, the problem itself."""
        if self.sampler is None:
            return self
        view = copy.copy(self)
        view.batch, view.inner_loss = batch, _on_batch(self._loss_of_batch, batch)
        return view

    def traced(self, mode: str = "fx") -> BilevelProblem:
        """Return this problem with its gradient and VJP oracles traced once and replayed; see `bilevel.traced`.

        Args:
            mode: "fx" replays the recorded operations without autograd; "inductor" compiles them (seconds to minutes
                for each shape, and a C++ compiler).

        Returns:
            A problem of the same losses; this one is unchanged.

        Raises:
            ValueError: for another mode, and for a problem with closed-form oracles.
        """
        return traced(self, mode)

    def gradient_graph(self, params: Tree, hparams: Tree) -> Tree:
        """Return the inner gradient (or the optimality map) with its autograd graph back to `params` and `hparams`."""
        if self.optimality is not None:
            return tree.matched(self.optimality(params, hparams), params, "optimality")
        # A start that requires no gradient still has to be a root of the gradient's graph.
        params = tree.tree_map(lambda leaf: leaf if leaf.requires_grad else leaf.detach().requires_grad_(), params)
        loss = self.inner_loss(params, hparams)
        return tree.rebuild(
            params, torch.autograd.grad(loss, tree.leaves(params), create_graph=True, materialize_grads=True)
        )

    def outer_value_and_grads(self, params: Tree, hparams: Tree) -> tuple[Tensor, Tree, Tree]:
        """Return the outer loss and its partial gradients with respect to `params` and `hparams`."""
        params, hparams = tree.attach(params), tree.attach(hparams)
        x, u = tree.leaves(params), tree.leaves(hparams)
        with torch.enable_grad():
            value = self.outer_loss(params, hparams)
        if not value.requires_grad:
            return value.detach(), tree.zeros_like(params), tree.zeros_like(hparams)
        both = torch.autograd.grad(value, x + u, materialize_grads=True)
        return value.detach(), tree.rebuild(params, both[: len(x)]), tree.rebuild(hparams, both[len(x) :])

    def exact_hypergradient(self, hparams: Tree) -> Tree | None:
        """Return the exact hypergradient where a closed form exists, else None."""
        return None

    def spectrum(self) -> Eigenbasis | None:
        """Return the eigenbasis of a quadratic inner loss whose Hessian is ``A + s(u) I``, else None (the default).

        A problem that has one should compute it once (``functools.cached_property``): `Spectral` and `ClosedForm` then
        take d numbers of work for each hyperparameter vector.
        """
        return None

    def metrics(self, params: Tree) -> dict[str, float]:
        """Return named figures of merit of `params`, such as the test loss; none by default."""
        return {}

    def start(self, params: Tree = None) -> Tree:
        """Return where the inner solver starts: `params`, or else the problem's own start.

        Raises:
            ValueError: if neither is given, or what is given is no tree of tensors.
        """
        params = self.params if params is None else params
        if params is None:
            raise ValueError("no start for the inner variable: give `params=` to the problem or to this call.")
        check_tensors("params", params)
        return tree.detach(params)

    def check(self, params: Tree, hparams: Tree) -> None:
        """Look at everything that can be known before the work starts.

        Args:
            params: where the inner solver starts.
            hparams: hyperparameters.

        Raises:
            ValueError: one sentence for trees that do not fit, losses that are not finite scalars, and hyperparameters
                without influence on the inner problem.
        """
        check_trees(params, hparams)
        params, hparams = tree.attach(params), tree.attach(hparams)
        with torch.enable_grad():
            if self.optimality is None:
                _check_scalar("inner_loss", self.inner_loss, params, hparams)
            outer = _check_scalar("outer_loss", self.outer_loss, params, hparams)
            gradient = self.gradient_graph(params, hparams)
        self._check_influence(gradient, outer, hparams)

    def _check_influence(self, gradient: Tree, outer: Tensor, hparams: Tree) -> None:
        """Refuse hyperparameters whose hypergradient would be a silent zero."""
        u = tree.leaves(hparams)
        moving = [leaf for leaf in tree.leaves(gradient) if leaf.requires_grad]
        ones = [torch.ones_like(leaf) for leaf in moving]
        inner = torch.autograd.grad(moving, u, ones, allow_unused=True) if moving else [None] * len(u)
        direct = torch.autograd.grad(outer, u, allow_unused=True) if outer.requires_grad else [None] * len(u)
        what = "inner_loss" if self.optimality is None else "optimality"
        for name, by_inner, by_outer in zip(tree.names(hparams), inner, direct, strict=True):
            if by_inner is None and (by_outer is None or not any(g is not None for g in inner)):
                raise ValueError(
                    f"the gradient of `{what}` does not depend on `hparams{name}`: its hypergradient would be a "
                    "silent zero. Is the hyperparameter detached, or turned into a number, inside the loss?"
                )

    @classmethod
    def from_fixed_point(
        cls, update: Callable[[Tree, Tree], Tree], outer_loss: Loss, params: Tree = None
    ) -> BilevelProblem:
        """Make a problem whose inner solution is the fixed point of ``update(params, hparams)``.

        Args:
            update: a map that contracts in params.
            outer_loss: the outer loss.
            params: where the inner solver starts.

        Returns:
            A problem with the optimality map ``params - update(params, hparams)``; solve it with `FixedPoint(update)`.
        """
        require_arguments("update", update, "params", "hparams")
        return cls(
            outer_loss=outer_loss,
            params=params,
            optimality=lambda params, hparams: tree.add(params, update(params, hparams), -1.0),
        )

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        inner_loss: Callable[..., Tensor],
        outer_loss: Callable[[Callable[..., Any], Tree, Tree], Tensor],
        *,
        sampler: Sampler | None = None,
    ) -> BilevelProblem:
        """Make a problem over the parameters of an ``nn.Module``.

        Args:
            module: the model; it is not modified. Parameters with ``requires_grad=False`` and buffers are constants at
                their present values: in train mode BatchNorm normalises by the batch, and its running statistics do
                not move.
            inner_loss: ``(model, params, hparams) -> scalar``, with a sampler ``(model, params, hparams, batch)``;
                ``model(*inputs)`` runs the module at `params`.
            outer_loss: ``(model, params, hparams) -> scalar``.
            sampler: the batches of the inner steps.

        Returns:
            A problem whose params are ``{name: tensor}`` of the module's trainable parameters.

        Raises:
            ValueError: for a module without trainable parameters, or with active dropout (a random inner loss has no
                hypergradient), or losses that do not take three arguments.

        >>> model = nn.Linear(2, 1)
        >>> X, y = torch.ones(3, 2), torch.ones(3, 1)
        >>> problem = BilevelProblem.from_module(
        ...     model,
        ...     inner_loss=lambda model, params, decay: ((model(X) - y) ** 2).mean() + decay * params["weight"].norm(),
        ...     outer_loss=lambda model, params, decay: ((model(X) - y) ** 2).mean(),
        ... )
        >>> sorted(problem.params)
        ['bias', 'weight']
        """
        batched = () if sampler is None else ("batch",)
        require_arguments("inner_loss", inner_loss, "model", "params", "hparams", *batched)
        require_arguments("outer_loss", outer_loss, "model", "params", "hparams")
        params, model_at = functional_model(module)

        def bound(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def at(params: Tree, hparams: Tree, *batch: Tree) -> Tensor:
                return loss(model_at(params), params, hparams, *batch)

            return at

        return cls(bound(inner_loss), bound(outer_loss), params, sampler=sampler)


def _on_batch(loss: Callable[[Tree, Tree, Tree], Tensor], batch: Tree) -> Loss:
    def at(params: Tree, hparams: Tree) -> Tensor:
        return loss(params, hparams, batch)

    return at


def check_trees(params: Tree, hparams: Tree) -> None:
    """Refuse trees that cannot be worked on.

    Args:
        params: inner variable.
        hparams: outer variable.

    Raises:
        ValueError: one sentence for leaves that are no tensors, empty or not floating, NaN or infinite values, and for
            dtypes or devices that differ.
    """
    found = []
    for what, value in (("params", params), ("hparams", hparams)):
        check_tensors(what, value)
        for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True):
            if not leaf.is_floating_point():
                raise ValueError(f"`{what}{name}` must have a floating dtype, got {leaf.dtype}.")
            if leaf.numel() == 0:
                raise ValueError(f"`{what}{name}` is empty, of shape {tuple(leaf.shape)}.")
            found.append((what, name, leaf))
    dtype, device = found[0][2].dtype, found[0][2].device
    for what, name, leaf in found:
        if leaf.dtype != dtype or leaf.device != device:
            raise ValueError(
                f"`{what}{name}` is {leaf.dtype} on {leaf.device}, but params are {dtype} on {device}: "
                "params and hparams must share dtype and device."
            )
    for what, name, leaf in found:
        if leaf.is_meta:
            raise ValueError(f"`{what}{name}` is on the meta device and holds no values.")
        if not tree.is_finite(leaf):
            raise ValueError(f"`{what}{name}` holds NaN or infinite values.")


def check_tensors(what: str, value: Tree) -> None:
    """Refuse a tree whose leaves are not tensors, or that has none.

    Args:
        what: how messages call the tree.
        value: the tree.

    Raises:
        ValueError: in one sentence.
    """
    found = tree.leaves(value)
    if not found:
        raise ValueError(f"`{what}` holds no tensors.")
    # Every outer step comes here; the names take longer than the look.
    if all(isinstance(leaf, Tensor) for leaf in found):
        return
    for name, leaf in zip(tree.names(value), tree.leaves(value), strict=True):
        if not isinstance(leaf, Tensor):
            remedy = ": torch.as_tensor makes one" if hasattr(leaf, "__array__") or isinstance(leaf, Real) else ""
            raise ValueError(f"`{what}{name}` must be a Tensor, got {type(leaf).__name__}{remedy}.")


def _check_scalar(what: str, loss: Loss, params: Tree, hparams: Tree) -> Tensor:
    """Evaluate a loss at the start and refuse what is no finite scalar Tensor."""
    try:
        value = loss(params, hparams)
    except RuntimeError as error:
        first = tree.leaves(params)[0]
        raise ValueError(
            f"`{what}` fails at the start, with params of {first.dtype} on {first.device}: {error} "
            "(do its data have the same dtype and device, and shapes that fit?)"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dim() != 0:
        got = f"a Tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`{what}` must return a scalar Tensor (shape ()), got {got}.")
    if not torch.isfinite(value):
        raise ValueError(f"`{what}` is {float(value.detach())} at the start: are there NaN in the data or the start?")
    unused = not value.requires_grad
    if what == "inner_loss" and not unused:
        by_params = torch.autograd.grad(value, tree.leaves(params), retain_graph=True, allow_unused=True)
        unused = all(part is None for part in by_params)
    if unused:
        of = "`params`" if what == "inner_loss" else "`params` nor on `hparams`"
        raise ValueError(f"`{what}` does not depend on {of}: is the computation detached?")
    return value
