// What our loops have in common: reading and writing numbers, sums of squares of a row or of columns, and what of all
// there is to do a thread does. In C++17, which is what torch 2.11 has its compiler read.
//
// They take lists of matrices: a loop leaves nothing of its caller in the cache, and what the caller does between two of
// them takes several times as long.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <omp.h>
#include <type_traits>

namespace {

// Its bits, and no struct: loops over those are not vectorized.
enum bfloat16 : uint16_t {};

template <typename To, typename From> inline To to(From x) {
  if constexpr (std::is_same_v<From, bfloat16>) {
    return To(__builtin_bit_cast(float, uint32_t(x) << 16));
  } else if constexpr (std::is_same_v<To, bfloat16>) {  // the nearest, of two the even one
    const uint32_t bits = __builtin_bit_cast(uint32_t, float(x));
    return bfloat16(x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
  } else {
    return To(x);
  }
}

template <typename T> T larger(T x, T y) { return x > y || x != x ? x : y; }
template <typename T> T clamped(T x, T low, T high) { return x < low ? low : x > high ? high : x; }
// As torch's, of NaN too. Not as a difference of two comparisons, for which GCC leaves the vectors.
inline float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }

// The largest of their sizes; NaN if one is: by their bits, of which NaN has the largest.
inline float most(const float* x, int64_t n) {
  int32_t found = 0;
  #pragma omp simd reduction(max : found)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = __builtin_bit_cast(int32_t, x[i]) & 0x7fffffff;
    found = bits > found ? bits : found;
  }
  return __builtin_bit_cast(float, found);
}
// What the blocks of a line of n elements share, of that which begins at an element.
inline float* line(void* blocks, int64_t at, int64_t n, int64_t size) {
  return static_cast<float*>(blocks) + at / n * ((n + size - 1) / size) + at % n / size;
}

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
template <typename A, typename T> Lanes<A> as(const T* x) { return __builtin_convertvector(lanes(x), Lanes<A>); }
template <typename A, typename T> void add_square(Lanes<A>& sum, const T* x) {
  const Lanes<A> value = as<A>(x);
  sum += value * value;
}
template <typename V> auto sum_of(const V& x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }

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
    total += sum_of(a);
    for (; i < end; ++i) total += double(to<float>(x[i])) * to<float>(x[i]);
  }
  if constexpr (OVERFLOWS<A>)
    if (!std::isfinite(total)) return row_squares<double>(x, n);
  return total;
}

// Adds to `sums`. Of more rows side by side the processor loses track, of fewer a group is written too often.
template <typename A, typename T>
void column_squares(const T* x, int64_t rows, int64_t columns, int64_t pitch, A* group, double* sums) {
  for (int64_t begin = 0; begin < rows; begin += GROUP_ROWS) {
    const int64_t end = std::min(rows, begin + GROUP_ROWS);
    std::fill(group, group + columns, A(0));
    int64_t r = begin;
    for (; r + STREAMS <= end; r += STREAMS) {
      const T* y = x + r * pitch;
      int64_t c = 0;
      for (; c + 2 * LANES <= columns; c += 2 * LANES) {
        Lanes<A>*own = reinterpret_cast<Lanes<A>*>(group + c), a = own[0], b = own[1];
        for (int64_t k = 0; k < STREAMS; ++k) {
          add_square<A>(a, y + k * pitch + c);
          add_square<A>(b, y + k * pitch + c + LANES);
        }
        own[0] = a, own[1] = b;
      }
      for (; c < columns; ++c)
        for (int64_t k = 0; k < STREAMS; ++k) group[c] += A(to<float>(y[k * pitch + c])) * to<float>(y[k * pitch + c]);
    }
    for (; r < end; ++r)
      for (int64_t c = 0; c < columns; ++c) group[c] += A(to<float>(x[r * pitch + c])) * to<float>(x[r * pitch + c]);
    for (int64_t c = 0; c < columns; ++c) sums[c] += group[c];
  }
}

struct Same {  // one number for all
  float value;
  float operator[](int64_t) const { return value; }
};

// Threads that work on one matrix: all, or one by itself.
struct Team {
  int64_t thread, threads;
  void meet() const {
    if (threads > 1) {
      #pragma omp barrier
    }
  }
  // Where the part of a thread begins, of `n` things by the `unit`.
  int64_t begin(int64_t n, int64_t unit, int64_t of) const { return std::min(n, (n + unit - 1) / unit * of / threads * unit); }
  int64_t begin(int64_t n, int64_t unit) const { return begin(n, unit, thread); }
  int64_t end(int64_t n, int64_t unit) const { return begin(n, unit, thread + 1); }
};

inline Team all_threads() { return {omp_get_thread_num(), omp_get_num_threads()}; }

// What of a list of `total` elements, of which those of a tensor of `n` come after `before`, a thread takes: whole units.
struct Range {
  int64_t begin, end;
  Range(const Team& team, int64_t total, int64_t before, int64_t n, int64_t unit) {
    const int64_t first = int64_t(double(total) * team.thread / team.threads) - before;
    const int64_t last = team.thread + 1 == team.threads ? n : int64_t(double(total) * (team.thread + 1) / team.threads) - before;
    begin = up(first, n, unit), end = up(last, n, unit);
  }
  static int64_t up(int64_t at, int64_t n, int64_t unit) {
    return at <= 0 ? 0 : at >= n ? n : std::min(n, (at + unit - 1) / unit * unit);
  }
};

// For all of a team to call: sums over the rows, in parts that `added` adds up, as [threads][columns].
template <typename A, typename T>
void all_column_squares(const Team& team, const T* x, int64_t rows, int64_t columns, int64_t pitch, double* groups,
                        double* parts) {
  const int64_t begin = team.begin(rows, STREAMS), end = team.end(rows, STREAMS);
  double *group = groups + team.thread * columns, *sums = parts + team.thread * columns;
  std::fill(sums, sums + columns, 0.0);
  column_squares(x + begin * pitch, end - begin, columns, pitch, reinterpret_cast<A*>(group), sums);
  if constexpr (OVERFLOWS<A>)
    if (!std::all_of(sums, sums + columns, [](double sum) { return std::isfinite(sum); })) {
      std::fill(sums, sums + columns, 0.0);
      column_squares(x + begin * pitch, end - begin, columns, pitch, group, sums);
    }
  team.meet();
}

inline double added(const Team& team, const double* parts, int64_t columns, int64_t c) {
  double total = 0;
  for (int64_t t = 0; t < team.threads; ++t) total += parts[t * columns + c];
  return total;
}

}  // namespace
