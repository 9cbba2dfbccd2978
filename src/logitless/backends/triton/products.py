"""Products by the library, into buffers that exist, accumulating in fp32."""

from __future__ import annotations

import torch


def scale_left(gradient: torch.Tensor, scale: float) -> float:
    """The factor that products of a gradient of logits, which may be changed, are still to have.

    The library forms no product whose factor is 0, and would lose the NaN of a row: the gradient is multiplied instead.
    """
    if scale:
        return scale
    gradient.mul_(scale)
    return 1.0


def multiply(
    left: torch.Tensor,  # [M, K]
    right: torch.Tensor,  # [K, P]
    result: torch.Tensor,  # [M, P]
    *,
    add: bool,
    scale: float,
) -> None:
    """``result = scale * left @ right``, added to what is there with ``add``; ``scale`` is not 0: see ``scale_left``.

    A result wider than the operands gets the fp32 sums unrounded; where the library cannot write the result's dtype,
    the product is formed in fp32 and rounded once.
    """
    assert scale, "the library would form no product"
    beta = 1.0 if add else 0.0
    if result.dtype == left.dtype:
        torch.addmm(result, left, right, beta=beta, alpha=scale, out=result)
    elif result.dtype == torch.float32 and left.device.type == "cuda":
        torch.addmm(result, left, right, out_dtype=torch.float32, beta=beta, alpha=scale, out=result)
    else:
        product = torch.empty(result.shape, dtype=torch.float32, device=result.device)
        if left.device.type == "cuda" and left.dtype != torch.float32:
            torch.mm(left, right, out_dtype=torch.float32, out=product)
        else:
            torch.mm(left.float(), right.float(), out=product)
        if add:
            result.add_(product, alpha=scale)
        else:
            result.copy_(product.mul_(scale))
