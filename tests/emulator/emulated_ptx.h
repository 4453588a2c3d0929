// The twins of kernels/cuda/ptx.cuh.
#pragma once
