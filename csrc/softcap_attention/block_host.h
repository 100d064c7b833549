// A block of threads on the CPU, in lock step: Registers<T> is one T for each lane, a loop over lanes is a loop, and
// what warps do together follows the PTX ISA's fragment layouts. It is stricter than a GPU: shared memory starts as
// NaN, copies arrive no earlier than wait(), and two warps that use the same 16 bytes, one of them writing, without a
// sync between are found out, and so is a use beyond the bytes that the block asked for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <limits>
#include <vector>

#include "softcap_attention.h"

namespace locfast::softcap_attention {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

struct HostMath {
  static float exp2(float x) { return std::exp2(x); }
  static float log(float x) { return std::log(x); }
  static float reciprocal(float x) { return 1.0f / x; }
  // tanh.approx.f32 has a relative error of 2^-11: here tanh is rounded to as many bits.
  static float hardware_tanh(float x) {
    const float value = std::tanh(x);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (bits + (1u << 12)) & ~((1u << 13) - 1);
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  }
};

// Shared memory that knows who used each of its 16-byte lines since the last sync.
class HostMemory {
 public:
  explicit HostMemory(int64_t bytes) : bytes_(bytes), lines_(bytes / 16 + 1), uses_(lines_.size()) {}

  void start() {
    std::memset(lines_.data(), 0xff, lines_.size() * sizeof(Line));
    std::memset(uses_.data(), 0, uses_.size() * sizeof(Use));
    epoch_ = 1;
  }
  void sync() { ++epoch_; }
  const char* fault() const { return fault_; }

  const char* read(int offset, int warp) {
    Use& use = use_of(offset);
    if (use.read_epoch != epoch_) use.readers = 0;
    use.read_epoch = epoch_;
    use.readers |= 1u << warp;
    if (use.write_epoch == epoch_ && use.writer != warp) fault_ = kRace;
    return lines_.data()->bytes + offset;
  }
  char* write(int offset, int warp) {
    Use& use = use_of(offset);
    if (use.write_epoch == epoch_ && use.writer != warp) fault_ = kRace;
    if (use.read_epoch == epoch_ && (use.readers & ~(1u << warp)) != 0) fault_ = kRace;
    use.write_epoch = epoch_;
    use.writer = warp;
    return lines_.data()->bytes + offset;
  }

 private:
  struct alignas(16) Line {
    char bytes[16];
  };
  struct Use {
    int write_epoch, writer, read_epoch;
    uint32_t readers;
  };
  static constexpr const char* kRace = "two warps used the same shared memory without a sync between";

  Use& use_of(int& offset) {
    if (offset < 0 || offset >= bytes_) {
      fault_ = "a warp used shared memory that its block had not asked for";
      offset = 0;
    }
    return uses_[offset / 16];
  }

  int64_t bytes_;
  std::vector<Line> lines_;
  std::vector<Use> uses_;
  int epoch_ = 1;
  const char* fault_ = nullptr;
};

class HostWarp {
 public:
  using Math = HostMath;

  template <typename T>
  struct Registers {
    T value[kLanes];
    T& operator[](int lane) { return value[lane]; }
    const T& operator[](int lane) const { return value[lane]; }
  };

  HostWarp(HostMemory& memory, int index) : memory_(memory), index_(index) {}

  template <class Body>
  void each_lane(Body body) const {
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  }
  void sync() const {}

  template <typename Value>
  Value load(int offset) const {
    return *reinterpret_cast<const Value*>(memory_.read(offset, index_));
  }
  template <typename Value>
  void store(int offset, const Value& value) const {
    *reinterpret_cast<Value*>(memory_.write(offset, index_)) = value;
  }

  static uint32_t load_word(const void* from, bool present) {
    return present ? *static_cast<const uint32_t*>(from) : 0u;
  }
  static void store_word(void* to, uint32_t word, bool present) {
    if (present) *static_cast<uint32_t*>(to) = word;
  }

  // Lane l gets elements 2 (l % 4) and the next of row l / 4 of each matrix; transposed, of column l / 4.
  template <bool kTransposed, class Offset>
  void load_matrices(Registers<Array<uint32_t, 4>>& to, Offset offset) const {
    int offsets[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) offsets[lane] = offset(lane);
    load_rows(to, offsets, kTransposed);
  }

  // mma.m16n8k16. Of a, register i of lane l holds row l / 4 + 8 (i % 2), columns 2 (l % 4) + 8 (i / 2) and the next;
  // of b, register i holds column l / 4, rows 2 (l % 4) + 8 i and the next; of the sum, register i holds row
  // l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2.
  template <typename T, int N, int M>
  void multiply(Registers<Array<float, N>>& sum, int tile, const Registers<Array<uint32_t, M>>& a, int block,
                const Registers<Array<uint32_t, 4>>& b, int half) const {
    multiply_lanes<T>(&sum[0][4 * tile], N, &a[0][4 * block], M, &b[0][2 * half]);
  }

  void sum_over_rows(Registers<Array<float, 2>>& values) const {
    over_rows(values, [](float a, float b) { return a + b; });
  }
  void maximum_over_rows(Registers<Array<float, 2>>& values) const {
    over_rows(values, [](float a, float b) { return std::fmax(a, b); });
  }

  template <typename T>
  static uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(T(low).x) | static_cast<uint32_t>(T(high).x) << 16;
  }
  template <typename T>
  static Array<float, 2> unpack(uint32_t word) {
    return {static_cast<float>(T(static_cast<uint16_t>(word), T::from_bits())),
            static_cast<float>(T(static_cast<uint16_t>(word >> 16), T::from_bits()))};
  }

 private:
  // Not inlined, and with strides in place of types: there are hundreds of uses, and builds should stay short.
  [[gnu::noinline]] void load_rows(Registers<Array<uint32_t, 4>>& to, const int* offsets, bool transposed) const {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const uint16_t* rows[8];
      for (int row = 0; row < 8; ++row) {
        rows[row] = reinterpret_cast<const uint16_t*>(memory_.read(offsets[8 * matrix + row], index_));
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const int across = 2 * (lane % 4), down = lane / 4;
        const uint32_t low = transposed ? rows[across][down] : rows[down][across];
        const uint32_t high = transposed ? rows[across + 1][down] : rows[down][across + 1];
        to[lane][matrix] = low | high << 16;
      }
    }
  }

  template <typename T>
  [[gnu::noinline]] static void multiply_lanes(float* sum, int sum_stride, const uint32_t* a, int a_stride,
                                               const uint32_t* b) {
    float left[16][16], right[16][8], total[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int down = lane / 4, across = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) {
        const Array<float, 2> pair = unpack<T>(a[lane * a_stride + i]);
        left[down + 8 * (i % 2)][across + 8 * (i / 2)] = pair[0];
        left[down + 8 * (i % 2)][across + 8 * (i / 2) + 1] = pair[1];
        total[down + 8 * (i / 2)][across + i % 2] = sum[lane * sum_stride + i];
      }
      for (int i = 0; i < 2; ++i) {
        const Array<float, 2> pair = unpack<T>(b[lane * 4 + i]);
        right[across + 8 * i][down] = pair[0];
        right[across + 8 * i + 1][down] = pair[1];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) total[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        sum[lane * sum_stride + i] = total[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
      }
    }
  }

  template <class Combine>
  void over_rows(Registers<Array<float, 2>>& values, Combine combine) const {
    for (int distance = 1; distance <= 2; distance *= 2) {
      const Registers<Array<float, 2>> before = values;
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int r = 0; r < 2; ++r) values[lane][r] = combine(before[lane][r], before[lane ^ distance][r]);
      }
    }
  }

  HostMemory& memory_;
  int index_;
};

class HostBlock {
 public:
  using Warp = HostWarp;
  template <typename T>
  struct PerWarp {
    std::vector<T> value = std::vector<T>(kMostWarps);
    T& operator[](int warp) { return value[warp]; }
  };

  HostBlock(int warps, int64_t shared_bytes) : warps_(warps), memory_(shared_bytes) {}

  void start(int index) {
    index_ = index;
    memory_.start();
    groups_.assign(1, {});
  }
  const char* fault() const { return memory_.fault(); }

  int index() const { return index_; }
  int warps() const { return warps_; }
  int threads() const { return warps_ * kLanes; }

  template <class Body>
  void each_thread(Body body) const {
    for (int thread = 0; thread < threads(); ++thread) body(thread);
  }
  template <class Body>
  void each_warp(Body body) {
    for (int warp = 0; warp < warps_; ++warp) body(HostWarp(memory_, warp), warp);
  }
  void sync() { memory_.sync(); }

  template <typename Value>
  void store(int thread, int offset, const Value& value) {
    *reinterpret_cast<Value*>(memory_.write(offset, thread / kLanes)) = value;
  }

  // A copy writes from here on, when it may overtake readers, until it arrives.
  void copy(int thread, int offset, const void* from, bool present) {
    memory_.write(offset, thread / kLanes);
    groups_.back().push_back({thread, offset, present ? from : nullptr});
  }
  void commit() { groups_.emplace_back(); }
  template <int kPending>
  void wait() {
    const int64_t arriving = static_cast<int64_t>(groups_.size()) - 1 - kPending;
    for (int64_t group = 0; group < arriving; ++group) {
      for (const Copy& copy : groups_[group]) {
        char* to = memory_.write(copy.offset, copy.thread / kLanes);
        if (copy.from == nullptr) {
          std::memset(to, 0, 16);
        } else {
          std::memcpy(to, copy.from, 16);
        }
      }
    }
    if (arriving > 0) groups_.erase(groups_.begin(), groups_.begin() + arriving);
  }

 private:
  struct Copy {
    int thread, offset;
    const void* from;
  };

  int index_ = 0;
  int warps_;
  HostMemory memory_;
  std::vector<std::vector<Copy>> groups_;
};

}  // namespace locfast::softcap_attention
