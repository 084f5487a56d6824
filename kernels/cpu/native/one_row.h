// One row of x, as integers, times the rows of a matrix: what decoding spends its time on.
//
// Rows of the matrix are read in pairs, in the order in which they lie in memory (of eight rows at once, memory delivers
// half as much), and codes are multiplied where they stand. Only sums of groups are put side by side, as in a panel.
// Then they are scaled and added in the same order as there, because a row's sums must not depend on its neighbours.
#pragma once
#include "panels.h"

namespace jaxllm { namespace JAXLLM_LEVEL {

constexpr int kStretch = 16;         // slices that are worked on before the next rows
constexpr int64_t kAhead = 8 << 10;  // bytes

// A stretch of eight rows: for each group the sums of products with x, and what says the scales. The rows with even
// numbers are the first four lanes.
template <class F>
struct alignas(64) Stretch {
  s32x8 sums[kStretch * kSlice / F::kGroup / 4][4];              // of four groups, of two rows
  uint32_t heads[kStretch * kSlice / F::kChunk][F::kWords][kRows];
};

// Sums of four lanes: of four vectors, of each half.
INLINE s32x8 sums_of_fours(const s32x8* v) {
  s32x8 words[4] = {v[0], v[1], v[2], v[3]};
  transpose(words);
  return (words[0] + words[1]) + (words[2] + words[3]);
}

// Asks memory for what is read next, for the second cache: processors look ahead by themselves along one line of
// addresses, but not along two rows. It begins with what is read at once, and gains on it.
struct Ahead {
  const uint8_t* from;
  int64_t size, asked, read;  // bytes
  inline __attribute__((always_inline)) void step(int64_t bytes) {
    read += bytes;
    const int64_t to = least(asked + 2 * bytes, least(read + kAhead, size));
    for (; asked < to; asked += 64) __builtin_prefetch(from + asked, 0, 2);
  }
};

// Chunks [first, last) of two rows that follow each other.
template <class F>
static void multiply_pair(const Matrix& m, int64_t row, int pair, int64_t first, int64_t last, const RoundedSlice* x,
                          int64_t stride, int64_t bytes, Ahead& ahead, Stretch<F>& to) {
  constexpr int groups = F::kChunk / F::kGroup, parts = F::kGroup / 16, some = groups < 4 ? 4 / groups : 1;
  constexpr int depth = F::kDepth == 0 || F::kDepth > parts ? parts : F::kDepth, slice = kSlice / F::kChunk;
  const int64_t a = least(row, m.rows - 1), b = least(row + 1, m.rows - 1);
  for (int64_t chunk = first; chunk < last; chunk += some) {
    const int8_t* codes_of_x = x[(chunk - first) / slice * stride].codes + (chunk - first) % slice * F::kChunk;
    s32x8 sums[some * groups];
    UNROLL
    for (int i = 0; i < some; i++) {
      if (some > 1 && chunk + i >= last) {
        for (int g = 0; g < groups; g++) sums[i * groups + g] = s32x8{};
        continue;
      }
      uint32_t words[2][F::kWords];
      F::head(m, a, chunk + i, words[0]), F::head(m, b, chunk + i, words[1]);
      for (int k = 0; k < F::kWords; k++) {
        to.heads[chunk + i - first][k][pair] = words[0][k], to.heads[chunk + i - first][k][4 + pair] = words[1][k];
      }
      u8x32 codes[groups * parts];
      F::codes(m, a, b, chunk + i, codes);
      UNROLL
      for (int g = 0; g < groups; g++) {
        s32x8 sum = {};
        UNROLL
        for (int k = 0; k < parts; k += depth) {
          Dot<F::kDepth> dot;
          dot.clear();
          for (int d = 0; d < depth; d++) {
            const int8_t* sixteen = codes_of_x + F::kChunk * i + F::kGroup * g + 16 * (k + d);
            dot.add(codes[parts * g + k + d], (s32x8)two(sixteen, sixteen));
          }
          sum = dot.finish(sum);
        }
        sums[i * groups + g] = sum;
      }
    }
    ahead.step(bytes);
    UNROLL
    for (int g = 0; g < some * groups; g += 4) {
      to.sums[((chunk - first) * groups + g) / 4][pair] = sums_of_fours(sums + g);
    }
  }
}

// As `rounded_rows`, in the order in which the matrix lies in memory, and with the same sums.
template <class F>
static void rounded_row(const Product& p, const RoundedX& x, int64_t begin, int64_t end) {
  constexpr int slice = kSlice / F::kChunk, groups = F::kChunk / F::kGroup, some = groups < 4 ? 4 / groups : 1;
  const Matrix& m = p.matrix;
  const int64_t chunks = (m.cols + F::kChunk - 1) / F::kChunk;
  const int64_t bytes = 2 * some * m.row_bytes[0] / chunks;
  Ahead ahead{row_of(m, 0, begin), (least(end, m.rows) - begin) * m.row_bytes[0], 0, 0};
  Stretch<F> stretch;
  for (int64_t row = begin; row < end; row += kRows) {
    f32x8 sums = {};
    for (int64_t first = 0; first < chunks; first += kStretch * slice) {
      const int64_t last = least(first + kStretch * slice, chunks);
      const RoundedSlice* slices = x.slices + first / slice * x.rows + p.x_row;
      for (int pair = 0; pair < 4; pair++) {
        multiply_pair<F>(m, row + 2 * pair, pair, first, last, slices, x.rows, bytes, ahead, stretch);
      }
      for (int64_t chunk = first; chunk < last; chunk += slice) {
        const RoundedSlice& of_x = slices[(chunk - first) / slice * x.rows];
        const int64_t count = least(slice, last - chunk);
        f32x8 scale[kSlice / F::kGroup], offset[kSlice / F::kGroup], total = {};
        for (int64_t i = 0; i < count; i++) {
          F::scales((const u32x8*)stretch.heads[chunk - first + i], scale + groups * i, offset + groups * i);
        }
        for (int g = 0; g < count * groups; g += 4) {
          s32x8* four = stretch.sums[((chunk - first) * groups + g) / 4];
          transpose(four);
          for (int k = 0; k < least(4, count * groups - g); k++) {
            total += floats(four[k]) * (scale[g + k] * broadcast(of_x.scale[(g + k) * F::kGroup / 32]));
            if (F::kOffset) total += offset[g + k] * broadcast(F::kGroup == 16 ? of_x.sum16[g + k] : of_x.sum32[g + k]);
          }
        }
        sums += total;
      }
    }
    write(p.y + row, __builtin_shufflevector(sums, sums, 0, 4, 1, 5, 2, 6, 3, 7), end - row);
  }
}

}}  // namespace jaxllm::JAXLLM_LEVEL
