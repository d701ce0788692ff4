// y = W x + bias for one row x: what a linear layer does for a single token.
//
// Each weight is read once and used once, so memory is all that counts: four rows of the matrix at a time, while the next
// four are asked for.
//
// Letters: d inputs, e outputs.
#include "native.h"

namespace {

using namespace zoo;

constexpr int64_t kRows = 4;

// sums of `rows` rows of W from `w` on, times x
template <int rows, typename T>
inline void dot_rows(int64_t d, const T* __restrict__ x, const T* __restrict__ w, T* sums) {
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<T>;
  V parts[rows] = {};
  int64_t j = 0;
  for (; j + lanes <= d; j += lanes) {
    const V right = *(const V*)(x + j);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      parts[r] += *(const V*)(w + r * d + j) * right;
      __builtin_prefetch(w + (r + rows) * d + j);
    }
  }
  for (int r = 0; r < rows; r++) {
    sums[r] = sum_lanes<T>(parts[r]);
    for (int64_t i = j; i < d; i++) sums[r] += w[r * d + i] * x[i];
  }
}

template <typename T>
void multiply_row(int64_t e, int64_t d, const T* x, const T* weight, const T* bias, T* y, int64_t threads) {
  const int64_t groups = (e + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; group++) {
    const int64_t first = group * kRows;
    if (first + kRows <= e) {
      dot_rows<kRows>(d, x, weight + first * d, y + first);
    } else {
      for (int64_t i = first; i < e; i++) dot_rows<1>(d, x, weight + i * d, y + i);
    }
    for (int64_t i = first; bias && i < std::min(first + kRows, e); i++) y[i] += bias[i];
  }
}

}  // namespace

extern "C" int linear_row_f32(int64_t e, int64_t d, const float* x, const float* weight, const float* bias, float* y,
                              int64_t threads) {
  ZOO_STATUS(multiply_row(e, d, x, weight, bias, y, threads))
}
