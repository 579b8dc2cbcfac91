"""Products that threshold or mask the weight on its way."""

from collections.abc import Iterator
from typing import Any

from tritonsparse.kernels import _tiles
from tritonsparse.kernels.fused import gemm, grad

from .case import EVERYWHERE, HOPPER, LIMITS, WIDTH, Case, Constant, case_of


def product_cases() -> Iterator[Case]:
    """The fused products in the configurations that their launchers compute for n results of 4096 columns.

    Those without a bias are compiled as dX and parts of a split product: what follows the loop then decides nothing of
    its registers.
    """
    for rows, n, kind, weight, x, exchanged, contiguous, bias, precision, targets in (
        (512, 4096, "soft", "fp32", "bf16", False, True, True, "ieee", EVERYWHERE),
        (16, 4096, "mask", "bf16", "bf16", False, True, True, "ieee", ("sm_90", "gfx942")),
        (512, 4096, "soft per row", "fp32", "bf16", True, True, True, "ieee", HOPPER),
        (512, 4096, "soft", "fp32", "fp32", False, True, True, "tf32", HOPPER),
        (512, 4096, "soft", "fp32", "fp32", False, True, True, "ieee", HOPPER),
        (512, 4096, "soft", "fp32", "bf16", False, False, True, "ieee", HOPPER),
        (512, 1024, "soft", "fp32", "bf16", True, True, False, "ieee", HOPPER),
        (512, 4096, "mask", "fp32", "bf16", False, True, False, "ieee", HOPPER),
        (64, 1024, "soft", "bf16", "bf16", False, True, False, "ieee", HOPPER),
        (16, 512, "mask", "fp32", "bf16", False, True, False, "ieee", HOPPER),
        (16, 16384, "soft", "bf16", "bf16", False, True, False, "ieee", HOPPER),
        (512, 4096, "soft per row", "fp32", "fp32", False, True, False, "tf32", HOPPER),
    ):
        for target in targets:
            tiles = _tiles.gemm_tiles(
                (rows, n, 4096), weight_bytes=WIDTH[weight], x_bytes=WIDTH[x], masked=kind == "mask",
                precision=precision, aligned=contiguous, limits=LIMITS[target],
            )  # fmt: skip
            matrix = x == "bf16" or precision == "tf32"
            what = f"{rows} rows, {f'{n} results, ' if n != 4096 else ''}{kind}, weight {weight}, x {x} {precision}"
            what += f"{', weight transposed' if exchanged else ''}{'' if contiguous else ', any strides'}"
            values = gemm_values(tiles, kind, weight, x, exchanged, contiguous, precision)
            # As many buffers as stages, but for the one that is in registers. Loads as narrow as single elements of 2
            # bytes are beyond what is copied in the background.
            yield case_of(
                gemm._masked_gemm_kernel, what + ("" if bias else ", no bias"),
                values | ({} if bias else {"bias": None}), tiles.num_warps, 255, num_stages=tiles.num_stages,
                matrix=matrix, left_in_registers=matrix and target == "sm_90",
                buffers=tiles.num_stages - 1 if target == "sm_90" and contiguous else 0, targets=(target,),
            )  # fmt: skip
    for n, kind, weight, x, restricted, contiguous, precision, targets in (
        (4096, "soft", "fp32", "bf16", True, True, "ieee", EVERYWHERE),
        (4096, "soft", "fp32", "bf16", False, True, "ieee", HOPPER),
        (4096, "soft", "bf16", "bf16", True, True, "ieee", HOPPER),
        (4096, "mask", "fp32", "bf16", True, True, "ieee", HOPPER),
        (4096, "soft", "fp32", "fp32", True, True, "tf32", HOPPER),
        (1024, "soft", "fp32", "bf16", True, True, "ieee", HOPPER),
        (512, "soft", "fp32", "bf16", False, True, "ieee", HOPPER),
        (512, "mask", "bf16", "bf16", True, True, "ieee", HOPPER),
        (1024, "soft", "fp32", "bf16", True, False, "ieee", HOPPER),
    ):
        for target in targets:
            grad_tiles = _tiles.grad_tiles(
                n, 4096, operand_bytes=WIDTH[x], precision=precision, aligned=contiguous, limits=LIMITS[target]
            )
            what = f"{n} x 4096, {kind}{', grad_mask' if restricted else ''}, weight {weight}, x {x} {precision}"
            values = grad_values(grad_tiles, kind, weight, x, restricted, contiguous, precision)
            yield case_of(
                grad._masked_grad_kernel, what + ("" if contiguous else ", any strides"), values, grad_tiles.num_warps,
                255, num_stages=grad_tiles.num_stages, matrix=x == "bf16" or precision == "tf32",
                buffers=grad_tiles.num_stages if target == "sm_90" and contiguous else 0, targets=(target,),
            )  # fmt: skip
    sums: dict[str, Any] = {
        **{"y": "*bf16", "parts": "*fp32", "bias": "*bf16", "total": "i32", "N": "i32"},
        **{"SPLITS": 4, "SUM_TILE": gemm.SUM_TILE},
    }
    yield case_of(gemm._sum_splits_kernel, "", sums, 4, 64, targets=HOPPER)


def gemm_values(
    tiles: _tiles.GemmTiles, kind: str, weight: str, x: str, exchanged: bool, contiguous: bool, precision: str
) -> dict[str, Any]:
    masked = kind == "mask"
    size, one = ("i32", 1) if contiguous else ("i32?", "i32?")
    strides = (one, size) if exchanged else (size, one)
    return {
        **{"y": "*fp32" if tiles.splits > 1 else f"*{x}", "x": f"*{x}", "weight": f"*{weight}", "bias": f"*{x}"},
        **{"threshold": None if masked else "*fp32", "mask": "*i1" if masked else None},
        **{"M": "i32?", "N": size, "K": size, "stride_xm": size, "stride_xk": one, "stride_t": one},
        **dict(zip(("stride_wn", "stride_wk", "stride_mn", "stride_mk"), strides * 2, strict=True)),
        **{"SOFT": kind.startswith("soft"), "THRESHOLD_ALONG_K": exchanged and not masked},
        **{"INPUT_PRECISION": Constant(precision), "UPCAST": False, "SPLITS": tiles.splits, "GROUP": _tiles.GROUP},
        **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k},
    }


def grad_values(
    tiles: _tiles.GradTiles, kind: str, weight: str, x: str, restricted: bool, contiguous: bool, precision: str
) -> dict[str, Any]:
    masked, soft = kind == "mask", kind == "soft"
    size, one = ("i32", 1) if contiguous else ("i32?", "i32?")
    return {
        **{"grad_weight": f"*{weight}", "row_sums": "*fp32" if soft else None, "left": f"*{x}", "right": f"*{x}"},
        **{"weight": f"*{weight}", "threshold": None if masked else "*fp32", "mask": "*i1" if masked else None},
        **{"grad_mask": "*i1" if restricted else None, "alpha": "*fp32", "M": "i32?", "N": size, "K": size},
        **{f"stride_{name}": size for name in ("lm", "rm", "wn", "mn", "bn")},
        **{f"stride_{name}": one for name in ("ln", "rk", "wk", "mk", "bk", "t")},
        **{"SOFT": soft, "INPUT_PRECISION": Constant(precision), "UPCAST": False, "SUBTILES": tiles.subtiles},
        **{"GROUP": _tiles.GROUP, "LEAST_STEPS": tiles.least_steps},
        **{"TILE_M": tiles.m, "TILE_N": tiles.n, "TILE_K": tiles.k},
    }
