// One row of x, as integers, times the rows of a matrix: what decoding spends its time on.
//
// The sums are those of a panel (panels.h), added in the same order, because a row's sums must not depend on its
// neighbours. But codes are multiplied as soon as they are there, without a panel in memory, and the matrix is asked for
// ahead, in the order of memory: processors look ahead by themselves along one line of addresses, but not along eight rows.
#pragma once
#include "panels.h"

namespace jaxllm { namespace JAXLLM_LEVEL {

constexpr int64_t kAhead = 8 << 10;  // bytes, in addition to eight rows

// Asks memory for what is read next, for the second cache. It begins with what is read at once, and gains on it.
struct Ahead {
  const uint8_t* from;
  int64_t size, distance, asked, read;  // bytes
  inline __attribute__((always_inline)) void step(int64_t bytes) {
    read += bytes;
    const int64_t to = least(asked + 2 * bytes, least(read + distance, size));
    for (; asked < to; asked += 64) __builtin_prefetch(from + asked, 0, 2);
  }
};

// A group of eight rows times x.
template <class F>
INLINE s32x8 sum_of_group(const u8x32* codes, const int8_t* x, int32_t raised) {
  constexpr int vectors = F::kGroup / 4, depth = depth_of<F::kDepth, 1>(vectors);
  s32x8 sum = start<F::kDepth>(raised);
  UNROLL
  for (int v = 0; v < vectors; v += depth) {
    Dot<F::kDepth> dot;
    dot.clear();
    UNROLL
    for (int d = 0; d < depth; d++) dot.add(codes[v + d], broadcast4(x + 4 * (v + d)));
    sum = dot.finish(sum);
  }
  return sum;
}

// Blocks of eight rows times x, added to `total`; the first group is group `g` of the slice.
template <class F>
INLINE void add_blocks(const Blocks& blocks, const RoundedSlice& x, int g, f32x8& total) {
  constexpr int groups = F::kChunk / F::kGroup;
  u32x8 words[F::kWords];
  f32x8 scale[groups], offset[groups];
  F::heads(blocks, words);
  F::scales(words, scale, offset);
  Four codes[F::kChunk / 16];
  F::codes(blocks, codes);
  UNROLL
  for (int i = 0; i < groups; i++, g++) {
    const int32_t raised = F::kGroup == 16 ? x.raised16[g] : x.raised32[g];
    const s32x8 sum = sum_of_group<F>(codes[0].v + F::kGroup / 4 * i, x.codes + F::kGroup * g, raised);
    total += floats(sum) * (scale[i] * broadcast(x.scale[g * F::kGroup / 32]));
    if (F::kOffset) total += offset[i] * broadcast(F::kGroup == 16 ? x.sum16[g] : x.sum32[g]);
  }
}

template <class F>
static void rounded_row(const Product& p, const RoundedX& x, int64_t begin, int64_t end) {
  constexpr int slice = kSlice / F::kChunk, groups = F::kChunk / F::kGroup;
  const Matrix& m = p.matrix;
  const int64_t chunks = (m.cols + F::kChunk - 1) / F::kChunk, bytes = kRows * m.row_bytes[0];
  Ahead ahead{row_of(m, 0, begin), (least(end, m.rows) - begin) * m.row_bytes[0], bytes + kAhead, 0, 0};
  for (int64_t row = begin; row < end; row += kRows) {
    f32x8 sums = {};
    for (int64_t first = 0; first < chunks; first += slice) {
      const int64_t last = least(first + slice, chunks);
      const RoundedSlice& of_x = x.slices[first / slice * x.rows + p.x_row];
      ahead.step(bytes * (last - first) / chunks);
      if constexpr (in_blocks<F>(0)) {
        if (row + kRows <= m.rows) {
          Blocks blocks{row_of(m, 0, row) + F::kBlock * first, m.row_bytes[0], 3 * m.row_bytes[0]};
          f32x8 total = {};
          for (int g = 0; g < (last - first) * groups; g += groups, blocks.p += F::kBlock) {
            add_blocks<F>(blocks, of_x, g, total);
          }
          sums += total;
          continue;
        }
      }
      Codes panel;
      decode_codes<F>(m, row, first, last, panel);
      add_codes<F::kGroup, F::kOffset, F::kDepth, 1>(panel, int(last - first) * groups, &of_x, &sums);
    }
    write(p.y + row, sums, end - row);
  }
}

}}  // namespace jaxllm::JAXLLM_LEVEL
