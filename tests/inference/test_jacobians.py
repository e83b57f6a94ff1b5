"""Function covariances contracted from layer inputs and output gradients equal those of the Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference.distributions import DenseGaussian, DiagonalGaussian, FlatGaussian, KroneckerGaussian, LowRankGaussian
from inference.jacobians import entries_jacobian, eta_and_jacobian, linearized_joint, linearized_moments
from inference.kronecker_gaussian import KroneckerBlock
from inference.taps import taps_for
from inference.target import Target
from tests.networks import NAMES, network

EXACT = {"rtol": 1e-9, "atol": 1e-9}
STRUCTURES = ["diagonal", "kronecker", "low_rank", "dense"]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _block(positions: Tensor, identity: bool) -> KroneckerBlock:
    out, columns = positions.shape
    variance = _random(out, columns).exp()
    if identity:  # inputs of an embedding are not rotated
        return KroneckerBlock(
            positions, variance, torch.linalg.qr(_random(out, out)).Q, in_scale=_random(columns).exp()
        )
    vectors = [torch.linalg.qr(_random(size, size)).Q for size in (out, columns)]
    return KroneckerBlock(positions, variance, *vectors, _random(out).exp(), _random(columns).exp())


def gaussian(structure: str, target: Target, theta: Tensor) -> FlatGaussian:
    size = target.dim
    if structure == "diagonal":
        return DiagonalGaussian(theta, _random(size).exp())
    if structure == "low_rank":
        return LowRankGaussian(theta, _random(size).exp(), _random(size, 3))
    if structure == "dense":
        root = _random(size, size)
        return DenseGaussian.from_precision(theta, root @ root.mT / size + torch.eye(size))
    taps = taps_for(target, theta, target.x)
    blocks = [_block(b.positions, b.kind == "embedding") for b in taps.blocks]
    rest = [KroneckerBlock(taps.rest[:, None], _random(len(taps.rest), 1).exp())] if len(taps.rest) else []
    return KroneckerGaussian(theta, (*blocks, *rest))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_moments_are_those_of_the_jacobian(name: str, structure: str) -> None:
    target, theta = network(name)
    held = gaussian(structure, target, theta)
    eta, jacobian = eta_and_jacobian(target, theta, target.x)
    mean, covariance = linearized_moments(target, held, theta, target.x)
    torch.testing.assert_close(mean, eta, **EXACT)
    torch.testing.assert_close(covariance, jacobian @ held.covariance() @ jacobian.mT, **EXACT)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ["by_hand", "learnt_noise", "lenet", "resnet", "encoder", "shared_weight"])
def test_joint_covariances_are_those_of_the_jacobian(name: str, structure: str) -> None:
    target, theta = network(name)
    held = gaussian(structure, target, theta)
    eta, jacobian = eta_and_jacobian(target, theta, target.x)
    flat = jacobian.flatten(0, 1)
    mean, covariance = linearized_joint(target, held, theta, target.x)
    torch.testing.assert_close(mean, eta, **EXACT)
    torch.testing.assert_close(covariance.reshape(len(flat), -1), flat @ held.covariance() @ flat.mT, **EXACT)


@pytest.mark.parametrize("name", ["lenet", "encoder"])
def test_chunking_changes_no_moment(name: str) -> None:
    target, theta = network(name)
    held = gaussian("kronecker", target, theta)
    whole = linearized_moments(target, held, theta, target.x)
    pieces = linearized_moments(target, held, theta, target.x, chunk_bytes=1)
    torch.testing.assert_close(pieces, whole, **EXACT)


@pytest.mark.parametrize("pattern", ["6.*", "3.*", "0.weight"])
def test_a_dense_covariance_of_one_layer_is_contracted_with_its_inputs(pattern: str) -> None:
    full, theta = network("lenet")
    target = full.restrict(pattern, theta)
    point = target.reduce(theta)
    held = gaussian("dense", target, point)
    _, jacobian = eta_and_jacobian(target, point, target.x)
    covariance = linearized_moments(target, held, point, target.x)[1]
    torch.testing.assert_close(covariance, jacobian @ held.covariance() @ jacobian.mT, **EXACT)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "dense"])
def test_gradients_with_respect_to_the_inputs_are_those_of_finite_differences(structure: str) -> None:
    target, theta = network("by_hand")
    held = gaussian(structure, target, theta)
    x = target.x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: linearized_moments(target, held, theta, v)[1], x)


def test_moments_inside_a_transform_of_torch_func_are_the_same() -> None:
    target, theta = network("by_hand")
    held = gaussian("kronecker", target, theta)

    def variance(x: Tensor) -> Tensor:
        return linearized_moments(target, held, theta, x)[1].sum()

    x = target.x[:2].clone().requires_grad_()
    (expected,) = torch.autograd.grad(variance(x), x)
    torch.testing.assert_close(torch.func.grad(variance)(target.x[:2]), expected, **EXACT)


@pytest.mark.parametrize("num", [3, 30])  # forward mode, reverse mode
def test_jacobians_of_some_entries_are_columns_of_the_whole(num: int) -> None:
    target, theta = network("resnet")
    entries = torch.arange(0, target.dim, target.dim // num)[:num]
    _, jacobian = eta_and_jacobian(target, theta, target.x)
    torch.testing.assert_close(entries_jacobian(target, theta, target.x, entries), jacobian[..., entries], **EXACT)
