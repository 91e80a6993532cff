// A step of a list of matrices of which all is known but the elements themselves.
//
// Comes after sums.cpp and what loops.py writes: the types P, G, Scalars and Job, and out of the rule
//   move(s, m, at, n, rates, decays, index)    moves n elements from `at` on, each by its rate; `index` is the first's

namespace {

void step_rows(const Job& m, const Range& part) {
  const Scalars s = *m.scalars;
  for (int64_t r = part.begin / m.columns; r * m.columns < part.end; ++r)
    move(s, m, r * m.columns, m.columns, Same{rate(m, r)}, Same{decay(m, r)}, m.first + r * m.stride);
}

// Threads share a row of a thing that is all alike.
void step_flat(const Job& m, const Range& part) {
  move(*m.scalars, m, part.begin, part.end - part.begin, Same{rate(m, 0)}, Same{decay(m, 0)}, m.first + part.begin);
}

void step_columns(const Job& m, const Range& part, float* rates, float* decays) {
  const Scalars s = *m.scalars;
  for (int64_t c = 0; c < m.columns; ++c) rates[c] = rate(m, c), decays[c] = decay(m, c);
  for (int64_t r = part.begin / m.columns; r * m.columns < part.end; ++r)
    move<const float*, const float*>(s, m, r * m.columns, m.columns, rates, decays, m.first + r * m.stride);
}

}  // namespace

// `rates` holds twice the most columns of any matrix, per thread. What is left of the arguments is for blocks.cpp.
extern "C" void step(const int64_t* gradients, const float* values, double, Job* matrices, int64_t count, int64_t total,
                      double*, double*, float* rates, double*, int64_t widest, int threads) {
  begin_step(matrices, count, gradients, values);
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads();
    float* own = rates + 2 * widest * team.thread;
    for (const Job* m = matrices; m < matrices + count; ++m) {
      const bool flat = m->by_row && m->rows == 1;
      const Range part(team, total, m->before, m->rows * m->columns, flat ? 64 : m->columns);
      if (part.begin >= part.end) continue;
      if (flat)
        step_flat(*m, part);
      else if (m->by_row)
        step_rows(*m, part);
      else
        step_columns(*m, part, own, own + widest);
    }
  }
}
