// y_t = bias + sum_j weight_j x_{t-w+1+j} for each channel; what stands before a document reads as 0 in it.
//
// A thread takes a row of the batch and a block of channels and walks along the tokens, so that the last w inputs stay
// in the first-level cache; the backward walks back. What the weights get is summed over the tokens of a row, then over
// the rows in their order: the number of threads changes no result.
//
// Letters: b batch, t tokens, d channels, w weights of a channel. A token is numbered from the first of the call: the
// state holds those from -(w - 1) to -1. The lag of an input is how many tokens ago it was.
#include "native.h"

namespace {

using namespace zoo;

constexpr int64_t kBlock = 256;

struct Sizes {
  int64_t b, t, d, w;
  int64_t kept() const { return w - 1; }
  int64_t blocks() const { return (d + kBlock - 1) / kBlock; }
  int64_t width(int64_t block) const { return std::min(kBlock, d - block * kBlock); }
};

// The channels from `first` on of a token of a row, among the inputs of the call and those before it.
template <typename T>
inline T* token_of(const Sizes& size, T* sequence, T* state, int64_t row, int64_t token, int64_t first) {
  if (token >= 0) return sequence + (row * size.t + token) * size.d + first;
  return state + (row * size.kept() + size.kept() + token) * size.d + first;
}

// (d w) -> (w d), lag 0 first
template <typename T>
void arrange_by_lag(const Sizes& size, const T* weight, T* by_lag) {
  for (int64_t i = 0; i < size.d; i++) {
    for (int64_t lag = 0; lag < size.w; lag++) by_lag[lag * size.d + i] = weight[i * size.w + size.w - 1 - lag];
  }
}

// Calls body.run<Value>(i) for channels i of a block: vectors as long as they fit, then one by one.
template <typename T, typename Body>
inline void for_channels(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= width; i += kLanes<T>) body.template run<Vector<T>>(i);
  for (; i < width; i++) body.template run<T>(i);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// y = or += the inputs `count` tokens back, each times its weight: consecutive ones, the newest first.
template <typename T>
struct Filter {
  int64_t count, d;
  const T *newest, *by_lag, *before;  // `before`: what is added to; null: 0
  T* y;
  template <typename Value>
  void run(int64_t i) const {
    Value sum = before ? *(const Value*)(before + i) : Value{};
    for (int64_t lag = 0; lag < count; lag++) {
      sum += *(const Value*)(by_lag + lag * d + i) * *(const Value*)(newest - lag * d + i);
    }
    *(Value*)(y + i) = sum;
  }
};

template <typename T>
void forward(const Sizes& size, const T* x, const T* weight, const T* bias, const T* state, const bool* starts, T* y,
             T* end, int64_t threads) {
  const int64_t t = size.t, d = size.d, kept = size.kept();
  Scratch<T> by_lag(size.w * d);
  arrange_by_lag<T>(size, weight, by_lag);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t row = 0; row < size.b; row++) {
    for (int64_t block = 0; block < size.blocks(); block++) {
      const int64_t first = block * kBlock, width = size.width(block);
      int64_t document = -kept;  // its first token
      for (int64_t token = 0; token < t; token++) {
        if (starts && starts[row * t + token]) document = token;
        const int64_t lags = std::min(size.w, token - document + 1), of_call = std::min(lags, token + 1);
        T* y_t = y + (row * t + token) * d + first;
        const T* newest = x + (row * t + token) * d + first;
        for_channels<T>(width, Filter<T>{of_call, d, newest, by_lag + first, bias ? bias + first : nullptr, y_t});
        if (lags > of_call) {
          newest = token_of(size, x, state, row, -1, first);
          for_channels<T>(width, Filter<T>{lags - of_call, d, newest, by_lag + of_call * d + first, y_t, y_t});
        }
      }
      for (int64_t k = 0; k < kept; k++) {
        const int64_t token = t - kept + k;
        T* end_k = end + (row * kept + k) * d + first;
        if (token < document) {
          std::memset(end_k, 0, width * sizeof(T));
        } else {
          std::memcpy(end_k, token_of(size, x, state, row, token, first), width * sizeof(T));
        }
      }
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What an input gets of the outputs that read it, `count` consecutive ones, and their weights of it.
template <typename T>
struct FilterBack {
  int64_t count, d;
  const T *input, *grad_y, *by_lag, *from_end;  // of the first output and its lag; from_end: null: 0
  T *grad_input, *grad_by_lag;
  template <typename Value>
  void run(int64_t i) const {
    const Value x = *(const Value*)(input + i);
    Value sum = from_end ? *(const Value*)(from_end + i) : Value{};
    for (int64_t k = 0; k < count; k++) {
      const Value grad = *(const Value*)(grad_y + k * d + i);
      sum += *(const Value*)(by_lag + k * d + i) * grad;
      *(Value*)(grad_by_lag + k * d + i) += grad * x;
    }
    *(Value*)(grad_input + i) = sum;
  }
};

template <typename T>
void backward(const Sizes& size, const T* x, const T* weight, const T* state, const bool* starts, const T* grad_y,
              const T* grad_end, T* grad_x, T* grad_weight, T* grad_bias, T* grad_state, int64_t threads) {
  const int64_t t = size.t, d = size.d, w = size.w, kept = size.kept();
  Scratch<T> by_lag(w * d), rows(size.b * (w + 1) * d);  // rows: what weights and bias get of each row, (b w+1 d)
  arrange_by_lag<T>(size, weight, by_lag);
  rows.zero(size.b * (w + 1) * d);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t row = 0; row < size.b; row++) {
    for (int64_t block = 0; block < size.blocks(); block++) {
      const int64_t first = block * kBlock, width = size.width(block);
      T* row_weight = rows + row * (w + 1) * d + first;
      T* __restrict__ row_bias = row_weight + w * d;
      int64_t next = t;  // where the document ends that the token belongs to
      for (int64_t token = t - 1; token >= -kept; token--) {
        const int64_t lag = std::max<int64_t>(0, -token), count = std::max<int64_t>(0, std::min(w, next - token) - lag);
        const bool in_end = token >= t - kept && next == t;
        const T* from_end = in_end ? grad_end + (row * kept + token - (t - kept)) * d + first : nullptr;
        const T* first_grad = grad_y + (row * t + token + lag) * d + first;
        for_channels<T>(width, FilterBack<T>{count, d, token_of(size, x, state, row, token, first), first_grad,
                                             by_lag + lag * d + first, from_end,
                                             token_of(size, grad_x, grad_state, row, token, first),
                                             row_weight + lag * d});
        if (token < 0) continue;
        for (int64_t i = 0; i < width; i++) row_bias[i] += first_grad[i];
        if (starts && starts[row * t + token]) next = token;
      }
    }
  }
  for (int64_t i = 0; i < d; i++) {
    for (int64_t lag = 0; lag <= w; lag++) {
      T sum = 0;
      for (int64_t row = 0; row < size.b; row++) sum += rows[(row * (w + 1) + lag) * d + i];
      if (lag < w) {
        grad_weight[i * w + w - 1 - lag] = sum;
      } else if (grad_bias) {
        grad_bias[i] = sum;
      }
    }
  }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                              \
  extern "C" int short_conv_forward_##suffix(int64_t b, int64_t t, int64_t d, int64_t w, const T* x, const T* weight,  \
                                             const T* bias, const T* state, const bool* starts, T* y, T* end,          \
                                             int64_t threads) {                                                        \
    ZOO_STATUS(forward<T>({b, t, d, w}, x, weight, bias, state, starts, y, end, threads))                              \
  }                                                                                                                    \
  extern "C" int short_conv_backward_##suffix(int64_t b, int64_t t, int64_t d, int64_t w, const T* x, const T* weight, \
                                              const T* state, const bool* starts, const T* grad_y,                     \
                                              const T* grad_end, T* grad_x, T* grad_weight, T* grad_bias,              \
                                              T* grad_state, int64_t threads) {                                        \
    ZOO_STATUS(backward<T>({b, t, d, w}, x, weight, state, starts, grad_y, grad_end, grad_x, grad_weight, grad_bias,   \
                           grad_state, threads))                                                                       \
  }

EXPORT(f32, float)
EXPORT(f64, double)
