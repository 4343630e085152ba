"""`BilevelProblem`: two losses, and where the inner variable starts.

min over hparams   outer_loss(params*(hparams), hparams)
subject to         params*(hparams) = argmin over params of inner_loss(params, hparams)
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader

from bilevel.core import tree
from bilevel.core.options import require_arguments
from bilevel.core.tree import Tree
from bilevel.numerics.eigenbasis import Eigenbasis
from bilevel.oracles import batching as batches
from bilevel.oracles.error_model import Certifiable
from bilevel.oracles.exact import AtOnce
from bilevel.oracles.hyper_hessian import hyper_hessians
from bilevel.oracles.inner_problem import InnerProblem
from bilevel.oracles.losses import Loss, Losses, Purity
from bilevel.oracles.nonsmooth import Nonsmooth, require_term
from bilevel.oracles.old_forwards import OldForwards
from bilevel.oracles.proximal_inner import ProximalInner
from bilevel.oracles.recording import Recordings
from bilevel.oracles.samplers import Sampler
from bilevel.oracles.sampling import FreshBatch, Sampling, sampling
from bilevel.oracles.separate import Separable
from bilevel.oracles.structure import QuadraticForm, Structure, declared
from bilevel.oracles.tracing import TracedInner
from bilevel.oracles.validation import Reads, check_losses, check_tensors

Solver = TypeVar("Solver")


class BilevelProblem(AtOnce, Separable, OldForwards, Losses):
    """An inner and an outer loss over trees of tensors.

    Both losses are called as ``loss(params, hparams)`` and return a scalar Tensor; data are captured by the functions.
    The inner loss must be twice differentiable in ``(params, hparams)`` for anything but `FiniteDifference`.

    With a sampler the inner loss is called as ``inner_loss(params, hparams, batch)``; `bilevel.oracles.sampling` says
    which step sees which batch. The losses must be functions of their arguments: they write nothing, draw nothing, and
    depend on nothing that moves from call to call, which the first use of a problem checks (`bilevel.oracles.purity`).

    Args:
        inner_loss: the loss that the inner solver minimises over params.
        outer_loss: the loss whose gradient over hparams is wanted.
        params: where the inner solver starts, unless a call says otherwise.
        optimality: instead of an inner loss, a map whose zero over params is the inner solution, such as
            ``params - update(params, hparams)`` or a KKT residual; it returns a tree shaped as params. Its Jacobian
            need not be symmetric: use GMRES for implicit differentiation.
        sampler: the batches of the inner loss, such as ``MiniBatches((X, y), batch_size=64)``, or a DataLoader (see
            `LoaderBatches`).
        fresh_batch: when the inner loss sees another batch: "inner step", "outer step", or "never" (all data always).
        outer_sampler: the batches of the outer loss, likewise; another one each outer step.
        data: a tree of tensors that the functions are then given as a third argument,
            ``loss(params, hparams, data)``: what differs between the problems of a batch.
        nonsmooth: a term that is added to `inner_loss`, which is then the smooth part: `L1`, `ElasticNet`,
            `GroupLasso`, `NonNegative`, or a `Nonsmooth` of your own; for `ProximalGradient` and `FISTA`.

    Raises:
        ValueError: unless exactly one of `inner_loss` and `optimality` is given, every function takes its arguments,
            and params are tensors; for a sampler that is none, or without a loss to hand its batches to.

    >>> import torch
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
    structure: Structure = Structure()
    """What is declared of the problem."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.structure = declared(cls, cls.structure)

    sampler: Sampler | None = None
    """Where every inner step sees a batch of its own: the batches."""
    _sampling: Sampling | None = None
    recurring: bool = False
    """Whether a closed form has been asked for before, or will be again and again: an eigenbasis pays then."""
    one_by_one: bool = False
    """Whether the members of this batch run one after the other."""
    why: str = ""
    """Why they do, where nobody asked for it."""

    def __init__(
        self,
        inner_loss: Callable[..., Tensor] | None = None,
        outer_loss: Loss | None = None,
        params: Tree = None,
        *,
        optimality: Callable[..., Tree] | None = None,
        sampler: Sampler | DataLoader[Any] | None = None,
        fresh_batch: FreshBatch = "inner step",
        outer_sampler: Sampler | DataLoader[Any] | None = None,
        data: Tree = None,
        nonsmooth: Nonsmooth | None = None,
    ) -> None:
        if data is not None and (sampler is not None or outer_sampler is not None):
            raise ValueError("give `data` or a `sampler`, not both: each is the third argument of a loss.")
        given = () if data is None else ("data",)
        for what, function, more in (
            ("inner_loss", inner_loss, given if sampler is None else ("batch",)),
            ("outer_loss", outer_loss, given if outer_sampler is None else ("batch",)),
            ("optimality", optimality, given),
        ):
            if function is not None:
                require_arguments(what, function, "params", "hparams", *more)
        if params is not None:
            check_tensors("params", params)
        self.derivatives_seen, self.traces = {}, Recordings()
        # Structured problems define the losses as methods and pass none.
        self.functions = (inner_loss, outer_loss, optimality)
        self.data = data
        inner, outer, self.optimality = (
            function if function is None or data is None else batches.with_last(function, data)
            for function in self.functions
        )
        if inner is not None:
            self.inner_loss = inner
        if outer is not None:
            self.outer_loss = outer
        if (getattr(self, "inner_loss", None) is None) == (optimality is None):
            raise ValueError("a BilevelProblem needs exactly one of `inner_loss` and `optimality`.")
        if not callable(getattr(self, "outer_loss", None)):
            raise ValueError("a BilevelProblem needs an `outer_loss`, a function (params, hparams) -> scalar Tensor.")
        self.params = params
        if nonsmooth is not None:
            require_term(nonsmooth, optimality)
            self.nonsmooth = nonsmooth
        self.purity = Purity()
        self._sampling = sampling(sampler, fresh_batch, inner_loss, outer_sampler, outer_loss)
        if self._sampling is not None:
            self._see(self._sampling, 0)

    @property
    def traced_inner(self) -> type[InnerProblem] | None:  # type: ignore[override]
        """The class of the bound problem with recorded oracles; None for closed forms, which are faster."""
        return TracedInner if self.inner_problem in (InnerProblem, TracedInner) else None

    @property
    def variation(self) -> str:
        """Why inner steps differ in more than params; an empty string where they do not."""
        return "" if self.sampler is None else "a sampler, whose steps see different batches"

    def bind(self, hparams: Tree, counts: Counter[str] | None = None) -> InnerProblem:
        """Return the inner problem at fixed hyperparameters; its oracle calls are counted in `counts`."""
        inner = self.inner_problem(self, hparams, counts)
        return inner if self.nonsmooth is None else ProximalInner(inner, self.nonsmooth)

    def on_batch(self, batch: Tree) -> BilevelProblem:
        if self._sampling is None or self._sampling.sampler is None:
            return self
        view = copy.copy(self)
        view.minibatch, view.inner_loss = batch, batches.with_last(self._sampling.inner_loss, batch)
        return view

    def on_step(self, index: int) -> BilevelProblem:
        return self if self.sampler is None else self.on_batch(self.sampler(index))

    def sources(self) -> list[tuple[str, Callable[[int], Tree]]]:
        if self._sampling is None:
            return []
        made = (("sampler", self._sampling.sampler), ("outer sampler", self._sampling.outer_sampler))
        # A sampler that holds batches for later has a method that fetches them anew.
        return [(what, getattr(each, "fetched", each)) for what, each in made if each is not None]

    def augmented(self, solver: Solver) -> Solver:
        """Return the solver that runs this problem: the given one, unless running statistics move beside params."""
        return solver

    def deterministic(self) -> BilevelProblem:
        """Return this problem without `variation`: every inner step sees what everything else of it is evaluated on."""
        if self.sampler is None:
            return self
        view = copy.copy(self)
        view.sampler = None
        return view

    def on_outer_step(self, index: int) -> BilevelProblem:
        """Return the problem of an outer step: this one, unless its data change from step to step.

        With samplers it is a view on the batches of that step. A problem that draws its data anew in another way, such
        as tasks, overrides it with a pure function of the index, so that a run that resumes sees the same data again.
        """
        if self._sampling is None:
            return self
        view = copy.copy(self)
        view._see(self._sampling, index)
        return view

    def _see(self, sampling: Sampling, outer_step: int) -> None:
        """Evaluate the losses on their batches in an outer step."""
        if sampling.sampler is not None:
            self.sampler = sampling.sampler if sampling.fresh_batch == "inner step" else None
            self.minibatch = sampling.minibatch(outer_step)
            self.inner_loss = batches.with_last(sampling.inner_loss, self.minibatch)
        if sampling.outer_sampler is not None:
            self.outer_loss = batches.with_last(sampling.outer_loss, sampling.outer_sampler(outer_step))

    def exact_hypergradient(self, hparams: Tree) -> Tree | None:
        """Return the exact hypergradient where a closed form exists, else None."""
        return None if self.batch is None else batches.exact_hypergradient(self, hparams)

    def hyper_hessians(self, hparams: Tree, params: Tree, adjoint: Tree) -> tuple[Tensor, Tensor] | None:
        """Return the Gauss-Newton and the exact second derivatives of the outer loss by the hyperparameters.

        Args:
            hparams: the hyperparameters, k numbers.
            params: the inner solution at them.
            adjoint: ``H^-1 f_w`` there, shaped as params.

        Returns:
            Two matrices of shape (k, k), in the order of the leaves; None where there is no dense factor of H.
        """
        return None if self.inner_loss is None or self.nonsmooth else hyper_hessians(self, hparams, params, adjoint)

    def penalty_scales(self, hparams: Tree) -> Tree | None:
        """Return the scales of log penalties, shaped as hparams; None (the default) where they are no log penalties.

        Each is the mean diagonal of the data's Hessian over the weights of a penalty: it shrinks a lone one by half.
        """
        return None

    def spectrum(self) -> Eigenbasis | None:
        """Return the eigenbasis, made once, of a quadratic inner loss with the Hessian ``A + s(u) I``, else None."""
        return None

    @property
    def has_spectrum(self) -> bool:
        """Whether there is a `spectrum`; override it beside one that takes long."""
        return self.spectrum() is not None

    def quadratic_form(self, hparams: Tree) -> QuadraticForm | None:
        """Return the coefficients of a quadratic inner loss of one tensor, where they are known; None by default."""
        return None

    def certifiable(self) -> Certifiable | None:
        """Return what proved error bounds need to know of this problem, or None: its errors are estimated then."""
        return None

    def metrics(self, params: Tree, hparams: Tree = None, solver: Any = None) -> dict[str, float]:
        """Return named figures of merit at an inner solution, such as the test loss; none by default."""
        return {}

    @property
    def unit(self) -> str:
        """What a hyperparameter is, such as "log penalty", as tables call it."""
        return "hyperparameter"

    def remark(self, params: Tree, hparams: Tree) -> str:
        """Return what is odd about the outer loss where a run ends, in words; an empty string by default."""
        return ""

    def start(self, params: Tree = None) -> Tree:
        """Return where the inner solver starts: `params`, or else the problem's own start; ValueError without one."""
        params = self.params if params is None else params
        if params is None:
            raise ValueError("no start for the inner variable: give `params=` to the problem or to this call.")
        check_tensors("params", params)
        return tree.detach(params) if self.batch is None else batches.start(self.batch, self.params, params)

    def check(self, params: Tree, hparams: Tree, reads: Reads | None = None) -> None:
        """Look at everything that can be known before the work starts.

        `reads` says which hyperparameters the inner solver reads by itself, such as a tuned step size.

        Raises:
            ValueError: one sentence for trees that do not fit, losses that are not finite scalars, params that neither
                loss uses, and hyperparameters without influence on the inner problem.
            DerivativeError: a ValueError, for an inner loss that torch cannot differentiate twice; one HVP shows it.
        """
        if self.batch is not None:
            return batches.check(self, params, hparams, reads)
        check_losses(self, params, hparams, reads)

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

        >>> import torch
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
        if self._sampling is not None:
            raise ValueError(batches.SAMPLED)
        return batches.side_by_side(self, size, data, BilevelProblem)

    def stacked(self, problems: Sequence[Any]) -> BilevelProblem:
        """Return problems of this kind as one batch: what `bilevel.stack` calls on the first of them."""
        batches.check_shared_functions(problems)
        batch = self.batched(len(problems), batches.stacked_trees("data", [problem.data for problem in problems]))
        batch.params = batches.stacked_trees("params", [problem.start() for problem in problems])
        return batch.as_batch(problems)

    def as_batch(self, single: Sequence[BilevelProblem]) -> BilevelProblem:
        """Declare this problem the batch of the given members, and return it."""
        self.batch, self._single = len(single), tuple(single)
        quadratic = all(each.structure.quadratic for each in single)
        self.structure = replace(single[0].structure, quadratic=quadratic)
        return self

    def member(self, index: int) -> BilevelProblem:
        return self._single[index]

    @classmethod
    def from_fixed_point(
        cls, update: Callable[[Tree, Tree], Tree], outer_loss: Loss, params: Tree = None
    ) -> BilevelProblem:
        """Return the problem of the inner solution ``params = update(params, hparams)``, for `FixedPoint(update)`."""
        require_arguments("update", update, "params", "hparams")
        return cls(
            outer_loss=outer_loss,
            params=params,
            optimality=lambda params, hparams: tree.add(params, update(params, hparams), -1.0),
        )
