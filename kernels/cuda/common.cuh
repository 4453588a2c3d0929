// Shared by all kernels: the constants that they are compiled with, conversions, loads, reductions.
//
// DTYPE        the C++ type of activations or of the unquantized weight: float, __half or __nv_bfloat16
// BLOCK_SIZE   elements per absmax; if 0 or not given, the argument `block_size` decides
// ZERO         1 if a weight has zero points; if 0 or not given, it has none
//
// A kernel is `KERNEL void name(...)`. Each file is one op and is compiled alone, so nothing here needs a namespace.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

#ifdef QCLI_EMULATOR
#include "cuda_emulator.h"
#else
#define KERNEL extern "C" __global__
// Dynamic shared memory as an array of `type`. The launch sets its size.
#define DYNAMIC_SHARED(type, name)                                        \
  extern __shared__ __align__(16) unsigned char name##_bytes[];          \
  type* name = reinterpret_cast<type*>(name##_bytes)
#include "ptx.cuh"
#endif

#ifndef BLOCK_SIZE
#define BLOCK_SIZE 0
#endif
#ifndef ZERO
#define ZERO 0
#endif

constexpr unsigned WHOLE_WARP = 0xffffffffu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two values per register, the first one in the low half.
__device__ inline float2 unpack2(uint32_t bits, __half) {
  const __half2 pair = *reinterpret_cast<const __half2*>(&bits);
  return make_float2(__low2float(pair), __high2float(pair));
}
__device__ inline float2 unpack2(uint32_t bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
template <class T>
__device__ inline uint32_t pack2(float low, float high);
template <>
__device__ inline uint32_t pack2<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack2<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Differences and products of two values at once, each rounded to their type.
__device__ inline uint32_t subtract2(uint32_t a, uint32_t b, __half) {
  const __half2 pair = __hsub2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t subtract2(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 pair =
      __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t multiply2(uint32_t a, uint32_t b, __half) {
  const __half2 pair = __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t multiply2(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 pair =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The eight values of a load.
template <class T>
__device__ inline void expand8(uint4 bits, float (&to)[8]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2(words[i], T());
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}
__device__ inline void expand8(const float4 (&four)[2], float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    to[4 * i] = four[i].x;
    to[4 * i + 1] = four[i].y;
    to[4 * i + 2] = four[i].z;
    to[4 * i + 3] = four[i].w;
  }
}
// Loads eight values from an address that is a multiple of 16. The caches keep them.
template <class T>
__device__ inline void load8_kept(const T* from, float (&to)[8]) {
  expand8<T>(__ldg(reinterpret_cast<const uint4*>(from)), to);
}
template <>
__device__ inline void load8_kept<float>(const float* from, float (&to)[8]) {
  const float4* fours = reinterpret_cast<const float4*>(from);
  expand8({__ldg(fours), __ldg(fours + 1)}, to);
}
// The same for values that are read once: the caches need not keep them.
template <class T>
__device__ inline void load8(const T* from, float (&to)[8]) {
  expand8<T>(__ldcs(reinterpret_cast<const uint4*>(from)), to);
}
template <>
__device__ inline void load8<float>(const float* from, float (&to)[8]) {
  const float4* fours = reinterpret_cast<const float4*>(from);
  expand8({__ldcs(fours), __ldcs(fours + 1)}, to);
}

// Stores eight values at an address that is a multiple of 16.
template <class T>
__device__ inline void store8(T* to, const float (&from)[8]) {
  __stcs(reinterpret_cast<uint4*>(to),
         make_uint4(pack2<T>(from[0], from[1]), pack2<T>(from[2], from[3]), pack2<T>(from[4], from[5]),
                    pack2<T>(from[6], from[7])));
}
template <>
__device__ inline void store8<float>(float* to, const float (&from)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    __stcs(reinterpret_cast<float4*>(to) + i, make_float4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]));
  }
}

// Stores four values at an address that is a multiple of their total size.
template <class T>
__device__ inline void store4(T* to, const float (&from)[4]) {
  __stcs(reinterpret_cast<uint2*>(to), make_uint2(pack2<T>(from[0], from[1]), pack2<T>(from[2], from[3])));
}
template <>
__device__ inline void store4<float>(float* to, const float (&from)[4]) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
}

// |x| as an integer. The order of non-negative floats is the same, and a NaN is above infinity, so a maximum keeps it.
__device__ inline uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The maximum over each aligned group of `lanes` lanes, a power of two.
__device__ inline uint32_t group_max(uint32_t value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(WHOLE_WARP, value, offset);
    value = value > other ? value : other;
  }
  return value;
}

// A table of 16 floats that is passed by value: it is in the constant bank, and needs no tensor.
struct Codebook {
  float value[16];
};
