// What our loops have in common: reading and writing numbers, and sums of squares of a row or of columns. In C++17, which
// is what torch 2.11 has its compiler read.
//
// They take lists of matrices: a loop leaves nothing of its caller in the cache, and what the caller does between two of
// them takes several times as long.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <omp.h>

namespace {

struct bfloat16 {
  uint16_t bits;
};

inline float load(const float* x) { return *x; }
inline float load(const bfloat16* x) { return __builtin_bit_cast(float, uint32_t(x->bits) << 16); }
inline void store(float* x, float value) { *x = value; }
inline void store(bfloat16* x, float value) {  // the nearest, of two the even one
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  x->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float sign(float x) { return float((x > 0) - (x < 0)); }  // as torch's, of NaN too

constexpr int64_t LANES = 8;
template <typename T> struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * LANES), aligned(alignof(T))));
};
template <typename T> using Lanes = typename Vector<T>::type;

inline Lanes<float> lanes(const float* x) { return *reinterpret_cast<const Lanes<float>*>(x); }
inline Lanes<float> lanes(const bfloat16* x) {
  const Lanes<uint16_t> bits = *reinterpret_cast<const Lanes<uint16_t>*>(x);
  return __builtin_bit_cast(Lanes<float>, __builtin_convertvector(bits, Lanes<uint32_t>) << 16);
}
template <typename A, typename T> void add_square(Lanes<A>& sum, const T* x) {
  const Lanes<A> value = __builtin_convertvector(lanes(x), Lanes<A>);
  sum += value * value;
}

// Squares are added in groups, in the type A, and the groups in fp64: with A = float in half the time of A = double.
// Floats overflow at |x| = 1.8e19: what is not finite then is added up again in double.
template <typename A> constexpr bool OVERFLOWS = sizeof(A) < sizeof(double);
constexpr int64_t GROUP = 256, GROUP_ROWS = 64, STREAMS = 8;

template <typename A, typename T> double row_squares(const T* x, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += GROUP) {
    const int64_t end = std::min(n, begin + GROUP);
    Lanes<A> a = {}, b = {}, c = {}, d = {};
    int64_t i = begin;
    for (; i + 4 * LANES <= end; i += 4 * LANES) {
      add_square<A>(a, x + i);
      add_square<A>(b, x + i + LANES);
      add_square<A>(c, x + i + 2 * LANES);
      add_square<A>(d, x + i + 3 * LANES);
    }
    a = (a + b) + (c + d);
    total += ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
    for (; i < end; ++i) total += double(load(x + i)) * load(x + i);
  }
  if constexpr (OVERFLOWS<A>)
    if (!std::isfinite(total)) return row_squares<double>(x, n);
  return total;
}

// Adds to `sums`. Of more rows side by side the processor loses track, of fewer a group is written too often.
template <typename A, typename T>
void column_squares(const T* x, int64_t rows, int64_t columns, A* group, double* sums) {
  for (int64_t begin = 0; begin < rows; begin += GROUP_ROWS) {
    const int64_t end = std::min(rows, begin + GROUP_ROWS);
    std::fill(group, group + columns, A(0));
    int64_t r = begin;
    for (; r + STREAMS <= end; r += STREAMS) {
      const T* y = x + r * columns;
      int64_t c = 0;
      for (; c + 2 * LANES <= columns; c += 2 * LANES) {
        Lanes<A>*own = reinterpret_cast<Lanes<A>*>(group + c), a = own[0], b = own[1];
        for (int64_t k = 0; k < STREAMS; ++k) {
          add_square<A>(a, y + k * columns + c);
          add_square<A>(b, y + k * columns + c + LANES);
        }
        own[0] = a, own[1] = b;
      }
      for (; c < columns; ++c)
        for (int64_t k = 0; k < STREAMS; ++k) group[c] += A(load(y + k * columns + c)) * load(y + k * columns + c);
    }
    for (; r < end; ++r)
      for (int64_t c = 0; c < columns; ++c) group[c] += A(load(x + r * columns + c)) * load(x + r * columns + c);
    for (int64_t c = 0; c < columns; ++c) sums[c] += group[c];
  }
}

struct Same {  // one number for all
  float value;
  float operator[](int64_t) const { return value; }
};

// Where the rows of thread `t` begin.
inline int64_t share(int64_t rows, int64_t t, int64_t threads) {
  return std::min(rows, (rows + STREAMS - 1) / STREAMS * t / threads * STREAMS);
}

// For all threads to call: sums over the rows, in parts that `added` adds up, as [threads][columns].
template <typename A, typename T>
void all_column_squares(const T* x, int64_t rows, int64_t columns, double* groups, double* parts) {
  const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
  const int64_t begin = share(rows, t, threads), end = share(rows, t + 1, threads);
  double *group = groups + t * columns, *sums = parts + t * columns;
  std::fill(sums, sums + columns, 0.0);
  column_squares(x + begin * columns, end - begin, columns, reinterpret_cast<A*>(group), sums);
  if constexpr (OVERFLOWS<A>)
    if (!std::all_of(sums, sums + columns, [](double sum) { return std::isfinite(sum); })) {
      std::fill(sums, sums + columns, 0.0);
      column_squares(x + begin * columns, end - begin, columns, group, sums);
    }
  #pragma omp barrier
}

inline double added(const double* parts, int64_t columns, int64_t c) {
  double total = 0;
  for (int64_t t = 0; t < omp_get_num_threads(); ++t) total += parts[t * columns + c];
  return total;
}

}  // namespace
