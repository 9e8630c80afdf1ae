"""Triton kernels: 8-bit products, dequantization, norms and attention.

Every public function also has a plain PyTorch form, which runs on a CPU, in fp32 or without Triton and agrees within
rounding; `triton_support.use_kernels` says which one runs. Activations are contiguous (M, K) in fp16 or bf16, sums
are fp32 (int32 for int8 × int8). The first call of a shape compiles and places small tables: make it before a CUDA
graph is captured. Later calls allocate with `torch.empty` only and never wait for the device.
"""
