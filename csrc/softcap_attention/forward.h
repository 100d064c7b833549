// Forward: every warp owns 16 queries and walks over the keys of their head.
#pragma once

#include "tiles.h"

namespace locfast::softcap_attention {

template <typename T>
struct ForwardArguments {
  Tensor4<const T> q, k, v;
  Mask key_mask;
  Tensor4<T> out;
  float* lse;  // [B, H, Tq]
  Shape shape;
  Walk walk;
  Cap cap;
};

template <class Warp, int kD>
struct ForwardState {
  Operand<Warp, kD> q;
  Sums<Warp, kD> out;
  Registers<Warp, Array<float, 2>> sum, maximum;  // of a lane's own columns; of the whole row
};

// Scores of 16 queries and 16 kN keys -> weights as an A operand, their sums, and what the sums so far shrink by.
template <typename T, int kN, Softmax kSoftmax, class Warp, int kD>
LOCFAST_BODY void take_softmax(const Warp& warp, Sums<Warp, 16 * kN>& scores, ForwardState<Warp, kD>& state,
                               const Cap& cap) {
  using Math = typename Warp::Math;
  if constexpr (kSoftmax == Softmax::kBounded) {
    warp.each_lane([&](int lane) {
      LOCFAST_UNROLL
      for (int i = 0; i < 8 * kN; ++i) {
        scores[lane][i] = Math::exp2(fmaf(scores[lane][i], cap.outer, -cap.shift));
        state.sum[lane][half_of(i)] += scores[lane][i];
      }
    });
    return;
  }
  Registers<Warp, Array<float, 2>> maximum;
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int half = 0; half < 2; ++half) maximum[lane][half] = -INFINITY;
    LOCFAST_UNROLL
    for (int i = 0; i < 8 * kN; ++i) {
      maximum[lane][half_of(i)] = fmaxf(maximum[lane][half_of(i)], scores[lane][i]);
    }
  });
  warp.maximum_over_rows(maximum);
  warp.each_lane([&](int lane) {
    Array<float, 2> origin;
    LOCFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float before = state.maximum[lane][half], now = fmaxf(before, maximum[lane][half]);
      state.maximum[lane][half] = now;
      origin[half] = now == -INFINITY ? 0.0f : now;  // nothing but hidden keys so far
      const float shrink = Math::exp2(before - origin[half]);
      state.sum[lane][half] *= shrink;
      LOCFAST_UNROLL
      for (int tile = 0; tile < kD / 8; ++tile) {
        state.out[lane][4 * tile + 2 * half] *= shrink;
        state.out[lane][4 * tile + 2 * half + 1] *= shrink;
      }
    }
    LOCFAST_UNROLL
    for (int i = 0; i < 8 * kN; ++i) {
      scores[lane][i] = Math::exp2(scores[lane][i] - origin[half_of(i)]);
      state.sum[lane][half_of(i)] += scores[lane][i];
    }
  });
}

// Keys [first, first + 16 kN) of the chunk whose keys, values and mask bits start at the three offsets.
template <typename T, int kD, int kN, Softmax kSoftmax, Tanh kTanh, class Warp>
LOCFAST_BODY void attend_keys(const Warp& warp, ForwardState<Warp, kD>& state, const Cap& cap, int keys, int values,
                              int bits, int first) {
  Array<uint32_t, (kN + 1) / 2> present;
  constexpr uint32_t kAll = kN == 1 ? 0xffffu : ~0u;
  bool all = true, none = true;
  LOCFAST_UNROLL
  for (int word = 0; word < (kN + 1) / 2; ++word) {
    present[word] = warp.template load<uint32_t>(bits + 4 * (first / 32 + word)) >> first % 32 & kAll;
    all &= present[word] == kAll;
    none &= present[word] == 0;
  }
  if (none) return;

  Sums<Warp, 16 * kN> scores;
  clear(warp, scores);
  multiply_by_rows<T, kD, kN>(warp, scores, HeldOperand<Warp, kD>{state.q}, keys, first);
  cap_scores<kTanh>(warp, scores, cap);
  if constexpr (kSoftmax == Softmax::kOnline) {
    warp.each_lane([&](int lane) {
      LOCFAST_UNROLL
      for (int i = 0; i < 8 * kN; ++i) scores[lane][i] *= cap.outer;
    });
  }
  if (!all) {
    warp.each_lane([&](int lane) {
      LOCFAST_UNROLL
      for (int i = 0; i < 8 * kN; ++i) {
        const int column = column_of(0, i);
        if (!(present[column / 32] >> 2 * (lane % 4) >> column % 32 & 1u)) scores[lane][i] = -INFINITY;
      }
    });
  }
  take_softmax<T, kN, kSoftmax>(warp, scores, state, cap);
  Operand<Warp, 16 * kN> weights;
  pack_operand<T, kN>(warp, weights, scores);
  multiply_into_columns<T, kD, kN>(warp, state.out, weights, values, first);
}

template <typename T, int kD, Softmax kSoftmax, class Warp>
LOCFAST_BODY void finish_rows(const Warp& warp, ForwardState<Warp, kD>& state, const ForwardArguments<T>& a,
                              int pair, int first) {
  const Rows<T> out = a.shape.head(pair).rows(a.out, a.shape.queries);
  using Math = typename Warp::Math;
  warp.sum_over_rows(state.sum);
  Registers<Warp, Array<float, 2>> factors;
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = state.sum[lane][half];
      factors[lane][half] = sum == 0.0f ? 0.0f : 1.0f / sum;  // the sum of a row with NaN is NaN, and stays it
      const int row = first + row_of(lane, half);
      if (lane % 4 != 0 || row >= out.count) continue;
      const float origin = kSoftmax == Softmax::kBounded ? a.cap.shift : state.maximum[lane][half];
      const float lse = origin * (1.0f / kLog2E) + Math::log(sum);
      a.lse[int64_t{pair} * out.count + row] = sum == 0.0f ? INFINITY : lse;  // exp(s - lse) is then zero for every s
    }
  });
  store_sums<kD>(warp, out, first, a.shape.head_dim, state.out, factors);
}

template <typename T, int kD, Softmax kSoftmax, Tanh kTanh, class Block>
LOCFAST_BODY void forward(Block& block, const ForwardArguments<T>& a) {
  using Warp = typename Block::Warp;
  const Shape& shape = a.shape;
  const int pair = block.index() / a.walk.splits;
  const Head head = shape.head(pair);

  const int values = a.walk.chunk * kRowBytes<kD>, bits = 2 * values, buffer = bits + mask_bytes(a.walk.chunk);
  typename Block::template PerWarp<ForwardState<Warp, kD>> states;
  // Calls body(warp, state, first query) in every warp that has queries in this tile.
  const auto each_strip = [&](int tile, auto body) {
    block.each_warp([&](const Warp& warp, int index) {
      const int first = 16 * (tile * block.warps() + index);
      if (first < shape.queries) body(warp, states[index], first);
    });
  };

  walk_columns(
      block, a.walk, shape.keys,
      [&](int half, int first, int count) {
        const Rows<const T> k = head.rows(a.k, shape.keys, a.key_mask), v = head.rows(a.v, shape.keys, a.key_mask);
        copy_rows<kD>(block, half * buffer, k, first, count, shape.head_dim);
        copy_rows<kD>(block, half * buffer + values, v, first, count, shape.head_dim);
        note_present(block, half * buffer + bits, k, first, count);
      },
      [&](int tile) {
        each_strip(tile, [&](const Warp& warp, ForwardState<Warp, kD>& state, int first) {
          load_operand<kD>(warp, state.q, head.rows(a.q, shape.queries), first, shape.head_dim);
          clear(warp, state.out);
          warp.each_lane([&](int lane) {
            state.sum[lane] = {0.0f, 0.0f};
            state.maximum[lane] = {-INFINITY, -INFINITY};
          });
        });
      },
      [&](int tile, int half, int count) {
        each_strip(tile, [&](const Warp& warp, ForwardState<Warp, kD>& state, int) {
          const int keys = half * buffer;
          int key = 0;  // tails go by 16 keys: 197 tokens cost 208, not 256
          for (; key + 64 <= count; key += 64) {
            attend_keys<T, kD, 4, kSoftmax, kTanh>(warp, state, a.cap, keys, keys + values, keys + bits, key);
          }
          for (; key < count; key += 16) {
            attend_keys<T, kD, 1, kSoftmax, kTanh>(warp, state, a.cap, keys, keys + values, keys + bits, key);
          }
        });
      },
      [&](int tile) {
        each_strip(tile, [&](const Warp& warp, ForwardState<Warp, kD>& state, int first) {
          finish_rows<T, kD, kSoftmax>(warp, state, a, pair, first);
        });
      });
}

}  // namespace locfast::softcap_attention
