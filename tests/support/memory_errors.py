"""What Python, MLX, Metal and CUDA raise when memory has ended."""

import errno

OUT_OF_MEMORY = [
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[malloc] Unable to allocate 9 bytes."),
    RuntimeError("[malloc_or_wait] Unable to allocate 9 bytes."),
    RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum"),
    RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU)"),
    RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
]
