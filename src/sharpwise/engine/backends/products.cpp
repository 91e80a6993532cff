// Products of a matrix with thin ones, by the row or the vector. Comes after sums.cpp.
//
// A matrix m is [rows, columns], its rows `pitch` apart. Thin ones are as wide as a multiple of WIDE, filled up with zeros.

namespace {

#ifdef __AVX512F__
constexpr int64_t WIDE = 16;
constexpr int ROWS = 8, PANELS = 3;  // as many sums as there are registers
#else
constexpr int64_t WIDE = 8;
constexpr int ROWS = 4, PANELS = 2;
#endif
constexpr int64_t CHUNK = 256;  // terms that are added up in one sum
typedef float Wide __attribute__((vector_size(sizeof(float) * WIDE), aligned(alignof(float)), may_alias));
inline Wide& wide(float* x) { return *reinterpret_cast<Wide*>(x); }
inline const Wide& wide(const float* x) { return *reinterpret_cast<const Wide*>(x); }

struct Lying {
  const float* data;
  int64_t rows, columns, pitch;
  const float* operator[](int64_t r) const { return data + r * pitch; }
};

// out = m thin, for N rows from r on and WIDE columns from k on; thin [columns, width].
template <int N> void right_rows(const Lying& m, const float* thin, float* out, int64_t width, int64_t r, int64_t k) {
  Wide total[N] = {};
  for (int64_t begin = 0; begin < m.columns; begin += CHUNK) {
    Wide sum[N] = {};
    for (int64_t c = begin, end = std::min(m.columns, begin + CHUNK); c < end; ++c) {
      const Wide t = wide(thin + c * width + k);
      #pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sum[i] += m[r + i][c] * t;
    }
    #pragma GCC unroll 8
    for (int i = 0; i < N; ++i) total[i] += sum[i];
  }
  for (int i = 0; i < N; ++i) wide(out + (r + i) * width + k) = total[i];
}

// out += thin^T m over rows [begin, end), for WIDE columns from c on and WIDE of thin from k on; thin [rows, width].
void left_rows(const Lying& m, const float* thin, float* out, int64_t width, int64_t begin, int64_t end, int64_t c, int64_t k) {
  Wide sum[WIDE] = {};
  for (int64_t r = begin; r < end; ++r) {
    const Wide row = wide(m[r] + c);
    __builtin_prefetch(m[r + GROUP_ROWS] + c);
    #pragma GCC unroll 16
    for (int i = 0; i < WIDE; ++i) sum[i] += thin[r * width + k + i] * row;
  }
  #pragma GCC unroll 16
  for (int i = 0; i < WIDE; ++i) wide(out + (k + i) * m.columns + c) += sum[i];
}

// x = a b + beta m, for N rows from r on and P panels from column c on; a [rows, inner], b [panels, inner, WIDE].
struct Sum {
  Lying m;
  const float *a, *b;
  int64_t inner;
  float beta, *x;
};
template <int N, int P> void fill_panels(const Sum& s, int64_t r, int64_t c) {
  Wide sum[N][P], t[P];
  const float* panel = s.b + c * s.inner;
  #pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    #pragma GCC unroll 8
    for (int j = 0; j < P; ++j) sum[i][j] = s.beta * wide(s.m[r + i] + c + j * WIDE);
  for (int64_t k = 0; k < s.inner; ++k) {
    #pragma GCC unroll 8
    for (int j = 0; j < P; ++j) t[j] = wide(panel + (j * s.inner + k) * WIDE);
    #pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      #pragma GCC unroll 8
      for (int j = 0; j < P; ++j) sum[i][j] += s.a[(r + i) * s.inner + k] * t[j];
  }
  #pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    #pragma GCC unroll 8
    for (int j = 0; j < P; ++j) wide(s.x + (r + i) * s.m.columns + c + j * WIDE) = sum[i][j];
}
template <int N> void fill_rows(const Sum& s, int64_t r) {
  int64_t c = 0;
  for (; c + PANELS * WIDE <= s.m.columns; c += PANELS * WIDE) fill_panels<N, PANELS>(s, r, c);
  for (; c + WIDE <= s.m.columns; c += WIDE) fill_panels<N, 1>(s, r, c);
  for (; c < s.m.columns; ++c)
    for (int64_t i = r; i < r + N; ++i) {
      float sum = s.beta * s.m[i][c];
      for (int64_t k = 0; k < s.inner; ++k) sum += s.a[i * s.inner + k] * s.b[(c / WIDE * s.inner + k) * WIDE + c % WIDE];
      s.x[i * s.m.columns + c] = sum;
    }
}
void fill(const Sum& s, int64_t begin, int64_t end) {
  for (; begin + ROWS <= end; begin += ROWS) fill_rows<ROWS>(s, begin);
  for (; begin < end; ++begin) fill_rows<1>(s, begin);
}

}  // namespace

// out [rows, width] = m thin, thin [columns, width].
extern "C" void right(const float* data, int64_t rows, int64_t columns, int64_t pitch, const float* thin, float* out,
                      int64_t width, int threads) {
  const Lying m{data, rows, columns, pitch};
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads();
    int64_t r = team.begin(rows, ROWS);
    const int64_t end = team.end(rows, ROWS);
    for (; r + ROWS <= end; r += ROWS)
      for (int64_t k = 0; k < width; k += WIDE) right_rows<ROWS>(m, thin, out, width, r, k);
    for (; r < end; ++r)
      for (int64_t k = 0; k < width; k += WIDE) right_rows<1>(m, thin, out, width, r, k);
  }
}

// out [width, columns] = thin^T m, thin [rows, width]. Threads share columns: each reads a part of every row.
extern "C" void left(const float* data, int64_t rows, int64_t columns, int64_t pitch, const float* thin, float* out,
                     int64_t width, int threads) {
  const Lying m{data, rows, columns, pitch};
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads();
    const int64_t first = team.begin(columns, WIDE), last = team.end(columns, WIDE), whole = last / WIDE * WIDE;
    for (int64_t k = 0; k < width; ++k) std::fill(out + k * columns + first, out + k * columns + last, 0.0f);
    for (int64_t begin = 0; begin < rows; begin += GROUP_ROWS) {
      const int64_t end = std::min(rows, begin + GROUP_ROWS);
      for (int64_t c = first; c < whole; c += WIDE)
        for (int64_t k = 0; k < width; k += WIDE) left_rows(m, thin, out, width, begin, end, c, k);
      for (int64_t c = std::max(first, whole); c < last; ++c)
        for (int64_t r = begin; r < end; ++r)
          for (int64_t k = 0; k < width; ++k) out[k * columns + c] += thin[r * width + k] * m[r][c];
    }
  }
}

// x = a b + beta m, and sums of x*x over its columns, or over its rows; `groups` and `parts` hold its columns per thread.
extern "C" void filled(const float* data, int64_t rows, int64_t columns, int64_t pitch, const float* a, const float* b,
                       float* x, double* sums, double* groups, double* parts, int64_t inner, float beta, int by_row,
                       int threads) {
  const Sum s{{data, rows, columns, pitch}, a, b, inner, beta, x};
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads();
    const int64_t end = team.end(rows, ROWS), at = team.thread * columns;
    if (!by_row) std::fill(parts + at, parts + at + columns, 0.0);
    for (int64_t r = team.begin(rows, ROWS), last; r < end; r = last) {
      last = std::min(end, r + (by_row ? ROWS : GROUP_ROWS));
      fill(s, r, last);
      if (by_row)
        for (int64_t i = r; i < last; ++i) sums[i] = row_squares<float>(x + i * columns, columns);
      else
        column_squares(x + r * columns, last - r, columns, reinterpret_cast<float*>(groups + at), parts + at);
    }
    team.meet();
    if (!by_row) {
      bool finite = true;
      for (int64_t c = 0; c < columns; ++c) finite &= std::isfinite(added(team, parts, columns, c));
      team.meet();
      if (!finite) all_column_squares<double>(team, x, rows, columns, groups, parts);
      for (int64_t c = team.begin(columns, 1), to = team.end(columns, 1); c < to; ++c) sums[c] = added(team, parts, columns, c);
    }
  }
}
extern "C" int64_t wide_of() { return WIDE; }
