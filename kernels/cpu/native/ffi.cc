// What XLA and Python call.
#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "divide.h"
#include "pool.h"
#include "refuse.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxllm {

Grids grids;

namespace {

const Level* level = &portable;

#if defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#else
  return true;  // Apple's, all of which have it
#endif
}
#endif

// How a matrix is written in an operation's `plan`, in this order (kernels/cpu/operands.py). Its leaves are operands.
struct Planned {
  int64_t format, rows, cols, leaves;
  int64_t index[kLeaves], row_bytes[kLeaves], matrix_bytes[kLeaves], param[kParams];
};

// The matrix with number `i` of a stack whose leaves are operands from `first` on; the leaf of index -1 is not there.
// Returns why there is none, or null.
const char* matrix_of(const Planned& plan, const ffi::RemainingArgs& args, size_t first, int64_t i, Matrix* m) {
  *m = {Format(plan.format), plan.rows, plan.cols, {}, {}, {}};
  int64_t bytes[kLeaves] = {};
  for (int leaf = 0; leaf < kLeaves; leaf++) {
    if (plan.index[leaf] < 0) continue;
    const auto buffer = args.get<ffi::AnyBuffer>(first + plan.index[leaf]);
    bytes[leaf] = plan.matrix_bytes[leaf];
    if (!buffer || bytes[leaf] < 0 || times(i + 1, bytes[leaf]) > int64_t(buffer->size_bytes())) {
      return "a matrix that its stack does not have";
    }
    m->leaf[leaf] = static_cast<const uint8_t*>(buffer->untyped_data()) + i * bytes[leaf];
    m->row_bytes[leaf] = plan.row_bytes[leaf];
  }
  std::copy_n(plan.param, kParams, m->param);
  return wrong_matrix(*m, bytes);
}

ffi::Error refused(const char* why) { return ffi::Error::InvalidArgument(std::string("jaxllm's kernels refuse ") + why); }

// Products of x[rows, cols] with the matrices of a plan, whose leaves are operands. `expert[tile]` is the number of a
// tile's matrix; of tiles without one, the result is zero.
ffi::Error products(ffi::Buffer<ffi::F32> x, const int32_t* expert, int64_t tiles, ffi::RemainingArgs leaves,
                    ffi::RemainingRets results, ffi::Span<const int64_t> plan, bool exact) {
  if (x.dimensions().size() != 2 || tiles < 1 || x.dimensions()[0] % tiles) return refused("rows that are no tiles");
  if (plan.size() * sizeof(int64_t) != results.size() * sizeof(Planned)) return refused("a plan of another size");
  const int64_t rows = x.dimensions()[0], cols = x.dimensions()[1], tile = rows / tiles;
  std::vector<Product> products;
  size_t first = 0;
  for (size_t i = 0; i < results.size(); i++) {
    const Planned& planned = reinterpret_cast<const Planned*>(plan.begin())[i];
    const auto result = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!result || planned.cols != cols || int64_t((*result)->element_count()) != times(rows, planned.rows)) {
      return refused("factors and results of different sizes");
    }
    float* y = (*result)->typed_data();
    for (int64_t t = 0; t < tiles; t++, y += tile * planned.rows) {
      const int64_t number = expert ? expert[t] : 0;
      Product product{{}, t * tile, tile, y};
      if (number < 0 || !cols) {
        std::fill_n(y, tile * planned.rows, 0.0f);
      } else if (const char* why = matrix_of(planned, leaves, first, number, &product.matrix)) {
        return refused(why);
      } else {
        products.push_back(product);
      }
    }
    first += planned.leaves;
  }
  if (rows && !products.empty()) multiply(*level, products, x.typed_data(), rows, exact);
  return ffi::Error::Success();
}

// x[rows, cols], then the leaves of some matrices -> a result [rows, matrix.rows] for each.
ffi::Error matmul(ffi::Buffer<ffi::F32> x, ffi::RemainingArgs leaves, ffi::RemainingRets results,
                  ffi::Span<const int64_t> plan, bool exact) {
  return products(x, nullptr, 1, leaves, results, plan, exact);
}

// Tiles of rows x[tiles * tile, cols], each times the matrix expert[tile] of each stack; zero where it is negative.
ffi::Error grouped_matmul(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> expert, ffi::RemainingArgs leaves,
                          ffi::RemainingRets results, ffi::Span<const int64_t> plan, bool exact) {
  return products(x, expert.typed_data(), expert.element_count(), leaves, results, plan, exact);
}

int64_t type_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return kF32;
    case ffi::F16: return kF16;
    case ffi::S8: return kS8;
    case ffi::U8: return kE4M3;  // its bits, see kernels/coded.py
    case ffi::BF16: return kBF16;
    default: return -1;
  }
}

// See Attention in level.h. Scales, `key_positions`, `sinks` and `logs` are empty where there are none.
ffi::Error attention(ffi::Buffer<ffi::F32> q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::Buffer<ffi::BF16> key_scales, ffi::Buffer<ffi::BF16> value_scales,
                     ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> key_positions, ffi::Buffer<ffi::F32> sinks,
                     ffi::Buffer<ffi::S32> rows, ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> logs,
                     int64_t window, float score_cap) {
  const auto queries = q.dimensions(), held = keys.dimensions(), valued = values.dimensions();
  const auto type = keys.element_type();
  if (queries.size() != 4 || held.size() != 4 || valued.size() != 4 || key_positions.dimensions().size() != 2 ||
      queries[3] != held[3] || !std::equal(held.begin(), held.begin() + 3, valued.begin()) ||
      values.element_type() != type || type_of(type) < 0) {
    return refused("queries, keys and values that do not fit together");
  }
  const size_t tokens = queries[0] * queries[1], all = held[0] * held[1] * held[2];
  const size_t scales = type == ffi::S8 || type == ffi::U8 ? all : 0;
  if (positions.element_count() != tokens || rows.element_count() != size_t(queries[0]) ||
      key_scales.element_count() != scales || value_scales.element_count() != scales ||
      (key_positions.element_count() && key_positions.dimensions()[1] != held[2]) ||
      (sinks.element_count() && sinks.element_count() != size_t(queries[2])) ||
      y->element_count() != tokens * queries[2] * valued[3] ||
      (logs->element_count() && logs->element_count() != tokens * queries[2])) {
    return refused("attention with operands of different sizes");
  }
  Attention a{};
  a.q = q.typed_data(), a.positions = positions.typed_data(), a.y = y->typed_data();
  a.logs = logs->element_count() ? logs->typed_data() : nullptr;
  a.keys = static_cast<const uint8_t*>(keys.untyped_data());
  a.values = static_cast<const uint8_t*>(values.untyped_data());
  a.key_scales = static_cast<const uint8_t*>(key_scales.untyped_data());
  a.value_scales = static_cast<const uint8_t*>(value_scales.untyped_data());
  a.key_positions = key_positions.element_count() ? key_positions.typed_data() : nullptr;
  a.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  a.rows = rows.typed_data();
  a.batch = queries[0], a.time = queries[1], a.heads = queries[2], a.dim = queries[3];
  a.kv_heads = held[1], a.length = held[2], a.value_dim = valued[3];
  a.key_batches = key_positions.dimensions()[0];
  a.type = type_of(type);
  a.window = window, a.score_cap = score_cap;
  if (const char* why = wrong_attention(a, held[0])) return refused(why);
  attend(*level, a);
  return ffi::Error::Success();
}

// See AttentionGradients in level.h.
ffi::Error attention_gradients(ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> values,
                               ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> key_positions,
                               ffi::Buffer<ffi::F32> logs, ffi::Buffer<ffi::F32> means, ffi::Buffer<ffi::F32> g,
                               ffi::ResultBuffer<ffi::F32> to_q, ffi::ResultBuffer<ffi::F32> to_keys,
                               ffi::ResultBuffer<ffi::F32> to_values, int64_t window, float score_cap) {
  const auto queries = q.dimensions(), held = keys.dimensions(), valued = values.dimensions();
  if (queries.size() != 4 || held.size() != 4 || valued.size() != 4 || key_positions.dimensions().size() != 2 ||
      held[1] < 1 || queries[2] % held[1] || queries[0] != held[0] || queries[3] != held[3] ||
      !std::equal(held.begin(), held.begin() + 3, valued.begin())) {
    return refused("queries, keys and values that do not fit together");
  }
  const size_t tokens = queries[0] * queries[1], rows = tokens * queries[2], all = queries[2] * held[0] * held[2];
  const size_t key_batches = key_positions.dimensions()[0];
  if (positions.element_count() != tokens || (key_batches != 1 && key_batches != size_t(queries[0])) ||
      key_positions.dimensions()[1] != held[2] || logs.element_count() != rows || means.element_count() != rows ||
      g.element_count() != rows * valued[3] || to_q->element_count() != q.element_count() ||
      to_keys->element_count() != all * held[3] || to_values->element_count() != all * valued[3]) {
    return refused("gradients of attention with operands of different sizes");
  }
  AttentionGradients a{};
  Attention& f = a.forward;
  f.q = q.typed_data(), f.positions = positions.typed_data(), f.key_positions = key_positions.typed_data();
  f.keys = static_cast<const uint8_t*>(keys.untyped_data());
  f.values = static_cast<const uint8_t*>(values.untyped_data());
  f.batch = queries[0], f.time = queries[1], f.heads = queries[2], f.dim = queries[3];
  f.kv_heads = held[1], f.length = held[2], f.value_dim = valued[3];
  f.key_batches = key_positions.dimensions()[0];
  f.window = window, f.score_cap = score_cap;
  a.logs = logs.typed_data(), a.means = means.typed_data(), a.g = g.typed_data();
  a.q = to_q->typed_data(), a.keys = to_keys->typed_data(), a.values = to_values->typed_data();
  gradients(*level, a);
  return ffi::Error::Success();
}

// See Norm in divide.h. `weight` is empty where there is none.
ffi::Error rms_norm(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weight, ffi::ResultBuffer<ffi::F32> y, float eps) {
  const int64_t size = x.dimensions().size() ? x.dimensions().back() : 0;
  if ((weight.element_count() && int64_t(weight.element_count()) != size) || y->element_count() != x.element_count()) {
    return refused("a norm with operands of different sizes");
  }
  if (size == 0) return ffi::Error::Success();
  normalize({x.typed_data(), weight.element_count() ? weight.typed_data() : nullptr,
             int64_t(x.element_count()) / size, size, eps, y->typed_data()});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxllm

#define EXPORT __attribute__((visibility("default")))

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxllm_matmul, jaxllm::matmul,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().RemainingArgs().RemainingRets()
        .Attr<ffi::Span<const int64_t>>("plan").Attr<bool>("exact"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxllm_grouped_matmul, jaxllm::grouped_matmul,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::S32>>().RemainingArgs().RemainingRets()
        .Attr<ffi::Span<const int64_t>>("plan").Attr<bool>("exact"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxllm_attention, jaxllm::attention,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::Buffer<ffi::BF16>>().Arg<ffi::Buffer<ffi::BF16>>().Arg<ffi::Buffer<ffi::S32>>()
        .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::S32>>()
        .Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("window").Attr<float>("score_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxllm_attention_gradients, jaxllm::attention_gradients,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
        .Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("window").Attr<float>("score_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxllm_rms_norm, jaxllm::rms_norm,
    ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
        .Attr<float>("eps"));

#pragma GCC visibility pop

// Chooses the instruction set by name (the best one that the processor has, if it is empty), and the number of threads.
// Returns the name, or null if the processor lacks it.
extern "C" EXPORT const char* jaxllm_start(const char* wanted, int threads, const jaxllm::Grids* grids) {
  jaxllm::grids = *grids;
  jaxllm::use_threads(threads);
  const jaxllm::Level* there[4];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vnni")) {
    there[count++] = &jaxllm::avx512;
  }
  if (has_avx2) there[count++] = &jaxllm::avx2;
#elif defined(__aarch64__)
  if (jaxllm::has_dotprod()) there[count++] = &jaxllm::dotprod;
#endif
  there[count++] = &jaxllm::portable;
  for (int i = 0; i < count; i++) {
    if (*wanted && std::string_view(wanted) != there[i]->name) continue;
    jaxllm::level = there[i];
    return there[i]->name;
  }
  return nullptr;
}
