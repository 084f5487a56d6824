// One row of x, as integers, times the rows of a matrix: what decoding spends its time on.
//
// The sums are those of a panel (panels.h), added in the same order, because a row's sums must not depend on its
// neighbours. But codes are multiplied as soon as they are there, without a panel in memory. And the matrix is asked for
// ahead, in the order of memory: processors look ahead by themselves along one line, but not along eight rows at once.
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

// Whether a chunk fits there. Codes from codebooks, 256 of eight rows, would be much code.
template <class F>
constexpr bool in_registers = in_blocks<F>(0) || F::kChunk <= 64;

// A chunk of eight rows times x, added to `total`; its first group is group `g` of the slice.
template <class F>
INLINE void add_chunk(const f32x8* scale, const f32x8* offset, const Four* codes, const RoundedSlice& x, int g,
                      f32x8& total) {
  UNROLL
  for (int i = 0; i < F::kChunk / F::kGroup; i++, g++) {
    const int32_t raised = F::kGroup == 16 ? x.raised16[g] : x.raised32[g];
    const s32x8 sum = sum_of_group<F>((const u8x32*)codes + F::kGroup / 4 * i, x.codes + F::kGroup * g, raised);
    total += floats(sum) * (scale[i] * broadcast(x.scale[g * F::kGroup / 32]));
    if (F::kOffset) total += offset[i] * broadcast(F::kGroup == 16 ? x.sum16[g] : x.sum32[g]);
  }
}

// A chunk of eight rows from `row` on that are read one by one. Words stay out of memory: it would take long until they
// have arrived there.
template <class F>
INLINE void read_rows(const Matrix& m, int64_t row, int64_t chunk, f32x8* scale, f32x8* offset, Four* codes) {
  constexpr int parts = F::kChunk / 16;
  uint32_t of_row[kRows][F::kWords];
  UNROLL
  for (int r = 0; r < kRows; r++) F::head(m, row + r, chunk, of_row[r]);
  u32x8 words[F::kWords];
  UNROLL
  for (int i = 0; i < F::kWords; i++) {
    words[i] = u32x8{of_row[0][i], of_row[1][i], of_row[2][i], of_row[3][i],
                     of_row[4][i], of_row[5][i], of_row[6][i], of_row[7][i]};
  }
  F::scales(words, scale, offset);
  u8x32 pairs[4][parts];
  UNROLL
  for (int r = 0; r < 4; r++) F::codes(m, row + r, row + r + 4, chunk, pairs[r]);
  UNROLL
  for (int i = 0; i < parts; i++) {
    s32x8 four[4] = {(s32x8)pairs[0][i], (s32x8)pairs[1][i], (s32x8)pairs[2][i], (s32x8)pairs[3][i]};
    transpose(four);
    codes[i] = {{(u8x32)four[0], (u8x32)four[1], (u8x32)four[2], (u8x32)four[3]}};
  }
}

// Chunks [first, last) of a slice, of eight rows from `row` on, times x.
template <class F>
INLINE f32x8 times_slice(const Matrix& m, int64_t row, int64_t first, int64_t last, const RoundedSlice& x) {
  constexpr int groups = F::kChunk / F::kGroup;
  f32x8 total = {};
  Blocks blocks{row_of(m, 0, row), m.row_bytes[0], 3 * m.row_bytes[0]};
  if constexpr (in_blocks<F>(0)) blocks.p += F::kBlock * first;
  for (int64_t chunk = first; chunk < last; chunk++) {
    f32x8 scale[groups], offset[groups];
    Four codes[F::kChunk / 16];
    if constexpr (in_blocks<F>(0)) {
      u32x8 words[F::kWords];
      F::heads(blocks, words), F::scales(words, scale, offset), F::codes(blocks, codes), blocks.p += F::kBlock;
    } else {
      read_rows<F>(m, row, chunk, scale, offset, codes);
    }
    add_chunk<F>(scale, offset, codes, x, int(chunk - first) * groups, total);
  }
  return total;
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
      if (in_registers<F> && row + kRows <= m.rows) {
        if constexpr (in_registers<F>) sums += times_slice<F>(m, row, first, last, of_x);
      } else {
        Codes panel;
        decode_codes<F>(m, row, first, last, panel);
        add_codes<F::kGroup, F::kOffset, F::kDepth, 1>(panel, int(last - first) * groups, &of_x, &sums);
      }
    }
    write(p.y + row, sums, end - row);
  }
}

}}  // namespace jaxllm::JAXLLM_LEVEL
