"""Losses of many batches at once are those of each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from fedmpi import random
from fedmpi.tasks.dataset import IGNORE
from fedmpi.tasks.objectives import OBJECTIVES

FASTER = {name: row for name, row in OBJECTIVES.items() if row.each is not None}


def test_some_are_faster() -> None:
    assert "cross_entropy" in FASTER


@pytest.mark.parametrize("name", FASTER)
@given(
    batches=st.integers(1, 5),
    samples=st.integers(1, 7),
    classes=st.integers(2, 6),
    seed=st.integers(0, 99),
    ignored=st.floats(0, 0.9),
)
@settings(max_examples=40, deadline=None)
def test_each_batch_has_its_loss_and_gradient(
    name: str, batches: int, samples: int, classes: int, seed: int, ignored: float
) -> None:
    shape, row = (batches, samples), OBJECTIVES[name]
    logits = 3 * random.normal(random.key(seed, stream="logits"), batches * samples * classes)
    y_CB = random.integers(random.key(seed, stream="y"), batches * samples, classes).view(shape)
    left_out = random.uniform(random.key(seed, stream="out"), batches * samples).view(shape) < ignored
    left_out[:, 0] = False  # the mean of nothing is no number, either way
    y_CB[left_out] = IGNORE
    found = []
    for losses in (row.losses, vmap(row.loss)):
        logits_CBK = logits.view(*shape, classes).clone().requires_grad_()
        loss_C = losses(logits_CBK, y_CB)
        loss_C.sum().backward()
        found.append((loss_C.detach(), logits_CBK.grad))
    torch.testing.assert_close(found[0], found[1])
