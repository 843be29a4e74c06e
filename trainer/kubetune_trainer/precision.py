"""The number format of a run: what the device multiplies well, and why it was chosen."""

from pathlib import Path

import torch

from kubetune_contract.config import RunConfig

_CPU_FLAGS = ("avx512_bf16", "amx_bf16")
"""Instructions that multiply bf16 matrices, as /proc/cpuinfo names them."""


def choose_precision(config: RunConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format of weights and matrix products, and why it was chosen.

    Auto takes bf16 only where the device multiplies it in hardware: a CPU without such instructions is up to 30 times
    slower in bf16 than in float32.
    """
    wish = config.training.precision
    able, reason = _has_bf16(device)
    if wish == "FP32":
        return torch.float32, "fp32, as training.precision says"
    if wish == "BF16":
        warning = "" if able else f"; it will be slow: {reason}"
        return torch.bfloat16, f"bf16, as training.precision says{warning}"
    return (torch.bfloat16, f"bf16: {reason}") if able else (torch.float32, f"fp32: {reason}")


def _has_bf16(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= (8, 0)
        return able, f"{torch.cuda.get_device_name(device)} has {'' if able else 'no '}bf16 instructions"
    flags = _cpu_flags()
    found = [flag for flag in _CPU_FLAGS if flag in flags]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported() or not found:
        return False, "this CPU has no bf16 instructions (avx512_bf16 or amx_bf16)"
    return True, f"this CPU has bf16 instructions ({', '.join(found)})"


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
