// The smallest kernel. It shows whether nvcc, its headers, the driver and this GPU work together.
// prebuilt:
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void probe() {}
