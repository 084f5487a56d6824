// Softmax attention over a cache, for one instruction set, after FlashAttention: some queries of one key head pass over
// the keys in blocks, with a running maximum, sum and weighted sum of values, so that no score is stored.
//
// Keys and values are multiplied as matrices are in products.h: keys are rows of a matrix, eight side by side; values
// are already side by side. The scale of a key of 8 bits multiplies its scores; that of a value, its weights.
#pragma once
#include "few_queries.h"
#include "products.h"

namespace jaxllm { namespace JAXLLM_LEVEL {

// exp(x) for x <= 0, within 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf).
INLINE f32x8 exponential(f32x8 x) {
  x = x > -87.0f ? x : broadcast(-87.0f);
  const f32x8 n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  f32x8 r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  f32x8 p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (f32x8)((__builtin_convertvector(n, s32x8) << 23) + (s32x8)p);
}

// Rows of the queries of a key head that a piece works on, and what it has found so far.
struct State {
  f32x8* sums;    // [value_dim / 8][kTokens]: weighted sums of values
  float* most;    // [kTokens]
  float* weight;  // [kTokens]: sums of exp(score - most)
};

// P panels times all rows of x: adds to sums[p * kTokens + row].
template <int P>
INLINE void add_all(const Floats* panels, int64_t columns, const float* x, int64_t stride, int64_t rows, f32x8* sums) {
  int64_t t = 0;
  for (; t + 6 <= rows; t += 6) add_floats<P, 6, 1>(panels, columns, x + t * stride, stride, sums + t);
  for (; t + 3 <= rows; t += 3) add_floats<P, 3, 2>(panels, columns, x + t * stride, stride, sums + t);
  for (; t < rows; t++) add_floats<P, 1, 4>(panels, columns, x + t * stride, stride, sums + t);
}

// Scores of `rows` queries [rows, dim] against keys [first, first + kKeys): float [rows][kKeys]. Keys from `end` on are
// repetitions.
template <int kType>
static void score(const Attention& a, const uint8_t* keys, const float* q, int64_t rows, int64_t first, int64_t end,
                  float (*scores)[kKeys]) {
  constexpr int size = kSizeOf<kType>;
  Matrix m{kDense, end, a.dim, {}, {}, {}};
  m.leaf[0] = keys, m.row_bytes[0] = size * a.dim;
  Floats panels[2];
  f32x8 sums[2 * kTokens];
  for (int64_t key = first; key < first + kKeys && key < end; key += 2 * kRows) {
    for (int64_t t = 0; t < rows; t++) sums[t] = sums[kTokens + t] = f32x8{};
    for (int64_t at = 0; at < a.dim; at += kSlice) {
      const int64_t columns = least(kSlice, a.dim - at);
      for (int p = 0; p < 2; p++) {
        decode_floats<Dense<kType>>(m, key + p * kRows, at / 32, (at + columns + 31) / 32, panels[p]);
      }
      add_all<2>(panels, columns, q + at, a.dim, rows, sums);
    }
    for (int64_t t = 0; t < rows; t++) {
      store(scores[t] + (key - first), sums[t]), store(scores[t] + (key - first) + kRows, sums[kTokens + t]);
    }
  }
}

// Scales of keys [first, first + kKeys), or of values; zeros from `end` on, where memory may hold anything.
INLINE void scales_of(const uint8_t* scales, int64_t first, int64_t end, f32x8* found) {
  uint16_t bits[kKeys] = {};
  memcpy(bits, scales + 2 * first, 2 * least(kKeys, end - first));
  for (int i = 0; i < kKeys; i += 8) found[i / 8] = eight<kBF16>((const uint8_t*)(bits + i));
}

// Whether queries at these positions see none of these keys.
INLINE bool unseen(const int32_t* positions, int64_t rows, const int32_t* keys, int64_t count, int64_t window) {
  int32_t low = positions[0], high = low;
  for (int64_t t = 1; t < rows; t++) {
    low = positions[t] < low ? positions[t] : low, high = positions[t] > high ? positions[t] : high;
  }
  for (int64_t k = 0; k < count; k++) {
    if (keys[k] >= 0 && keys[k] <= high && (window == 0 || low - keys[k] < window)) return false;
  }
  return true;
}

// Adds keys [begin, end) of a head to the state of `rows` queries at `positions`.
template <int kType>
static void attend(const Attention& a, int64_t batch, int64_t head, const float* q, const int32_t* positions,
                   int64_t rows, int64_t begin, int64_t end, State& state) {
  constexpr int size = kSizeOf<kType>;
  constexpr bool coded = size == 1;
  const int64_t slot = (a.rows[batch] * a.kv_heads + head) * a.length;
  const uint8_t *keys = a.keys + slot * a.dim * size, *values = a.values + slot * a.value_dim * size;
  const int32_t* key_positions = a.key_positions ? a.key_positions + batch % a.key_batches * a.length : nullptr;
  alignas(32) float scores[kTokens][kKeys];
  f32x8 key_scales[kKeys / 8], value_scales[kKeys / 8];
  const s32x8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const bool few = a.time < kFew && rows <= kFewQueries && a.dim % 8 == 0;  // of all tokens of a step, or of none
  for (int64_t first = begin; first < end; first += kKeys) {
    const int64_t count = least(kKeys, end - first);
    if (key_positions && unseen(positions, rows, key_positions + first, count, a.window)) continue;
    if (few) {
      in_fours(rows, [&](int64_t t, auto some) {
        score_few<kType, some()>(keys, a.dim, q + t * a.dim, first, first + count, scores + t);
      });
    } else {
      score<kType>(a, keys, q, rows, first, end, scores);
    }
    if (coded) {
      scales_of(a.key_scales + 2 * slot, first, end, key_scales);
      scales_of(a.value_scales + 2 * slot, first, end, value_scales);
    }
    for (int64_t t = 0; t < rows; t++) {
      f32x8 most = broadcast(state.most[t]);
      for (int i = 0; i < count; i += 8) {
        f32x8 s = load<f32x8>(scores[t] + i);
        if (coded) s *= key_scales[i / 8];
        if (a.score_cap > 0) {
          for (int k = 0; k < 8; k++) s[k] = a.score_cap * __builtin_tanhf(s[k] / a.score_cap);
        }
        s32x8 at = lanes + int32_t(first + i);
        s32x8 visible = at < int32_t(end);
        if (key_positions) {
          s32x8 given = {};
          memcpy(&given, key_positions + first + i, 4 * least(8, end - first - i));
          at = given, visible &= at >= 0;
        }
        const s32x8 back = (s32x8)(u32x8(s32x8{} + positions[t]) - (u32x8)at);
        visible &= at <= positions[t];
        if (a.window > 0) visible &= back < int32_t(least(a.window, INT32_MAX));
        s = visible ? s : broadcast(-__builtin_inff());
        store(scores[t] + i, s);
        most = s > most ? s : most;
      }
      const float largest = largest_of(most);
      const float safe = largest == -__builtin_inff() ? 0 : largest;  // nothing is visible yet
      f32x8 total = {};
      for (int i = 0; i < count; i += 8) {
        const f32x8 s = load<f32x8>(scores[t] + i);
        f32x8 weight = exponential(s - safe);
        weight = s == -__builtin_inff() ? f32x8{} : s == s ? weight : s;  // NaN stays
        store(scores[t] + i, coded ? weight * value_scales[i / 8] : weight);
        total += weight;
      }
      const float shrunk = state.most[t] == -__builtin_inff() ? 0 : exponential(broadcast(state.most[t] - safe))[0];
      state.most[t] = largest;
      state.weight[t] = state.weight[t] * shrunk + sum_of(total);
      for (int64_t j = 0; j < a.value_dim / 8; j++) state.sums[j * kTokens + t] *= shrunk;
    }
    if (few) {
      in_fours(rows, [&](int64_t t, auto some) {
        weigh_few<kType, some()>(values + first * a.value_dim * size, a.value_dim, scores + t, count, state.sums + t);
      });
      continue;
    }
    Floats panels[2];
    for (int64_t j = 0; j < a.value_dim / 8; j += 2) {
      const int many = j + 1 < a.value_dim / 8 ? 2 : 1;
      for (int p = 0; p < many; p++) {
        for (int64_t k = 0; k < count; k++) {
          panels[p].weights[k] = eight<kType>(values + ((first + k) * a.value_dim + 8 * (j + p)) * size);
        }
      }
      f32x8* sums = state.sums + j * kTokens;
      if (many == 2) add_all<2>(panels, count, scores[0], kKeys, rows, sums);
      else add_all<1>(panels, count, scores[0], kKeys, rows, sums);
    }
  }
}

// See Level.
static void attend(const Attention& a, int64_t batch, int64_t head, const float* q, const int32_t* positions,
                   int64_t rows, int64_t begin, int64_t end, float* found) {
  f32x8* sums = (f32x8*)found;
  float* most = (float*)(sums + a.value_dim / 8 * kTokens);
  State state{sums, most, most + kTokens};
  for (int64_t t = 0; t < rows; t++) {
    state.most[t] = -__builtin_inff(), state.weight[t] = 0;
    for (int64_t j = 0; j < a.value_dim / 8; j++) sums[j * kTokens + t] = f32x8{};
  }
  switch (a.type) {
    case kF32: return attend<kF32>(a, batch, head, q, positions, rows, begin, end, state);
    case kF16: return attend<kF16>(a, batch, head, q, positions, rows, begin, end, state);
    case kS8: return attend<kS8>(a, batch, head, q, positions, rows, begin, end, state);
    case kE4M3: return attend<kE4M3>(a, batch, head, q, positions, rows, begin, end, state);
    default: return attend<kBF16>(a, batch, head, q, positions, rows, begin, end, state);
  }
}

}}  // namespace jaxllm::JAXLLM_LEVEL
