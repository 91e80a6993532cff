// Products of a matrix with thin ones, by the row or the vector. Comes after sums.cpp.
//
// A matrix m is [rows, columns], its rows `pitch` apart. Thin ones are packed first: as wide as a multiple of WIDE, filled
// up with zeros.

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

// A thin matrix as it is given: numbers `down` apart from row to row, `across` from column to column.
struct Thin {
  const float* data;
  int64_t rows, columns, down, across;
  float at(int64_t r, int64_t c) const { return c < columns ? data[r * down + c * across] : 0.0f; }
  int64_t width() const { return (columns + WIDE - 1) / WIDE * WIDE; }
};
// As [rows, width].
void pack_rows(const Team& team, const Thin& thin, float* packed) {
  const int64_t width = thin.width();
  for (int64_t r = team.begin(thin.rows, 1), end = team.end(thin.rows, 1); r < end; ++r)
    for (int64_t c = 0; c < width; ++c) packed[r * width + c] = thin.at(r, c);
  team.meet();
}
// As panels of WIDE columns, [panels, rows, WIDE].
void pack_panels(const Team& team, const Thin& thin, float* packed) {
  const int64_t width = thin.width();
  for (int64_t c = team.begin(width, WIDE), end = team.end(width, WIDE); c < end; c += WIDE)
    for (int64_t r = 0; r < thin.rows; ++r)
      for (int64_t i = 0; i < WIDE; ++i) packed[c * thin.rows + r * WIDE + i] = thin.at(r, c + i);
  team.meet();
}

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
  int64_t inner, pitch;
  float beta, *x;
};
template <int N, int P> void fill_panels(const Sum& s, int64_t r, int64_t c) {
  Wide sum[N][P], t[P];
  const float* panel = s.b + c * s.inner;
  #pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    #pragma GCC unroll 8
    for (int j = 0; j < P; ++j) {
      sum[i][j] = s.beta * wide(s.m[r + i] + c + j * WIDE);
      __builtin_prefetch(s.m[r + i + ROWS] + c + j * WIDE, 0, 2);
    }
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
    for (int j = 0; j < P; ++j) wide(s.x + (r + i) * s.pitch + c + j * WIDE) = sum[i][j];
}
template <int N> void fill_rows(const Sum& s, int64_t r) {
  int64_t c = 0;
  for (; c + PANELS * WIDE <= s.m.columns; c += PANELS * WIDE) fill_panels<N, PANELS>(s, r, c);
  for (; c + WIDE <= s.m.columns; c += WIDE) fill_panels<N, 1>(s, r, c);
  for (; c < s.m.columns; ++c)
    for (int64_t i = r; i < r + N; ++i) {
      float sum = s.beta * s.m[i][c];
      for (int64_t k = 0; k < s.inner; ++k) sum += s.a[i * s.inner + k] * s.b[(c / WIDE * s.inner + k) * WIDE + c % WIDE];
      s.x[i * s.pitch + c] = sum;
    }
}
void fill(const Sum& s, int64_t begin, int64_t end) {
  for (; begin + ROWS <= end; begin += ROWS) fill_rows<ROWS>(s, begin);
  for (; begin < end; ++begin) fill_rows<1>(s, begin);
}

}  // namespace

// out [rows, width] = m thin.
extern "C" void right(const Lying* given, const Thin* factor, float* thin, float* out, int threads) {
  const Lying m = *given;
  const int64_t rows = m.rows, width = factor->width();
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads();
    pack_rows(team, *factor, thin);
    int64_t r = team.begin(rows, ROWS);
    const int64_t end = team.end(rows, ROWS);
    for (; r + ROWS <= end; r += ROWS)
      for (int64_t k = 0; k < width; k += WIDE) right_rows<ROWS>(m, thin, out, width, r, k);
    for (; r < end; ++r)
      for (int64_t k = 0; k < width; k += WIDE) right_rows<1>(m, thin, out, width, r, k);
  }
}

// out [width, columns] = thin^T m. Threads share columns: each reads a part of every row.
extern "C" void left(const Lying* given, const Thin* factor, float* thin, float* out, int threads) {
  const Lying m = *given;
  const int64_t rows = m.rows, columns = m.columns, width = factor->width();
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads();
    pack_rows(team, *factor, thin);
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
extern "C" void filled(const Lying* given, const Thin* factor, float* b, const float* a, float* x, double* sums,
                       double* groups, double* parts, int64_t x_pitch, float beta, int by_row, int threads) {
  const Sum s{*given, a, b, factor->rows, x_pitch, beta, x};
  const int64_t rows = s.m.rows, columns = s.m.columns;
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads();
    pack_panels(team, *factor, b);
    const int64_t end = team.end(rows, ROWS), at = team.thread * columns;
    if (!by_row) std::fill(parts + at, parts + at + columns, 0.0);
    for (int64_t r = team.begin(rows, ROWS), last; r < end; r = last) {
      last = std::min(end, r + (by_row ? ROWS : GROUP_ROWS / 4));
      fill(s, r, last);
      if (by_row)
        for (int64_t i = r; i < last; ++i) sums[i] = row_squares<float>(x + i * x_pitch, columns);
      else
        column_squares(x + r * x_pitch, last - r, columns, x_pitch, reinterpret_cast<float*>(groups + at), parts + at);
    }
    team.meet();
    if (!by_row) {
      bool finite = true;
      for (int64_t c = 0; c < columns; ++c) finite &= std::isfinite(added(team, parts, columns, c));
      team.meet();
      if (!finite) all_column_squares<double>(team, x, rows, columns, x_pitch, groups, parts);
      for (int64_t c = team.begin(columns, 1), to = team.end(columns, 1); c < to; ++c) sums[c] = added(team, parts, columns, c);
    }
  }
}
extern "C" int64_t wide_of() { return WIDE; }
