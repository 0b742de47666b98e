"""The layer of `benchmark.py` in PyTorch on `torch._grouped_mm`: what a user of PyTorch would write today. Imports torch when called.

Legend: T tokens, D model, F ffn, E experts, K experts of a token, A rows sorted by expert.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_lm.routing.benchmark_layer import Shape


def synchronize(_: Any) -> None:
    """Waits for the GPU."""
    import torch

    torch.cuda.synchronize()


def layer(shape: "Shape", zipf: float, *, compiled: bool) -> tuple[Callable[[], Any], float]:
    """Builds the layer in bfloat16, router in float32.

    Args:
      shape: sizes.
      zipf: popularity of the experts falls as rank to this power.
      compiled: by torch.compile.

    Returns:
      (a forward and backward pass, megabytes held between the two, parameters left out).
    """
    import torch
    import torch.nn.functional as functional

    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*sides: int, dtype: Any = torch.bfloat16, scale: float = 0.02) -> Any:
        return (torch.randn(*sides, generator=draw, device="cuda", dtype=torch.float32) * scale).to(dtype)

    hidden = shape.active // shape.k
    gate, up = (normal(shape.experts, shape.d_model, hidden).requires_grad_() for _ in range(2))
    down = normal(shape.experts, hidden, shape.d_model).requires_grad_()
    router = normal(shape.d_model, shape.experts, dtype=torch.float32).requires_grad_()
    x_TD = normal(shape.tokens, shape.d_model, scale=1.0).requires_grad_()
    dy_TD = normal(shape.tokens, shape.d_model, scale=1.0)
    offset_E = -zipf * torch.log(torch.arange(1, shape.experts + 1, device="cuda", dtype=torch.float32))

    def forward(x_TD: Any) -> Any:
        probability_TE = torch.softmax(x_TD.float() @ router, dim=-1)
        gumbel_TE = -torch.log(-torch.log(torch.rand_like(probability_TE).clamp(1e-20, 1 - 1e-7)))
        expert_TK = torch.topk(gumbel_TE + offset_E, shape.k, dim=-1).indices
        weight_TK = torch.gather(probability_TE, 1, expert_TK)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        expert_A, order_A = torch.sort(expert_TK.reshape(-1), stable=True)
        bounds_E = torch.searchsorted(expert_A, torch.arange(1, shape.experts + 1, device="cuda")).to(torch.int32)
        x_AD = x_TD[order_A // shape.k]
        hidden_AF = functional.silu(torch._grouped_mm(x_AD, gate, offs=bounds_E))
        hidden_AF = hidden_AF * torch._grouped_mm(x_AD, up, offs=bounds_E)
        y_AD = torch._grouped_mm(hidden_AF, down, offs=bounds_E)
        inverse_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(order_A.numel(), device="cuda"))
        y_TKD = y_AD[inverse_A].reshape(shape.tokens, shape.k, -1)
        return (y_TKD * weight_TK[..., None].to(y_TKD.dtype)).sum(1)

    run = torch.compile(forward) if compiled else forward
    parameters = (x_TD, gate, up, down, router)

    def step() -> Any:
        return torch.autograd.grad(run(x_TD), parameters, dy_TD)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y_TD = run(x_TD)
    torch.cuda.synchronize()
    # Its input is held as well; its output is not for the backward pass.
    held = torch.cuda.memory_allocated() - before - y_TD.nbytes + x_TD.nbytes
    del y_TD
    return step, held / 1e6
