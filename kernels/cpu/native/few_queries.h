// Scores and sums of values for a few queries of one key head, as a decode step has them.
//
// Keys and values are read once, in the order of memory, and multiplied where they stand: a panel (attention.h) would
// cost more than it saves.
#pragma once
#include <type_traits>

#include "panels.h"

namespace jaxllm { namespace JAXLLM_LEVEL {

constexpr int64_t kFewQueries = 8;

// Sums of all lanes of eight vectors, side by side.
INLINE f32x8 sums_of_eight(const f32x8* v) {
  f32x8 halves[2];
  for (int i = 0; i < 2; i++) {
    s32x8 words[4];
    for (int k = 0; k < 4; k++) words[k] = (s32x8)v[4 * i + k];
    transpose(words);
    halves[i] = ((f32x8)words[0] + (f32x8)words[1]) + ((f32x8)words[2] + (f32x8)words[3]);
  }
  return __builtin_shufflevector(halves[0], halves[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(halves[0], halves[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// Scores of R queries [R, dim] against keys [first, end), of which there are at most kKeys, and repetitions of the last.
template <int kType, int R>
static void score_few(const uint8_t* keys, int64_t dim, const float* q, int64_t first, int64_t end,
                      float (*scores)[kKeys]) {
  for (int64_t key = first; key < end; key += 8) {
    f32x8 products[R][8];
    for (int64_t k = 0; k < 8; k++) {
      const uint8_t* at = keys + least(key + k, end - 1) * dim * kSizeOf<kType>;
      f32x8 total[R] = {};
      for (int64_t j = 0; j < dim; j += 8) {
        const f32x8 eight_of_key = eight<kType>(at + j * kSizeOf<kType>);
        for (int t = 0; t < R; t++) total[t] += eight_of_key * load<f32x8>(q + t * dim + j);
      }
      for (int t = 0; t < R; t++) products[t][k] = total[t];
    }
    for (int t = 0; t < R; t++) store(scores[t] + (key - first), sums_of_eight(products[t]));
  }
}

// J vectors of values [first, first + count), times the weights of R queries: adds to sums[j * kTokens + t].
template <int kType, int R, int J>
static void weigh_few(const uint8_t* values, int64_t value_dim, const float (*weights)[kKeys], int64_t count,
                      f32x8* sums) {
  f32x8 total[R][J] = {};
  for (int64_t k = 0; k < count; k++) {
    f32x8 value[J];
    for (int j = 0; j < J; j++) value[j] = eight<kType>(values + (k * value_dim + 8 * j) * kSizeOf<kType>);
    for (int t = 0; t < R; t++) {
      const f32x8 weight = broadcast(weights[t][k]);
      for (int j = 0; j < J; j++) total[t][j] += value[j] * weight;
    }
  }
  for (int t = 0; t < R; t++) {
    for (int j = 0; j < J; j++) sums[j * kTokens + t] += total[t][j];
  }
}

template <int kType, int R>
static void weigh_few(const uint8_t* values, int64_t value_dim, const float (*weights)[kKeys], int64_t count,
                      f32x8* sums) {
  constexpr int J = R == 1 ? 8 : R == 2 ? 4 : 2;  // so that eight additions are under way
  int64_t j = 0;
  for (; j + J <= value_dim / 8; j += J) {
    weigh_few<kType, R, J>(values + 8 * j * kSizeOf<kType>, value_dim, weights, count, sums + j * kTokens);
  }
  for (; j < value_dim / 8; j++) {
    weigh_few<kType, R, 1>(values + 8 * j * kSizeOf<kType>, value_dim, weights, count, sums + j * kTokens);
  }
}

// Calls work(t, R) with numbers of queries R that are known when this is compiled.
template <class Work>
INLINE void in_fours(int64_t rows, Work work) {
  int64_t t = 0;
  for (; t + 4 <= rows; t += 4) work(t, std::integral_constant<int, 4>());
  switch (rows - t) {
    case 3: return work(t, std::integral_constant<int, 3>());
    case 2: return work(t, std::integral_constant<int, 2>());
    case 1: return work(t, std::integral_constant<int, 1>());
  }
}

}}  // namespace jaxllm::JAXLLM_LEVEL
