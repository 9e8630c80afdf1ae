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


ROW_LIMIT = 4096  # longest row that one program normalises or quantizes


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1), on a CPU."""
    return triton is not None and not isinstance(tl.sum, triton.JITFunction)


@functools.cache
def use_kernels(device: torch.device, *, fp8: bool = False) -> bool:
    """Whether the Triton kernels, or those of 8-bit floating point, run on `device`; else the plain forms do.

    Triton uses tensor cores from Ampere on: on a T4 its products would be slower than dequantization and cuBLAS. Those
    of 8-bit floating point need Ada or Hopper.
    """
    if triton is None or device.type != "cuda":
        return interpreted()
    return torch.cuda.get_device_capability(device) >= ((8, 9) if fp8 else (8, 0))


def check_matrix(name: str, tensor: torch.Tensor, columns: int | None = None) -> None:
    """ValueError unless `tensor` is a contiguous matrix (rows are read at stride K) within reach of 32-bit offsets."""
    if tensor.ndim != 2 or not tensor.is_contiguous():
        found = f"it is {tuple(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(
            f"{name} must be a contiguous matrix, {found}: pass .contiguous(), flattened to two dimensions"
        )
    if columns is not None and tensor.shape[1] != columns:
        raise ValueError(f"{name} has {tensor.shape[1]} columns, {columns} were expected")
    if tensor.numel() >= 2**31:
        raise ValueError(f"{name} has {tensor.numel()} numbers, at most 2**31 - 1 fit: use smaller batches")
