"""Breaks of data, samplers, modules, problems and meta-learning."""

from __future__ import annotations

from .row import Break

INPUTS = (
    Break(
        "data-leak",
        "bilevel/dataprep.py",
        "scaler = StandardScaler().fit(X_train)",
        "scaler = StandardScaler().fit(np.concatenate([X for X, _ in raw.parts.values()]))",
        "test_data.py test_datafiles.py",
    ),
    Break(
        "data-strata",
        "bilevel/dataprep.py",
        "strata = None if labels is None else y[rest]",
        "strata = None",
        "test_data.py test_datafiles.py",
    ),
    Break(
        "data-not-finite",
        "bilevel/datafiles.py",
        'bad = ~np.isfinite(values) if values.dtype.kind == "f" else',
        'bad = np.isinf(values) if values.dtype.kind == "f" else',
        "test_data.py test_datafiles.py",
    ),
    Break(
        "sampler-epoch",
        "bilevel/samplers.py",
        "seed_of(ORDER, self._seed, epoch)",
        "seed_of(ORDER, self._seed)",
        "test_samplers.py",
    ),
    Break(
        "sampler-order",
        "bilevel/samplers.py",
        "position * self._size : (position + 1) * self._size",
        "position : position + self._size",
        "test_samplers.py",
    ),
    Break(
        "draws-of-no-step",
        "bilevel/draws.py",
        "key = (self._seed,) if step is None else (self._seed, step)",
        "key = (self._seed, step or 0)",
        "test_networks.py::test_steps_have_different_masks_and_what_is_no_step_has_one_of_its_own",
    ),
    Break(
        "statistics-cumulative",
        "bilevel/batch_norm.py",
        "weight = 1 / result[count].detach() if momentum is None else momentum",
        "weight = 0.1 if momentum is None else momentum",
        "test_networks.py::test_the_statistics_are_those_of_torchs_own_training_loop",
    ),
    Break(
        "module-buffers",
        "bilevel/modules.py",
        "{name: value.clone() for name, value in self._buffers.items()}",
        "self._buffers",
        "test_layer.py test_purity.py",
    ),
    Break(
        "decay-broadcast",
        "bilevel/decay.py",
        "(bent * w * g).sum_to_size(u.shape)",
        "(w * g).sum_to_size(u.shape)",
        "test_decay.py",
    ),
    Break(
        "meta-mean",
        "bilevel/meta/problem.py",
        "hparams, self.query).mean()",
        "hparams, self.query).sum()",
        "test_meta.py::test_mamls_meta_gradient_is_that_of_plain_autograd",
    ),
    Break(
        "meta-proximity",
        "bilevel/meta/problem.py",
        "loss + 0.5 * self.proximity *",
        "loss + self.proximity *",
        "test_meta.py::test_imamls_meta_gradient_is_that_of_dense_linear_algebra",
    ),
)
