"""The configurations of the fused products, computed and not searched for."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonsparse.kernels import _tiles
from tritonsparse.kernels._tiles import Limits, gemm_tiles, grad_tiles, input_precision, is_aligned

A100, RTX, H200, MI300 = Limits(166_912, 108), Limits(101_376, 128), Limits(232_448, 132), Limits(65_536, 304)
limits = st.sampled_from([A100, RTX, H200, MI300])
sizes = st.sampled_from([1, 7, 64, 1000, 4096, 100_000])


@given(m=sizes, n=sizes, k=sizes, w=st.sampled_from([2, 4]), x=st.sampled_from([2, 4]), masked=st.booleans(),
       precision=st.sampled_from(["ieee", "tf32"]), aligned=st.booleans(), limits=limits)  # fmt: skip
def test_tiles_fit(
    m: int, n: int, k: int, w: int, x: int, masked: bool, precision: str, aligned: bool, limits: Limits
) -> None:
    how: dict[str, Any] = {"precision": precision, "aligned": aligned, "limits": limits}
    tiles = gemm_tiles((m, n, k), weight_bytes=w, x_bytes=x, masked=masked, **how)
    assert all(side == _tiles.power_of_two(side, 16, 256) for side in (tiles.m, tiles.n, tiles.k))
    assert 2 <= tiles.num_stages <= _tiles.MAX_STAGES and 1 <= tiles.splits <= _tiles.MAX_SPLITS
    # What a loop of num_stages holds: all of x's buffers, one fewer of what passes through registers.
    held = tiles.num_stages * tiles.m * tiles.k * x + (tiles.num_stages - 1) * tiles.n * tiles.k * (w + masked)
    assert held <= limits.shared_bytes
    # The rows a tile computes for nothing are fewer than those it is asked for, from 16 on.
    assert tiles.m < 2 * max(m, 8) or tiles.m <= 64
    programs = -(-m // tiles.m) * -(-n // tiles.n) * tiles.splits
    assert tiles.splits == 1 or (programs <= limits.multiprocessors and k >= 4 * tiles.splits * tiles.k)
    of_grad = grad_tiles(n, k, operand_bytes=x, **how)
    assert of_grad.num_stages * of_grad.m * (of_grad.n + of_grad.k) * x <= limits.shared_bytes
    assert of_grad.subtiles in (1, 2, 4, 8) and of_grad.k // of_grad.subtiles % 32 == 0


def test_a_decoding_step_is_spread_over_the_device_and_large_gradients_have_large_tiles() -> None:
    how: dict[str, Any] = {"precision": "ieee", "aligned": True, "limits": H200}
    # 4096 / 64 = 64 tiles of the weight for 132 multiprocessors: two parts of the reduction each.
    tiles = gemm_tiles((1, 4096, 4096), weight_bytes=4, x_bytes=2, masked=False, **how)
    assert (tiles.m, tiles.n, tiles.splits) == (16, 64, 2)
    for n, k, tile in ((4096, 14_336, (128, 256)), (2048, 2048, (128, 128)), (1024, 1024, (64, 128))):
        of_grad = grad_tiles(n, k, operand_bytes=2, **how)
        assert (of_grad.n, of_grad.k) == tile


def test_lines_that_start_on_16_elements_are_aligned_along_either_axis() -> None:
    matrix = torch.zeros(32, 48)
    assert is_aligned(matrix, matrix.T, matrix[::2], matrix[:, 16:40], None)
    assert not is_aligned(matrix, torch.zeros(32, 40))  # lines of 40
    assert not is_aligned(matrix[:, ::2])  # no neighbours
    assert not is_aligned(matrix[:, 1:])  # starts on 4 bytes
    assert not is_aligned(torch.zeros(1).expand(32, 48))


def test_float32_products_are_full_float32_unless_torch_allows_tf32(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("highest")
    assert input_precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert input_precision(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    torch.set_float32_matmul_precision("high")
    assert input_precision(torch.float32) == "tf32"
    # 16 bits are exact either way: one kernel, whatever the setting.
    assert input_precision(torch.bfloat16) == input_precision(torch.float16) == "ieee"
