// A step of a rule with block state, for a list of matrices: a row that is a block is summed up and moved while it is in
// the cache; a matrix of columns is summed up whole and then moved, while what the last cache holds of it is there.
//
// Comes after sums.cpp and what loops.py writes: the types P, Scalars and Job, and out of the rule
//   denominator(s, m, b, mean)        moves the state of a block on and returns its denominator
//   move(s, m, at, n, rate, decay)    moves n elements, each by its rate, from one on

namespace {

// The mean square of gradients that count times `clip`: what undoes the scale of a loss.
inline double mean(const Scalars& s, double squares, double count) { return squares / count * s.clip * s.clip; }

void step_rows(const Job& m) {
  const Scalars s = *m.scalars;
  const P* g = static_cast<const P*>(m.g);
  #pragma omp for schedule(static) nowait
  for (int64_t b = 0; b < m.rows; ++b) {
    const double squares = row_squares<float>(g + b * m.columns, m.columns);
    const float rate = float((m.row_step ? m.row_step[b] : s.step) / denominator(s, m, b, mean(s, squares, m.counts[b])));
    move(s, m, b * m.columns, m.columns, Same{rate}, Same{m.row_decay ? m.row_decay[b] : s.decay});
  }
}

void step_columns(const Job& m, double* groups, double* parts, float* rates, float* decays, double* sums) {
  const Scalars s = *m.scalars;
  all_column_squares<float>(static_cast<const P*>(m.g), m.rows, m.columns, groups, parts);
  if (m.block_of) {
    #pragma omp single
    {
      std::fill(sums, sums + m.blocks, 0.0);
      for (int64_t c = 0; c < m.columns; ++c) sums[m.block_of[c]] += added(parts, m.columns, c);
      for (int64_t b = 0; b < m.blocks; ++b) sums[b] = denominator(s, m, b, mean(s, sums[b], m.counts[b]));
    }
  }
  #pragma omp for schedule(static)
  for (int64_t c = 0; c < m.columns; ++c) {
    const double below = m.block_of ? sums[m.block_of[c]]
                                    : denominator(s, m, c, mean(s, added(parts, m.columns, c), m.counts[c]));
    rates[c] = float((m.row_step ? m.row_step[c] : s.step) / below);
    decays[c] = m.row_decay ? m.row_decay[c] : s.decay;
  }
  const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
  for (int64_t r = share(m.rows, t, threads); r < share(m.rows, t + 1, threads); ++r)
    move<const float*, const float*>(s, m, r * m.columns, m.columns, rates, decays);
}

}  // namespace

// `sums`, `rates` and `decays` hold the most columns, or blocks, of any matrix; `groups` and `parts` as for `squares`.
extern "C" void step(const Job* matrices, int64_t count, double* groups, double* parts, float* rates, float* decays,
                     double* sums, int threads) {
  #pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    if (matrices[i].by_row)
      step_rows(matrices[i]);
    else
      step_columns(matrices[i], groups, parts, rates, decays, sums);
  }
}
