// What one instruction set offers to the rest.
#pragma once
#include "matrix.h"

namespace jaxllm {

// A matrix times `count` rows of x, from row `x_row` on; y is [count, matrix.rows].
struct Product {
  Matrix matrix;
  int64_t x_row, count;
  float* y;
};

constexpr int kSlice = 256;  // columns that are worked on at once: a multiple of every format's blocks
constexpr int kKeys = 64;    // keys that are attended to at once
constexpr int kFew = 16;     // tokens of a sequence from which on a call is a prompt's, not a decode step's
constexpr int kTokens = 64;  // rows of x that are worked on at once; as integers they stay in the first cache

// kSlice columns of a row of x as integers, with a scale for every 32, and the scale times the sum over 16 and over 32;
// -128 times the sum, too (see Dot in simd.h).
struct RoundedSlice {
  int8_t codes[kSlice];
  float scale[kSlice / 32], sum16[kSlice / 16], sum32[kSlice / 32];
  int32_t raised16[kSlice / 16], raised32[kSlice / 32];
};

// All rows of x: slices are [columns / kSlice][rows].
struct RoundedX {
  RoundedSlice* slices;
  int64_t rows;
};

// Queries q [batch, time, heads, dim], scaled, attend to a cache of keys [sequences, kv_heads, length, dim] and values.
struct Attention {
  const float* q;
  const uint8_t *keys, *values;
  const uint8_t *key_scales, *value_scales;  // bfloat16 [sequences, kv_heads, length], of codes of 8 bits; else null
  const int32_t* positions;      // [batch, time]
  const int32_t* key_positions;  // [key_batches, length], negative where there is no key; null: each key's own index
  const float* sinks;            // [heads], or null
  const int32_t* rows;           // [batch], the sequence that each belongs to
  int64_t batch, time, heads, kv_heads, length, dim, value_dim, key_batches;
  int64_t type;                  // of keys and values: kF32, kF16, kBF16, kS8 or kE4M3
  int64_t window;                // how many positions a query sees, its own included; 0: all
  float score_cap;               // 0: none
  float* y;                      // [batch, time, heads, value_dim]
  float* logs;                   // [batch, time, heads], the logarithm of the sum of exp(score); or null
};

// What attention's gradients are computed from, and where they go. Keys and values are float32, of `batch` sequences.
struct AttentionGradients {
  Attention forward;             // without y
  const float *logs, *means, *g; // [batch, time, heads]: what attention gave, and g . y; the gradient of y
  float *q, *keys, *values;      // like q; [batch, heads, length, dim], of each query head; likewise: zeros, added to
};

struct Level {
  const char* name;
  bool (*rounds)(const Matrix&);  // whether the format's products take rounded rows
  void (*round_rows)(const float* x, int64_t cols, int64_t begin, int64_t end, const RoundedX& to);
  // Rows [begin, end) of the matrix; `begin` is a multiple of 16. `rounded` may be null: then x is used.
  void (*multiply)(const Product&, const float* x, const RoundedX* rounded, int64_t begin, int64_t end);
  // `rows` queries [rows, dim] of a key head, at most kTokens, attend to its keys [begin, end). Fills `found`: sums of
  // values weighted with exp(score - most), [value_dim / 8][kTokens][8]; most [kTokens]; sums of the weights [kTokens].
  void (*attend)(const Attention&, int64_t batch, int64_t head, const float* q, const int32_t* positions, int64_t rows,
                 int64_t begin, int64_t end, float* found);
  // Of one query head. `columns` is memory for a block of its keys and values, [dim + value_dim][kKeys].
  void (*gradients)(const AttentionGradients&, int64_t batch, int64_t head, float* columns);
};

extern const Level portable;
#if defined(__x86_64__)
extern const Level avx2, avx512;
#elif defined(__aarch64__)
extern const Level dotprod;
#endif

}  // namespace jaxllm
