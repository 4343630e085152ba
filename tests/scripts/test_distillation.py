"""The distillation script: its hypergradient is right, and a few outer steps already beat real images."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import STUDIES

import bilevel as bl


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDIES))
        return importlib.import_module("distillation")


def test_the_hypergradient_by_images_is_that_of_plain_autograd_through_the_training(script: Any) -> None:
    found = script.digits(0)
    problem = script.Distillation(found.X_train[:50], found.y_train[:50]).on_outer_step(3)
    hparams = script.real_images(found, 0, 2.0)
    solver = bl.HeavyBall(step_size=0.05, momentum=0.9, steps=6)
    got = bl.hypergradient(problem, solver, bl.FullUnroll(), hparams).hypergradient

    images = hparams["images"].clone().requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64).log().requires_grad_()
    now = {name: value.clone().requires_grad_() for name, value in problem.params.items()}
    last = now
    for _ in range(6):
        logits = torch.tanh(images @ now["hidden"] + now["bias"]) @ now["last"]
        loss = scale.exp() * -logits.log_softmax(1).diagonal().mean()
        grads = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        moved = {
            name: value - 0.05 * grad + 0.9 * (value - last[name])
            for (name, value), grad in zip(now.items(), grads, strict=True)
        }
        now, last = moved, now
    problem.outer_loss(now, hparams).backward()
    torch.testing.assert_close(got["images"], images.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(got["log_scale"], scale.grad, rtol=1e-10, atol=1e-14)


def test_every_outer_step_has_a_start_of_its_own_that_follows_from_its_index(script: Any) -> None:
    problem = script.Distillation(torch.rand(5, 64, dtype=torch.float64), torch.arange(5))
    first, again, other = (problem.on_outer_step(index).params["hidden"] for index in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert problem.params["hidden"].shape == first.shape == (64, 32)


def test_a_few_steps_beat_real_images_and_are_drawn(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    learned, real = script.run(steps=40, seed=1, draws=2, out=tmp_path / "ten.png")
    assert learned > real
    assert (tmp_path / "ten.png").stat().st_size > 1_000
    assert "ten learned images: test accuracy" in capsys.readouterr().out
