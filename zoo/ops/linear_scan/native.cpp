// h_t = a_t h_{t-1} + b_t for each channel, real or complex.
//
// A thread takes a row of the batch and a block of channels whose states stay in the first-level cache, and walks along
// the tokens. Letters: b batch, t tokens, d channels.
#include "native.h"

namespace {

using namespace zoo;

constexpr int64_t kBlock = 512;

template <typename T>
struct Complex {
  T re, im;
};
template <typename T>
inline Complex<T> operator+(Complex<T> x, Complex<T> y) { return {x.re + y.re, x.im + y.im}; }
template <typename T>
inline Complex<T> operator*(Complex<T> x, Complex<T> y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
template <typename T>
inline Complex<T> conjugate(Complex<T> x) { return {x.re, -x.im}; }
inline float conjugate(float x) { return x; }
inline double conjugate(double x) { return x; }

template <typename T>
void forward(int64_t b, int64_t t, int64_t d, const T* keep, const T* add, const T* state, T* h, T* end,
             int64_t threads) {
  const int64_t blocks = (d + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t row = 0; row < b; row++) {
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * kBlock, width = std::min(kBlock, d - first);
      const T* __restrict__ before = state + row * d + first;
      for (int64_t step = 0; step < t; step++) {
        const int64_t at = (row * t + step) * d + first;
        const T* __restrict__ keep_t = keep + at;
        const T* __restrict__ add_t = add + at;
        T* __restrict__ h_t = h + at;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) h_t[i] = keep_t[i] * before[i] + add_t[i];
        before = h_t;
      }
      std::memcpy(end + row * d + first, before, width * sizeof(T));
    }
  }
}

// With g_t the gradient of all that comes after h_t, and of h_t itself: g_t = grad h_t + conj(a_{t+1}) g_{t+1}.
template <typename T>
void backward(int64_t b, int64_t t, int64_t d, const T* keep, const T* state, const T* h, const T* grad_h,
              const T* grad_end, T* grad_keep, T* grad_add, T* grad_state, int64_t threads) {
  const int64_t blocks = (d + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t row = 0; row < b; row++) {
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * kBlock, width = std::min(kBlock, d - first);
      T carry[kBlock];
      std::memcpy(carry, grad_end + row * d + first, width * sizeof(T));
      for (int64_t step = t - 1; step >= 0; step--) {
        const int64_t at = (row * t + step) * d + first;
        const T* __restrict__ keep_t = keep + at;
        const T* __restrict__ grad_h_t = grad_h + at;
        const T* __restrict__ before = step > 0 ? h + at - d : state + row * d + first;
        T* __restrict__ grad_keep_t = grad_keep + at;
        T* __restrict__ grad_add_t = grad_add + at;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
          const T g = grad_h_t[i] + carry[i];
          grad_add_t[i] = g;
          grad_keep_t[i] = g * conjugate(before[i]);
          carry[i] = g * conjugate(keep_t[i]);
        }
      }
      std::memcpy(grad_state + row * d + first, carry, width * sizeof(T));
    }
  }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                            \
  extern "C" int linear_scan_forward_##suffix(int64_t b, int64_t t, int64_t d, const T* keep, const T* add,          \
                                              const T* state, T* h, T* end, int64_t threads) {                       \
    ZOO_STATUS(forward<T>(b, t, d, keep, add, state, h, end, threads))                                               \
  }                                                                                                                  \
  extern "C" int linear_scan_backward_##suffix(int64_t b, int64_t t, int64_t d, const T* keep, const T* state,       \
                                               const T* h, const T* grad_h, const T* grad_end, T* grad_keep,         \
                                               T* grad_add, T* grad_state, int64_t threads) {                        \
    ZOO_STATUS(backward<T>(b, t, d, keep, state, h, grad_h, grad_end, grad_keep, grad_add, grad_state, threads))      \
  }

EXPORT(f32, float)
EXPORT(f64, double)
EXPORT(c32, Complex<float>)
EXPORT(c64, Complex<double>)
