"""The batched L-BFGS against scipy's, and each element against itself alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fedtap.attackers.gradients import lbfgs
from fedtap.attackers.gradients.lbfgs import minimise
from tests.support.tape import tape


def rosenbrock(points: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    points = points.detach().requires_grad_()
    here, after = points[:, :-1], points[:, 1:]
    value = (100 * (after - here.square()).square() + (1 - here).square()).sum(1)
    (slope,) = torch.autograd.grad(value.sum(), points)
    return value.detach(), slope


SCALES = torch.logspace(0, 3, 20, dtype=torch.float64) * torch.arange(1.0, 4.0, dtype=torch.float64)[:, None]


def bowl(points: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """A quadratic of its own for each element."""
    scales = SCALES[elements]
    return (scales * points.square()).sum(1) / 2, scales * points


def starts(elements: int, size: int) -> Tensor:
    return torch.randn(elements, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("history", [5, 10])
def test_each_lane_ends_where_scipy_ends(history: int) -> None:
    start = starts(4, 10)
    _, values = minimise(rosenbrock, start, 300, history=history)

    def alone(point: object) -> tuple[float, object]:
        value, slope = rosenbrock(torch.as_tensor(point)[None], torch.zeros(1, dtype=torch.long))
        return float(value), slope[0].numpy()

    for element in range(4):
        theirs = minimize(alone, start[element].numpy(), jac=True, method="L-BFGS-B", options={"maxcor": history})
        assert float(values[element]) < theirs.fun + 1e-6  # both are at a minimum, this one to more digits
        assert theirs.fun < 1e-6 or abs(theirs.fun - float(values[element])) < 1e-6


def test_quadratics_take_about_as_many_evaluations_as_scipys() -> None:
    start = starts(3, 20)
    for element in range(3):
        pick = torch.tensor([element])

        def alone(point: object, pick: Tensor = pick) -> tuple[float, object]:
            value, slope = bowl(torch.as_tensor(point)[None], pick)
            return float(value), slope[0].numpy()

        options = {"maxcor": 20, "ftol": 0, "gtol": 1e-6, "maxiter": 500}
        theirs = minimize(alone, start[element].numpy(), jac=True, method="L-BFGS-B", options=options)
        _, values = minimise(bowl, start, int(1.5 * theirs.nfev), history=20)
        assert float(values[element]) < 1e-8


def test_a_lane_does_not_feel_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    start = starts(5, 6)
    together, _ = minimise(rosenbrock, start, 30, history=8)
    for element in range(5):
        alone, _ = minimise(rosenbrock, start[element : element + 1], 30, history=8)
        torch.testing.assert_close(alone[0], together[element], rtol=1e-6, atol=1e-8)
    monkeypatch.setattr(lbfgs, "CPU_BLOCK", 2)
    apart, _ = minimise(rosenbrock, start, 30, history=8)
    torch.testing.assert_close(apart, together, rtol=1e-6, atol=1e-8)


def test_values_never_rise_and_are_those_of_the_points() -> None:
    start = starts(4, 8)
    last = rosenbrock(start, torch.arange(4))[0]
    for steps in (2, 5, 11, 30):
        points, values = minimise(rosenbrock, start, steps)
        assert bool((values <= last).all())
        torch.testing.assert_close(values, rosenbrock(points, torch.arange(4))[0])
        last = values


def test_elements_that_are_done_cost_nothing() -> None:
    asked: list[int] = []

    def counted(points: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(points))
        value, slope = bowl(points, elements)
        return value * torch.where(elements == 0, 1e-3, 1.0), slope * torch.where(elements == 0, 1e-3, 1.0)[:, None]

    minimise(counted, starts(3, 20), 60, tolerance=1e-3)
    assert asked[0] == 3
    assert sorted(asked, reverse=True) == asked
    assert sum(asked) < 3 * 60
    asked.clear()
    low = float(counted(starts(1, 20), torch.tensor([0]))[0])
    minimise(counted, starts(1, 20), 60, tolerance=low)  # no higher than the tolerance from the beginning
    assert asked == [1, 1]


def test_a_wall_of_nan_is_backed_away_from() -> None:
    def walled(points: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = bowl(points, elements)
        return torch.where(points.abs().amax(1) > 3, torch.nan, value), slope

    _, values = minimise(walled, starts(3, 20).clamp(-2.9, 2.9), 200)
    assert float(values.max()) < 1e-6
    _, values = minimise(walled, starts(3, 20) + 10, 20)
    assert bool(values.isnan().all())


def test_a_direction_is_that_of_the_inverse_hessian_written_out() -> None:
    """The textbook's matrix, built of each element's last pairs; those of no positive curvature teach nothing."""
    elements, size, history = 3, 6, 4
    draw = torch.Generator().manual_seed(1)
    memory = lbfgs._Memory(torch.zeros(elements, size, dtype=torch.float64), history)
    pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(elements)]
    slope = torch.randn(elements, size, dtype=torch.float64, generator=draw)
    bends = torch.rand(12, elements, 1, dtype=torch.float64, generator=draw) * 2 - 0.4
    bends[0], bends[5, 0] = 1.0, 0.0  # flat: the slope stays as it is
    for number, bend in enumerate(bends):
        accept = torch.tensor([True, True, number % 3 != 1])
        s = torch.randn(elements, size, dtype=torch.float64, generator=draw)
        turned = bend * s + 0.1 * bend * torch.randn(elements, size, dtype=torch.float64, generator=draw)
        after = torch.where(accept[:, None], slope + turned, slope)
        found = memory.direction(accept, s, slope, after)
        for element in accept.nonzero().flatten().tolist():
            y = after[element] - slope[element]
            if float(s[element] @ y) > 0:
                pairs[element] = [*pairs[element], (s[element], y)][-history:]
            last_s, last_y = pairs[element][-1]
            inverse = (last_s @ last_y) / (last_y @ last_y) * torch.eye(size, dtype=torch.float64)
            for one, change in pairs[element]:
                turn = torch.eye(size, dtype=torch.float64) - torch.outer(one, change) / (one @ change)
                inverse = turn @ inverse @ turn.T + torch.outer(one, one) / (one @ change)
            assert torch.allclose(found[element], -inverse @ after[element], rtol=1e-6, atol=1e-8)
        slope = after
    assert all(len(each) == history for each in pairs)


def test_an_element_that_has_ended_stays_where_it_is_in_a_captured_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU none leaves a small batch, and a look at who still runs comes every ten steps."""
    start = starts(3, 20)
    tolerance = 0.5
    alone, least = minimise(bowl, start, 60, tolerance=tolerance)
    assert bool((least <= tolerance).all())
    monkeypatch.setattr(lbfgs, "capture_on", lambda device: tape)
    together, values = minimise(bowl, start, 60, tolerance=tolerance)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values, least, rtol=1e-9, atol=1e-12)


def test_a_memory_that_was_forgotten_is_as_a_new_one() -> None:
    draw = torch.Generator().manual_seed(0)
    scales, history = torch.logspace(0, 2, 12, dtype=torch.float64), 4
    points = [torch.randn(2, 12, dtype=torch.float64, generator=draw) for _ in range(9)]
    everyone = torch.tensor([True, True])

    def fed(memory: lbfgs._Memory, some: list[Tensor]) -> Tensor:
        move = torch.zeros(2, 12, dtype=torch.float64)
        for before, after in itertools.pairwise(some):
            move = memory.direction(everyone, after - before, scales * before, scales * after)
        return move

    forgetful, steady, new = (lbfgs._Memory(points[0], history) for _ in range(3))
    for memory in (forgetful, steady):
        fed(memory, points[:6])
    forgetful.forget(torch.tensor([True, False]))
    for some in (points[5:7], points[6:9]):  # fewer pairs than it held before, and then more
        moves = [fed(memory, some) for memory in (forgetful, steady, new)]
        torch.testing.assert_close(moves[0][0], moves[2][0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moves[0][1], moves[1][1], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(moves[0][0], moves[1][0], rtol=1e-3)
