// How a launch is laid out: by bytes against the shared memory that the device has.
#pragma once

#include <cstdint>

#include "layout.h"

namespace locfast::softcap_attention {

struct Limits {
  int64_t block_bytes;           // shared memory that one block may take
  int64_t multiprocessor_bytes;  // and all blocks of a multiprocessor together
  int multiprocessors;
};

// What the CPU pretends to be: an H100 or H200 (sm_90).
constexpr Limits kHopper{227 * 1024, 228 * 1024, 132};

// Head dim -> the width it is padded to; 0 where there is none.
inline int width_of(int64_t head_dim) {
  for (const int width : kWidths) {
    if (head_dim <= width) return head_dim > 0 ? width : 0;
  }
  return 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Warps own rows, columns pass by. chunk_bytes(n): of n columns in shared memory; warp_bytes: of one warp's own place.
// blocks is -1 where nothing fits.
template <class ChunkBytes>
Walk plan_walk(int64_t pairs, int rows, int columns, const Limits& limits, ChunkBytes chunk_bytes, int warp_bytes) {
  const int strips = static_cast<int>(ceil_div(rows, 16));
  const int all = std::max(16, static_cast<int>(ceil_div(columns, 16)) * 16);
  const auto make = [&](int most_warps, int chunk) {
    Walk walk{};
    walk.tiles = static_cast<int>(ceil_div(strips, most_warps));
    walk.warps = walk.tiles == 0 ? 1 : static_cast<int>(ceil_div(strips, walk.tiles));
    walk.chunk = chunk;
    walk.chunks = static_cast<int>(ceil_div(all, chunk));
    walk.shared_bytes = chunk_bytes(chunk) * (walk.chunks > 1 ? 2 : 1) + static_cast<int64_t>(walk.warps) * warp_bytes;
    return walk;
  };
  const auto with_splits = [&](Walk walk, int64_t splits) {
    walk.splits = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(splits, walk.tiles)));
    walk.blocks = walk.tiles == 0 ? 0 : pairs * walk.splits;
    return walk;
  };
  // All columns stay: a block takes all rows of its head, or fewer where there are too few heads to fill the device.
  // One block hides another's copies and syncs, so two of four warps are better than one of eight.
  constexpr int64_t kReserved = 1024;  // CUDA takes a KiB of every block for itself
  const Walk small = make(4, all), large = make(kMostWarps, all);
  if (small.shared_bytes <= limits.block_bytes &&
      2 * (small.shared_bytes + kReserved) <= limits.multiprocessor_bytes) {
    const int64_t together = limits.multiprocessor_bytes / (small.shared_bytes + kReserved);
    const int64_t wanted = limits.multiprocessors * std::min<int64_t>(together, 4);
    return with_splits(small, ceil_div(wanted, std::max<int64_t>(pairs, 1)));
  }
  if (large.shared_bytes <= limits.block_bytes) {
    return with_splits(large, ceil_div(limits.multiprocessors, std::max<int64_t>(pairs, 1)));
  }
  for (const int chunk : {64, 32}) {
    for (const int most_warps : {kMostWarps, 4}) {
      const Walk walk = make(most_warps, chunk);
      if (walk.shared_bytes <= limits.block_bytes) return with_splits(walk, walk.tiles);
    }
  }
  Walk none{};
  none.blocks = -1;
  return none;
}

// Rows are queries, columns keys with their mask bits: the forward, and the backward's first kernel.
inline Walk plan_queries(const Shape& shape, int width, const Limits& limits) {
  return plan_walk(int64_t{shape.batch} * shape.heads, shape.queries, shape.keys, limits,
                   [&](int chunk) { return int64_t{2} * chunk * row_bytes(width) + mask_bytes(chunk); }, 0);
}

// Rows are keys, columns queries with their statistics: the backward's second kernel.
inline Walk plan_keys(const Shape& shape, int width, const Limits& limits) {
  return plan_walk(int64_t{shape.batch} * shape.heads, shape.keys, shape.queries, limits,
                   [&](int chunk) { return int64_t{chunk} * (2 * row_bytes(width) + kStatisticBytes); },
                   warp_bytes(width));
}

}  // namespace locfast::softcap_attention
