// What the C++ kernels share: vectors of the machine's width, a small matrix product, exponentials, scratch memory.
//
// Kernels are templates over the precision T (float or double) and work on contiguous arrays. Each is exported once for
// each precision, as `name_f32` and `name_f64`, takes sizes as int64_t and the number of threads last, and returns 0, or 1
// where memory ran out. Memory is taken before a parallel region begins: nothing may throw inside one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

namespace zoo {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#else
constexpr int kVectorBytes = 32;
#endif

// Elements of T in a vector register, and a vector of them that may lie anywhere in memory.
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

// ---- elementary functions, written so that a loop over them becomes vector code -------------------------------------
//
// The polynomials of exp and tanh in float are those of the Cephes library (S. Moshier).

// exp(x) to 2 units in the last place; 0 below -87.3, where float has only denormal numbers left.
inline float exponential(float x) {
  const float clamped = std::min(std::max(x, -87.33f), 88.72f);
  const float n = __builtin_rintf(clamped * 1.44269504f);
  float r = clamped - n * 0.693359375f;  // ln 2 in two parts
  r += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  // 2^n in two factors: n reaches 128, one more than a float's exponent holds
  const int32_t half = (int32_t)n >> 1;
  const uint32_t first_bits = (uint32_t)(half + 127) << 23, second_bits = (uint32_t)((int32_t)n - half + 127) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, 4);
  std::memcpy(&second, &second_bits, 4);
  const float value = y * first * second;
  return x < -87.33f ? 0.0f : (x != x ? x : (x > 88.72f ? std::numeric_limits<float>::infinity() : value));
}
inline double exponential(double x) { return std::exp(x); }

// exp(x) for x <= 0, at less cost: what is below -87 counts as -87, so that it is never 0.
inline float decaying_exponential(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = __builtin_rintf(clamped * 1.44269504f);
  float r = clamped - n * 0.693359375f;
  r += n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return (p * r * r + r + 1.0f) * power;
}
inline double decaying_exponential(double x) { return std::exp(x); }

template <typename T>
inline T sigmoid(T x) {
  const T u = decaying_exponential(-std::fabs(x));
  return (x < 0 ? u : T(1)) / (1 + u);
}

// tanh(x) to 3 units in the last place, near 0 too
inline float hyperbolic_tangent(float x) {
  const float size = std::fabs(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near_zero = p * square * x + x;
  const float u = decaying_exponential(-2.0f * size);
  const float beyond = std::copysign((1.0f - u) / (1.0f + u), x);
  return size < 0.625f ? near_zero : beyond;
}
inline double hyperbolic_tangent(double x) { return std::tanh(x); }

// ln(sigmoid(x)) = min(x, 0) - ln(1 + u) with u = exp(-|x|), and ln(1 + u) = 2 artanh(u / (2 + u))
inline float log_sigmoid(float x) {
  const float u = decaying_exponential(-std::fabs(x));
  const float s = u / (2.0f + u), square = s * s;
  float p = 1.0f / 13.0f;
  p = p * square + 1.0f / 11.0f;
  p = p * square + 1.0f / 9.0f;
  p = p * square + 1.0f / 7.0f;
  p = p * square + 1.0f / 5.0f;
  p = p * square + 1.0f / 3.0f;
  p = p * square + 1.0f;
  return std::min(x, 0.0f) - 2.0f * s * p;
}
inline double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::fabs(x))); }

// The sum of a vector's lanes, half onto half.
template <typename T, int lanes = kLanes<T>>
inline T sum_lanes(const T* x) {
  if constexpr (lanes == 1) {
    return x[0];
  } else {
    typedef T Half __attribute__((vector_size(lanes / 2 * sizeof(T)), aligned(sizeof(T)), may_alias));
    const Half sum = *(const Half*)x + *(const Half*)(x + lanes / 2);
    return sum_lanes<T, lanes / 2>((const T*)&sum);
  }
}
template <typename T>
inline T sum_lanes(const Vector<T>& x) {
  return sum_lanes<T>((const T*)&x);
}

// ---- memory ----------------------------------------------------------------------------------------------------------

// Aligned scratch memory of a thread, freed with it. Contents are undefined.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    const size_t bytes = ((size_t)std::max<int64_t>(count, 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() { return data_; }
  operator const T*() const { return data_; }
  void zero(int64_t count) { std::memset(data_, 0, (size_t)count * sizeof(T)); }

 private:
  T* data_;
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out the parts of a worker's memory; without any, it counts how much there should be.
template <typename T>
struct Arena {
  T* memory;
  int64_t used = 0;

  T* take(int64_t count) {
    T* part = memory ? memory + used : nullptr;
    used += round_up(count, 64 / sizeof(T));
    return part;
  }
};

// Ask for memory that is read soon, where the processor cannot guess it: a head's tokens lie far apart.
template <typename T>
inline void prefetch(const T* at, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(at + i);
}

// ---- rows of numbers ------------------------------------------------------------------------------------------------

template <typename T>
inline T dot(int64_t n, const T* __restrict__ x, const T* __restrict__ y) {
  using V = Vector<T>;
  V sums{};
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) sums += *(const V*)(x + i) * *(const V*)(y + i);
  T sum = sum_lanes<T>(sums);
  for (; i < n; i++) sum += x[i] * y[i];
  return sum;
}

// out += scale x
template <typename T>
inline void add_scaled(int64_t n, T scale, const T* __restrict__ x, T* __restrict__ out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] += scale * x[i];
}

// out = x y
template <typename T>
inline void multiply_row(int64_t n, const T* x, const T* y, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * y[i];
}

// ---- matrices, row by row, with the distance between rows ------------------------------------------------------------

constexpr int kRowBlock = 4;

template <typename T>
constexpr int kColumnBlock = 2 * kLanes<T>;

// Sizes that the product wants, so that it needs no remainders: scratch matrices are padded with zeros up to them.
inline int64_t round_rows(int64_t n) { return (n + kRowBlock - 1) / kRowBlock * kRowBlock; }
template <typename T>
inline int64_t round_columns(int64_t n) {
  return (n + kColumnBlock<T> - 1) / kColumnBlock<T> * kColumnBlock<T>;
}

struct Nothing {
  void operator()() const {}
};

// out (rows x vectors of columns) = or += a b, summed in registers; a's (r, p) is at r * a_row + p * a_column.
template <int rows, int vectors, bool accumulate, typename T>
inline void multiply_tile(int64_t k, const T* __restrict__ a, int64_t a_row, int64_t a_column, const T* __restrict__ b,
                          int64_t b_row, T* __restrict__ out, int64_t out_row) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  V sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
    for (int c = 0; c < vectors; c++) sums[r][c] = accumulate ? *(const V*)(out + r * out_row + c * lanes) : V{};
  }
  for (int64_t p = 0; p < k; p++) {
    V right[vectors];
#pragma GCC unroll 2
    for (int c = 0; c < vectors; c++) right[c] = *(const V*)(b + p * b_row + c * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const T left = a[r * a_row + p * a_column];
#pragma GCC unroll 2
      for (int c = 0; c < vectors; c++) sums[r][c] += left * right[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
    for (int c = 0; c < vectors; c++) *(V*)(out + r * out_row + c * lanes) = sums[r][c];
  }
}

template <int rows, bool accumulate, typename T, typename Between>
inline void multiply_rows(int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row,
                          T* out, int64_t out_row, Between& between) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + 2 * lanes <= n; j += 2 * lanes) {
    multiply_tile<rows, 2, accumulate>(k, a, a_row, a_column, b + j, b_row, out + j, out_row);
    between();
  }
  if (j < n) multiply_tile<rows, 1, accumulate>(k, a, a_row, a_column, b + j, b_row, out + j, out_row);
}

template <bool accumulate, typename T, typename Between>
inline void multiply_strided(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_column, const T* b,
                             int64_t b_row, T* out, int64_t out_row, Between& between) {
  constexpr int rows = kVectorBytes == 64 ? 8 : 4;  // as many sums as fit into the registers
  int64_t i = 0;
  for (; i + rows <= m; i += rows) {
    multiply_rows<rows, accumulate>(n, k, a + i * a_row, a_row, a_column, b, b_row, out + i * out_row, out_row,
                                    between);
  }
  if (i < m) {
    multiply_rows<kRowBlock, accumulate>(n, k, a + i * a_row, a_row, a_column, b, b_row, out + i * out_row, out_row,
                                         between);
  }
}

// out (m x n) = or += a (m x k) b (k x n); m a multiple of kRowBlock, n of kLanes<T> (best of kColumnBlock<T>).
// `between` is called between tiles of out, for small work that the product hides, as prefetching is.
template <bool accumulate, typename T, typename Between = Nothing>
inline void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const T* b, int64_t b_row, T* out,
                     int64_t out_row, Between&& between = {}) {
  multiply_strided<accumulate>(m, n, k, a, a_row, 1, b, b_row, out, out_row, between);
}

// The same with the transpose of a (k x m).
template <bool accumulate, typename T, typename Between = Nothing>
inline void multiply_transposed(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const T* b, int64_t b_row,
                                T* out, int64_t out_row, Between&& between = {}) {
  multiply_strided<accumulate>(m, n, k, a, 1, a_row, b, b_row, out, out_row, between);
}

#if defined(__clang__)
#define ZOO_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define ZOO_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Index{__VA_ARGS__})
#endif

// out (n x m) = transpose of a (m x n), in blocks of 4 x 4 that are turned in registers
template <typename T>
inline void transpose(int64_t m, int64_t n, const T* __restrict__ a, int64_t a_row, T* __restrict__ out,
                      int64_t out_row) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Integer;
  typedef Integer Index __attribute__((vector_size(4 * sizeof(T)), unused));
  const int64_t m4 = m / 4 * 4, n4 = n / 4 * 4;
  for (int64_t j = 0; j < n4; j += 4) {
    for (int64_t i = 0; i < m4; i += 4) {
      const T* from = a + i * a_row + j;
      const Four r0 = *(const Four*)from, r1 = *(const Four*)(from + a_row), r2 = *(const Four*)(from + 2 * a_row),
                 r3 = *(const Four*)(from + 3 * a_row);
      const Four low01 = ZOO_SHUFFLE(r0, r1, 0, 4, 1, 5), high01 = ZOO_SHUFFLE(r0, r1, 2, 6, 3, 7);
      const Four low23 = ZOO_SHUFFLE(r2, r3, 0, 4, 1, 5), high23 = ZOO_SHUFFLE(r2, r3, 2, 6, 3, 7);
      T* to = out + j * out_row + i;
      *(Four*)to = ZOO_SHUFFLE(low01, low23, 0, 1, 4, 5);
      *(Four*)(to + out_row) = ZOO_SHUFFLE(low01, low23, 2, 3, 6, 7);
      *(Four*)(to + 2 * out_row) = ZOO_SHUFFLE(high01, high23, 0, 1, 4, 5);
      *(Four*)(to + 3 * out_row) = ZOO_SHUFFLE(high01, high23, 2, 3, 6, 7);
    }
  }
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = i < m4 ? n4 : 0; j < n; j++) out[j * out_row + i] = a[i * a_row + j];
  }
}

}  // namespace zoo

// The body of an exported function: what it calls may throw bad_alloc, C knows a status.
#define ZOO_STATUS(...)             \
  try {                             \
    __VA_ARGS__;                    \
    return 0;                       \
  } catch (const std::bad_alloc&) { \
    return 1;                       \
  }
