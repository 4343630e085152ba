"""Data set distillation (Wang et al. 2018): ten images, one for each digit, train a network better than real ones do.

    inner   a network of 32 tanh units is trained on the ten images by 30 steps of gradient descent with momentum
    outer   its loss on the real training digits; hyperparameters: the images, and the logarithm of the step size

Every outer step draws other initial weights, so the images serve no particular start. The hypergradient is that of all
30 steps (`FullUnroll`). Accuracies are those on test digits of networks from initial weights that the images have not
seen; ten real images are drawn anew for each, and get the best of several step sizes.

    python scripts/studies/distillation.py [--steps 300] [--seed 0] [--out docs/figures/distillation.png]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel import data

CLASSES, HIDDEN = 10, 32
SOLVER = bl.HeavyBall(step_size=0.05, momentum=0.9, steps=30)
FIRST_UNSEEN = 1_000_000
"""Seeds of initial weights from here on are not used by any outer step."""
SCALES = (0.3, 1.0, 3.0, 10.0)
Params = dict[str, Tensor]


def initial_weights(features: int, seed: int) -> Params:
    """Return the Gaussian start of the network."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(features, HIDDEN, generator=generator, dtype=torch.float64) / features**0.5
    last = torch.randn(HIDDEN, CLASSES, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    return {"hidden": hidden, "bias": hidden.new_zeros(HIDDEN), "last": last}


def predict(params: Params, images: Tensor) -> Tensor:
    """Return the logits of some images, (images, classes)."""
    return torch.tanh(images @ params["hidden"] + params["bias"]) @ params["last"]


class Distillation(bl.BilevelProblem):
    """Train on ten images, judge on real ones; the start of the training changes from outer step to outer step."""

    def __init__(self, X: Tensor, y: Tensor) -> None:
        labels = torch.arange(CLASSES)
        super().__init__(
            # Gradient descent moves by its own step size times the gradient; the tuned one scales the loss.
            inner_loss=lambda params, u: u["log_scale"].exp() * cross_entropy(predict(params, u["images"]), labels),
            outer_loss=lambda params, u: cross_entropy(predict(params, X), y),
            params=initial_weights(X.shape[1], 0),
        )

    def on_outer_step(self, index: int) -> bl.BilevelProblem:
        """Return the problem whose network starts at the weights of this seed."""
        view = copy.copy(self)
        view.params = initial_weights(len(self.params["hidden"]), index)
        return view


def digits(seed: int) -> data.Dataset:
    """Return 8 x 8 digits with pixels from 0 to 1."""
    found = data.load("digits", seed=seed, validation=0.05, test=0.45, standardize=False)
    return replace(found, X_train=found.X_train / 16, X_test=found.X_test / 16)


def distil(problem: Distillation, steps: int, seed: int) -> dict[str, Tensor]:
    """Return ten learned images and the logarithm of their step size's scale."""
    noise = torch.rand(CLASSES, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = {"images": noise, "log_scale": noise.new_zeros(())}
    outer = bl.OuterOptimizer(
        problem,
        SOLVER,
        bl.FullUnroll(),
        start,
        optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.03),
        scheduler=lambda adam: torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps),
        warm_start=False,
    )
    return outer.run(steps).hparams


def accuracies(problem: Distillation, candidates: Sequence[dict[str, Tensor]], X: Tensor, y: Tensor) -> list[float]:
    """Return the accuracies on (X, y) of networks trained on each candidate, each from its own unseen weights."""
    found = []
    for index, hparams in enumerate(candidates):
        start = initial_weights(X.shape[1], FIRST_UNSEEN + index)
        trained = bl.solution(problem, SOLVER, bl.FullUnroll(), hparams, start)
        found.append(float((predict(trained, X).argmax(1) == y).double().mean()))
    return found


def real_images(found: data.Dataset, seed: int, scale: float) -> dict[str, Tensor]:
    """Return a random training image of each digit, in the form of what `distil` learns."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.nonzero(found.y_train == digit)[:, 0] for digit in range(CLASSES)]
    chosen = torch.stack([each[torch.randint(len(each), (), generator=generator)] for each in rows])
    images = found.X_train[chosen]
    return {"images": images, "log_scale": images.new_tensor(scale).log()}


def draw(learned: Tensor, real: Tensor, titles: Sequence[str], path: Path) -> None:
    """Draw the learned images above real ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, CLASSES, figsize=(10, 2.9))
    for row, images, title in zip(axes, (learned, real), titles, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.reshape(8, 8).numpy(), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
        row[0].set_title(title, loc="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def run(steps: int, seed: int, draws: int, out: Path | None) -> tuple[float, float]:
    """Distil, print and draw; return the mean accuracies with learned and with real images."""
    found = digits(seed)
    problem = Distillation(found.X_train, found.y_train)
    started = time.perf_counter()
    learned = distil(problem, steps, seed)
    seconds = time.perf_counter() - started
    by_learned = accuracies(problem, [learned] * draws, found.X_test, found.y_test)
    by_real = max(
        (
            accuracies(
                problem, [real_images(found, index, scale) for index in range(draws)], found.X_test, found.y_test
            )
            for scale in SCALES
        ),
        key=statistics.mean,
    )
    means = statistics.mean(by_learned), statistics.mean(by_real)
    titles = [
        f"{kind}: test accuracy {mean:.1%} ({min(each):.1%} to {max(each):.1%} over {draws} starts)"
        for kind, mean, each in zip(
            ("ten learned images", "ten real images"), means, (by_learned, by_real), strict=True
        )
    ]
    print(f"{steps} outer steps in {seconds:.0f} s, {len(found.y_train)} training and {len(found.y_test)} test digits")
    print("\n".join(titles))
    if out is not None:
        draw(learned["images"], real_images(found, 0, 1.0)["images"], titles, out)
        print(f"drawn to {out}")
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="outer steps (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the first images (default 0)")
    parser.add_argument("--draws", type=int, default=20, help="starts and sets of real images to judge by (default 20)")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/figures/distillation.png"), help="where the picture goes"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.steps, arguments.seed, arguments.draws, arguments.out)
