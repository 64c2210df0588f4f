"""A step of a model on a GPU that need not be there: fake tensors, which hold no data.

Shapes, dtypes and operators are those of a GPU of compute capability 8.0 or newer: CUDA's autocast
rules, our Triton kernels, torch's fused attention. Nothing is computed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import timing  # makes the repository's modules importable  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import models_mae
import ops.choice
from models_registry import create_classifier, create_pretrain_model

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`models_mae.attend` with the kernel that torch chooses on GPUs of capability 8.0 or newer."""
    if q.dtype == torch.float32:
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        return kernel(q, k, v, None, compute_log_sumexp=True)[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextmanager
def absent_gpu() -> Iterator[None]:
    """Create fake tensors on a CUDA device and choose its kernels, also where there is none."""
    with ExitStack() as stack:
        for owner, name, value in (
            (models_mae, "attend", attend),
            (ops.choice, "kernels_for", lambda device: "triton"),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
            (torch._C, "_current_graph_task_id", lambda: 0),  # checkpoints recompute once for it
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.device("cuda"))
        yield


def build(name: str, recompute: bool) -> nn.Module:
    """The model of a name of MODELS, which takes (images, labels or noise) and returns a loss."""
    name, _, finetuned = name.partition(":")
    if finetuned or name.startswith("vit"):
        model: nn.Module = create_classifier(name, 7)
    else:
        model = create_pretrain_model(name)
    model.set_grad_checkpointing(recompute)
    return model.train()


def loss_of(model: nn.Module, imgs: Tensor, precision: str) -> Tensor:
    """The loss of a batch (N, 3, 224, 224)."""
    dtype = PRECISIONS[precision]
    with torch.autocast(imgs.device.type, dtype, enabled=dtype != torch.float32):
        if hasattr(model, "mask_ratio"):
            return model(imgs, noise=torch.rand(len(imgs), model.num_patches, device=imgs.device))
        return F.cross_entropy(model(imgs), torch.zeros(len(imgs), 7, device=imgs.device))


def backward(compute: Callable[[], Tensor]) -> None:
    """`compute().backward()` in Python: torch's own does not run for a device that is not there.

    Nodes run in the same order, and what a node saved is freed once it has run.
    """
    loss = compute()
    waiting = dependencies(loss.grad_fn)
    slots = {key(loss.grad_fn): [torch.ones_like(loss)]}
    ready = [loss.grad_fn]
    del loss
    with torch.no_grad():
        while ready:
            ready.sort(key=lambda node: node._sequence_nr())
            for node in finish(ready.pop(), slots):
                waiting[key(node)] -= 1
                if not waiting[key(node)] and key(node) in slots:
                    ready.append(node)
                del node


def finish(node: Any, slots: dict[Any, list[Tensor | None]]) -> list[Any]:
    """Run a node on its gradients in `slots`, and add the results; -> the nodes that follow."""
    found = run_node(node, slots.pop(key(node)))
    following = []
    for (after, place), gradient in zip(node.next_functions, found, strict=True):
        if after is None:
            continue
        following.append(after)
        if gradient is not None:
            gradients = slots.setdefault(key(after), [None] * len(after._input_metadata))
            gradient = fitted(gradient, after._input_metadata[place])
            before = gradients[place]
            gradients[place] = gradient if before is None else before + gradient
    return following


def key(node: Any) -> object:
    """What identifies a node without keeping it alive."""
    return ("parameter", id(node.variable)) if hasattr(node, "variable") else node._sequence_nr()


def dependencies(root: Any) -> dict[object, int]:
    """How many edges of the graph lead to each node, by `key`."""
    count, stack = {key(root): 0}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if key(node) not in count:
                count[key(node)] = 0
                stack.append(node)
            count[key(node)] += 1
    return count


def run_node(node: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients of a node's outputs -> of its inputs; a parameter's is added to its `grad`."""
    if hasattr(node, "variable"):
        parameter = node.variable
        if parameter.grad is None:
            parameter.grad = gradients[0]
        else:
            parameter.grad.add_(gradients[0])
        return ()
    call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
    found = call(*gradients)
    # Our functions take tensors first: what follows has no gradient.
    return found[: len(node.next_functions)] if isinstance(found, tuple) else (found,)


def fitted(gradient: Tensor, wanted: Any) -> Tensor:
    """The gradient in the shape and dtype that a node expects."""
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(wanted.shape)
    return gradient.to(wanted.dtype)
