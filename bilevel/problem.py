"""`BilevelProblem`: two losses, and where the inner variable starts.

min over hparams   outer_loss(params*(hparams), hparams)
subject to         params*(hparams) = argmin over params of inner_loss(params, hparams)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bilevel import batches, members, tree
from bilevel.certifiable import Certifiable
from bilevel.inputs import Reads, check_influence, check_scalar, check_tensors, check_trees
from bilevel.modules import functional_model, module_loss
from bilevel.options import require_arguments
from bilevel.oracles import InnerProblem
from bilevel.samplers import Sampler
from bilevel.spectral import Eigenbasis
from bilevel.traced import Traces, traced
from bilevel.tree import Tree

Loss: TypeAlias = Callable[..., Tensor]
"""``(params, hparams) -> scalar``, or ``(params, hparams, data) -> scalar``."""


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
        data: a tree of tensors that the functions are then given as a third argument,
            ``loss(params, hparams, data)``: what differs between the problems of a batch.

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

    renewed: bool = False
    """Whether each outer step has an inner variable of its own (`on_outer_step`), as where tasks are drawn anew.

    Then no warm start is handed on, outer losses of different steps do not compare (the last hyperparameters are the
    best), and comparisons have no referee.
    """

    inner_loss: Loss
    outer_loss: Loss
    optimality: Callable[[Tree, Tree], Tree] | None
    sampler: Sampler | None = None
    minibatch: Tree = ()
    """The mini-batch that `inner_loss` is evaluated on; an empty tree without a sampler."""
    traces: Traces | None = None
    """The traced oracles of a problem that `traced` made."""
    batch: int | None = None
    """Number of members where this is a batch (see `batched`), else None."""
    data: Tree = None

    def __init__(
        self,
        inner_loss: Callable[..., Tensor] | None = None,
        outer_loss: Loss | None = None,
        params: Tree = None,
        *,
        optimality: Callable[..., Tree] | None = None,
        sampler: Sampler | None = None,
        data: Tree = None,
    ) -> None:
        if sampler is not None and data is not None:
            raise ValueError("give `data` or a `sampler`, not both: each is the third argument of the inner loss.")
        given = () if data is None else ("data",)
        for what, function, more in (
            ("inner_loss", inner_loss, given if sampler is None else ("batch",)),
            ("outer_loss", outer_loss, given),
            ("optimality", optimality, given),
        ):
            if function is not None:
                require_arguments(what, function, "params", "hparams", *more)
        if params is not None:
            check_tensors("params", params)
        # Structured problems define the losses as methods and pass none.
        self.functions = (inner_loss, outer_loss, optimality)
        self.data = data
        inner, outer, self.optimality = (batches.with_data(function, data) for function in self.functions)
        if inner is not None:
            self.inner_loss = inner
        if outer is not None:
            self.outer_loss = outer
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
            self.minibatch, self.inner_loss = sampler.full(), batches.with_third(inner_loss, sampler.full())

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
        view.minibatch, view.inner_loss = batch, batches.with_third(self._loss_of_batch, batch)
        return view

    def on_outer_step(self, index: int) -> BilevelProblem:
        """Return the problem of an outer step: this one, unless its data change from step to step.

        A problem that draws its data anew (tasks, batches) overrides it with a pure function of the index, so that a
        run that resumes sees the same data again.
        """
        return self

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
        """Return the outer loss, of shape () or (batch,), and its partial gradients by `params` and `hparams`."""
        params, hparams = tree.attach(params), tree.attach(hparams)
        x, u = tree.leaves(params), tree.leaves(hparams)
        with torch.enable_grad():
            value = self.outer_loss(params, hparams)
            total = value if self.batch is None else value.sum()
        if not value.requires_grad:
            return value.detach(), tree.zeros_like(params), tree.zeros_like(hparams)
        both = torch.autograd.grad(total, x + u, materialize_grads=True)
        return value.detach(), tree.rebuild(params, both[: len(x)]), tree.rebuild(hparams, both[len(x) :])

    def exact_hypergradient(self, hparams: Tree) -> Tree | None:
        """Return the exact hypergradient where a closed form exists, else None."""
        return None if self.batch is None else batches.exact_hypergradient(self, hparams)

    def spectrum(self) -> Eigenbasis | None:
        """Return the eigenbasis of a quadratic inner loss whose Hessian is ``A + s(u) I``, else None (the default).

        A problem that has one should compute it once (``functools.cached_property``): `Spectral` and `ClosedForm` then
        take d numbers of work for each hyperparameter vector.
        """
        return None

    def certifiable(self) -> Certifiable | None:
        """Return what proved error bounds need to know of this problem, or None: its errors are estimated then."""
        return None

    def metrics(self, params: Tree, hparams: Tree = None, solver: Any = None) -> dict[str, float]:
        """Return named figures of merit, such as the test loss; none by default.

        Args:
            params: the inner solution.
            hparams: its hyperparameters.
            solver: the inner solver.
        """
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
        return tree.detach(params) if self.batch is None else batches.start(self.batch, self.params, params)

    def check(self, params: Tree, hparams: Tree, reads: Reads | None = None) -> None:
        """Look at everything that can be known before the work starts.

        Args:
            params: where the inner solver starts.
            hparams: hyperparameters.
            reads: says which hyperparameters the inner solver reads by itself, such as a tuned step size.

        Raises:
            ValueError: one sentence for trees that do not fit, losses that are not finite scalars, and hyperparameters
                without influence on the inner problem.
        """
        if self.batch is not None:
            return batches.check(self, params, hparams, reads)
        check_trees(params, hparams)
        params, hparams = tree.attach(params), tree.attach(hparams)
        with torch.enable_grad():
            if self.optimality is None:
                check_scalar("inner_loss", self.inner_loss, params, hparams)
            outer = check_scalar("outer_loss", self.outer_loss, params, hparams)
            gradient = self.gradient_graph(params, hparams)
        what = "inner_loss" if self.optimality is None else "optimality"
        check_influence(what, gradient, outer, hparams, reads and partial(reads, self, params, hparams))

    def batched(self, size: int, data: Tree = None) -> BilevelProblem:
        """Return a problem of `size` members side by side.

        Params and hparams get a leading dimension; the losses are vectorised by ``torch.func.vmap``. Problems with
        structure keep their closed forms.

        Args:
            size: number of members.
            data: a tree with `size` rows in every leaf, one for each member: the losses are called as
                ``loss(params, hparams, data)``. Default: this problem's own data for all.

        Raises:
            ValueError: for a size that is no positive int, data without as many rows, and a problem that is a batch.

        >>> problem = BilevelProblem(
        ...     lambda w, penalty, y: ((w - y) ** 2).mean() + penalty * w**2,
        ...     lambda w, penalty, y: (w - y.mean()) ** 2,
        ...     params=torch.tensor(0.0),
        ...     data=torch.tensor([1.0, 3.0]),
        ... )
        >>> batch = problem.batched(2, data=torch.tensor([[1.0, 3.0], [0.0, 2.0]]))
        >>> batch.bind(torch.ones(2)).grad(batch.start())
        tensor([-4., -2.])
        """
        batches.check_single(self, size)
        if self.sampler is not None:
            raise ValueError("a problem with a sampler does not run in batches: give its data by `data=` instead.")
        single: list[BilevelProblem]
        if data is None:
            single = [self] * size
            functions = (getattr(self, "inner_loss", None), self.outer_loss, self.optimality)
        else:
            members.check_rows("data", data, size)
            functions = self.functions  # type: ignore[assignment]
            single = [
                BilevelProblem(*functions[:2], self.params, optimality=functions[2], data=batches.row_of(data, index))
                for index in range(size)
            ]
        inner, outer, optimality = (batches.for_members(function, data) for function in functions)
        params = None if self.params is None else members.expand(self.params, size)
        return BilevelProblem(batches.summed(inner), outer, params, optimality=optimality).as_batch(single)

    def stacked(self, problems: Sequence[BilevelProblem]) -> BilevelProblem:
        """Return problems of this kind as one batch: what `bilevel.stack` calls on the first of them.

        Args:
            problems: problems of the same kind, this one first.

        Raises:
            ValueError: for problems that differ in more than values of their data.
        """
        batches.check_shared_functions(problems)
        batch = self.batched(len(problems), batches.stacked_trees("data", [problem.data for problem in problems]))
        batch.params = batches.stacked_trees("params", [problem.start() for problem in problems])
        return batch.as_batch(problems)

    def as_batch(self, single: Sequence[BilevelProblem]) -> BilevelProblem:
        """Declare this problem the batch of the given members, and return it."""
        self.batch, self._single = len(single), tuple(single)
        return self

    def member(self, index: int) -> BilevelProblem:
        """Return one member of a batch as a problem of its own."""
        return self._single[index]

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
        return cls(module_loss(inner_loss, model_at), module_loss(outer_loss, model_at), params, sampler=sampler)
