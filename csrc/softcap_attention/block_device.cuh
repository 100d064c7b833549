// A block of threads on the GPU. block_host.h has the same members, executed in lock step on the CPU: a body written
// over either runs on both. Registers<T> is one T for each thread; every loop over lanes is the thread itself.
#pragma once

#include <cuda_fp16.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "softcap_attention.h"

namespace locfast::softcap_attention {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct DeviceMath {
  LOCFAST_BODY static float exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
  LOCFAST_BODY static float log(float x) { return __logf(x); }
  LOCFAST_BODY static float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
  LOCFAST_BODY static float hardware_tanh(float x) {
    float result;
    asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
};

class DeviceWarp {
 public:
  using Math = DeviceMath;

  template <typename T>
  struct Registers {
    T value;
    LOCFAST_BODY T& operator[](int) { return value; }
    LOCFAST_BODY const T& operator[](int) const { return value; }
  };

  LOCFAST_BODY DeviceWarp(char* shared, uint32_t window) : shared_(shared), window_(window) {}

  template <class Body>
  LOCFAST_BODY void each_lane(Body body) const {
    body(static_cast<int>(threadIdx.x) % kLanes);
  }

  LOCFAST_BODY void sync() const { __syncwarp(); }

  template <typename Value>
  LOCFAST_BODY Value load(int offset) const {
    return *reinterpret_cast<const Value*>(shared_ + offset);
  }
  template <typename Value>
  LOCFAST_BODY void store(int offset, const Value& value) const {
    *reinterpret_cast<Value*>(shared_ + offset) = value;
  }

  // A word of global memory that no one writes meanwhile, or zero. Predicated: the compiler would branch around each.
  LOCFAST_BODY static uint32_t load_word(const void* from, bool present) {
    uint32_t word;
    asm("{\n"
        "  .reg .pred p;\n"
        "  setp.ne.s32 p, %2, 0;\n"
        "  mov.b32 %0, 0;\n"
        "  @p ld.global.nc.b32 %0, [%1];\n"
        "}"
        : "=r"(word)
        : "l"(from), "r"(static_cast<int>(present)));
    return word;
  }
  LOCFAST_BODY static void store_word(void* to, uint32_t word, bool present) {
    asm volatile("{\n"
                 "  .reg .pred p;\n"
                 "  setp.ne.s32 p, %2, 0;\n"
                 "  @p st.global.b32 [%0], %1;\n"
                 "}"
                 :
                 : "l"(to), "r"(word), "r"(static_cast<int>(present))
                 : "memory");
  }

  // What a warp does together is volatile, so that nothing of it is moved to where the warp has parted.
  // Four 8 x 8 matrices of 16-bit elements from shared memory; lanes 8i to 8i + 7 name the rows of matrix i.
  template <bool kTransposed, class Offset>
  LOCFAST_BODY void load_matrices(Registers<Array<uint32_t, 4>>& to, Offset offset) const {
    const uint32_t address = window_ + offset(static_cast<int>(threadIdx.x) % kLanes);
    Array<uint32_t, 4>& r = to.value;
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address)
                   : "memory");
    }
  }

  // sum tile `tile` [16, 8] += a block `block` [16, 16] x b tile `half` [16, 8].
  template <typename T, int N, int M>
  LOCFAST_BODY void multiply(Registers<Array<float, N>>& sum, int tile, const Registers<Array<uint32_t, M>>& a,
                             int block, const Registers<Array<uint32_t, 4>>& b, int half) const {
    float* c = sum.value.value + 4 * tile;
    const uint32_t* left = a.value.value + 4 * block;
    const uint32_t* right = b.value.value + 2 * half;
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    } else {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    }
  }

  // Both rows of a lane, reduced over the four lanes that share them.
  LOCFAST_BODY void sum_over_rows(Registers<Array<float, 2>>& values) const {
    LOCFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      values.value[r] += __shfl_xor_sync(~0u, values.value[r], 1);
      values.value[r] += __shfl_xor_sync(~0u, values.value[r], 2);
    }
  }
  LOCFAST_BODY void maximum_over_rows(Registers<Array<float, 2>>& values) const {
    LOCFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      values.value[r] = fmaxf(values.value[r], __shfl_xor_sync(~0u, values.value[r], 1));
      values.value[r] = fmaxf(values.value[r], __shfl_xor_sync(~0u, values.value[r], 2));
    }
  }

  // Two elements in one word, the first in its low half.
  template <typename T>
  LOCFAST_BODY static uint32_t pack(float low, float high) {
    uint32_t word;
    if constexpr (std::is_same_v<T, BFloat16>) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
  }
  template <typename T>
  LOCFAST_BODY static Array<float, 2> unpack(uint32_t word) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    } else {
      const float2 values = __half22float2(*reinterpret_cast<const __half2*>(&word));
      return {values.x, values.y};
    }
  }

 private:
  char* shared_;
  uint32_t window_;
};

class DeviceBlock {
 public:
  using Warp = DeviceWarp;
  template <typename T>
  using PerWarp = DeviceWarp::Registers<T>;

  LOCFAST_BODY DeviceBlock() {
    extern __shared__ __align__(16) char dynamic_shared[];
    shared_ = dynamic_shared;
    window_ = static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
    warp_ = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kLanes, 0);  // so the compiler knows that lanes agree
  }

  // Volatile, so that what follows from it is made again where it is needed and does not fill registers meanwhile.
  LOCFAST_BODY int index() const {
    int index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
  }
  LOCFAST_BODY int warps() const { return blockDim.x / kLanes; }
  LOCFAST_BODY int threads() const { return blockDim.x; }

  template <class Body>
  LOCFAST_BODY void each_thread(Body body) const {
    body(static_cast<int>(threadIdx.x));
  }
  template <class Body>
  LOCFAST_BODY void each_warp(Body body) const {
    const DeviceWarp warp(shared_, window_);
    body(warp, warp_);
  }
  LOCFAST_BODY void sync() const { __syncthreads(); }

  template <typename Value>
  LOCFAST_BODY void store(int, int offset, const Value& value) const {
    *reinterpret_cast<Value*>(shared_ + offset) = value;
  }

  // 16 bytes of global memory, or zeros, to shared memory, behind the block's back until wait().
  LOCFAST_BODY void copy(int, int offset, const void* from, bool present) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(window_ + offset), "l"(from), "r"(present ? 16 : 0)
                 : "memory");
  }
  LOCFAST_BODY void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Until at most the last kPending groups of this thread's copies are on their way; sync() tells the others.
  template <int kPending>
  LOCFAST_BODY void wait() const {
    asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
  }

 private:
  char* shared_;
  uint32_t window_;
  int warp_;
};

}  // namespace locfast::softcap_attention
