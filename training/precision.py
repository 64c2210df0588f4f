"""Mixed precision: the dtype of a forward pass, and loss scaling."""

import torch

from util.errors import BadInput


class Precision:
    """Autocast and loss scaling for `bf16`, `fp16`, `tf32` or `off`; `auto` chooses by device.

    `off` is true fp32: on GPUs it also turns off TF32 convolutions, which torch enables by default.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        if mode == "auto":
            mode = "off"
            if device.type == "cuda":
                # Older GPUs only emulate bf16, slowly.
                native = torch.cuda.is_bf16_supported(including_emulation=False)
                mode = "bf16" if native else "fp16"
        if mode == "fp16" and device.type == "cpu":
            raise BadInput("--amp fp16: needs a GPU; use bf16 or off on the CPU")
        if mode == "tf32" and device.type != "cuda":
            raise BadInput(f"--amp tf32: needs a CUDA GPU; use off on {device.type}")
        if device.type == "cuda":
            # Not via the newer fp32_precision: torch.compile reads these flags, which then raise.
            torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
            torch.backends.cudnn.allow_tf32 = mode == "tf32"
        self.name = {"off": "fp32"}.get(mode, mode)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mode, torch.float32)
        self._device = device.type
        # Only fp16 gradients can underflow; for other types the scaler does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode == "fp16")

    def autocast(self) -> torch.autocast:
        """The context manager for a forward pass."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self._device, self.dtype if enabled else None, enabled=enabled)
