"""Newton's method on attention: the input of an attention block from its output, its weights known.

Deng, Song, Xie and Yang 2023, https://arxiv.org/abs/2310.12462. The loss is the paper's, ``|F(X) - B|^2 + gamma |X|^2``
with ``F = softmax(X W X^T) X V`` and W = Q K^T (K Q^T in the paper's letters, whose X has tokens as columns).
Departs from the paper, which has no experiments, in four ways: blocks may have several heads, a residual branch, scaled
scores, LayerNorm, biases, and an affine embedding before them; gamma is 0 unless said, since it moves the minimum away
from the input; the Hessian is Gauss and Newton's ``J^T J``, which at zero residual is the Hessian; and each step is
damped, d = -(J^T J + gamma + damping)^-1 (J^T r + gamma x), where the paper counts on a start close enough for
whole steps. The damping falls with the residual, so that convergence stays quadratic (Fan and Yuan 2005,
https://doi.org/10.1007/s00607-004-0083-1, who scale it by |r|).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedtap.attackers.activations.block import (
    AttentionBlock,
    BlockInput,
    BlockOutput,
    Dense,
    Products,
    begun,
    float64_problem,
    lowest,
)
from fedtap.attackers.parts.checks import check_fields
from fedtap.simulator.attack import Attack, Inputs
from fedtap.simulator.leaks import AttentionLeak, Leak

_FIRST, _FALL, _RISE, _MOST = 0.1, 0.1, 4.0, 1e8
"""First damping, in units of the curvature along the gradient; its factor after a step that is kept, and after one
that is not; and the damping at which an element ends."""

ENTRIES = 2**24
"""Entries of the Jacobians in memory at once: 128 MiB of float64."""

DENSE = 1536
"""Unknowns up to which a step is solved by Cholesky's factors; more, by conjugate gradients in products with J."""

_TINY = 1e-300

_CONVERGED, _ROUNDING = 1e-12, 1e-13
"""An element has converged where the norm of the residual is the first share of the output's, or where a step with
almost no damping predicts a fall of the loss by the second share of it."""


@dataclass(frozen=True)
class AttentionNewton(Attack[Inputs]):
    """Damped Gauss-Newton steps with the Jacobian in closed form; the start of lowest loss is kept."""

    leaks = (AttentionLeak,)
    reconstructs = Inputs

    steps: int = 150
    """Newton steps, at most; a start that has converged takes no more."""
    gamma: float = 0.0
    """Weight of ``|X|^2``; the paper's gamma."""
    damped: bool = True
    """Whether steps are damped; False takes whole Gauss-Newton steps, even where they raise the loss."""
    restarts: int = 1
    """Starting points of each victim."""

    @classmethod
    def suits(cls, leak: Leak) -> bool:
        """Any attention block's output."""
        return isinstance(leak, AttentionLeak)

    def __post_init__(self) -> None:
        check_fields(self, steps=1, restarts=1)

    @property
    def starts(self) -> int:
        """The restarts."""
        return self.restarts

    def begin(self, leak: Leak, seed: int) -> Tensor:
        return begun(leak, seed)

    def reconstruct(self, leak: Leak, start: Tensor) -> Inputs:
        block, target, x = float64_problem(leak, start, self.starts)
        dense = x[0].numel() <= DENSE
        # a dense Jacobian has outputs x inputs entries for each element
        at_once = max(1, ENTRIES // (target[0].numel() * x[0].numel())) if dense else 1
        parts = zip(target.split(at_once), x.split(at_once), strict=True)  # type: ignore[no-untyped-call]
        found = [self._lowered(block, *some, Dense if dense else Products) for some in parts]
        return lowest(self.starts, *(torch.cat(each) for each in zip(*found, strict=True)))

    def _lowered(
        self,
        block: AttentionBlock,
        target: Float[Tensor, "elements n m"],
        x: BlockInput,
        jacobian: type[Dense | Products],
    ) -> tuple[BlockInput, Float[Tensor, "elements"], Int[Tensor, "elements"], Bool[Tensor, "elements"]]:
        """Input, loss, steps and whether it converged, of each element."""
        x, elements, size = x.clone(), len(x), target.flatten(1).norm(dim=1)
        damping, loss = x.new_full((elements,), _FIRST), self._loss(block(x), target, x)
        steps = torch.zeros(elements, dtype=torch.long, device=x.device)
        converged, going = torch.zeros_like(steps, dtype=torch.bool), torch.arange(elements, device=x.device)
        for _ in range(self.steps):
            here, wanted = x[going], target[going]
            here_linear = jacobian(block, here)
            # r = F(X) - B
            r, flat = (here_linear.out - wanted).flatten(1), here.flatten(1)
            down = -(here_linear.transposed_times(r) + self.gamma * flat)  # -(J^T r + gamma x)
            far = r.norm(dim=1) / size[going]
            # lambda |r| / |B| (g'J'J g / g'g): curvature along the gradient g, falling with the residual
            added = (
                damping[going] * far * here_linear.times(down).square().sum(1) / down.square().sum(1).clamp_min(_TINY)
            )
            # d = (J'J + gamma + damping)^-1 (-(J'r + gamma x))
            move = here_linear.solve(down, self.gamma + (added if self.damped else 0 * added))
            there = here + move.reshape(here.shape)
            # where H d = down, the quadratic model of the loss falls by d'down
            gain, whole = (move * down).sum(1), damping[going] * far <= _FIRST
            after = self._loss(block(there), wanted, there)
            # NaN is not below, so a step to a non-finite loss is refused
            kept = after < loss[going] if self.damped else after.isfinite()
            x[going], loss[going] = torch.where(kept[:, None, None], there, here), torch.where(kept, after, loss[going])
            steps[going] += 1
            met = (far <= _CONVERGED) | (whole & (gain <= _ROUNDING * loss[going]))
            damping[going] *= torch.where(kept, _FALL, _RISE if self.damped else torch.inf)
            converged[going[met]] = True
            going = going[~met & (damping[going] < _MOST)]
            if not len(going):
                break
        return x, loss, steps, converged

    def _loss(self, out: BlockOutput, target: BlockOutput, x: BlockInput) -> Float[Tensor, "elements"]:
        """``|F(X) - B|^2 + gamma |X|^2``."""
        return (out - target).flatten(1).square().sum(1) + self.gamma * x.flatten(1).square().sum(1)
