"""Whether Triton's kernels can run on a device, and the checks that all kernels share."""

import functools

import torch

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError  # does not compile, or needs more shared memory than there is

    jit = triton.jit
except ImportError:  # the plain forms remain
    triton = None
    TritonError = RuntimeError

    class tl:
        """A namespace for the annotations of kernels, which nothing calls without Triton."""

        constexpr = object

    def jit(function=None, **_):
        return function or (lambda kernel: kernel)


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ROW_LIMIT = 4096  # longest row that one program normalises or quantizes


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1), on a CPU."""
    return triton is not None and not isinstance(tl.sum, triton.JITFunction)


@functools.cache
def missing_triton(device: torch.device) -> str:
    """Why the Triton kernels cannot run on `device` ('' if they can): then the plain PyTorch forms run."""
    if triton is None:
        return "the package triton is not installed"
    return "" if device.type == "cuda" or interpreted() else "Triton kernels need a CUDA device"


@functools.cache
def missing_products(device: torch.device) -> str:
    """Why the products cannot run as kernels on `device` ('' if they can); norms and dequantization still may.

    Triton uses tensor cores from Ampere on: on a T4 its products would be slower than dequantization and cuBLAS.
    """
    return missing_triton(device) or _too_old(device, (8, 0), "Triton's products", "Ampere")


def missing_fp8(device: torch.device) -> str:
    """Why 8-bit floating point products cannot run as kernels on `device` ('' if they can)."""
    return missing_triton(device) or _too_old(device, (8, 9), "fp8 products", "Ada, Hopper")


def _too_old(device: torch.device, capability: tuple[int, int], what: str, cards: str) -> str:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= capability:
        return ""
    name = torch.cuda.get_device_name(device)
    return f"{what} need compute capability {capability[0]}.{capability[1]} ({cards}), {name} has less"


def check_matrix(name: str, tensor: torch.Tensor, columns: int | None = None, dtypes: tuple = ()) -> None:
    """ValueError unless `tensor` is a contiguous matrix (rows are read at stride K) within reach of 32-bit offsets."""
    if tensor.ndim != 2 or not tensor.is_contiguous():
        found = f"it is {tuple(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(
            f"{name} must be a contiguous matrix, {found}: pass .contiguous(), flattened to two dimensions"
        )
    if columns is not None and tensor.shape[1] != columns:
        raise ValueError(f"{name} has {tensor.shape[1]} columns, {columns} were expected")
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, must be one of {', '.join(map(str, dtypes))}")
    if tensor.numel() >= 2**31:
        raise ValueError(f"{name} has {tensor.numel()} numbers, at most 2**31 - 1 fit: use smaller batches")


def check_scale(name: str, scale: torch.Tensor, length: int) -> None:
    """ValueError unless `scale` is contiguous fp32 (length,)."""
    if tuple(scale.shape) != (length,) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"{name} must be contiguous fp32 ({length},), it is {scale.dtype} {tuple(scale.shape)}")
