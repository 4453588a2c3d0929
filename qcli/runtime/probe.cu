// The smallest kernel: whether nvcc, its headers, the driver and this GPU agree is found out with it.
// prebuilt:
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void probe() {}
