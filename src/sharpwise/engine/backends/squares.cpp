// Sums of squares of a list of matrices, per row or per column. Comes after sums.cpp.

namespace {

struct Matrix {
  const void* data;
  int64_t rows, columns, by_row, narrow;
  double* sums;
};

template <typename A, typename T> void squares_of(const Matrix& m, double* groups, double* parts) {
  const T* x = static_cast<const T*>(m.data);
  if (m.by_row) {
    #pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < m.rows; ++r) m.sums[r] = row_squares<A>(x + r * m.columns, m.columns);
  } else {
    all_column_squares<A>(x, m.rows, m.columns, groups, parts);
    #pragma omp for schedule(static)
    for (int64_t c = 0; c < m.columns; ++c) m.sums[c] = added(parts, m.columns, c);
  }
}

template <typename A>
void all_squares(const Matrix* matrices, int64_t count, double* groups, double* parts, int threads) {
  #pragma omp parallel num_threads(threads)
  for (const Matrix* m = matrices; m < matrices + count; ++m) {
    if (m->narrow)
      squares_of<A, bfloat16>(*m, groups, parts);
    else
      squares_of<A, float>(*m, groups, parts);
  }
}

}  // namespace

// `groups` and `parts` hold the most columns of any matrix, per thread.
extern "C" void squares(const Matrix* matrices, int64_t count, double* groups, double* parts, int threads) {
  all_squares<float>(matrices, count, groups, parts, threads);
}
extern "C" void exact_squares(const Matrix* matrices, int64_t count, double* groups, double* parts, int threads) {
  all_squares<double>(matrices, count, groups, parts, threads);
}
