// h_t = exp(step_t A) h_{t-1} + step_t x_t B_t and y_t = C_t . h_t, for each channel.
//
// A thread takes a row of the batch and a group of channels, and goes along the tokens chunk by chunk; in a chunk it
// takes the group's tiles one after the other. Channels lie in the lanes of vectors, the states of a tile in the
// first-level cache: nothing of size (t d n) is ever made. The backward first walks along the tokens and keeps the
// states before every chunk; then, from the last chunk to the first, it computes the chunk's states and decays again
// and goes back through them: a second exponential costs less than memory for all decays. Nothing is divided. What B
// and C get is summed over the channels of a group, then over the groups in their order: the number of threads changes
// no result.
//
// Letters: b batch, t tokens, d channels, n states of a channel.
#include "native.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <omp.h>

namespace {

using namespace zoo;

constexpr int64_t kGroup = 128;  // channels a thread takes at a time
constexpr int kTileVectors = 2;
template <typename T>
constexpr int64_t kTile = kTileVectors * kLanes<T>;  // channels that are computed at once
constexpr int64_t kForwardChunk = 16, kBackwardChunk = 8;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// ---- powers of two --------------------------------------------------------------------------------------------------

template <typename T>
struct Power;

template <>
struct Power<float> {
  typedef uint32_t Integers __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa_bits = 23;
  static constexpr float lowest = -127.0f, highest = 128.0f, shift = 12582912.0f + 127.0f;  // 1.5 * 2^23, and the exponent's bias
  // 2^r = 1 + r p(r) for |r| <= 1/2, to 9.2e-8; the highest power first
  static constexpr float p[] = {1.3264727e-3f, 9.6715129e-3f, 5.5507337e-2f, 2.4022242e-1f, 6.9314698e-1f};
};

template <>
struct Power<double> {
  typedef uint64_t Integers __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa_bits = 52;
  static constexpr double lowest = -1023.0, highest = 1024.0, shift = 6755399441055744.0 + 1023.0;
  // (ln 2)^k / k! for k from 13 to 1
  static constexpr double p[] = {1.3691488853904124e-12, 2.5678435993488196e-11, 4.4455382718708101e-10,
                                 7.0549116208011209e-09, 1.0178086009239696e-07, 1.3215486790144305e-06,
                                 1.5252733804059838e-05, 0.00015403530393381606, 0.0013333558146428441,
                                 0.0096181291076284769, 0.055504108664821576, 0.24022650695910069,
                                 0.69314718055994529};
};

// The larger or smaller of two numbers, lane by lane; the second where one is NaN. Of a comparison and a choice GCC makes
// two or three instructions, where the processor has one.
#if defined(__AVX512F__)
inline Vector<float> larger(Vector<float> x, Vector<float> y) { return _mm512_max_ps(x, y); }
inline Vector<float> smaller(Vector<float> x, Vector<float> y) { return _mm512_min_ps(x, y); }
inline Vector<double> larger(Vector<double> x, Vector<double> y) { return _mm512_max_pd(x, y); }
inline Vector<double> smaller(Vector<double> x, Vector<double> y) { return _mm512_min_pd(x, y); }
#elif defined(__AVX__)
inline Vector<float> larger(Vector<float> x, Vector<float> y) { return _mm256_max_ps(x, y); }
inline Vector<float> smaller(Vector<float> x, Vector<float> y) { return _mm256_min_ps(x, y); }
inline Vector<double> larger(Vector<double> x, Vector<double> y) { return _mm256_max_pd(x, y); }
inline Vector<double> smaller(Vector<double> x, Vector<double> y) { return _mm256_min_pd(x, y); }
#else
template <typename V>
inline V larger(V x, V y) { return x > y ? x : y; }
template <typename V>
inline V smaller(V x, V y) { return x < y ? x : y; }
#endif

// 2^x to 2 units in the last place; 0 where it would be denormal, infinity from 2^127.5 (2^1023.5) on; NaN stays NaN.
template <typename T>
inline Vector<T> power_of_2(Vector<T> x) {
  using V = Vector<T>;
  using P = Power<T>;
  const V lowest = V{} + P::lowest, highest = V{} + P::highest;
  x = smaller(highest, larger(lowest, x));
  const V shifted = x + P::shift;  // rounds x to a whole number, which stands in the last bits, with the bias
  const V r = x - (shifted - P::shift);
  V p = V{} + P::p[0];
#pragma GCC unroll 16
  for (size_t k = 1; k < sizeof(P::p) / sizeof(T); k++) p = p * r + P::p[k];
  return (p * r + T(1)) * (V)((typename P::Integers)shifted << P::mantissa_bits);
}

// A vector of which only the first `count` lanes, if so few, lie in memory; the others read as 0.
template <typename T>
inline Vector<T> load_some(const T* from, int64_t count) {
  if (count >= kLanes<T>) return *(const Vector<T>*)from;
  Vector<T> x{};
  std::memcpy(&x, from, count * sizeof(T));
  return x;
}

template <typename T>
inline void store_some(Vector<T> x, T* to, int64_t count) {
  std::memcpy(to, &x, std::min<int64_t>(count, kLanes<T>) * sizeof(T));
}

// ---- one token of a tile; states, decays and rates are (n, tile) ----------------------------------------------------

// What stands before and behind a token: `left` may be `found`. With `remembers` the decays are kept, with `reads` y is
// computed. `rates` are A log2(e).
template <bool remembers, bool reads, typename T>
inline void scan_token(int64_t n, const T* rates, const T* step, const T* x, const T* B, const T* C, const T* found,
                       T* left, T* decays, T* y) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  V steps[kTileVectors], writes[kTileVectors], sums[kTileVectors];
  for (int v = 0; v < kTileVectors; v++) {
    steps[v] = *(const V*)(step + v * lanes);
    writes[v] = steps[v] * *(const V*)(x + v * lanes);
    sums[v] = V{};
  }
  for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++) {
      const int64_t at = i * kTile<T> + v * lanes;
      const V decay = power_of_2<T>(steps[v] * *(const V*)(rates + at));
      const V h = decay * *(const V*)(found + at) + writes[v] * B[i];
      *(V*)(left + at) = h;
      if (remembers) *(V*)(decays + at) = decay;
      if (reads) sums[v] += h * C[i];
    }
  }
  if (reads) {
    for (int v = 0; v < kTileVectors; v++) *(V*)(y + v * lanes) = sums[v];
  }
}

// Back through a token: `carry` is the gradient of the state behind it, and becomes that of the state before it. What B
// and C get is added up lane by lane, (n, lanes).
template <typename T>
inline void grad_token(int64_t n, const T* rates, const T* step, const T* x, const T* B, const T* C, const T* found,
                       const T* left, const T* decays, const T* grad_y, T* carry, T* grad_A, T* grad_B, T* grad_C,
                       T* grad_x, T* grad_step) {
  using V = Vector<T>;
  constexpr int lanes = kLanes<T>;
  V steps[kTileVectors], xs[kTileVectors], grad_ys[kTileVectors], grad_writes[kTileVectors], grad_decays[kTileVectors];
  for (int v = 0; v < kTileVectors; v++) {
    steps[v] = *(const V*)(step + v * lanes);
    xs[v] = *(const V*)(x + v * lanes);
    grad_ys[v] = *(const V*)(grad_y + v * lanes);
    grad_writes[v] = grad_decays[v] = V{};
  }
  for (int64_t i = 0; i < n; i++) {
    V sum_B = *(const V*)(grad_B + i * lanes), sum_C = *(const V*)(grad_C + i * lanes);
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++) {
      const int64_t at = i * kTile<T> + v * lanes;
      const V grad_h = *(const V*)(carry + at) + grad_ys[v] * C[i];
      sum_C += grad_ys[v] * *(const V*)(left + at);
      sum_B += grad_h * (steps[v] * xs[v]);
      grad_writes[v] += grad_h * B[i];
      const V kept = grad_h * *(const V*)(decays + at);
      *(V*)(carry + at) = kept;
      const V grad_exponent = kept * *(const V*)(found + at);
      grad_decays[v] += grad_exponent * *(const V*)(rates + at);
      *(V*)(grad_A + at) += grad_exponent * steps[v];
    }
    *(V*)(grad_B + i * lanes) = sum_B;
    *(V*)(grad_C + i * lanes) = sum_C;
  }
  for (int v = 0; v < kTileVectors; v++) {
    *(V*)(grad_x + v * lanes) = grad_writes[v] * steps[v];
    *(V*)(grad_step + v * lanes) = grad_writes[v] * xs[v] + grad_decays[v] * T(kLn2);
  }
}

// ---- between the caller's tensors and the tiles ---------------------------------------------------------------------

struct Sizes {
  int64_t b, t, d, n;
  int64_t groups() const { return (d + kGroup - 1) / kGroup; }
  int64_t width(int64_t group) const { return std::min(kGroup, d - group * kGroup); }
};

// (channels n) -> (tiles n tile), with zeros behind the last channel
template <typename T>
void into_tiles(int64_t channels, int64_t n, const T* from, T* to, T scale = T(1)) {
  for (int64_t c = 0; c < kGroup; c++) {
    T* lane = to + c / kTile<T> * kTile<T> * n + c % kTile<T>;
    for (int64_t i = 0; i < n; i++) lane[i * kTile<T>] = c < channels ? scale * from[c * n + i] : T(0);
  }
}

template <typename T>
void out_of_tiles(int64_t channels, int64_t n, const T* from, T* to) {
  for (int64_t c = 0; c < channels; c++) {
    const T* lane = from + c / kTile<T> * kTile<T> * n + c % kTile<T>;
    for (int64_t i = 0; i < n; i++) to[c * n + i] = lane[i * kTile<T>];
  }
}

// The group's channels of some tokens (t d) -> (tokens kGroup), with zeros behind the last channel
template <typename T>
void pack(int64_t tokens, int64_t channels, const T* from, int64_t d, T* to) {
  for (int64_t i = 0; i < tokens; i++) {
    std::memcpy(to + i * kGroup, from + i * d, channels * sizeof(T));
    std::memset(to + i * kGroup + channels, 0, (kGroup - channels) * sizeof(T));
  }
}

template <typename T>
void unpack(int64_t tokens, int64_t channels, const T* from, T* to, int64_t d) {
  for (int64_t i = 0; i < tokens; i++) std::memcpy(to + i * d, from + i * kGroup, channels * sizeof(T));
}

// A log2(e) in tiles, group after group
template <typename T>
void arrange_rates(const Sizes& size, const T* A, T* rates) {
  for (int64_t group = 0; group < size.groups(); group++) {
    into_tiles(size.width(group), size.n, A + group * kGroup * size.n, rates + group * kGroup * size.n, T(kLog2E));
  }
}

// Hands out parts of a thread's scratch memory, each on a cache line of its own.
template <typename T>
class Parts {
 public:
  explicit Parts(T* begin) : next_(begin) {}
  static int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }
  T* take(int64_t count) {
    T* part = next_;
    next_ += rounded(count);
    return part;
  }

 private:
  T* next_;
};

// ---- forward --------------------------------------------------------------------------------------------------------

// A single token: channel after channel, its n states in the lanes, so that nothing is rearranged.
template <typename T>
void decode(const Sizes& size, const T* x, const T* step, const T* A, const T* B, const T* C, const T* state,
            const bool* starts, T* y, T* end, int64_t threads) {
  using V = Vector<T>;
  using Bits = typename Power<T>::Integers;
  constexpr int lanes = kLanes<T>;
  const int64_t n = size.n;
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t row = 0; row < size.b; row++) {
    for (int64_t group = 0; group < size.groups(); group++) {
      const Bits keeps = Bits{} - !(starts && starts[row]);  // all bits or none: a product with 0 would keep NaN
      const int64_t first = group * kGroup;
      for (int64_t c = first; c < first + size.width(group); c++) {
        const int64_t channel = row * size.d + c;
        const T rate = step[channel] * T(kLog2E), write = step[channel] * x[channel];
        V sums{};
        for (int64_t i = 0; i < n; i += lanes) {
          const V decay = power_of_2<T>(rate * load_some(A + c * n + i, n - i));
          const V found = (V)((Bits)load_some(state + channel * n + i, n - i) & keeps);
          const V h = decay * found + write * load_some(B + row * n + i, n - i);
          store_some(h, end + channel * n + i, n - i);
          sums += h * load_some(C + row * n + i, n - i);
        }
        y[channel] = sum_lanes<T>(sums);
      }
    }
  }
}

template <typename T>
void forward(const Sizes& size, const T* x, const T* step, const T* A, const T* B, const T* C, const T* state,
             const bool* starts, T* y, T* end, int64_t threads) {
  if (size.t == 1) return decode(size, x, step, A, B, C, state, starts, y, end, threads);

  const int64_t t = size.t, d = size.d, n = size.n, groups = size.groups();
  Scratch<T> rates(groups * kGroup * n);
  arrange_rates(size, A, static_cast<T*>(rates));
  const int64_t packed = kForwardChunk * kGroup, group_states = kGroup * n, tile_states = kTile<T> * n;
  const int64_t per_thread = 3 * packed + Parts<T>::rounded(group_states) + Parts<T>::rounded(tile_states);
  Scratch<T> scratch(threads * per_thread);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t row = 0; row < size.b; row++) {
    for (int64_t group = 0; group < groups; group++) {
      Parts<T> parts(scratch + omp_get_thread_num() * per_thread);
      T *packed_x = parts.take(packed), *packed_step = parts.take(packed), *packed_y = parts.take(packed);
      T *h = parts.take(group_states), *nothing = parts.take(tile_states);
      std::memset(nothing, 0, tile_states * sizeof(T));
      const int64_t first = group * kGroup, width = size.width(group);
      into_tiles(width, n, state + (row * d + first) * n, h);
      for (int64_t begin = 0; begin < t; begin += kForwardChunk) {
        const int64_t tokens = std::min(kForwardChunk, t - begin), at = (row * t + begin) * d + first;
        pack(tokens, width, x + at, d, packed_x);
        pack(tokens, width, step + at, d, packed_step);
        for (int64_t tile = 0; tile < width; tile += kTile<T>) {
          T* h_tile = h + tile * n;
          for (int64_t i = 0; i < tokens; i++) {
            const int64_t token = row * t + begin + i, place = i * kGroup + tile;
            scan_token<false, true, T>(n, rates + (first + tile) * n, packed_step + place, packed_x + place,
                                       B + token * n, C + token * n, starts && starts[token] ? nothing : h_tile,
                                       h_tile, nullptr, packed_y + place);
          }
        }
        unpack(tokens, width, packed_y, y + at, d);
      }
      out_of_tiles(width, n, h, end + (row * d + first) * n);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// out (size) = sum of `count` parts (size) that lie `distance` apart, the first one first
template <typename T>
void add_up(int64_t count, int64_t size, const T* parts, int64_t distance, T* out) {
  std::memcpy(out, parts, size * sizeof(T));
  for (int64_t k = 1; k < count; k++) {
    const T* __restrict__ part = parts + k * distance;
    for (int64_t i = 0; i < size; i++) out[i] += part[i];
  }
}

template <typename T>
void backward(const Sizes& size, const T* x, const T* step, const T* A, const T* B, const T* C, const T* state,
              const bool* starts, const T* grad_y, const T* grad_end, T* grad_x, T* grad_step, T* grad_A, T* grad_B,
              T* grad_C, T* grad_state, int64_t threads) {
  using V = Vector<T>;
  constexpr int64_t chunk = kBackwardChunk, lanes = kLanes<T>;
  const int64_t t = size.t, d = size.d, n = size.n, groups = size.groups(), chunks = (t + chunk - 1) / chunk;
  Scratch<T> rates(groups * kGroup * n);
  arrange_rates(size, A, static_cast<T*>(rates));
  Scratch<T> parts_B(size.b * groups * t * n), parts_C(size.b * groups * t * n), parts_A(size.b * d * n);

  const int64_t packed = chunk * kGroup, group_states = kGroup * n, tile_states = kTile<T> * n;
  const int64_t lane_sums = chunk * n * lanes;
  const int64_t per_thread = 5 * packed + (2 + chunks) * group_states +
                             Parts<T>::rounded((2 * chunk + 2) * tile_states) + 2 * Parts<T>::rounded(lane_sums);
  Scratch<T> scratch(threads * per_thread);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t row = 0; row < size.b; row++) {
    for (int64_t group = 0; group < groups; group++) {
      Parts<T> parts(scratch + omp_get_thread_num() * per_thread);
      T *packed_x = parts.take(packed), *packed_step = parts.take(packed), *packed_grad_y = parts.take(packed);
      T *packed_grad_x = parts.take(packed), *packed_grad_step = parts.take(packed);
      T *carry = parts.take(group_states), *group_grad_A = parts.take(group_states);
      T* checkpoints = parts.take(chunks * group_states);  // (chunks tiles n tile)
      T* h = parts.take((2 * chunk + 2) * tile_states);    // of a tile, before each token and behind the last
      T* decays = h + (chunk + 1) * tile_states;
      T* nothing = decays + chunk * tile_states;
      T *lanes_B = parts.take(lane_sums), *lanes_C = parts.take(lane_sums);
      std::memset(nothing, 0, tile_states * sizeof(T));
      std::memset(group_grad_A, 0, group_states * sizeof(T));
      const int64_t first = group * kGroup, width = size.width(group);

      into_tiles(width, n, state + (row * d + first) * n, checkpoints);
      for (int64_t c = 0; c + 1 < chunks; c++) {
        const int64_t begin = c * chunk, at = (row * t + begin) * d + first;
        pack(chunk, width, x + at, d, packed_x);
        pack(chunk, width, step + at, d, packed_step);
        for (int64_t tile = 0; tile < width; tile += kTile<T>) {
          const T* found = checkpoints + c * group_states + tile * n;
          T* left = checkpoints + (c + 1) * group_states + tile * n;
          for (int64_t i = 0; i < chunk; i++) {
            const int64_t token = row * t + begin + i, place = i * kGroup + tile;
            scan_token<false, false, T>(n, rates + (first + tile) * n, packed_step + place, packed_x + place,
                                        B + token * n, nullptr, starts && starts[token] ? nothing : found, left,
                                        nullptr, nullptr);
            found = left;
          }
        }
      }

      into_tiles(width, n, grad_end + (row * d + first) * n, carry);
      for (int64_t c = chunks - 1; c >= 0; c--) {
        const int64_t begin = c * chunk, tokens = std::min(chunk, t - begin), at = (row * t + begin) * d + first;
        pack(tokens, width, x + at, d, packed_x);
        pack(tokens, width, step + at, d, packed_step);
        pack(tokens, width, grad_y + at, d, packed_grad_y);
        std::memset(lanes_B, 0, lane_sums * sizeof(T));
        std::memset(lanes_C, 0, lane_sums * sizeof(T));
        for (int64_t tile = 0; tile < width; tile += kTile<T>) {
          const T* tile_rates = rates + (first + tile) * n;
          std::memcpy(h, checkpoints + c * group_states + tile * n, tile_states * sizeof(T));
          for (int64_t i = 0; i < tokens; i++) {
            const int64_t token = row * t + begin + i, place = i * kGroup + tile;
            scan_token<true, false, T>(n, tile_rates, packed_step + place, packed_x + place, B + token * n, nullptr,
                                       starts && starts[token] ? nothing : h + i * tile_states,
                                       h + (i + 1) * tile_states, decays + i * tile_states, nullptr);
          }
          for (int64_t i = tokens - 1; i >= 0; i--) {
            const int64_t token = row * t + begin + i, place = i * kGroup + tile;
            const bool starts_anew = starts && starts[token];
            grad_token<T>(n, tile_rates, packed_step + place, packed_x + place, B + token * n, C + token * n,
                          starts_anew ? nothing : h + i * tile_states, h + (i + 1) * tile_states,
                          decays + i * tile_states, packed_grad_y + place, carry + tile * n, group_grad_A + tile * n,
                          lanes_B + i * n * lanes, lanes_C + i * n * lanes, packed_grad_x + place,
                          packed_grad_step + place);
            if (starts_anew) std::memset(carry + tile * n, 0, tile_states * sizeof(T));
          }
        }
        T* group_B = parts_B + ((row * groups + group) * t + begin) * n;
        T* group_C = parts_C + ((row * groups + group) * t + begin) * n;
        for (int64_t i = 0; i < tokens * n; i++) {
          group_B[i] = sum_lanes<T>(*(const V*)(lanes_B + i * lanes));
          group_C[i] = sum_lanes<T>(*(const V*)(lanes_C + i * lanes));
        }
        unpack(tokens, width, packed_grad_x, grad_x + at, d);
        unpack(tokens, width, packed_grad_step, grad_step + at, d);
      }
      out_of_tiles(width, n, carry, grad_state + (row * d + first) * n);
      out_of_tiles(width, n, group_grad_A, parts_A + (row * d + first) * n);
    }
  }
  for (int64_t row = 0; row < size.b; row++) {
    add_up(groups, t * n, parts_B + row * groups * t * n, t * n, grad_B + row * t * n);
    add_up(groups, t * n, parts_C + row * groups * t * n, t * n, grad_C + row * t * n);
  }
  add_up(size.b, d * n, static_cast<const T*>(parts_A), d * n, grad_A);
}

}  // namespace

#define EXPORT(suffix, T)                                                                                             \
  extern "C" int selective_scan_forward_##suffix(int64_t b, int64_t t, int64_t d, int64_t n, const T* x,              \
                                                 const T* step, const T* A, const T* B, const T* C, const T* state,   \
                                                 const bool* starts, T* y, T* end, int64_t threads) {                 \
    ZOO_STATUS(forward<T>({b, t, d, n}, x, step, A, B, C, state, starts, y, end, threads))                            \
  }                                                                                                                   \
  extern "C" int selective_scan_backward_##suffix(                                                                    \
      int64_t b, int64_t t, int64_t d, int64_t n, const T* x, const T* step, const T* A, const T* B, const T* C,      \
      const T* state, const bool* starts, const T* grad_y, const T* grad_end, T* grad_x, T* grad_step, T* grad_A,     \
      T* grad_B, T* grad_C, T* grad_state, int64_t threads) {                                                         \
    ZOO_STATUS(backward<T>({b, t, d, n}, x, step, A, B, C, state, starts, grad_y, grad_end, grad_x, grad_step,        \
                           grad_A, grad_B, grad_C, grad_state, threads))                                              \
  }

EXPORT(f32, float)
EXPORT(f64, double)
