"""Effective weights and gradients by hand, in numbers that are exact: every ring gives these bits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritonsparse.kernels.weight.forward import threshold_cast
from tritonsparse.kernels.weight.view import View

from .matrices import same

INF, NAN = float("inf"), float("nan")
Rows = list[list[float]]


class Exact(NamedTuple):
    """A case by hand whose every number is exact: all rings must give these bits."""

    weight: Rows
    view: View
    w_hat: Rows
    grad: Rows | None = None
    grad_weight: Rows | None = None
    grad_threshold: list[float] | None = None


def _soft(*logits: float, **rest: Tensor) -> View:
    return View("soft", torch.tensor(logits), **rest)


# sigmoid(0) = 1/2 and sigmoid'(0) = 1/4. 0.5 is a tie, hence pruned.
HAND, G = [[0.75, -0.25, 0.0], [-1.0, 0.5, 0.25]], [[8.0, 4.0, 2.0], [16.0, 64.0, 32.0]]
HAND_HAT = [[0.25, 0.0, 0.0], [-0.5, 0.0, 0.0]]
# Outside B: (0, 0), which is kept and so counts as inside, and (1, 2).
B = torch.tensor([[False, True, True], [True, True, False]])
KEPT, KEPT_B = torch.tensor([[True, False, True], [False, False, True]]), torch.tensor([[False, True, False]] * 2)
HALF, ONE, ZERO = torch.tensor(0.5), torch.tensor(1.0), torch.zeros(1)

EXACT = {
    # m = [[1, 1/2, 0], [1, 1/2, 1/2]]: 0 where W = 0. sign(W) dW sums to 8 - 2 = 6 and -16 + 32 + 16 = 32.
    "alpha, one threshold": Exact(
        HAND, _soft(0.0, alpha=HALF), HAND_HAT, G, [[8.0, 2.0, 0.0], [16.0, 32.0, 16.0]], [-38 / 4]
    ),
    "alpha, B": Exact(
        HAND, _soft(0.0, 0.0, alpha=HALF, grad_mask=B), HAND_HAT, G,
        [[8.0, 2.0, 0.0], [16.0, 32.0, 0.0]], [-6 / 4, -16 / 4],
    ),
    "no alpha": Exact(HAND, _soft(0.0, 0.0), HAND_HAT, G, [[8.0, 0.0, 0.0], [16.0, 0.0, 0.0]], [-8 / 4, 16 / 4]),
    # W = 0 at (0, 2) is kept and gets its gradient: for a mask, zero is a value like any other.
    "mask, alpha, B": Exact(
        HAND, View("mask", None, KEPT, KEPT_B, HALF), [[0.75, 0.0, 0.0], [0.0, 0.0, 0.25]], G,
        [[8.0, 2.0, 2.0], [0.0, 32.0, 32.0]],
    ),
    # Kept; pruned in B; pruned outside B; a pruned zero in B: unlike soft, its sign plays no part.
    "hard, alpha, B": Exact(
        [[0.75, -0.5, 0.25, 0.0]],
        View("hard", torch.tensor([0.5]), None, torch.tensor([[False, True, False, True]]), HALF),
        [[0.75, 0.0, 0.0, 0.0]], [[2.0, 4.0, 8.0, 16.0]], [[2.0, 2.0, 0.0, 8.0]], [0.0],
    ),
    # A negative cut-off keeps even a zero.
    "hard, one a row": Exact(
        [[0.75, -0.5, 0.25], [-1.0, 0.0, NAN]], View("hard", torch.tensor([0.5, -0.125])),
        [[0.75, 0.0, 0.0], [-1.0, 0.0, NAN]],
    ),
    # q = |W| - 1/2:   1/4    -1/8      5/8     -1/2    3/2
    # H(q):            1      3/2       0.4      0.4    0          m = kept + |W| H; W H(q) G of the last two is 0
    "step": Exact(
        [[0.75, -0.375, 0.0, -2.0]], View("step", torch.tensor([0.5])), [[0.75, 0.0, 0.0, -2.0]],
        [[4.0, 64.0, 8.0, 16.0]], [[7.0, 36.0, 0.0, 16.0]], [-(0.75 * 4 - 0.5625 * 64)],
    ),
    # q = 1, where H is 0.4 still, and the next number.
    "step, the end of its reach": Exact(
        [[1.5, 1.5 + 2**-23]], View("step", torch.tensor([0.5])), [[1.5, 1.5 + 2**-23]],
        [[32.0, 32.0]], [[51.2, 32.0]], [-19.2],
    ),
    # Kept and pruned weights that H does not reach.
    "step, NaN and infinity": Exact(
        [[INF, NAN, 3.0], [0.5, -0.5, 0.0]], View("step", torch.tensor([0.5, 2.0])),
        [[INF, NAN, 3.0], [0.0, 0.0, 0.0]], [[2.0, 4.0, NAN], [NAN, INF, 1.0]],
        [[2.0, 4.0, NAN], [0.0, 0.0, 0.0]], [0.0, 0.0],
    ),
    # Bits of W where T = 0, but -0 becomes +0. 1e-40 is a denormal.
    "soft, T = 0": Exact(
        [[1e-40, -1e-40, 0.0, -0.0, INF, -INF]], _soft(-INF), [[1e-40, -1e-40, 0.0, 0.0, INF, -INF]],
    ),
    "pruned is +0": Exact([[-0.25, -0.0, 0.25, -0.5, 0.5]], _soft(0.0), [[0.0] * 5]),
    # The neighbours of 1/2, which leave a difference of one unit in the last place.
    "soft, NaN and infinity": Exact(
        [[NAN, INF, -INF, 0.5 + 2**-24, -0.5 - 2**-24]], _soft(0.0, alpha=HALF),
        [[NAN, INF, -INF, 2**-24, -(2**-24)]], [[1.0, 2.0, 4.0, 8.0, 16.0]], [[1.0, 2.0, 4.0, 8.0, 16.0]],
        [-(2.0 - 4.0 + 8.0 - 16.0) / 4],
    ),
    "mask over NaN and infinity": Exact(
        [[1.0, NAN, -3.0], [INF, 5.0, -INF]],
        View("mask", mask=torch.tensor([[True, False, True], [False, True, False]])),
        [[1.0, 0.0, -3.0], [0.0, 5.0, 0.0]], [[1.0, NAN, 2.0], [INF, 4.0, -INF]], [[1.0, 0.0, 2.0], [0.0, 4.0, 0.0]],
    ),
    # Kept; pruned inside B; pruned outside B; W = 0.
    "no gradient due": Exact(
        [[1.0, -0.25, 0.25, 0.0]], _soft(0.0, alpha=HALF, grad_mask=torch.tensor([[False, True, False, True]])),
        [[0.5, 0.0, 0.0, 0.0]], [[2.0, 4.0, NAN, INF]], [[2.0, 2.0, 0.0, 0.0]], [0.0],
    ),
    "alpha 0, NaN in the gradient": Exact(
        [[1.0, 0.25, 0.0]], _soft(0.0, alpha=ZERO), [[0.5, 0.0, 0.0]], [[2.0, NAN, INF]], [[2.0, 0.0, 0.0]], [-2 / 4]
    ),
    "a NaN that is due": Exact(
        [[1.0, 0.25]], _soft(0.0, alpha=HALF), [[0.5, 0.0]], [[NAN, NAN]], [[NAN, NAN]], [NAN]
    ),
    "s = -infinity": Exact([[1.0, -2.0]], _soft(-INF), [[1.0, -2.0]], [[INF, 1.0]], [[INF, 1.0]], [0.0]),
    "s = infinity": Exact([[1.0, -2.0]], _soft(INF), [[0.0, -1.0]], [[INF, 1.0]], [[0.0, 1.0]], [0.0]),
}  # fmt: skip


def check_untouched(dtype: torch.dtype, backend: str) -> None:
    """A threshold of zero returns the weight bit for bit, but for -0."""
    weight, tiny = torch.randn(70, 70).to(dtype), torch.finfo(dtype).smallest_normal / 4
    weight[0, :6] = torch.tensor([tiny, -tiny, 0.0, -0.0, INF, -INF], dtype=dtype)
    assert same(threshold_cast(weight, _soft(-INF), backend=backend), weight + 0.0)


def check_exact(case: Exact, cast: Callable[..., Tensor], backward: Callable[..., Any], device: str = "cpu") -> None:
    """`cast(weight, view)` and `backward(grad, weight, view)` give the bits that were found by hand."""

    def tensor(rows: Rows | list[float]) -> Tensor:
        return torch.tensor(rows, device=device)

    weight, view = tensor(case.weight), View(*(t.to(device) if isinstance(t, Tensor) else t for t in case.view))
    assert same(cast(weight, view), tensor(case.w_hat))
    if case.grad is not None and case.grad_weight is not None:
        grad_weight, of_threshold = backward(tensor(case.grad), weight, view)
        assert same(grad_weight, tensor(case.grad_weight))
        expected = None if case.grad_threshold is None else tensor(case.grad_threshold)
        torch.testing.assert_close(of_threshold, expected, rtol=0, atol=0, equal_nan=True)
