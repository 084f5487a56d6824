// What would be read beyond a buffer, or divided by zero: the caller refuses it, in a line. Sizes come from Python, which
// has them from the same buffers; indices come out of checkpoints and computations.
#pragma once
#include "level.h"

namespace jaxllm {

// Columns and bytes of a block of ggml's, from kQ1_0 on.
struct BlockSize { int64_t cols, bytes; };
constexpr BlockSize kBlocks[] = {
    {128, 18}, {32, 18}, {32, 20}, {32, 22}, {32, 24}, {32, 34}, {32, 36}, {256, 84}, {256, 110}, {256, 144},
    {256, 176}, {256, 210}, {256, 292}, {256, 54}, {256, 66}, {32, 17}, {64, 36}, {256, 50}, {256, 56}, {256, 66},
    {256, 74}, {256, 82}, {256, 98}, {256, 110}, {32, 18}, {256, 136}};
static_assert(sizeof(kBlocks) / sizeof(BlockSize) == kFormats - kQ1_0, "a block for each format");

inline int64_t size_of(int64_t type) {
  static constexpr int64_t sizes[] = {4, 2, 2, 1, 1, 1, 1, 1, 2, 2, 4, 4};
  return type >= 0 && type <= kU32 ? sizes[type] : 8;
}

inline int64_t parts(int64_t count, int64_t each) { return (count + each - 1) / each; }

// The product, or a number that no buffer reaches.
inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

inline bool all_below(const uint8_t* indices, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; i++) {
    int32_t index;
    __builtin_memcpy(&index, indices + 4 * i, 4);
    if (index < 0 || index >= limit) return false;
  }
  return true;
}

// Why a matrix cannot be read whose leaves have so many bytes; null: it can.
inline const char* wrong_matrix(const Matrix& m, const int64_t* bytes) {
  constexpr int64_t most = int64_t{1} << 48;
  if (m.format < 0 || m.format >= kFormats || m.rows < 0 || m.cols < 0 || m.rows > most || m.cols > most) {
    return "a matrix of an impossible format or size";
  }
  if (!m.rows || !m.cols) return nullptr;
  // Whether a leaf has `rows` rows of at least so many bytes.
  const auto holds = [&](int leaf, int64_t rows, int64_t least) {
    return m.leaf[leaf] && m.row_bytes[leaf] >= least && times(m.row_bytes[leaf], rows) <= bytes[leaf];
  };
  bool sound = true;
  switch (m.format) {
    case kDense: sound = holds(0, m.rows, times(m.cols, size_of(m.param[0]))); break;
    case kScaled: {
      const int64_t tall = m.param[0], wide = m.param[1], row = m.param[3];
      sound = holds(0, m.rows, m.cols) && m.leaf[1] && tall > 0 && wide > 0 &&
              row >= times(parts(m.cols, wide), size_of(m.param[2])) && times(parts(m.rows, tall), row) <= bytes[1];
      break;
    }
    case kCodebook: {
      const int64_t group = m.param[0];
      sound = group > 0 && holds(0, m.rows, parts(m.cols, 2)) && holds(1, m.rows, 4 * parts(m.cols, group)) &&
              m.leaf[2] && bytes[2] >= 64;
      break;
    }
    case kMXFP4: sound = holds(0, m.rows, 16 * parts(m.cols, 32)) && holds(1, m.rows, parts(m.cols, 32)); break;
    case kNVFP4:
      sound = holds(0, m.rows, parts(m.cols, 2)) && holds(1, m.rows, parts(m.cols, 16)) &&
              (!m.leaf[2] || bytes[2] >= 4);
      break;
    case kAffine: {
      const int64_t bits = m.param[0], group = m.param[1];
      if (bits < 1 || bits > 8 || group < 1 || !holds(0, m.rows, parts(times(m.cols, bits), 8)) || !m.leaf[1]) {
        return "codes or groups of an impossible size";
      }
      const bool by_row = m.leaf[5], by_column = m.leaf[4] && !by_row;
      const int64_t rows = by_row ? bytes[1] / (m.row_bytes[1] > 0 ? m.row_bytes[1] : most) : m.rows;
      const int64_t groups = by_row      ? m.cols
                             : by_column ? m.row_bytes[1] / size_of(m.param[2])
                                         : parts(m.cols, group);
      for (int leaf = 1; leaf < 4; leaf++) {
        sound &= !m.leaf[leaf] || holds(leaf, rows, times(groups, size_of(m.param[1 + leaf])));
      }
      if (by_row && (times(m.rows, 4) > bytes[5] || !all_below(m.leaf[5], m.rows, rows))) return "a row of no group";
      if (by_column && (times(m.cols, 4) > bytes[4] || !all_below(m.leaf[4], m.cols, groups))) {
        return "a column of no group";
      }
      break;
    }
    default: {
      const BlockSize block = kBlocks[m.format - kQ1_0];
      sound = holds(0, m.rows, times(parts(m.cols, block.cols), block.bytes));
    }
  }
  return sound ? nullptr : "a matrix larger than its buffers";
}

// Why queries cannot attend to a cache of so many sequences; null: they can.
inline const char* wrong_attention(const Attention& a, int64_t sequences) {
  if (a.kv_heads < 1 || a.heads % a.kv_heads) return "queries of heads that key heads do not divide";
  if (a.window < 0) return "a window of fewer than no positions";
  if (a.value_dim % 8) return "values whose size is no multiple of 8";
  if (a.key_positions && a.key_batches < 1) return "positions of no keys";
  if (!all_below(reinterpret_cast<const uint8_t*>(a.rows), a.batch, sequences)) return "a row of no sequence";
  return nullptr;
}

}  // namespace jaxllm
