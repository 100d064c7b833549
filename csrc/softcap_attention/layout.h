// Where things lie in a block's shared memory, for the kernels and for the host that asks for the bytes.
#pragma once

#include "softcap_attention.h"

namespace locfast::softcap_attention {

// Head dims are padded with zeros to one of these widths in shared memory and registers, not in global memory.
constexpr int kWidths[] = {64, 80, 96, 128};

// A row of 16-bit elements takes 16 bytes more than it needs: an odd multiple of 16, so that eight consecutive rows
// start in different banks, and matrix loads have no conflict.
constexpr int row_bytes(int width) { return 2 * width + 16; }

// The mask bits of a chunk of keys.
LOCFAST_BOTH int mask_bytes(int chunk) { return (chunk + 127) / 128 * 16; }

constexpr int kStatisticBytes = 8;  // of one query: its lse (in units of log 2) and its delta

// k and v of a warp's 16 keys stay in registers where these suffice, beside two sums of as many columns; else they are
// read again and again from the warp's own place in shared memory.
constexpr bool holds_keys(int width) { return width <= 80; }

// That place: keys and values.
constexpr int warp_bytes(int width) { return holds_keys(width) ? 0 : 2 * 16 * row_bytes(width); }

}  // namespace locfast::softcap_attention
