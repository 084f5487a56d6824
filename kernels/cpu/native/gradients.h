// Gradients of softmax attention, for one instruction set, after FlashAttention-2 (Dao, 2023): scores are computed
// again, a block of keys and some queries at a time, with what the forward pass kept of each query, the logarithm of
// its sum of exp(score).
//
// With p = exp(score - log), s = p (g . values - mean), where mean is the query's g . y:
// values get p^T g, queries s keys, and keys s^T q. Five products of small matrices; each stays in the first cache.
#pragma once
#include "attention.h"

namespace jaxllm { namespace JAXLLM_LEVEL {

// A matrix that is read in any order: element (i, k) is at[i * row + k * column].
struct Strided {
  const float* at;
  int64_t row, column;
};

// c[M, N] += a[M, depth] b[depth, N]; b and c have rows that are adjacent numbers.
template <int M, int N>
INLINE void add_tile(Strided a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row) {
  f32x8 sums[M][N / 8] = {};
  for (int64_t k = 0; k < depth; k++) {
    for (int m = 0; m < M; m++) {
      const f32x8 one = broadcast(a.at[m * a.row + k * a.column]);
      for (int n = 0; n < N / 8; n++) sums[m][n] += one * load<f32x8>(b + k * b_row + 8 * n);
    }
  }
  for (int m = 0; m < M; m++) {
    for (int n = 0; n < N / 8; n++) store(c + m * c_row + 8 * n, load<f32x8>(c + m * c_row + 8 * n) + sums[m][n]);
  }
}

template <int N>
static void add_columns(Strided a, const float* b, int64_t b_row, int64_t rows, int64_t depth, float* c,
                        int64_t c_row) {
  const auto below = [&](int64_t i) { return Strided{a.at + i * a.row, a.row, a.column}; };
  int64_t i = 0;
  for (; i + 6 <= rows; i += 6) add_tile<6, N>(below(i), b, b_row, depth, c + i * c_row, c_row);
  for (; i + 4 <= rows; i += 4) add_tile<4, N>(below(i), b, b_row, depth, c + i * c_row, c_row);
  for (; i < rows; i++) add_tile<1, N>(below(i), b, b_row, depth, c + i * c_row, c_row);
}

// c[rows, columns] += a[rows, depth] b[depth, columns]; columns are a multiple of 8.
static void add_product(Strided a, const float* b, int64_t b_row, int64_t rows, int64_t depth, int64_t columns,
                        float* c, int64_t c_row) {
  int64_t j = 0;
  for (; j + 16 <= columns; j += 16) add_columns<16>(a, b + j, b_row, rows, depth, c + j, c_row);
  if (j < columns) add_columns<8>(a, b + j, b_row, rows, depth, c + j, c_row);
}

// Rows [count, size] as columns [size][kKeys]; zeros from `count` on.
INLINE void transposed(const float* rows, int64_t count, int64_t size, float* columns) {
  for (int64_t i = 0; i < size; i++) {
    for (int64_t k = 0; k < kKeys; k++) columns[i * kKeys + k] = k < count ? rows[k * size + i] : 0;
  }
}

// From scores and products g . values of some queries and keys: p, and s in place of the products.
INLINE void weigh(const AttentionGradients& a, int64_t query, const int32_t* positions, const int32_t* at,
                  int64_t count, int64_t rows, float (*scores)[kKeys], float (*products)[kKeys]) {
  const Attention& f = a.forward;
  for (int64_t t = 0; t < rows; t++) {
    const float log = a.logs[query + t * f.heads], mean = a.means[query + t * f.heads];
    for (int64_t i = 0; i < kKeys; i += 8) {
      f32x8 score = load<f32x8>(scores[t] + i), slope = broadcast(1);
      if (f.score_cap > 0) {
        for (int k = 0; k < 8; k++) {
          const float part = __builtin_tanhf(score[k] / f.score_cap);
          score[k] = f.score_cap * part, slope[k] = 1 - part * part;
        }
      }
      s32x8 given = {-1, -1, -1, -1, -1, -1, -1, -1};
      if (i < count) memcpy(&given, at + i, 4 * least(8, count - i));
      const s32x8 back = positions[t] - given;
      s32x8 visible = (given >= 0) & (back >= 0);
      if (f.window > 0) visible &= back < int32_t(f.window);
      const f32x8 p = visible ? exponential(score - log) : f32x8{};
      store(scores[t] + i, p);
      store(products[t] + i, p * slope * (load<f32x8>(products[t] + i) - mean));
    }
  }
}

// See Level.
static void gradients(const AttentionGradients& a, int64_t batch, int64_t head, float* columns) {
  const Attention& f = a.forward;
  const int64_t slot = batch * f.kv_heads + head / (f.heads / f.kv_heads), own = batch * f.heads + head;
  const float* keys = (const float*)f.keys + slot * f.length * f.dim;
  const float* values = (const float*)f.values + slot * f.length * f.value_dim;
  const int32_t* positions = f.positions + batch * f.time;
  const int32_t* key_positions = f.key_positions + batch % f.key_batches * f.length;
  const int64_t q_row = f.heads * f.dim, g_row = f.heads * f.value_dim;  // from one query of the head to the next
  float *key_columns = columns, *value_columns = columns + kKeys * f.dim;
  alignas(32) float scores[kTokens][kKeys], products[kTokens][kKeys];
  for (int64_t first = 0; first < f.length; first += kKeys) {
    const int64_t count = least(kKeys, f.length - first);
    const int32_t* at = key_positions + first;
    transposed(keys + first * f.dim, count, f.dim, key_columns);
    transposed(values + first * f.value_dim, count, f.value_dim, value_columns);
    float *to_keys = a.keys + (own * f.length + first) * f.dim;
    float *to_values = a.values + (own * f.length + first) * f.value_dim;
    for (int64_t time = 0; time < f.time; time += kTokens) {
      const int64_t rows = least(kTokens, f.time - time), query = (batch * f.time + time) * f.heads + head;
      if (unseen(positions + time, rows, at, count, f.window)) continue;
      const float *q = f.q + query * f.dim, *g = a.g + query * f.value_dim;
      memset(scores, 0, sizeof scores), memset(products, 0, sizeof products);
      add_product({q, q_row, 1}, key_columns, kKeys, rows, f.dim, kKeys, scores[0], kKeys);
      add_product({g, g_row, 1}, value_columns, kKeys, rows, f.value_dim, kKeys, products[0], kKeys);
      weigh(a, query, positions + time, at, count, rows, scores, products);
      add_product({scores[0], 1, kKeys}, g, g_row, count, rows, f.value_dim, to_values, f.value_dim);
      add_product({products[0], 1, kKeys}, q, q_row, count, rows, f.dim, to_keys, f.dim);
      add_product({products[0], kKeys, 1}, keys + first * f.dim, f.dim, rows, count, f.dim, a.q + query * f.dim, q_row);
    }
  }
}

}}  // namespace jaxllm::JAXLLM_LEVEL
