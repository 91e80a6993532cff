// A step of a list of matrices of which all is known but the elements themselves.
//
// Comes after sums.cpp and what loops.py writes: the types P, Scalars and Job, and out of the rule
//   move(s, m, at, n, rate, decay)    moves n elements, each by its rate, from one on

namespace {

template <typename Rates, typename Decays> void step_columns(const Job& m, Rates rates, Decays decays) {
  #pragma omp for schedule(static) nowait
  for (int64_t r = 0; r < m.rows; ++r) move(*m.scalars, m, r * m.columns, m.columns, rates, decays);
}

void step_rows(const Job& m) {
  const Scalars s = *m.scalars;
  #pragma omp for schedule(static) nowait
  for (int64_t r = 0; r < m.rows; ++r)
    move(s, m, r * m.columns, m.columns, Same{m.row_step ? m.row_step[r] : s.step},
         Same{m.row_decay ? m.row_decay[r] : s.decay});
}

}  // namespace

// What is left of the arguments is for blocks.cpp.
extern "C" void step(const Job* matrices, int64_t count, double*, double*, float*, float*, double*, int threads) {
  #pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    const Job& m = matrices[i];
    const Same rate{m.scalars->step}, decay{m.scalars->decay};
    if (m.by_row)
      step_rows(m);
    else if (m.row_step && m.row_decay)
      step_columns(m, m.row_step, m.row_decay);
    else if (m.row_step)
      step_columns(m, m.row_step, decay);
    else if (m.row_decay)
      step_columns(m, rate, m.row_decay);
    else
      step_columns(m, rate, decay);
  }
}
