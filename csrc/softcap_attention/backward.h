// Backward in two kernels: one walks like the forward and gives q's gradient and delta, one walks with the roles of
// queries and keys exchanged and gives those of k and v. Nothing is added by two writers: same bits on every run.
//
// delta_i = sum_j weight_ij weight_grad_ij is also the sum over D of grad * out, but out has been rounded, and where
// one key takes nearly all of a row, weight_grad - delta cancels and leaves that rounding. So the first kernel starts
// with this estimate and sums what it lacks, as weights add up to 1:
//     excess_i = sum_j weight_ij (weight_grad_ij - estimate_i).
// q's gradient, linear in delta, is put right at the end; the second kernel gets estimate + excess.
#pragma once

#include "tiles.h"

namespace locfast::softcap_attention {

template <typename T>
struct BackwardArguments {
  Tensor4<const T> grad, q, k, v, out;
  const float* lse;  // [B, H, Tq]
  Mask key_mask;
  Tensor4<T> q_grad, k_grad, v_grad;
  float* delta;  // [B, H, Tq]; scratch between the two kernels
  Shape shape;
  Walk walk;
  Cap cap;
};

// The same 16 rows of two tensors -> their inner products, in all lanes of a row.
template <typename T, int kD, class Warp>
LOCFAST_BODY void multiply_rows(const Warp& warp, Registers<Warp, Array<float, 2>>& products,
                                const Operand<Warp, kD>& left, const Operand<Warp, kD>& right) {
  warp.each_lane([&](int lane) {
    products[lane] = {0.0f, 0.0f};
    LOCFAST_UNROLL
    for (int i = 0; i < kD / 4; ++i) {
      const Array<float, 2> a = Warp::template unpack<T>(left[lane][i]), b = Warp::template unpack<T>(right[lane][i]);
      products[lane][i % 2] = fmaf(a[0], b[0], fmaf(a[1], b[1], products[lane][i % 2]));
    }
  });
  warp.sum_over_rows(products);
}

// x of one score (see Cap), the gradient of its weight, and its query's lse (in units of log 2) and delta -> its weight
// and the gradient of its capped logit. Returns the slope of that logit over the product of q and k, short of the
// scale. An absent pair has weight zero.
template <class Math>
LOCFAST_BODY float differentiate(float& x, float& weight_grad, bool present, float lse, float delta, const Cap& cap) {
  const float weight = present ? Math::exp2(fmaf(x, cap.outer, -lse)) : 0.0f;
  const float slope = fmaf(-x * x, cap.curvature, 1.0f);
  weight_grad = weight * (weight_grad - delta);
  x = weight;
  return slope;
}

template <class Warp, int kD>
struct QueryState {
  Operand<Warp, kD> q, grad;
  Sums<Warp, kD> q_grad, mean_key;  // mean_key: of weight * slope * key, what q's gradient loses per unit of delta
  Registers<Warp, Array<float, 2>> lse, delta, excess;  // delta: the estimate; excess: of a lane's own columns
};

// Keys [first, first + 16 kN) of a chunk.
template <typename T, int kD, int kN, Tanh kTanh, class Warp>
LOCFAST_BODY void differentiate_keys(const Warp& warp, QueryState<Warp, kD>& state, const Cap& cap, int keys,
                                     int values, int bits, int first) {
  static_assert(kN <= 2, "one word of mask bits");
  const uint32_t present = warp.template load<uint32_t>(bits + 4 * (first / 32)) >> first % 32;
  Sums<Warp, 16 * kN> scores, weight_grads;
  clear(warp, scores);
  clear(warp, weight_grads);
  multiply_by_rows<T, kD, kN>(warp, scores, HeldOperand<Warp, kD>{state.q}, keys, first);
  multiply_by_rows<T, kD, kN>(warp, weight_grads, HeldOperand<Warp, kD>{state.grad}, values, first);
  cap_scores<kTanh>(warp, scores, cap);
  warp.each_lane([&](int lane) {
    const uint32_t mine = present >> 2 * (lane % 4);
    LOCFAST_UNROLL
    for (int i = 0; i < 8 * kN; ++i) {
      const float slope = differentiate<typename Warp::Math>(
          scores[lane][i], weight_grads[lane][i], mine >> column_of(0, i) & 1u, state.lse[lane][half_of(i)],
          state.delta[lane][half_of(i)], cap);
      state.excess[lane][half_of(i)] += weight_grads[lane][i];
      weight_grads[lane][i] *= slope;
      scores[lane][i] *= slope;
    }
  });
  Operand<Warp, 16 * kN> score_grads, sloped_weights;
  pack_operand<T, kN>(warp, score_grads, weight_grads);
  pack_operand<T, kN>(warp, sloped_weights, scores);
  each_right_operand<kD, kN>(warp, keys, first, [&](int j, int block, const auto& right) {
    LOCFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      warp.template multiply<T>(state.q_grad, 2 * block + half, score_grads, j, right, half);
      warp.template multiply<T>(state.mean_key, 2 * block + half, sloped_weights, j, right, half);
    }
  });
}

template <typename T, int kD, Tanh kTanh, class Block>
LOCFAST_BODY void backward_queries(Block& block, const BackwardArguments<T>& a) {
  using Warp = typename Block::Warp;
  const Shape& shape = a.shape;
  const int pair = block.index() / a.walk.splits;
  const Head head = shape.head(pair);

  const int values = a.walk.chunk * kRowBytes<kD>, bits = 2 * values, buffer = bits + mask_bytes(a.walk.chunk);
  typename Block::template PerWarp<QueryState<Warp, kD>> states;
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
        each_strip(tile, [&](const Warp& warp, QueryState<Warp, kD>& state, int first) {
          load_operand<kD>(warp, state.q, head.rows(a.out, shape.queries), first, shape.head_dim);
          load_operand<kD>(warp, state.grad, head.rows(a.grad, shape.queries), first, shape.head_dim);
          multiply_rows<T, kD>(warp, state.delta, state.grad, state.q);
          load_operand<kD>(warp, state.q, head.rows(a.q, shape.queries), first, shape.head_dim);
          clear(warp, state.q_grad);
          clear(warp, state.mean_key);
          clear(warp, state.excess);
          warp.each_lane([&](int lane) {
            LOCFAST_UNROLL
            for (int half = 0; half < 2; ++half) {
              const int row = first + row_of(lane, half);
              const int64_t index = int64_t{pair} * shape.queries + row;
              state.lse[lane][half] = row < shape.queries ? a.lse[index] * kLog2E : INFINITY;
            }
          });
          warp.sync();
        });
      },
      [&](int tile, int half, int count) {
        each_strip(tile, [&](const Warp& warp, QueryState<Warp, kD>& state, int) {
          const int keys = half * buffer;
          constexpr int kUnit = kD <= 80 ? 2 : 1;  // strips of keys a warp takes at once: what registers allow
          int key = 0;
          for (; key + 16 * kUnit <= count; key += 16 * kUnit) {
            differentiate_keys<T, kD, kUnit, kTanh>(warp, state, a.cap, keys, keys + values, keys + bits, key);
          }
          if (kUnit > 1 && key < count) {
            differentiate_keys<T, kD, 1, kTanh>(warp, state, a.cap, keys, keys + values, keys + bits, key);
          }
        });
      },
      [&](int tile) {
        each_strip(tile, [&](const Warp& warp, QueryState<Warp, kD>& state, int first) {
          warp.sum_over_rows(state.excess);
          Registers<Warp, Array<float, 2>> factors;
          warp.each_lane([&](int lane) {
            factors[lane] = {a.cap.scale, a.cap.scale};
            LOCFAST_UNROLL
            for (int half = 0; half < 2; ++half) {
              const int row = first + row_of(lane, half);
              if (lane % 4 != 0 || row >= shape.queries) continue;
              a.delta[int64_t{pair} * shape.queries + row] = state.delta[lane][half] + state.excess[lane][half];
            }
            LOCFAST_UNROLL
            for (int i = 0; i < kD / 2; ++i) {
              state.q_grad[lane][i] = fmaf(-state.excess[lane][half_of(i)], state.mean_key[lane][i],
                                           state.q_grad[lane][i]);
            }
          });
          store_sums<kD>(warp, head.rows(a.q_grad, shape.queries), first, shape.head_dim, state.q_grad, factors);
        });
      });
}

}  // namespace locfast::softcap_attention
