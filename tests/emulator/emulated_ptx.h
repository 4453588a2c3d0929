// The emulator's versions of the instructions in kernels/cuda/ptx.cuh. Names are those of the PTX manual, which says which lane
// holds which element.
#pragma once

template <class T>
inline T load_once(const T* from) { return *from; }

inline uint32_t shared_address(const void* at) {
  return uint32_t(static_cast<const unsigned char*>(at) - emulator::block->dynamic_shared);
}
inline uint32_t load_shared(uint32_t address) {
  return *reinterpret_cast<const uint32_t*>(emulator::block->dynamic_shared + address);
}

template <class T>
inline float emulated_value(uint32_t bits, int half, T) {
  const uint16_t part = uint16_t(bits >> 16 * half);
  T value;
  static_assert(sizeof(T) == 2, "a register holds two");
  memcpy(static_cast<void*>(&value), &part, 2);
  return float(value);
}

struct EmulatedOperands {
  uint32_t a[4], b[2];
};

// Products of two 11-bit values are exact in float32. The hardware's order of summation is not known.
template <class T>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type, int line = __builtin_LINE()) {
  const auto slots = emulator::exchange(EmulatedOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, line);
  const int group = emulator::lane() / 4, thread = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >= 2 ? 8 : 0), column = 2 * thread + i % 2;
    for (int k = 0; k < 16; ++k) {
      const auto left = emulator::from_lane<EmulatedOperands>(slots, row % 8 * 4 + k % 8 / 2);
      const auto right = emulator::from_lane<EmulatedOperands>(slots, column * 4 + k % 8 / 2);
      c[i] += emulated_value(left.a[(row >= 8) + 2 * (k >= 8)], k % 2, type) * emulated_value(right.b[k >= 8], k % 2, type);
    }
  }
}

inline void mma_16x8x32(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  const auto slots = emulator::exchange(EmulatedOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, line);
  const int group = emulator::lane() / 4, thread = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >= 2 ? 8 : 0), column = 2 * thread + i % 2;
    for (int k = 0; k < 32; ++k) {
      const auto left = emulator::from_lane<EmulatedOperands>(slots, row % 8 * 4 + k % 16 / 4);
      const auto right = emulator::from_lane<EmulatedOperands>(slots, column * 4 + k % 16 / 4);
      const int shift = 8 * (k % 4);
      c[i] += int(int8_t(left.a[(row >= 8) + 2 * (k >= 16)] >> shift)) * int(int8_t(right.b[k >= 16] >> shift));
    }
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* row, int line = __builtin_LINE()) {
  const auto slots = emulator::exchange(row, line);
  for (int i = 0; i < 4; ++i) {
    const auto from = emulator::from_lane<const unsigned char*>(slots, 8 * i + emulator::lane() / 4);
    if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("ldmatrix from an address that is no multiple of 16");
    memcpy(&to[i], from + emulator::lane() % 4 * 4, 4);
  }
}

namespace emulator {
inline void land(const Copy& copy) {
  const uint4 zeros = {0, 0, 0, 0};
  const auto* from = static_cast<const uint4*>(copy.from);
  *static_cast<uint4*>(copy.to) = from ? *from : zeros;
}
}  // namespace emulator

// The copy is made when a thread waits for it: a thread that does not wait sees the old bytes. Or it is made at once: a thread that
// still reads the old bytes sees the new ones.
inline void copy_async(void* to, const void* from, bool valid) {
  emulator::Fiber* self = emulator::block->current;
  if (reinterpret_cast<uintptr_t>(to) % 16) emulator::fail("cp.async to an address that is no multiple of 16");
  if (valid && reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("cp.async from an address that is no multiple of 16");
  self->copies.push_back({to, valid ? from : nullptr, self->group});
  if (emulator::block->order == 1) emulator::land(self->copies.back());
}
inline void commit_copies() { ++emulator::block->current->group; }
template <int LATEST>
inline void wait_for_copies() {
  emulator::Fiber* self = emulator::block->current;
  std::vector<emulator::Copy> later;
  for (const emulator::Copy& copy : self->copies) {
    if (copy.group >= self->group - LATEST) {
      later.push_back(copy);
      continue;
    }
    if (emulator::block->order != 1) emulator::land(copy);
  }
  self->copies = later;
}
