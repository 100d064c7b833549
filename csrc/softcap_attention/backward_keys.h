// Gradients of k and v: every warp owns 16 keys and walks over the queries of their head. Scores are computed
// transposed, so weights and their gradients are operands of the next products without leaving their lanes.
#pragma once

#include "backward.h"

namespace locfast::softcap_attention {

template <int kD>
constexpr bool kHoldKeys = holds_keys(kD);
template <int kD>
constexpr int kWarpBytes = warp_bytes(kD);

struct alignas(16) TwoStatistics {
  float lse[2], delta[2];  // of queries 2 i and 2 i + 1
};
LOCFAST_BODY int statistic_offset(int query) { return query / 2 * 2 * kStatisticBytes + query % 2 * 4; }
constexpr int kDeltaOffset = 8;

template <class Warp, int kD>
struct KeyState {
  Operand<Warp, kD> k, v;
  Sums<Warp, kD> k_grad, v_grad;
  Registers<Warp, Array<bool, 2>> present;
};

template <class Warp, int kD, typename T>
LOCFAST_BODY void begin_keys(const Warp& warp, KeyState<Warp, kD>& state, const BackwardArguments<T>& a,
                             const Head& head, int first, int own) {
  const Rows<const T> k = head.rows(a.k, a.shape.keys, a.key_mask), v = head.rows(a.v, a.shape.keys, a.key_mask);
  const int head_dim = a.shape.head_dim;
  if constexpr (kHoldKeys<kD>) {
    load_operand<kD>(warp, state.k, k, first, head_dim);
    load_operand<kD>(warp, state.v, v, first, head_dim);
  } else {
    copy_strip<kD>(warp, own, k, first, head_dim);
    copy_strip<kD>(warp, own + 16 * kRowBytes<kD>, v, first, head_dim);
  }
  clear(warp, state.k_grad);
  clear(warp, state.v_grad);
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int half = 0; half < 2; ++half) state.present[lane][half] = k.present(first + row_of(lane, half));
  });
  warp.sync();
}

// Queries [first, first + 16 kN) of those whose rows, output gradients and statistics start at the three offsets.
template <typename T, int kD, int kN, Tanh kTanh, class Warp>
LOCFAST_BODY void differentiate_queries(const Warp& warp, KeyState<Warp, kD>& state, const Cap& cap, int queries,
                                        int grads, int statistics, int first, int own) {
  const auto held_or_shared = [&](const Operand<Warp, kD>& held, int offset) {
    if constexpr (kHoldKeys<kD>) {
      return HeldOperand<Warp, kD>{held};
    } else {
      return SharedOperand<Warp, kD>{offset};
    }
  };
  Sums<Warp, 16 * kN> scores, weight_grads;
  clear(warp, scores);
  clear(warp, weight_grads);
  multiply_by_rows<T, kD, kN>(warp, scores, held_or_shared(state.k, own), queries, first);
  multiply_by_rows<T, kD, kN>(warp, weight_grads, held_or_shared(state.v, own + 16 * kRowBytes<kD>), grads, first);
  cap_scores<kTanh>(warp, scores, cap);
  warp.each_lane([&](int lane) {
    LOCFAST_UNROLL
    for (int tile = 0; tile < 2 * kN; ++tile) {
      const int query = first + column_of(lane, 4 * tile);
      const TwoStatistics two = warp.template load<TwoStatistics>(statistics + query * kStatisticBytes);
      LOCFAST_UNROLL
      for (int i = 4 * tile; i < 4 * tile + 4; ++i) {
        weight_grads[lane][i] *= differentiate<typename Warp::Math>(
            scores[lane][i], weight_grads[lane][i], state.present[lane][half_of(i)], two.lse[i % 2], two.delta[i % 2],
            cap);
      }
    }
  });
  Operand<Warp, 16 * kN> weights, score_grads;
  pack_operand<T, kN>(warp, weights, scores);
  multiply_into_columns<T, kD, kN>(warp, state.v_grad, weights, grads, first);
  pack_operand<T, kN>(warp, score_grads, weight_grads);
  multiply_into_columns<T, kD, kN>(warp, state.k_grad, score_grads, queries, first);
}

template <class Warp, int kD, typename T>
LOCFAST_BODY void finish_keys(const Warp& warp, const KeyState<Warp, kD>& state, const BackwardArguments<T>& a,
                              const Head& head, int first) {
  Registers<Warp, Array<float, 2>> factors;
  warp.each_lane([&](int lane) { factors[lane] = {a.cap.scale, a.cap.scale}; });
  store_sums<kD>(warp, head.rows(a.k_grad, a.shape.keys), first, a.shape.head_dim, state.k_grad, factors);
  warp.each_lane([&](int lane) { factors[lane] = {1.0f, 1.0f}; });
  store_sums<kD>(warp, head.rows(a.v_grad, a.shape.keys), first, a.shape.head_dim, state.v_grad, factors);
}

template <typename T, int kD, Tanh kTanh, class Block>
LOCFAST_BODY void backward_keys(Block& block, const BackwardArguments<T>& a) {
  using Warp = typename Block::Warp;
  const Shape& shape = a.shape;
  const int pair = block.index() / a.walk.splits;
  const Head head = shape.head(pair);

  const int grads = a.walk.chunk * kRowBytes<kD>, statistics = 2 * grads;
  const int buffer = statistics + a.walk.chunk * kStatisticBytes;
  const int scratch = buffer * (a.walk.chunks > 1 ? 2 : 1);
  typename Block::template PerWarp<KeyState<Warp, kD>> states;
  const auto each_strip = [&](int tile, auto body) {
    block.each_warp([&](const Warp& warp, int index) {
      const int first = 16 * (tile * block.warps() + index);
      if (first < shape.keys) body(warp, states[index], first, scratch + index * kWarpBytes<kD>);
    });
  };

  walk_columns(
      block, a.walk, shape.queries,
      [&](int half, int first, int count) {
        copy_rows<kD>(block, half * buffer, head.rows(a.q, shape.queries), first, count, shape.head_dim);
        copy_rows<kD>(block, half * buffer + grads, head.rows(a.grad, shape.queries), first, count, shape.head_dim);
        block.each_thread([&](int thread) {
          for (int i = thread; i < count; i += block.threads()) {
            const bool present = first + i < shape.queries;
            const int64_t index = int64_t{pair} * shape.queries + first + i;
            const int at = half * buffer + statistics + statistic_offset(i);
            block.store(thread, at, present ? a.lse[index] * kLog2E : INFINITY);
            block.store(thread, at + kDeltaOffset, present ? a.delta[index] : 0.0f);
          }
        });
      },
      [&](int tile) {
        each_strip(tile, [&](const Warp& warp, KeyState<Warp, kD>& state, int first, int own) {
          begin_keys(warp, state, a, head, first, own);
        });
      },
      [&](int tile, int half, int count) {
        each_strip(tile, [&](const Warp& warp, KeyState<Warp, kD>& state, int, int own) {
          const int queries = half * buffer;
          const auto take = [&](auto count, int query) {
            constexpr int kN = decltype(count)::value;
            differentiate_queries<T, kD, kN, kTanh>(warp, state, a.cap, queries, queries + grads, queries + statistics,
                                                    query, own);
          };
          constexpr int kUnit = kD <= 96 ? 2 : 1;  // strips of queries a warp takes at once: what registers allow
          int query = 0;
          for (; query + 16 * kUnit <= count; query += 16 * kUnit) take(std::integral_constant<int, kUnit>{}, query);
          if (kUnit > 1 && query < count) take(std::integral_constant<int, 1>{}, query);
        });
      },
      [&](int tile) {
        each_strip(tile, [&](const Warp& warp, KeyState<Warp, kD>& state, int first, int) {
          finish_keys(warp, state, a, head, first);
        });
      });
}

}  // namespace locfast::softcap_attention
