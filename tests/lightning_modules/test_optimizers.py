"""ConvMuon: equal to torch's Muon on matrices and torch's SGD on all other parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_modules.optimizers import ConvMuon, orthogonalize


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 3), nn.Flatten(), nn.Linear(256, 5),
    )  # fmt: skip


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.fixture
def model() -> nn.Sequential:
    return network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.mark.parametrize("shape", [(3, 16, 72), (2, 72, 16), (1, 8, 8)])
def test_singular_values_become_about_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape
    assert values.min() > 0.3
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert (
        (found * (left @ right)).sum((1, 2)) / found.norm(dim=(1, 2)) / (left @ right).norm(dim=(1, 2))
    ).min() > 0.95


def test_it_is_torchs_muon_and_torchs_sgd(model: nn.Sequential) -> None:
    other = copy.deepcopy(model)
    hidden = [p for p in other.parameters() if p.ndim == 4 and p.shape[1] > 3]
    rest = [p for p in other.parameters() if not any(p is h for h in hidden)]
    matrices = [nn.Parameter(p.detach().reshape(len(p), -1).clone()) for p in hidden]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.9, weight_decay=0.1)
    sgd = torch.optim.SGD(rest, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    ours = ConvMuon(model.parameters(), lr=0.02)
    for step in range(5):
        gradients(model, step)
        gradients(other, step)
        for matrix, p in zip(matrices, hidden, strict=True):
            assert p.grad is not None
            matrix.grad = p.grad.reshape(len(p), -1).clone()
        ours.step()
        muon.step()
        sgd.step()
    found = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 3]
    assert len(found) == 3
    for p, matrix in zip(found, matrices, strict=True):
        # Torch iterates in bfloat16.
        assert (p.reshape(len(p), -1) - matrix).abs().max() < 0.03 * 5 * 0.02
    others = [p for p in model.parameters() if not any(p is h for h in found)]
    for p, q in zip(others, rest, strict=True):
        torch.testing.assert_close(p, q)


def test_groups_keep_what_they_say_and_a_state_goes_on_exactly(model: nn.Sequential) -> None:
    groups = [
        {"params": [*model[0].parameters(), *model[3].parameters()], "lr_scale": 0.5},
        {"params": model[8].parameters()},
    ]
    optimizer = ConvMuon(groups)
    assert [(g["use_muon"], g["lr"], g.get("lr_scale")) for g in optimizer.param_groups] == [
        (True, 0.02, 0.5), (False, 0.05, 0.5), (False, 0.05, None),
    ]  # fmt: skip
    gradients(model, 0)
    optimizer.step()
    again = copy.deepcopy(model)
    resumed = ConvMuon(
        [
            {"params": [*again[0].parameters(), *again[3].parameters()], "lr_scale": 0.5},
            {"params": again[8].parameters()},
        ]
    )
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for chosen, stepped in ((model, optimizer), (again, resumed)):
        gradients(chosen, 1)
        stepped.step()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_bad_numbers() -> None:
    weight = [nn.Parameter(torch.zeros(4, 4, 3, 3))]
    with pytest.raises(ValueError, match="lr: expected 0 or more, found -1"):
        ConvMuon(weight, lr=-1)
    with pytest.raises(ValueError, match=r"sgd_momentum: expected 0 or more, below 1, found 1.5"):
        ConvMuon(weight, sgd_momentum=1.5)
    with pytest.raises(ValueError, match="expected weights of convolutions"):
        ConvMuon(nn.Linear(3, 3).parameters())
