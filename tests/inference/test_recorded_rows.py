"""A model recorded for a few of its data is the same model, and its parts cost no recording of all data."""

from __future__ import annotations

import pytest
import torch

from bnn_models import MLP, likelihoods
from inference import KroneckerLaplace
from inference.backend import Run
from inference.data import full_chunks
from inference.hessians import prior_alone
from inference.laplace import mode
from inference.target import compile_target
from tests.cases import CASES, Case


@pytest.mark.parametrize("case", [c for c in CASES if not c.local], ids=lambda c: c.name)
def test_a_target_recorded_at_a_batch_size_is_the_same_target(case: Case) -> None:
    whole = compile_target(case.model(), case.x, case.y)
    part = compile_target(case.model(), case.x, case.y, batch_size=4)
    num = len(case.y)
    assert (whole.recorded_rows, part.recorded_rows) == (num, min(4, num))
    assert part.batch_size is None  # no loader: steps are full unless a backend says otherwise
    theta = 0.3 * torch.randn(whole.dim, generator=torch.Generator().manual_seed(1))
    assert [layer.name for layer in part.layers] == [layer.name for layer in whole.layers]
    torch.testing.assert_close(part.log_density(theta), whole.log_density(theta), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_prior_cut_out_of_the_joint_is_the_prior(case: Case) -> None:
    target = compile_target(case.model(), case.x, case.y)
    thetas = torch.randn(2, target.dim, generator=torch.Generator().manual_seed(2))
    for theta in thetas:
        torch.testing.assert_close(prior_alone(target)(theta), target.log_prior(theta), rtol=1e-12, atol=1e-12)
    if len(target.sites) > 1:
        part = target.restrict(target.sites[0].name, thetas[0])
        alone, theta = prior_alone(part), thetas[1, : part.dim]
        torch.testing.assert_close(alone(theta), part.log_prior(theta), rtol=1e-12, atol=1e-12)


def test_full_chunks_cover_every_row_once() -> None:
    for total, size in ((10, 10), (10, 3), (7, 4), (9, 1)):
        covered = [row for rows, skip in full_chunks(total, size) for row in range(rows.start + skip, rows.stop)]
        assert covered == list(range(total))
        assert all(rows.stop - rows.start == size for rows, _ in full_chunks(total, size))


@pytest.mark.parametrize("rows", [64, 100, 150])
def test_an_energy_in_chunks_is_the_whole_one_and_records_one_graph(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, model = torch.randn(150, 3, generator=generator), MLP([3, 5, 1], likelihood=likelihoods.Normal(0.3))
    y = x.sum(1).sin() + 0.3 * torch.randn(150, generator=generator)
    theta_of = compile_target(model, x, y)
    theta = 0.3 * torch.randn(theta_of.dim, generator=torch.Generator().manual_seed(3))
    expected = mode.energy_of(theta_of, Run(KroneckerLaplace(), theta_of, 0, None))(theta)
    target = compile_target(model, x, y, batch_size=rows)
    monkeypatch.setattr(mode, "CHUNK_BYTES", 3 * mode.floats_per_datum(target, 0) * 8 * 120)
    found = mode.energy_of(target, Run(KroneckerLaplace(), target, 0, None))(theta)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    # A recorded size that fits is used again; chunks are never of two shapes.
    assert sum(key[0] == "joint" for key in target.programs.cache) == (1 if rows <= 120 else 2)
