// Vectors of 32 bytes, for the instruction set that this file is compiled for (JAXLLM_LEVEL names it).
//
// GCC's and clang's vector types do nearly everything; only what no operator expresses has code of its own: the product
// of small integers, a table of 16 bytes, and float16. Functions here are static, because the same ones are compiled
// for several instruction sets, and a linker that merged them would choose one for all.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace jaxllm { namespace JAXLLM_LEVEL {

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x32 __attribute__((vector_size(32)));
typedef int8_t s8x32 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t s32x8 __attribute__((vector_size(32)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t s8x8 __attribute__((vector_size(8)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

template <class V>
INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

// 16 bytes from each of two places. Most code here works on two rows of a matrix at once, one in each half.
INLINE u8x32 two(const void* a, const void* b) {
#if defined(__AVX2__)
  const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a));
  return (u8x32)_mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i*)b), 1);
#else
  const u8x16 low = load<u8x16>(a), high = load<u8x16>(b);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                                 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
#endif
}

// a0 b0 a1 b1 ... in each half, from its first 8 bytes
INLINE u8x32 interleave_low(u8x32 a, u8x32 b) {
  return __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 16, 48, 17, 49, 18, 50,
                                 19, 51, 20, 52, 21, 53, 22, 54, 23, 55);
}

// The same from its last 8 bytes.
INLINE u8x32 interleave_high(u8x32 a, u8x32 b) {
  return __builtin_shufflevector(a, b, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 24, 56, 25, 57, 26,
                                 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}

INLINE f32x8 broadcast(float x) { return f32x8{x, x, x, x, x, x, x, x}; }

INLINE s32x8 broadcast4(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return s32x8{x, x, x, x, x, x, x, x};
}

INLINE f32x8 floats(s32x8 x) { return __builtin_convertvector(x, f32x8); }

// Eight int8. (GCC 12 converts vectors of bytes one by one.)
INLINE s32x8 s8(const void* p) {
#if defined(__AVX2__)
  return (s32x8)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return __builtin_convertvector(load<s8x8>(p), s32x8);
#endif
}

INLINE float f16(uint16_t bits) {
#if defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
#else
  // Exponent and mantissa moved to float32's place, with the bias corrected by a product (which handles subnormals).
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
  float x;
  if (rest >= 0x7c00u << 13) {
    const uint32_t special = sign | 0x7f800000 | (rest & 0x7fffff);
    memcpy(&x, &special, 4);
    return x;
  }
  if (rest < 0x400u << 13) {  // a subnormal: the mantissa times 2^-24 (a float32 subnormal might be flushed)
    x = float(bits & 0x3ff) * 0x1p-24f;
    return sign ? -x : x;
  }
  const uint32_t normal = sign | (rest + ((127 - 15) << 23));
  memcpy(&x, &normal, 4);
  return x;
#endif
}

INLINE f32x8 f16x8(u16x8 bits) {
#if defined(__F16C__)
  return (f32x8)_mm256_cvtph_ps((__m128i)bits);
#else
  f32x8 x;
  for (int i = 0; i < 8; i++) x[i] = f16(bits[i]);
  return x;
#endif
}

// 32 numbers as bytes, which they fit into.
INLINE s8x32 bytes(const s32x8 v[4]) {
#if defined(__AVX2__)
  const __m256i first = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]);
  const __m256i last = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works within each half
  return (s8x32)_mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, last), order);
#else
  s8x32 all;
  for (int i = 0; i < 32; i++) all[i] = int8_t(v[i / 8][i % 8]);
  return all;
#endif
}

INLINE float largest_of(f32x8 v) {
  f32x8 other = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v = other > v ? other : v;
  other = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  v = other > v ? other : v;
  return v[1] > v[0] ? v[1] : v[0];
}

template <class V>
INLINE auto sum_of(V v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}

// float16 in the low half of each word
INLINE f32x8 halves(u32x8 words) { return f16x8(__builtin_convertvector(words & 0xffff, u16x8)); }

// table[index], index below 16
INLINE u8x32 lookup(u8x16 table, u8x32 index) {
#if defined(__AVX2__)
  return (u8x32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)table), (__m256i)index);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  uint8x16_t low, high, t;
  memcpy(&low, &index, 16), memcpy(&high, (const char*)&index + 16, 16), memcpy(&t, &table, 16);
  low = vqtbl1q_u8(t, low), high = vqtbl1q_u8(t, high);
  u8x32 found;
  memcpy(&found, &low, 16), memcpy((char*)&found + 16, &high, 16);
  return found;
#else
  u8x32 found;
  for (int i = 0; i < 32; i++) found[i] = table[index[i]];
  return found;
#endif
}

// Sums of four neighbouring products, added to 8 sums. Codes are unsigned and below 128 if `kDepth` is above 0, and then
// AVX2 may add up `kDepth` products of pairs in 16 bits: 127 * 2 * kDepth * (largest code) stays below 2^15. With
// `kDepth` 0 they are signed. x is from -127 to 127.
//
// `Sum` is what a kernel keeps while it goes through the `kDepth` vectors; `finish` adds it to the sums. VNNI takes
// unsigned codes: signed ones are raised by 128, and the sums `start` with -128 times the sum of x.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define JAXLLM_VNNI(a, b, c) _mm256_dpbusd_epi32(a, b, c)
#elif defined(__AVXVNNI__)
#define JAXLLM_VNNI(a, b, c) _mm256_dpbusd_avx_epi32(a, b, c)
#endif

template <int kDepth>
struct Dot {
#if defined(JAXLLM_VNNI)
  s32x8 sum;
  inline __attribute__((always_inline)) void clear() { sum = s32x8{}; }
  inline __attribute__((always_inline)) void add(u8x32 code, s32x8 x) {
    sum = (s32x8)JAXLLM_VNNI((__m256i)sum, (__m256i)(kDepth > 0 ? code : code ^ 128), (__m256i)x);
  }
  inline __attribute__((always_inline)) s32x8 finish(s32x8 total) { return total + sum; }
#elif defined(__AVX2__)
  __m256i sum;
  inline __attribute__((always_inline)) void clear() { sum = _mm256_setzero_si256(); }
  inline __attribute__((always_inline)) void add(u8x32 code, s32x8 x) {
    if (kDepth > 0) {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)code, (__m256i)x));
      asm("" : "+x"(sum));  // GCC would add in another order that keeps all products, and spill them
    } else {
      const __m256i size = _mm256_abs_epi8((__m256i)code);
      const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8((__m256i)x, (__m256i)code));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  inline __attribute__((always_inline)) s32x8 finish(s32x8 total) {
    if (kDepth > 0) return total + (s32x8)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    return total + (s32x8)sum;
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  int32x4_t low, high;
  inline __attribute__((always_inline)) void clear() { low = high = vdupq_n_s32(0); }
  inline __attribute__((always_inline)) void add(u8x32 code, s32x8 x) {
    int8x16_t c[2], q[2];
    memcpy(c, &code, 32), memcpy(q, &x, 32);
    low = vdotq_s32(low, c[0], q[0]), high = vdotq_s32(high, c[1], q[1]);
  }
  inline __attribute__((always_inline)) s32x8 finish(s32x8 total) {
    s32x8 sum;
    memcpy(&sum, &low, 16), memcpy((char*)&sum + 16, &high, 16);
    return total + sum;
  }
#else
  s32x8 sum;
  inline __attribute__((always_inline)) void clear() { sum = s32x8{}; }
  inline __attribute__((always_inline)) void add(u8x32 code, s32x8 x) {
    for (int byte = 0; byte < 4; byte++) {  // the bytes of each word, with their signs
      const s32x8 c = (s32x8)((u32x8)code << (24 - 8 * byte)) >> 24, q = (s32x8)((u32x8)x << (24 - 8 * byte)) >> 24;
      sum += c * q;
    }
  }
  inline __attribute__((always_inline)) s32x8 finish(s32x8 total) { return total + sum; }
#endif
};

// How many of a group's `vectors` one Dot adds up, of `kSums` that are computed at a time. VNNI takes four cycles for
// each; so several are under way.
template <int kDepth, int kSums>
constexpr int depth_of(int vectors) {
#if defined(JAXLLM_VNNI)
  return kSums == 1 ? 2 : vectors;
#else
  return kDepth == 0 || kDepth > vectors ? vectors : kDepth;
#endif
}

// What the sums of a group start with; see Dot.
template <int kDepth>
INLINE s32x8 start([[maybe_unused]] int32_t raised) {
#if defined(JAXLLM_VNNI)
  if (kDepth == 0) return s32x8{} + raised;
#endif
  return s32x8{};
}

// Four vectors as the rows of two matrices of 4 x 4 words, one in each half, transposed.
INLINE void transpose(s32x8 r[4]) {
  const s32x8 a = __builtin_shufflevector(r[0], r[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const s32x8 b = __builtin_shufflevector(r[0], r[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const s32x8 c = __builtin_shufflevector(r[2], r[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const s32x8 d = __builtin_shufflevector(r[2], r[3], 2, 10, 3, 11, 6, 14, 7, 15);
  // As words of 64 bits: GCC 12 has a slower instruction for the same in words of 32.
  const auto first = [](s32x8 p, s32x8 q) { return (s32x8)__builtin_shufflevector((u64x4)p, (u64x4)q, 0, 4, 2, 6); };
  const auto last = [](s32x8 p, s32x8 q) { return (s32x8)__builtin_shufflevector((u64x4)p, (u64x4)q, 1, 5, 3, 7); };
  r[0] = first(a, c), r[1] = last(a, c), r[2] = first(b, d), r[3] = last(b, d);
}

// ---- eight rows at once ----

// 16 columns of eight rows: in each vector four columns, as the lanes of a panel have them.
struct Four {
  u8x32 v[4];
};

INLINE Four operator|(Four a, Four b) { return {{a.v[0] | b.v[0], a.v[1] | b.v[1], a.v[2] | b.v[2], a.v[3] | b.v[3]}}; }

// `count` bits of each byte, from bit `from` on, moved to bit `to`.
INLINE u8x32 moved(u8x32 x, int from, int count, int to) {
  const u16x16 words = to < from ? (u16x16)x >> (from - to) : (u16x16)x << (to - from);
  const uint8_t mask = uint8_t(((1 << count) - 1) << to);
  return (u8x32)words & mask;
}

INLINE Four moved(Four x, int from, int count, int to) {
  UNROLL
  for (u8x32& v : x.v) v = moved(v, from, count, to);
  return x;
}

INLINE Four low(Four x) { return moved(x, 0, 4, 0); }

INLINE Four high(Four x) { return moved(x, 4, 4, 0); }

INLINE Four lookup(u8x16 table, Four index) {
  UNROLL
  for (u8x32& v : index.v) v = lookup(table, v);
  return index;
}

// Blocks of eight rows.
struct Blocks {
  const uint8_t* p;  // of the first row
  int64_t row_bytes, three_rows;

  inline __attribute__((always_inline)) const uint8_t* row(int r) const {
    const uint8_t* q = r < 4 ? p : p + 4 * row_bytes;
    return r % 4 == 3 ? q + three_rows : q + r % 4 * row_bytes;
  }

  // Columns that have a byte each, from byte `at` on; or one of their parts.
  inline __attribute__((always_inline)) Four bytes(int at) const {
    s32x8 words[4];
    UNROLL
    for (int r = 0; r < 4; r++) words[r] = (s32x8)two(row(r) + at, row(r + 4) + at);
    transpose(words);
    return {{(u8x32)words[0], (u8x32)words[1], (u8x32)words[2], (u8x32)words[3]}};
  }

  inline __attribute__((always_inline)) u32x8 word(int at) const {
    const auto of = [&](int r) { return load<uint32_t>(row(r) + at); };
    return u32x8{of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)};
  }

  // Two words, in half as many loads.
  inline __attribute__((always_inline)) void two_words(int at, u32x8* words) const {
    const auto of = [&](int r) { return load<uint64_t>(row(r) + at); };
    const u32x8 a = (u32x8)u64x4{of(0), of(1), of(4), of(5)}, b = (u32x8)u64x4{of(2), of(3), of(6), of(7)};
    words[0] = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14);
    words[1] = __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  }
};

// Byte `i` of each word, in all of its bytes.
template <int i>
INLINE u8x32 spread(u32x8 word) {
  const u8x32 w = (u8x32)word;
  return __builtin_shufflevector(w, w, i, i, i, i, 4 + i, 4 + i, 4 + i, 4 + i, 8 + i, 8 + i, 8 + i, 8 + i,
                                 12 + i, 12 + i, 12 + i, 12 + i, 16 + i, 16 + i, 16 + i, 16 + i,
                                 20 + i, 20 + i, 20 + i, 20 + i, 24 + i, 24 + i, 24 + i, 24 + i,
                                 28 + i, 28 + i, 28 + i, 28 + i);
}

// Where `bits` are set in x, `more` is added.
INLINE u8x32 add_where(u8x32 x, u8x32 bits, u8x32 codes, uint8_t more) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __mmask32 set = _mm256_test_epi8_mask((__m256i)x, (__m256i)bits);
  return (u8x32)_mm256_mask_add_epi8((__m256i)codes, set, (__m256i)codes, _mm256_set1_epi8(char(more)));
#else
  return codes | ((u8x32)((x & bits) == bits) & more);
#endif
}

// Adds `more` to codes of 32 columns whose bit is set in words that have them in order; codes are below it.
INLINE void add_bits(u32x8 word, uint8_t more, Four* codes) {
  const u8x32 eight[4] = {spread<0>(word), spread<1>(word), spread<2>(word), spread<3>(word)};
  const u8x32 first = (u8x32)(u32x8{} + 0x08040201), last = first << 4;
  UNROLL
  for (int i = 0; i < 4; i++) {
    u8x32* columns = codes[i / 2].v + i % 2 * 2;
    columns[0] = add_where(eight[i], first, columns[0], more), columns[1] = add_where(eight[i], last, columns[1], more);
  }
}

}}  // namespace jaxllm::JAXLLM_LEVEL
