// The whole backward of one head in one block: q and its output gradient stay in shared memory, and so does q's
// gradient, in fp32. Warps own 16 keys each and start at different queries; all move on together, so that no two ever
// add to the same rows of q's gradient, and every row gets its terms in the same order on every run.
//
// Not the default, and only for measuring: delta is the sum of grad * out with the rounded out, and where one key takes
// nearly all of a row, the gradients of q and k err up to 2.7 times as much as they may (fp16). The remedy, in
// backward.h, knows delta only once it has seen the whole row, which is too late for the first keys' gradients here.
#pragma once

#include "backward_keys.h"

namespace locfast::softcap_attention {

struct alignas(16) Quad {
  float value[4];
};

// Sums of q's gradient lie in the order of the fragments: tile [16, 8] by tile, lane by lane.
template <int kD>
LOCFAST_BODY int sum_offset(int strip, int tile, int lane) {
  return ((strip * (kD / 8) + tile) * kLanes + lane) * static_cast<int>(sizeof(Quad));
}

// Adds score_grads^T [16 kN queries, 16 keys] x the warp's keys to q's gradient, queries [first, first + 16 kN).
template <typename T, int kD, int kN, class Warp>
LOCFAST_BODY void add_to_queries(const Warp& warp, const Operand<Warp, 16 * kN>& score_grads, int keys, int sums,
                                 int first) {
  Operand<Warp, 16 * kN> left;
  LOCFAST_UNROLL
  for (int j = 0; j < kN; ++j) {
    LOCFAST_UNROLL
    for (int i = 0; i < 4; ++i) warp.transpose(left, 4 * j + i, score_grads, 4 * j + i % 2 * 2 + i / 2);
  }
  LOCFAST_UNROLL_2  // not further: 255 registers would not do
  for (int block = 0; block < kD / 16; ++block) {
    Registers<Warp, Array<uint32_t, 4>> right;
    warp.template load_matrices<true>(right, [&](int lane) {
      return keys + lane % 16 * kRowBytes<kD> + lane / 16 * 16 + block * 32;
    });
    LOCFAST_UNROLL
    for (int j = 0; j < kN; ++j) {
      const auto offset_of = [&](int half, int lane) {
        return sums + sum_offset<kD>(first / 16 + j, 2 * block + half, lane);
      };
      Sums<Warp, 16> total;
      warp.each_lane([&](int lane) {
        LOCFAST_UNROLL
        for (int i = 0; i < 8; i += 4) {
          const Quad before = warp.template load<Quad>(offset_of(i / 4, lane));
          LOCFAST_UNROLL
          for (int part = 0; part < 4; ++part) total[lane][i + part] = before.value[part];
        }
      });
      warp.template multiply<T>(total, 0, left, j, right, 0);
      warp.template multiply<T>(total, 1, left, j, right, 1);
      warp.each_lane([&](int lane) {
        LOCFAST_UNROLL
        for (int i = 0; i < 8; i += 4) {
          const Array<float, 8>& now = total[lane];
          warp.store(offset_of(i / 4, lane), Quad{now[i], now[i + 1], now[i + 2], now[i + 3]});
        }
      });
    }
  }
}

template <typename T, int kD, Tanh kTanh, class Block>
LOCFAST_BODY void backward_one_pass(Block& block, const BackwardArguments<T>& a) {
  using Warp = typename Block::Warp;
  const Shape& shape = a.shape;
  const auto head = [&] { return shape.head(block.index()); };
  const OnePassLayout at(kD, shape.queries);
  const int query_strips = (shape.queries + 15) / 16;
  const auto each_query_strip = [&](auto body) {
    block.each_warp([&](const Warp& warp, int index) {
      for (int strip = index; strip < query_strips; strip += block.warps()) body(warp, strip);
    });
  };

  copy_rows<kD>(block, 0, head().rows(a.q, shape.queries), 0, 16 * query_strips, shape.head_dim);
  copy_rows<kD>(block, at.grads, head().rows(a.grad, shape.queries), 0, 16 * query_strips, shape.head_dim);
  block.commit();
  each_query_strip([&](const Warp& warp, int strip) {
    Operand<Warp, kD> left, right;
    Registers<Warp, Array<float, 2>> delta;
    load_operand<kD>(warp, left, head().rows(a.grad, shape.queries), 16 * strip, shape.head_dim);
    load_operand<kD>(warp, right, head().rows(a.out, shape.queries), 16 * strip, shape.head_dim);
    multiply_rows<T, kD>(warp, delta, left, right);
    warp.each_lane([&](int lane) {
      LOCFAST_UNROLL
      for (int half = 0; half < 2 && lane % 4 == 0; ++half) {
        const int row = 16 * strip + row_of(lane, half);
        const float lse = row < shape.queries ? a.lse[int64_t{block.index()} * shape.queries + row] * kLog2E : INFINITY;
        warp.store(at.statistics + statistic_offset(row), lse);
        warp.store(at.statistics + statistic_offset(row) + kDeltaOffset, delta[lane][half]);
      }
      LOCFAST_UNROLL
      for (int tile = 0; tile < kD / 8; ++tile) {
        warp.store(at.sums + sum_offset<kD>(strip, tile, lane), Quad{});
      }
    });
  });
  block.template wait<0>();
  block.sync();

  constexpr int kUnit = kD <= 80 ? 2 : 1;  // strips of queries a warp takes at once: what registers allow
  const int units = (query_strips + kUnit - 1) / kUnit;
  const int steps = units < block.warps() ? block.warps() : units;
  typename Block::template PerWarp<KeyState<Warp, kD>> states;
  for (int strips = 0; 16 * strips < shape.keys; strips += block.warps()) {
    const auto each_key_strip = [&](auto body) {
      block.each_warp([&](const Warp& warp, int index) {
        const int first = 16 * (strips + index), own = at.scratch + index * kWarpBytes<kD, true>;
        if (first < shape.keys) body(warp, states[index], index, first, own);
      });
    };
    each_key_strip([&](const Warp& warp, KeyState<Warp, kD>& state, int, int first, int own) {
      begin_keys<true>(warp, state, a, head(), first, own);
    });
    for (int step = 0; step < steps; ++step) {
      each_key_strip([&](const Warp& warp, KeyState<Warp, kD>& state, int index, int, int own) {
        const int unit = (step + index) % steps, query = 16 * kUnit * unit;
        const auto take = [&](auto count) {
          constexpr int kN = decltype(count)::value;
          Operand<Warp, 16 * kN> score_grads;
          differentiate_queries<T, kD, kN, kTanh>(warp, state, score_grads, a.cap, 0, at.grads, at.statistics,
                                                        query, own);
          add_to_queries<T, kD, kN>(warp, score_grads, own, at.sums, query);
        };
        if (unit < units) {
          if (kUnit == 1 || query + 16 == 16 * query_strips) {
            take(std::integral_constant<int, 1>{});
          } else {
            take(std::integral_constant<int, kUnit>{});
          }
        }
      });
      block.sync();
    }
    each_key_strip([&](const Warp& warp, KeyState<Warp, kD>& state, int, int first, int) {
      finish_keys(warp, state, a, head(), first);
    });
  }

  each_query_strip([&](const Warp& warp, int strip) {
    Sums<Warp, kD> total;
    Registers<Warp, Array<float, 2>> factors;
    warp.each_lane([&](int lane) {
      factors[lane] = {a.cap.scale, a.cap.scale};
      LOCFAST_UNROLL
      for (int tile = 0; tile < kD / 8; ++tile) {
        const Quad quad = warp.template load<Quad>(at.sums + sum_offset<kD>(strip, tile, lane));
        LOCFAST_UNROLL
        for (int i = 0; i < 4; ++i) total[lane][4 * tile + i] = quad.value[i];
      }
    });
    store_sums<kD>(warp, head().rows(a.q_grad, shape.queries), 16 * strip, shape.head_dim, total, factors);
  });
}

}  // namespace locfast::softcap_attention
