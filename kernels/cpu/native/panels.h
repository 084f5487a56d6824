// Rows of x times the rows of a matrix.
//
// Eight rows of the matrix are decoded at a time, a slice of 256 columns after the other, into a panel in which they
// stand side by side: each vector holds four columns of the eight rows as codes, or one column as floats. Then all rows
// of x pass over the panel. So a format only has to decode, and one row of x or five hundred take the same path.
#pragma once
#include "decode.h"
#include "level.h"

namespace jaxllm { namespace JAXLLM_LEVEL {

constexpr int kRows = 8;  // rows of a panel

struct alignas(64) Codes {
  u8x32 codes[kSlice / 4];        // [columns / 4][rows][4]
  f32x8 scale[kSlice / 16];       // [groups][rows]
  f32x8 offset[kSlice / 16];
};

struct alignas(64) Floats {
  f32x8 weights[kSlice];          // [columns][rows]
};

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- panels ----

// Whether a format's rows are blocks, which are read eight at a time (decode.h).
template <class F>
constexpr auto in_blocks(int) -> decltype(F::kBlock > 0) { return true; }
template <class F>
constexpr bool in_blocks(...) { return false; }

// The block of eight rows from `row` on. Rows beyond the matrix repeat its last one, in a copy.
template <class F>
INLINE Blocks blocks_of(const Matrix& m, int64_t row, int64_t chunk, uint8_t* copy) {
  const uint8_t* p = row_of(m, 0, row) + F::kBlock * chunk;
  if (row + kRows <= m.rows) return {p, m.row_bytes[0], 3 * m.row_bytes[0]};
  for (int r = 0; r < kRows; r++) {
    memcpy(copy + F::kBlock * r, p + (least(row + r, m.rows - 1) - row) * m.row_bytes[0], F::kBlock);
  }
  return {copy, F::kBlock, 3 * F::kBlock};
}

// Rows from `row` on, chunks [first, last) of the columns. Rows beyond the matrix repeat its last one.
template <class F>
static void decode_codes(const Matrix& m, int64_t row, int64_t first, int64_t last, Codes& panel) {
  constexpr int parts = F::kChunk / 16, groups = F::kChunk / F::kGroup;
  if constexpr (in_blocks<F>(0)) {
    for (int64_t chunk = first; chunk < last; chunk++) {
      const int64_t at = chunk - first;
      uint8_t copy[kRows * F::kBlock];
      const Blocks blocks = blocks_of<F>(m, row, chunk, copy);
      u32x8 words[F::kWords];
      F::heads(blocks, words);
      F::scales(words, panel.scale + groups * at, panel.offset + groups * at);
      F::codes(blocks, (Four*)(panel.codes + 4 * parts * at));
    }
  } else {
    alignas(32) uint32_t heads[kSlice / F::kChunk][F::kWords][kRows];
    int64_t rows[kRows];
    for (int r = 0; r < kRows; r++) rows[r] = least(row + r, m.rows - 1);
    for (int64_t chunk = first; chunk < last; chunk++) {
      for (int r = 0; r < kRows; r++) {
        uint32_t words[F::kWords];
        F::head(m, rows[r], chunk, words);
        for (int i = 0; i < F::kWords; i++) heads[chunk - first][i][r] = words[i];
      }
      s32x8 codes[4][parts];
      if constexpr (F::kChunk > 64) {  // much code: once
        for (int r = 0; r < 4; r++) F::codes(m, rows[r], rows[r + 4], chunk, (u8x32*)codes[r]);
      } else {
        UNROLL
        for (int r = 0; r < 4; r++) F::codes(m, rows[r], rows[r + 4], chunk, (u8x32*)codes[r]);
      }
      UNROLL
      for (int i = 0; i < parts; i++) {
        s32x8 words[4] = {codes[0][i], codes[1][i], codes[2][i], codes[3][i]};
        transpose(words);
        for (int k = 0; k < 4; k++) panel.codes[4 * (parts * (chunk - first) + i) + k] = (u8x32)words[k];
      }
    }
    for (int64_t at = 0; at < last - first; at++) {  // not above: the words have arrived in memory by now
      F::scales((const u32x8*)heads[at], panel.scale + groups * at, panel.offset + groups * at);
    }
  }
}

template <class F>
static void decode_floats(const Matrix& m, int64_t row, int64_t first, int64_t last, Floats& panel) {
  for (int64_t block = first; block < last; block++) {
    float w[kRows][32];
    for (int r = 0; r < kRows; r++) F::decode(m, least(row + r, m.rows - 1), block, w[r]);
    for (int i = 0; i < 32; i += 4) {
      s32x8 words[4];
      for (int r = 0; r < 4; r++) words[r] = (s32x8)two(w[r] + i, w[r + 4] + i);
      transpose(words);
      for (int k = 0; k < 4; k++) panel.weights[32 * (block - first) + i + k] = (f32x8)words[k];
    }
  }
}

// Codes as floats.
template <class F>
static void floats_of(const Codes& codes, int columns, Floats& panel) {
  for (int v = 0; v < columns / 4; v++) {
    const int group = 4 * v / F::kGroup;
    for (int byte = 0; byte < 4; byte++) {
      const u32x8 top = (u32x8)codes.codes[v] << (24 - 8 * byte);
      const s32x8 code = F::kDepth > 0 ? (s32x8)(top >> 24) : (s32x8)top >> 24;
      f32x8 w = floats(code) * codes.scale[group];
      if (F::kOffset) w += codes.offset[group];
      panel.weights[4 * v + byte] = w;
    }
  }
}

// ---- one panel times some rows of x ----

// `groups` groups of a panel times T slices of rows of x.
template <int kGroup, bool kOffset, int kDepth, int T>
static void add_codes(const Codes& panel, int groups, const RoundedSlice* x, f32x8* sums) {
  constexpr int vectors = kGroup / 4, depth = depth_of<kDepth, T>(vectors);
  f32x8 total[T] = {};
  const u8x32* w = panel.codes;
  for (int g = 0; g < groups; g++) {
    s32x8 group[T];
    for (int t = 0; t < T; t++) group[t] = start<kDepth>(kGroup == 16 ? x[t].raised16[g] : x[t].raised32[g]);
    for (int v = 0; v < vectors; v += depth) {
      Dot<kDepth> dot[T];
      for (int t = 0; t < T; t++) dot[t].clear();
      UNROLL
      for (int d = 0; d < depth; d++) {
        const u8x32 four = w[g * vectors + v + d];
        for (int t = 0; t < T; t++) dot[t].add(four, broadcast4(x[t].codes + kGroup * g + 4 * (v + d)));
      }
      for (int t = 0; t < T; t++) group[t] = dot[t].finish(group[t]);
    }
    for (int t = 0; t < T; t++) {
      total[t] += floats(group[t]) * (panel.scale[g] * broadcast(x[t].scale[g * kGroup / 32]));
      if (kOffset) total[t] += panel.offset[g] * broadcast(kGroup == 16 ? x[t].sum16[g] : x[t].sum32[g]);
    }
  }
  for (int t = 0; t < T; t++) sums[t] += total[t];
}

// P panels times T rows of x, as four sums each, of every fourth column: U of them at a time, so that enough additions
// are under way. In the same order for all T and U, because a row's sums must not depend on its neighbours.
template <int P, int T, int U>
static void add_floats(const Floats* panels, int64_t columns, const float* x, int64_t stride, f32x8* sums) {
  constexpr int kSums = 4;
  f32x8 all[P][T] = {};
  for (int first = 0; first < kSums; first += U) {
    f32x8 total[P][T][U] = {};
    int64_t k = first;
    for (; k + U <= columns; k += kSums) {
      for (int u = 0; u < U; u++) {
        for (int t = 0; t < T; t++) {
          const f32x8 one = broadcast(x[t * stride + k + u]);
          for (int p = 0; p < P; p++) total[p][t][u] += panels[p].weights[k + u] * one;
        }
      }
    }
    for (int u = 0; k + u < columns && u < U; u++) {
      for (int t = 0; t < T; t++) {
        for (int p = 0; p < P; p++) total[p][t][u] += panels[p].weights[k + u] * broadcast(x[t * stride + k + u]);
      }
    }
    for (int p = 0; p < P; p++) {
      for (int t = 0; t < T; t++) {
        for (int u = 0; u < U; u++) all[p][t] += total[p][t][u];
      }
    }
  }
  for (int p = 0; p < P; p++) {
    for (int t = 0; t < T; t++) sums[p * kTokens + t] += all[p][t];
  }
}

// ---- some rows of the matrix times rows of x ----

// Asks memory for rows that will be needed: for as much of eight rows as columns [first, last) are of each. Eight short
// rows at once are no pattern that processors see, but together they are adjacent.
INLINE void ask_for(const Matrix& m, int64_t row, int64_t first, int64_t last) {
  const uint8_t* p = row_of(m, 0, row);
  const int64_t size = kRows * m.row_bytes[0], begin = size * first / m.cols, end = size * least(last, m.cols) / m.cols;
  for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(p + at);
}

// How many rows before they are needed: memory takes as long as decoding a few thousand weights.
INLINE int64_t ahead(const Matrix& m) { return m.row_bytes[0] < 512 ? 2 * kRows : kRows; }

INLINE void write(float* y, f32x8 sums, int64_t rows) {
  if (rows >= kRows) {
    store(y, sums);
  } else {
    memcpy(y, &sums, 4 * rows);
  }
}

template <class F>
static void rounded_rows(const Product& p, const RoundedX& x, int64_t begin, int64_t end) {
  constexpr int slice = kSlice / F::kChunk;
  const int64_t chunks = (p.matrix.cols + F::kChunk - 1) / F::kChunk;
  Codes panel;
  f32x8 sums[kTokens];
  const int64_t early = ahead(p.matrix);
  for (int64_t row = begin; row < begin + early; row += kRows) ask_for(p.matrix, row, 0, p.matrix.cols);
  for (int64_t token = 0; token < p.count; token += kTokens) {
    const int64_t tokens = least(kTokens, p.count - token);
    for (int64_t row = begin; row < end; row += kRows) {
      for (int64_t t = 0; t < tokens; t++) sums[t] = f32x8{};
      for (int64_t chunk = 0; chunk < chunks; chunk += slice) {
        const int64_t last = least(chunk + slice, chunks);
        if (row + early < end) ask_for(p.matrix, row + early, chunk * F::kChunk, last * F::kChunk);
        decode_codes<F>(p.matrix, row, chunk, last, panel);
        const RoundedSlice* rows = x.slices + chunk / slice * x.rows + p.x_row + token;
        const int groups = int(last - chunk) * (F::kChunk / F::kGroup);
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) {
          add_codes<F::kGroup, F::kOffset, F::kDepth, 4>(panel, groups, rows + t, sums + t);
        }
        for (; t + 2 <= tokens; t += 2) {
          add_codes<F::kGroup, F::kOffset, F::kDepth, 2>(panel, groups, rows + t, sums + t);
        }
        for (; t < tokens; t++) add_codes<F::kGroup, F::kOffset, F::kDepth, 1>(panel, groups, rows + t, sums + t);
      }
      for (int64_t t = 0; t < tokens; t++) write(p.y + (token + t) * p.matrix.rows + row, sums[t], end - row);
    }
  }
}

// Decode(m, row, first block, last block, panel) -> floats; blocks are of 32 columns.
template <class Decode>
static void exact_rows(const Product& p, const float* x, int64_t begin, int64_t end, Decode decode) {
  const int64_t cols = p.matrix.cols;
  Floats panels[2];
  f32x8 sums[2 * kTokens];
  for (int64_t token = 0; token < p.count; token += kTokens) {
    const int64_t tokens = least(kTokens, p.count - token);
    for (int64_t row = begin; row < end; row += 2 * kRows) {
      for (f32x8& sum : sums) sum = f32x8{};
      for (int64_t first = 0; first < cols; first += kSlice) {
        const int64_t columns = least(kSlice, cols - first), last = (first + columns + 31) / 32;
        if (row + 2 * kRows < end) {
          ask_for(p.matrix, row + 2 * kRows, first, first + columns);
          ask_for(p.matrix, row + 3 * kRows, first, first + columns);
        }
        decode(p.matrix, row, first / 32, last, panels[0]);
        decode(p.matrix, row + kRows, first / 32, last, panels[1]);
        const float* rows = x + (p.x_row + token) * cols + first;
        int64_t t = 0;
        for (; t + 6 <= tokens; t += 6) add_floats<2, 6, 1>(panels, columns, rows + t * cols, cols, sums + t);
        for (; t + 4 <= tokens; t += 4) add_floats<2, 4, 1>(panels, columns, rows + t * cols, cols, sums + t);
        for (; t + 2 <= tokens; t += 2) add_floats<2, 2, 2>(panels, columns, rows + t * cols, cols, sums + t);
        for (; t < tokens; t++) add_floats<2, 1, 4>(panels, columns, rows + t * cols, cols, sums + t);
      }
      for (int64_t t = 0; t < tokens; t++) {
        float* y = p.y + (token + t) * p.matrix.rows + row;
        write(y, sums[t], end - row);
        if (row + kRows < end) write(y + kRows, sums[kTokens + t], end - row - kRows);
      }
    }
  }
}

template <class F>
static void exact_codes(const Product& p, const float* x, int64_t begin, int64_t end) {
  exact_rows(p, x, begin, end, [](const Matrix& m, int64_t row, int64_t first, int64_t last, Floats& panel) {
    constexpr int blocks = F::kChunk / 32;
    Codes codes;
    decode_codes<F>(m, row, first / blocks, (last + blocks - 1) / blocks, codes);
    floats_of<F>(codes, int(last - first) * 32, panel);
  });
}

template <class F>
static void exact_floats(const Product& p, const float* x, int64_t begin, int64_t end) {
  exact_rows(p, x, begin, end, decode_floats<F>);
}

}}  // namespace jaxllm::JAXLLM_LEVEL
