"""The products that head groups are made of, with gradients by hand where autograd's own would copy or write too much."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrain.model.routes import Route, Segment


class PaddedRows(torch.autograd.Function):
    """Rows of z in a route's padded layout; the gradients of padding are never read."""

    @staticmethod
    def forward(ctx: Any, z_BD: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.rows = route, len(z_BD)
        return z_BD.index_select(0, route.padded_row_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        route: Route = ctx.route
        grad_BD = grad_ND.new_zeros(ctx.rows, grad_ND.shape[1])
        grad_BD.index_add_(0, route.row_P, grad_ND.index_select(0, route.place_P))
        if route.fed is not None:
            grad_BD.index_add_(0, route.fed.row_Q, grad_ND.index_select(0, route.fed.place_Q))
        return grad_BD, None


class SegmentLinear(torch.autograd.Function):
    """`x_n @ weight_a^T + bias_a` for each row n of active head a in the padded layout: x `[N, I]`, weight `[A, O, I]`,
    bias `[A, O]`, result `[N, O]`. The seam for other kernels (`F.grouped_mm`): padded `baddbmm` for each segment here.

    By hand because autograd's own backward of a split over segments copies the gradient of all weights once more.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Tensor, bias: Tensor, segments: tuple[Segment, ...]) -> Tensor:
        ctx.save_for_backward(x_NI, weight)
        ctx.segments = segments
        out_NO = x_NI.new_empty(len(x_NI), weight.shape[1])
        for s in segments:
            torch.baddbmm(bias[s.heads, None], s.rows(x_NI), weight[s.heads].mT, out=s.rows(out_NO))
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x_NI, weight = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        grad_x = grad_NO.new_empty(x_NI.shape) if ctx.needs_input_grad[0] else None
        grad_weight, grad_bias = torch.empty_like(weight), weight.new_empty(weight.shape[:2])
        for s in ctx.segments:
            grad = s.rows(grad_NO)
            if grad_x is not None:
                torch.bmm(grad, weight[s.heads], out=s.rows(grad_x))
            torch.bmm(grad.mT, s.rows(x_NI), out=grad_weight[s.heads])
            torch.sum(grad, 1, out=grad_bias[s.heads])
        return grad_x, grad_weight, grad_bias, None


class RowsFirst(torch.autograd.Function):
    """`[T, O, B]` to `[B, T, O]`, contiguous in both directions: batched products of permuted gradients are slow."""

    @staticmethod
    def forward(ctx: Any, x_TOB: Tensor) -> Tensor:
        return x_TOB.permute(2, 0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad_BTO: Tensor) -> Tensor:
        return grad_BTO.permute(1, 2, 0).contiguous()


def gated_grid(z_BED: Tensor, gate_AEB: Tensor, weight_AHD: Tensor, bias_AH: Tensor) -> Tensor:
    """`W_a (sum over e of gate_aeb * z_be) + b_a` for every row b and head a: `[A, H, B]`.

    Where the products of all experts with a layer are smaller than the mixtures (H E <= D), one GEMM computes them and the
    gates weigh them: `[A, H, E, B]` in memory. Else the mixtures `[B, A, D]` are built, which takes D (E + H) multiply-adds for
    each row and head in place of D E H.
    """
    (heads, hidden, width), experts = weight_AHD.shape, z_BED.shape[1]
    if hidden * experts <= width:
        z_QD = z_BED.transpose(0, 1).flatten(0, 1)
        product_AHEB = (weight_AHD.flatten(0, 1) @ z_QD.t()).view(heads, hidden, experts, z_BED.shape[0])
        return (product_AHEB * gate_AEB[:, None]).sum(2) + bias_AH[..., None]
    mixed_BAD = torch.bmm(gate_AEB.permute(2, 0, 1), z_BED)
    return torch.baddbmm(bias_AH[..., None], weight_AHD, mixed_BAD.permute(1, 2, 0))


def split_columns(x_ND: Tensor, one: slice, other: slice) -> tuple[Tensor, Tensor]:
    """Two ranges of columns, as views; their gradients are joined in one pass where they do not overlap."""
    first, second = sorted((one, other), key=lambda columns: columns.start)
    if first.stop > second.start:
        return x_ND[:, one], x_ND[:, other]
    ends = [0, first.start, first.stop, second.start, second.stop, x_ND.shape[1]]
    _, low, _, high, _ = x_ND.split([end - start for start, end in pairwise(ends)], 1)
    return (low, high) if first is one else (high, low)
