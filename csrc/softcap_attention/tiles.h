// What forward and backward share: rows in shared memory and in registers, the two products, and the cap.
#pragma once

#include <type_traits>
#include <utility>

#include "layout.h"

namespace locfast::softcap_attention {

template <int kD>
constexpr int kRowBytes = row_bytes(kD);

template <class Warp, typename T>
using Registers = typename Warp::template Registers<T>;

// Register fragments: A operands [16, K], one word for two elements; sums [16, N] in fp32.
template <class Warp, int K>
using Operand = Registers<Warp, Array<uint32_t, K / 4>>;
template <class Warp, int N>
using Sums = Registers<Warp, Array<float, N / 2>>;

// Sum i of a lane belongs to row lane / 4 + 8 half, and to column 8 tile + 2 (lane % 4) + i % 2.
LOCFAST_BODY int half_of(int i) { return i % 4 / 2; }
LOCFAST_BODY int row_of(int lane, int half) { return lane / 4 + 8 * half; }
LOCFAST_BODY int column_of(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

// The length of the array that a lane holds.
template <class T>
constexpr int kSizeOf = std::remove_reference_t<decltype(std::declval<T&>()[0])>::kSize;

template <class Warp, class Fragment>
LOCFAST_BODY void clear(const Warp& warp, Fragment& sums) {
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int i = 0; i < kSizeOf<Fragment>; ++i) sums[lane][i] = 0.0f;
  });
}

// Sends rows [first, first + count) of a head on their way to shared memory; what is absent becomes zero.
template <int kD, class Block, typename T>
LOCFAST_BODY void copy_rows(Block& block, int offset, const Rows<T>& rows, int first, int count, int head_dim) {
  constexpr int kPacks = kD / 8;
  block.each_thread([&](int thread) {
    for (int i = thread; i < count * kPacks; i += block.threads()) {
      const int row = i / kPacks, pack = i % kPacks;
      block.copy(thread, offset + row * kRowBytes<kD> + 16 * pack, rows.row(first + row) + 8 * pack,
                 8 * pack < head_dim && rows.present(first + row));
    }
  });
}

struct alignas(16) Pack {
  uint32_t words[4];
};

// The same for the 16 rows of one warp, at once.
template <int kD, class Warp, typename T>
LOCFAST_BODY void copy_strip(const Warp& warp, int offset, const Rows<T>& rows, int first, int head_dim) {
  constexpr int kPacks = kD / 8;
  warp.sync();
  warp.each_lane([&](int lane) {
    for (int i = lane; i < 16 * kPacks; i += kLanes) {
      const int row = i / kPacks, pack = i % kPacks;
      const bool present = 8 * pack < head_dim && rows.present(first + row);
      warp.store(offset + row * kRowBytes<kD> + 16 * pack,
                 present ? *reinterpret_cast<const Pack*>(rows.row(first + row) + 8 * pack) : Pack{});
    }
  });
  warp.sync();
}

// Rows [first, first + 16) of a head as an A operand, from global memory.
template <int kD, class Warp, typename T>
LOCFAST_BODY void load_operand(const Warp& warp, Operand<Warp, kD>& to, const Rows<T>& rows, int first, int head_dim) {
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first + row_of(lane, half);
      const bool present = rows.present(row);
      const T* from = rows.row(row);
      LOCFAST_UNROLL
      for (int i = half; i < kD / 4; i += 2) {
        const int tile = i / 2;  // of 8 columns, present or not for all lanes
        to[lane][i] = Warp::load_word(from + column_of(lane, 4 * tile), present && 8 * tile < head_dim);
      }
    }
  });
  warp.sync();  // lanes may have parted over absent rows; matrix products want them together
}

// Sums [16, kD], each row times its factor, to rows [first, first + 16) of a head, those that there are.
template <int kD, class Warp, typename T>
LOCFAST_BODY void store_sums(const Warp& warp, const Rows<T>& rows, int first, int head_dim,
                             const Sums<Warp, kD>& sums, const Registers<Warp, Array<float, 2>>& factors) {
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first + row_of(lane, half);
      if (row >= rows.count) continue;
      T* to = rows.row(row);
      const float factor = factors[lane][half];
      LOCFAST_UNROLL
      for (int tile = 0; tile < kD / 8; ++tile) {
        const Array<float, kD / 2>& values = sums[lane];
        const uint32_t word = Warp::template pack<T>(values[4 * tile + 2 * half] * factor,
                                                     values[4 * tile + 2 * half + 1] * factor);
        Warp::store_word(to + column_of(lane, 4 * tile), word, 8 * tile < head_dim);
      }
    }
  });
  warp.sync();
}

// An A operand that stays in registers, or one that is read from shared memory whenever it is needed.
template <class Warp, int kD>
struct HeldOperand {
  const Operand<Warp, kD>& held;
  LOCFAST_BODY void load(const Warp& warp, int block, Operand<Warp, 16>& to) const {
    warp.each_lane([&](int lane) {
      LOCFAST_UNROLL
      for (int i = 0; i < 4; ++i) to[lane][i] = held[lane][4 * block + i];
    });
  }
};
template <class Warp, int kD>
struct SharedOperand {
  int offset;
  LOCFAST_BODY void load(const Warp& warp, int block, Operand<Warp, 16>& to) const {
    warp.template load_matrices<false>(to, [&](int lane) {
      return offset + lane % 16 * kRowBytes<kD> + lane / 16 * 16 + block * 32;
    });
  }
};

// sums [16, 16 kN] += a [16, kD] x (rows [first, first + 16 kN) in shared memory)^T
template <typename T, int kD, int kN, class Warp, class A>
LOCFAST_BODY void multiply_by_rows(const Warp& warp, Sums<Warp, 16 * kN>& sums, const A& a, int offset, int first) {
  LOCFAST_UNROLL
  for (int block = 0; block < kD / 16; ++block) {
    Operand<Warp, 16> left;
    a.load(warp, block, left);
    LOCFAST_UNROLL
    for (int j = 0; j < kN; ++j) {
      Registers<Warp, Array<uint32_t, 4>> right;
      warp.template load_matrices<false>(right, [&](int lane) {
        const int row = first + lane % 8 + lane / 16 * 8;
        return offset + row * kRowBytes<kD> + lane / 8 % 2 * 16 + j * 16 * kRowBytes<kD> + block * 32;
      });
      warp.template multiply<T>(sums, 2 * j, left, 0, right, 0);
      warp.template multiply<T>(sums, 2 * j + 1, left, 0, right, 1);
    }
  }
}

// Rows [first, first + 16 kN) in shared memory as right operands, each read once: multiply(row block, column block,
// operand [16, 16]).
template <int kD, int kN, class Warp, class Multiply>
LOCFAST_BODY void each_right_operand(const Warp& warp, int offset, int first, Multiply multiply) {
  LOCFAST_UNROLL
  for (int j = 0; j < kN; ++j) {
    LOCFAST_UNROLL
    for (int block = 0; block < kD / 16; ++block) {
      Registers<Warp, Array<uint32_t, 4>> right;
      warp.template load_matrices<true>(right, [&](int lane) {
        return offset + (first + lane % 16) * kRowBytes<kD> + lane / 16 * 16 + j * 16 * kRowBytes<kD> + block * 32;
      });
      multiply(j, block, right);
    }
  }
}

// sums [16, kD] += a [16, 16 kN] x rows [first, first + 16 kN) in shared memory
template <typename T, int kD, int kN, class Warp>
LOCFAST_BODY void multiply_into_columns(const Warp& warp, Sums<Warp, kD>& sums, const Operand<Warp, 16 * kN>& a,
                                        int offset, int first) {
  each_right_operand<kD, kN>(warp, offset, first, [&](int j, int block, const auto& right) {
    warp.template multiply<T>(sums, 2 * block, a, j, right, 0);
    warp.template multiply<T>(sums, 2 * block + 1, a, j, right, 1);
  });
}

// Sums [16, 16 kN] rounded to 16 bits, as an A operand: the layouts agree, so no lane asks another.
template <typename T, int kN, class Warp>
LOCFAST_BODY void pack_operand(const Warp& warp, Operand<Warp, 16 * kN>& to, const Sums<Warp, 16 * kN>& sums) {
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int i = 0; i < 4 * kN; ++i) to[lane][i] = Warp::template pack<T>(sums[lane][2 * i], sums[lane][2 * i + 1]);
  });
}

// Products of q and k -> x (see Cap). A uniform branch around an unrolled loop, not one in it.
template <Tanh kTanh, class Warp, class Fragment>
LOCFAST_BODY void cap_scores(const Warp& warp, Fragment& scores, const Cap& cap) {
  using Math = typename Warp::Math;
  constexpr int N = kSizeOf<Fragment>;
  if (!cap.capped) return;
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int i = 0; i < N; ++i) scores[lane][i] *= cap.inner;
  });
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int i = 0; i < N; ++i) {
      float& x = scores[lane][i];
      x = kTanh == Tanh::kAccurate ? accurate_tanh<Math>(x) : Math::hardware_tanh(x);
    }
  });
}

// One bit for each of `count` columns from `first` on: whether the row behind it is present.
template <class Block, typename T>
LOCFAST_BODY void note_present(Block& block, int offset, const Rows<T>& rows, int first, int count) {
  block.each_thread([&](int thread) {
    for (int word = thread; word < (count + 31) / 32; word += block.threads()) {
      uint32_t bits = 0;
      for (int bit = 0; bit < 32; ++bit) {
        const int column = 32 * word + bit;
        bits |= static_cast<uint32_t>(column < count && rows.present(first + column)) << bit;
      }
      block.store(thread, offset + 4 * word, bits);
    }
  });
}

// Walks over the columns of one head, chunk by chunk: copies of the next chunk run behind the work on this one. A head
// that is one chunk is copied once and stays, whatever the number of row tiles; more chunks mean one tile a block.
template <class Block, class Load, class Begin, class Attend, class Finish>
LOCFAST_BODY void walk_columns(Block& block, const Walk& walk, int columns, Load load, Begin begin, Attend attend,
                               Finish finish) {
  const int split = static_cast<int>(block.index() % walk.splits);
  const auto size_of = [&](int chunk) {
    const int left = (columns + 15) / 16 * 16 - chunk * walk.chunk;
    return left < walk.chunk ? left : walk.chunk;
  };
  if (columns > 0) load(0, 0, size_of(0));
  block.commit();
  for (int tile = split; tile < walk.tiles; tile += walk.splits) {
    begin(tile);
    for (int chunk = 0; columns > 0 && chunk < walk.chunks; ++chunk) {
      if (chunk + 1 < walk.chunks) {
        load((chunk + 1) % 2, (chunk + 1) * walk.chunk, size_of(chunk + 1));
        block.commit();
        block.template wait<1>();
      } else {
        block.template wait<0>();
      }
      if (tile == split) block.sync();
      attend(tile, chunk % 2, size_of(chunk));
      if (walk.chunks > 1) block.sync();
    }
    finish(tile);
  }
}

}  // namespace locfast::softcap_attention
