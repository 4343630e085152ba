"""Breaks of data, samplers, modules, problems and meta-learning."""

from __future__ import annotations

from .row import Break

DATA = "test_data.py test_datafiles.py"
SAMPLERS = "test_samplers.py"
NETWORKS = "test_networks.py"
META = "test_meta.py"
PROBLEMS = "test_problems.py test_linear_oracles.py"

INPUTS = (
    Break(
        "data-leak",
        "bilevel/dataprep.py",
        "scaler = StandardScaler().fit(X_train)",
        "scaler = StandardScaler().fit(np.concatenate([X for X, _ in raw.parts.values()]))",
        DATA,
    ),
    Break("data-centre", "bilevel/dataprep.py", "y_train.mean() if centre else 0", "0", DATA),
    Break("data-strata", "bilevel/dataprep.py", "strata = None if labels is None else y[rest]", "strata = None", DATA),
    Break(
        "data-corrupted-labels",
        "bilevel/dataprep.py",
        "random.integers(1, len(labels), len(rows))",
        "random.integers(0, len(labels), len(rows))",
        f"{DATA} test_cleaning.py",
    ),
    Break("data-split-seed", "bilevel/dataprep.py", "random_state=seed, stratify", "random_state=0, stratify", DATA),
    Break("data-truth-scaled", "bilevel/dataprep.py", "raw.truth * scaler.scale_", "raw.truth", DATA),
    Break("data-target-column", "bilevel/datafiles.py", "target = header[-1] if", "target = header[0] if", DATA),
    Break("data-rows", "bilevel/datafiles.py", "    if len(X) != len(y):\n", "    if len(X) < 0:\n", DATA),
    Break(
        "data-not-finite",
        "bilevel/datafiles.py",
        'bad = ~np.isfinite(values) if values.dtype.kind == "f" else',
        'bad = np.isinf(values) if values.dtype.kind == "f" else',
        DATA,
    ),
    # Samplers
    Break(
        "sampler-epoch",
        "bilevel/samplers.py",
        "seed_of(ORDER, self._seed, epoch)",
        "seed_of(ORDER, self._seed)",
        SAMPLERS,
    ),
    Break(
        "sampler-order",
        "bilevel/samplers.py",
        "position * self._size : (position + 1) * self._size",
        "position : position + self._size",
        SAMPLERS,
    ),
    Break(
        "sampler-streams",
        "bilevel/samplers.py",
        "EXAMPLES = range(4)",
        "EXAMPLES = (0, 0, 0, 0)",
        "test_samplers.py test_loaders.py",
    ),
    Break(
        "sampler-evaluation",
        "bilevel/samplers.py",
        "seed_of(EVALUATION, self._seed, outer_step)",
        "seed_of(EVALUATION, self._seed, 0)",
        SAMPLERS,
    ),
    Break(
        "sampling-outer-step",
        "bilevel/sampling.py",
        'return self.sampler(outer_step) if self.fresh_batch == "outer step"',
        'return self.sampler(0) if self.fresh_batch == "outer step"',
        SAMPLERS,
    ),
    Break(
        "loader-augmentation",
        "bilevel/loaders.py",
        "seed_of(EXAMPLES, self._seed, step)",
        "seed_of(EXAMPLES, self._seed, 0)",
        "test_loaders.py",
    ),
    Break(
        "loader-of-numpy",
        "bilevel/loaders.py",
        "np.random.seed(seed % 2**32)  # noqa: NPY002",
        "pass",
        "test_loaders.py",
    ),
    Break(
        "loader-generators-restored",
        "bilevel/loaders.py",
        "            each.set_state(state)\n",
        "            pass\n",
        "test_loaders.py",
    ),
    Break(
        "draws-of-no-step",
        "bilevel/draws.py",
        "key = (self._seed,) if step is None else (self._seed, step)",
        "key = (self._seed, step or 0)",
        NETWORKS,
    ),
    Break(
        "draws-noticed",
        "bilevel/draws.py",
        "if not all(map(torch.equal, before, after)):",
        "if False:",
        f"{NETWORKS} test_bad_input.py",
    ),
    Break(
        "draws-restored",
        "bilevel/draws.py",
        "with PROCESS_STATE, torch.random.fork_rng(devices):",
        "with PROCESS_STATE, torch.random.fork_rng(devices, enabled=False):",
        NETWORKS,
    ),
    # Modules and running statistics
    Break(
        "statistics-cumulative",
        "bilevel/batch_norm.py",
        "weight = 1 / result[count].detach() if momentum is None else momentum",
        "weight = 0.1 if momentum is None else momentum",
        NETWORKS,
    ),
    Break(
        "statistics-at-rest",
        "bilevel/batch_norm.py",
        "[keep**age for age in reversed(range(len(records)))]",
        "[keep**age for age in range(len(records))]",
        NETWORKS,
    ),
    Break(
        "statistics-variance",
        "bilevel/batch_norm.py",
        "[0, *range(2, x.dim())])",
        "[0, *range(2, x.dim())], correction=0)",
        NETWORKS,
    ),
    Break(
        "statistics-eps",
        "bilevel/batch_norm.py",
        "(variance + layer.eps).rsqrt()",
        "variance.rsqrt()",
        NETWORKS,
    ),
    Break(
        "module-buffers",
        "bilevel/modules.py",
        "{name: value.clone() for name, value in self._buffers.items()}",
        "self._buffers",
        f"test_layer.py {NETWORKS}",
    ),
    Break(
        "module-mode-restored",
        "bilevel/modules.py",
        "        finally:\n            for part in changed:\n                part.training = not part.training",
        "        finally:\n            pass",
        f"test_layer.py {NETWORKS}",
    ),
    Break(
        "module-tied",
        "bilevel/modules.py",
        "values |= {name: values[first] for name, first in self._tied.items()}",
        "pass",
        f"test_layer.py {NETWORKS}",
    ),
    Break(
        "decay-broadcast",
        "bilevel/decay.py",
        "(bent * w * g).sum_to_size(u.shape)",
        "(w * g).sum_to_size(u.shape)",
        "test_decay.py",
    ),
    # Problems
    Break(
        "ridge-exact",
        "bilevel/problems/ridge.py",
        "return -self.gather(slope * w * adjoint)",
        "return -self.gather(w * adjoint)",
        PROBLEMS,
    ),
    Break(
        "ridge-gram",
        "bilevel/problems/ridge.py",
        "return torch.addmv(problem.moment, self.hessian, params, beta=-1.0)",
        "return torch.addmv(problem.moment, self.hessian, params, beta=-0.9)",
        PROBLEMS,
    ),
    Break(
        "logistic-curvature",
        "bilevel/problems/logistic.py",
        "return torch.sigmoid(z) * torch.sigmoid(-z)",
        "return torch.sigmoid(z) * torch.sigmoid(z)",
        PROBLEMS,
    ),
    Break(
        "softmax-hessian",
        "bilevel/problems/softmax.py",
        "return weighted - curvature * weighted.sum(0)",
        "return weighted",
        PROBLEMS,
    ),
    Break(
        "softmax-gram",
        "bilevel/problems/softmax.py",
        "(p[i] * ((1.0 - p[j]) if i == j else -p[j]))) @ X.t()",
        "(p[i] * ((1.0 - p[j]) if i == j else 0 * p[j]))) @ X.t()",
        f"{PROBLEMS} test_quasi_newton.py",
    ),
    Break(
        "sample-weight-slope",
        "bilevel/problems/sample_weights.py",
        "self.weights * (1.0 - self.weights) if sigmoid",
        "self.weights if sigmoid",
        "test_problems.py test_linear_oracles.py test_cleaning.py",
    ),
    Break(
        "penalty-gather",
        "bilevel/problems/linear_model.py",
        "return weights.sum_to_size(self._group_shape).reshape(self.hparams_shape())",
        "return weights.mean().expand(self._group_shape).reshape(self.hparams_shape())",
        PROBLEMS,
    ),
    Break(
        "negative-penalty",
        "bilevel/problems/linear_model.py",
        'if self.parametrization == "direct" and bool((hparams < 0).any()):',
        'if self.parametrization == "direct" and bool(hparams.isnan().any()):',
        "test_problems.py test_problem_inputs.py",
    ),
    Break(
        "label-unseen",
        "bilevel/problems/splits.py",
        "if bool(unknown.any()):",
        "if bool(unknown.all()):",
        "test_problems.py test_problem_inputs.py",
    ),
    # Meta-learning
    Break("meta-mean", "bilevel/meta/problem.py", "hparams, self.query).mean()", "hparams, self.query).sum()", META),
    Break(
        "meta-proximity", "bilevel/meta/problem.py", "loss + 0.5 * self.proximity *", "loss + self.proximity *", META
    ),
    Break(
        "meta-tasks",
        "bilevel/meta/problem.py",
        "range(index * self.batch_size, (index + 1) * self.batch_size)",
        "range(index, index + self.batch_size)",
        META,
    ),
    Break(
        "meta-interval",
        "bilevel/meta/evaluation.py",
        "float(values.std()) / len(values) ** 0.5",
        "float(values.std()) / len(values)",
        META,
    ),
    Break(
        "meta-splits",
        "bilevel/meta/tasks.py",
        "keyed_generator(self.seed, SPLITS.index(self.split), index)",
        "keyed_generator(self.seed, index)",
        META,
    ),
    Break("sine-amplitude", "bilevel/meta/sine.py", "0.1 + 4.9 * uniform[0]", "4.9 * uniform[0]", META),
)
