// y = W x + bias for one row x: what a linear layer does for a single token. And the transpose of a matrix, for the
// products of its gradient.
//
// Each weight is read once and used once, so memory is all that counts: the matrix is one stream, read row after row, and
// asked for two pages ahead, as no processor does by itself.
//
// Letters: d inputs, e outputs; m rows and n columns of any matrix.
#include "native.h"

namespace {

using namespace zoo;

constexpr int64_t kParts = 4;     // sums that do not wait for each other
constexpr int64_t kAhead = 8192;  // bytes

// the sum of a row of W, at w, times x
template <typename T>
inline T dot_row(int64_t d, const T* __restrict__ x, const T* __restrict__ w) {
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<T>, block = kParts * lanes;
  V parts[kParts] = {};
  int64_t j = 0;
  for (; j + block <= d; j += block) {
#pragma GCC unroll 8
    for (int p = 0; p < kParts; p++) {
      __builtin_prefetch(w + j + p * lanes + kAhead / (int64_t)sizeof(T));
      parts[p] += *(const V*)(w + j + p * lanes) * *(const V*)(x + j + p * lanes);
    }
  }
  V all = parts[0];
  for (int p = 1; p < kParts; p++) all += parts[p];
  for (; j + lanes <= d; j += lanes) all += *(const V*)(w + j) * *(const V*)(x + j);
  T sum = sum_lanes<T>(all);
  for (; j < d; j++) sum += w[j] * x[j];
  return sum;
}

template <typename T>
void multiply_row(int64_t e, int64_t d, const T* x, const T* weight, const T* bias, T* y, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < e; i++) y[i] = dot_row(d, x, weight + i * d) + (bias ? bias[i] : T(0));
}

constexpr int64_t kStripe = 64;  // rows, whose columns become lines of the cache

// out (n m) = the transpose of x (m n)
template <typename T>
void transpose_stripes(int64_t m, int64_t n, const T* x, T* out, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < m; row += kStripe) {
    transpose(std::min(kStripe, m - row), n, x + row * n, n, out + row, m);
  }
}

}  // namespace

extern "C" int linear_transpose_f32(int64_t m, int64_t n, const float* x, float* out, int64_t threads) {
  ZOO_STATUS(transpose_stripes(m, n, x, out, threads))
}

extern "C" int linear_row_f32(int64_t e, int64_t d, const float* x, const float* weight, const float* bias, float* y,
                              int64_t threads) {
  ZOO_STATUS(multiply_row(e, d, x, weight, bias, y, threads))
}
