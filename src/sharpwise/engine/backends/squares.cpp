// Sums of squares of a list of matrices, per row or per column. Comes after sums.cpp.

namespace {

struct Matrix {
  const void* data;
  int64_t rows, columns, by_row, narrow;
  double* sums;
};

template <typename A, typename T> void squares_of(const Matrix& m, double* groups, double* parts) {
  const T* x = static_cast<const T*>(m.data);
  const Team team = all_threads();
  if (m.by_row) {
    #pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < m.rows; ++r) m.sums[r] = row_squares<A>(x + r * m.columns, m.columns);
  } else {
    all_column_squares<A>(team, x, m.rows, m.columns, m.columns, groups, parts);
    #pragma omp for schedule(static)
    for (int64_t c = 0; c < m.columns; ++c) m.sums[c] = added(team, parts, m.columns, c);
  }
}

// Everything in one sum. Threads share whole groups, so that their number changes the last digits of fp64 only.
struct Flat {
  const void* data;
  int64_t n, before, narrow;
};

template <typename A> double everything(const Flat* tensors, int64_t count, int64_t total, int threads) {
  double sum = 0;
  #pragma omp parallel num_threads(threads) reduction(+ : sum)
  for (const Flat* m = tensors; m < tensors + count; ++m) {
    const Range part(all_threads(), total, m->before, m->n, GROUP);
    const int64_t n = part.end - part.begin;
    if (n <= 0) continue;
    if (m->narrow)
      sum += row_squares<A>(static_cast<const bfloat16*>(m->data) + part.begin, n);
    else
      sum += row_squares<A>(static_cast<const float*>(m->data) + part.begin, n);
  }
  return sum;
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
extern "C" void squares(const Matrix* matrices, int64_t count, double* groups, double* parts, int exact, int threads) {
  (exact ? all_squares<double> : all_squares<float>)(matrices, count, groups, parts, threads);
}
extern "C" double total(const Flat* tensors, int64_t count, int64_t total, int exact, int threads) {
  return exact ? everything<double>(tensors, count, total, threads) : everything<float>(tensors, count, total, threads);
}
