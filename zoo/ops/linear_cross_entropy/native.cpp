// The softmax of logits in place, with its normaliser: where PyTorch passes over the logits of all tokens once for each
// operation, a token's stay in the cache.
//
// Letters: n tokens, v words.
#include "native.h"

namespace {

using namespace zoo;

constexpr int64_t kBlock = 1024;  // words whose sum is taken in T: that of a large vocabulary would lose digits

template <typename T>
inline T largest(int64_t v, const T* row) {
  T found = row[0];
#pragma omp simd reduction(max : found)
  for (int64_t i = 0; i < v; i++) found = row[i] > found ? row[i] : found;
  return found;
}

// row = exp(row - shift), and the sum of that
template <typename T>
inline double exponentiate(int64_t v, T shift, T* __restrict__ row) {
  double total = 0;
  for (int64_t start = 0; start < v; start += kBlock) {
    const int64_t stop = std::min(start + kBlock, v);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; i++) {
      const T power = decaying_exponential(row[i] - shift);
      row[i] = power;
      sum += power;
    }
    total += sum;
  }
  return total;
}

// normaliser (n) = log sum exp(logits), logits (n v) = exp(logits - normaliser)
template <typename T>
void softmax(int64_t n, int64_t v, T* logits, T* normaliser, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t token = 0; token < n; token++) {
    T* __restrict__ row = logits + token * v;
    const T shift = largest(v, row);
    const double sum = exponentiate(v, shift, row);
    normaliser[token] = shift + std::log(sum);
    const T scale = 1 / sum;
#pragma omp simd
    for (int64_t i = 0; i < v; i++) row[i] *= scale;
  }
}

}  // namespace

#define EXPORT(suffix, T)                                                                                     \
  extern "C" int softmax_##suffix(int64_t n, int64_t v, T* logits, T* normaliser, int64_t threads) {          \
    ZOO_STATUS(softmax<T>(n, v, logits, normaliser, threads))                                                 \
  }

EXPORT(f32, float)
EXPORT(f64, double)
