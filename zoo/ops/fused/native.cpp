// Norms, gates and rotary embedding, forward and backward, each in one pass over memory: PyTorch takes one for every
// operation.
//
// Letters: n rows, d channels; of rotations b batch, t tokens, h heads, r channels that turn.
#include "native.h"

namespace {

using namespace zoo;

// y = x / sqrt(mean(x^2) + eps) * weight; `inverse` (n) keeps 1 / sqrt(...) for the backward pass.
template <typename T>
void rms_norm_forward(int64_t n, int64_t d, const T* x, const T* weight, double eps, T* y, T* inverse,
                      int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < n; row++) {
    const T* __restrict__ from = x + row * d;
    T* __restrict__ to = y + row * d;
    const T scale = 1 / std::sqrt(dot(d, from, from) / d + T(eps));
    inverse[row] = scale;
    if (weight) {
#pragma omp simd
      for (int64_t i = 0; i < d; i++) to[i] = from[i] * scale * weight[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < d; i++) to[i] = from[i] * scale;
    }
  }
}

// With u = x * inverse and g = grad * weight: grad_x = inverse (g - u mean(g u)), grad_weight = sum of grad u over rows.
template <typename T>
void rms_norm_backward(int64_t n, int64_t d, const T* x, const T* weight, const T* inverse, const T* grad, T* grad_x,
                       T* grad_weight, int64_t threads) {
  Scratch<T> partial(threads * d);  // the gradient of the weight from the rows of each thread
  partial.zero(threads * d);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t part = 0; part < threads; part++) {
    T* __restrict__ sums = partial + part * d;
    for (int64_t row = n * part / threads; row < n * (part + 1) / threads; row++) {
      const T* __restrict__ from = x + row * d;
      const T* __restrict__ g = grad + row * d;
      T* __restrict__ to = grad_x + row * d;
      const T scale = inverse[row];
      T dot = 0;
      if (weight) {
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < d; i++) {
          const T product = g[i] * from[i];
          sums[i] += product * scale;
          dot += product * weight[i];
        }
        const T back = dot * scale * scale / d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) to[i] = scale * (g[i] * weight[i] - from[i] * back);
      } else {
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < d; i++) dot += g[i] * from[i];
        const T back = dot * scale * scale / d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) to[i] = scale * (g[i] - from[i] * back);
      }
    }
  }
  for (int64_t i = 0; weight && i < d; i++) {
    grad_weight[i] = 0;
    for (int64_t part = 0; part < threads; part++) grad_weight[i] += partial[part * d + i];
  }
}

// y = x / max(|x|, eps), the norm over the channels; `inverse` (n) keeps 1 / max(...) for the backward pass.
template <typename T>
void normalize_forward(int64_t n, int64_t d, double eps, const T* x, T* y, T* inverse, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < n; row++) {
    const T* __restrict__ from = x + row * d;
    T* __restrict__ to = y + row * d;
    const T norm = std::sqrt(dot(d, from, from));
    inverse[row] = 1 / (norm < T(eps) ? T(eps) : norm);
#pragma omp simd
    for (int64_t i = 0; i < d; i++) to[i] = from[i] * inverse[row];
  }
}

// grad_x = inverse (g - y (g . y)), and inverse g where the norm was below eps.
template <typename T>
void normalize_backward(int64_t n, int64_t d, double eps, const T* y, const T* inverse, const T* grad, T* grad_x,
                        int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < n; row++) {
    const T* __restrict__ unit = y + row * d;
    const T* __restrict__ g = grad + row * d;
    T* __restrict__ to = grad_x + row * d;
    const T scale = inverse[row];
    const T along = scale < 1 / T(eps) ? dot(d, g, unit) : 0;
#pragma omp simd
    for (int64_t i = 0; i < d; i++) to[i] = scale * (g[i] - unit[i] * along);
  }
}

// The activations of a gate, with their derivatives.

struct SiLU {
  template <typename T>
  static T value(T x) { return x * sigmoid(x); }
  template <typename T>
  static T slope(T x) {
    const T s = sigmoid(x);
    return s + x * s * (1 - s);
  }
};

// GELU with tanh: x (1 + tanh(a (x + b x^3))) / 2, which is x sigmoid(2 a (x + b x^3)); a = sqrt(2 / pi), b = 0.044715.
struct TanhGELU {
  template <typename T>
  static T value(T x) { return x * sigmoid(inner(x)); }
  template <typename T>
  static T slope(T x) {
    const T s = sigmoid(inner(x));
    return s + x * s * (1 - s) * T(1.5957691216057308) * (1 + T(0.134145) * x * x);
  }

 private:
  template <typename T>
  static T inner(T x) { return T(1.5957691216057308) * (x + T(0.044715) * x * x * x); }
};

// y = activation(gate) up
template <typename Activation, typename T>
void gate_forward(int64_t n, const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ y, int64_t threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) y[i] = Activation::value(gate[i]) * up[i];
}

template <typename Activation, typename T>
void gate_backward(int64_t n, const T* __restrict__ gate, const T* __restrict__ up, const T* __restrict__ grad,
                   T* __restrict__ grad_gate, T* __restrict__ grad_up, int64_t threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    grad_up[i] = grad[i] * Activation::value(gate[i]);
    grad_gate[i] = grad[i] * up[i] * Activation::slope(gate[i]);
  }
}

// Channels i and i + r/2 of each head, x (b t h d), turned by the angle of the token; cos and sin (1 or b, t, r), whose
// batches are `table_batch` numbers apart. Back is the transpose: what is a gradient of y becomes one of x.
template <bool back, typename T>
void rotate(int64_t b, int64_t t, int64_t h, int64_t d, int64_t r, int64_t table_batch, const T* x, const T* cos,
            const T* sin, T* y, int64_t threads) {
  const int64_t half = r / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t token = 0; token < b * t; token++) {
    const int64_t entry = token / t * table_batch + token % t * r;
    const T* __restrict__ c = cos + entry;
    const T* __restrict__ s = sin + entry;
    for (int64_t head = token * h; head < (token + 1) * h; head++) {
      const T* __restrict__ from = x + head * d;
      T* __restrict__ to = y + head * d;
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        const T first = from[i], second = from[i + half];
        to[i] = back ? first * c[i] + second * s[i + half] : first * c[i] - second * s[i];
        to[i + half] = back ? second * c[i + half] - first * s[i] : second * c[i + half] + first * s[i + half];
      }
      for (int64_t i = r; i < d; i++) to[i] = from[i];
    }
  }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                             \
  extern "C" int rms_norm_forward_##suffix(int64_t n, int64_t d, const T* x, const T* weight, double eps, T* y,       \
                                           T* inverse, int64_t threads) {                                             \
    ZOO_STATUS(rms_norm_forward<T>(n, d, x, weight, eps, y, inverse, threads))                                        \
  }                                                                                                                   \
  extern "C" int rms_norm_backward_##suffix(int64_t n, int64_t d, const T* x, const T* weight, const T* inverse,      \
                                            const T* grad, T* grad_x, T* grad_weight, int64_t threads) {              \
    ZOO_STATUS(rms_norm_backward<T>(n, d, x, weight, inverse, grad, grad_x, grad_weight, threads))                    \
  }                                                                                                                   \
  extern "C" int normalize_forward_##suffix(int64_t n, int64_t d, double eps, const T* x, T* y, T* inverse,           \
                                            int64_t threads) {                                                        \
    ZOO_STATUS(normalize_forward<T>(n, d, eps, x, y, inverse, threads))                                               \
  }                                                                                                                   \
  extern "C" int normalize_backward_##suffix(int64_t n, int64_t d, double eps, const T* y, const T* inverse,          \
                                             const T* grad, T* grad_x, int64_t threads) {                             \
    ZOO_STATUS(normalize_backward<T>(n, d, eps, y, inverse, grad, grad_x, threads))                                   \
  }                                                                                                                   \
  extern "C" int rotate_##suffix(int64_t b, int64_t t, int64_t h, int64_t d, int64_t r, int64_t table_batch,          \
                                 const T* x, const T* cos, const T* sin, T* y, int64_t threads) {                     \
    ZOO_STATUS(rotate<false>(b, t, h, d, r, table_batch, x, cos, sin, y, threads))                                    \
  }                                                                                                                   \
  extern "C" int rotate_back_##suffix(int64_t b, int64_t t, int64_t h, int64_t d, int64_t r, int64_t table_batch,     \
                                      const T* x, const T* cos, const T* sin, T* y, int64_t threads) {                \
    ZOO_STATUS(rotate<true>(b, t, h, d, r, table_batch, x, cos, sin, y, threads))                                     \
  }

#define EXPORT_GATE(name, Activation, suffix, T)                                                                      \
  extern "C" int name##_forward_##suffix(int64_t n, const T* gate, const T* up, T* y, int64_t threads) {              \
    ZOO_STATUS(gate_forward<Activation>(n, gate, up, y, threads))                                                     \
  }                                                                                                                   \
  extern "C" int name##_backward_##suffix(int64_t n, const T* gate, const T* up, const T* grad, T* grad_gate,         \
                                          T* grad_up, int64_t threads) {                                              \
    ZOO_STATUS(gate_backward<Activation>(n, gate, up, grad, grad_gate, grad_up, threads))                             \
  }

EXPORT(f32, float)
EXPORT(f64, double)
EXPORT_GATE(swiglu, SiLU, f32, float)
EXPORT_GATE(swiglu, SiLU, f64, double)
EXPORT_GATE(geglu, TanhGELU, f32, float)
EXPORT_GATE(geglu, TanhGELU, f64, double)
