// How products are divided into pieces of work.
#include <algorithm>
#include <vector>

#include "divide.h"
#include "pool.h"

namespace jaxllm {
namespace {

// The least work that a piece should have, in weights times rows of x. Few rows cost as much as four.
constexpr int64_t kPiece = 1 << 18;

int64_t work(int64_t rows, const Product& p) { return rows * p.matrix.cols * std::max<int64_t>(4, p.count); }

struct Piece {
  const Product* product;
  int64_t begin, end;  // rows of the matrix
};

}  // namespace

void multiply(const Level& level, const std::vector<Product>& products, const float* x, int64_t rows, bool exact) {
  const int64_t cols = products[0].matrix.cols;
  const bool rounds = !exact && std::any_of(products.begin(), products.end(),
                                            [&](const Product& p) { return level.rounds(p.matrix); });
  thread_local std::vector<RoundedSlice> buffer;
  if (rounds) buffer.resize(std::max<size_t>(buffer.size(), (cols + kSlice - 1) / kSlice * rows));
  const RoundedX rounded{buffer.data(), rows};
  if (rounds) {
    const int64_t some = std::max<int64_t>(1, kPiece / 16 / cols);  // a number takes as long to round as eight products
    in_parallel((rows + some - 1) / some, [&](int64_t i) {
      level.round_rows(x, cols, some * i, std::min(some * (i + 1), rows), rounded);
    });
  }
  // Large pieces first, because each begins by waiting for memory; then smaller ones, so that all threads end together.
  int64_t left = 0;
  for (const Product& p : products) left += work(p.matrix.rows, p);
  std::vector<Piece> pieces;
  for (const Product& p : products) {
    for (int64_t row = 0; row < p.matrix.rows;) {
      const int64_t some = std::max(kPiece, left / (2 * threads()));
      const int64_t step = 16 * std::max<int64_t>(1, some / work(16, p));
      const int64_t end = std::min(row + step, p.matrix.rows);
      pieces.push_back({&p, row, end});
      left -= work(end - row, p), row = end;
    }
  }
  in_parallel(pieces.size(), [&](int64_t i) {
    level.multiply(*pieces[i].product, x, rounds ? &rounded : nullptr, pieces[i].begin, pieces[i].end);
  });
}

}  // namespace jaxllm
