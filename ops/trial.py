"""A trial of the Triton kernels, before the first use on a GPU.

They have been tested in an interpreter and compiled, but a driver, a compiler release or a GPU may
still break them. A second at the start is cheap beside days of training on wrong gradients.
"""

import torch
from torch import Tensor

from ops.fused import FusedMLP, TiledDepthwise
from ops.packed import MLP, Depthwise, in_tiles, in_windows

# Largest relative error (norm) of a result or gradient: matrix products may be in TF32.
MOST_WRONG = 0.02
N, V, GRID, B, C = 2, 3, 3, 2, 40


def failure(device: torch.device) -> str:
    """What goes wrong with the kernels on a device; empty if they equal the passes for CPUs."""
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            found = block_and_gradients(device, fused=True)
        except Exception as error:  # compilers and drivers can raise anything
            what = next(iter(str(error).splitlines()), "")[:120]
            return f"they fail ({type(error).__name__}: {what})"
        wanted = block_and_gradients(torch.device("cpu"), fused=False)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True)]
    wrong = [error for error in errors if not error <= MOST_WRONG]
    return f"their results are wrong by {wrong[0]:.1%}" if wrong else ""


def block_and_gradients(device: torch.device, fused: bool) -> list[Tensor]:
    """A block of fixed inputs on visible patches -> its output and all gradients, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    visible = torch.tensor([[4, 0, 7], [8, 1, 3]], device=device)
    near = (in_tiles if fused else in_windows)(visible, GRID, B)
    convolution, mlp = (TiledDepthwise, FusedMLP) if fused else (Depthwise, MLP)
    convolved = [drawn(N * V * B * B, C), drawn(C, 1, 7, 7), drawn(C)]
    shapes = (C,), (C,), (4 * C, C), (4 * C,), (4 * C,), (4 * C,), (C, 4 * C), (C,)
    rest = [drawn(*shape) for shape in shapes]
    y = mlp.apply(convolution.apply(*convolved, near).view(N, -1, C), *rest)
    gradients = torch.autograd.grad(y.square().sum(), [*convolved, *rest])
    return [tensor.detach().cpu() for tensor in (y, *gradients)]
