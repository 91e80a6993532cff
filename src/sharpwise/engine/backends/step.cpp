// A step for a list of matrices. Where the blocks of one are known here (`counts`), a row that is a block is summed up and
// moved while it is in the cache; a matrix of columns is summed up whole and then moved, while what the last cache holds
// of it is there: by all threads together, or by one if it is small. Else all is known but the elements themselves.
//
// Comes after sums.cpp, what loops.py writes: the types P, G, Scalars and Job, and out of the rule
//   BLOCKS                                     whether it has block state, and then
//   denominator(s, m, b, mean)                 moves the state of a block on and returns its denominator
//   move(s, m, r, c, n, rates, decays, index)  moves n elements of row r from c on, each by its rate; `index` is the first's
// and units.cpp.

namespace {

// Threads share a row of a thing that is all alike.
void step_flat(const Job& m, const Range& part) {
  move(*m.scalars, m, 0, part.begin, part.end - part.begin, Same{rate(m, 0)}, Same{decay(m, 0)}, m.first + part.begin);
}

// False at once for rules without: nothing is compiled for what they do not have.
inline bool has_blocks(const Job& m) { return BLOCKS && m.counts; }

inline double mean_square(const Job& m, int64_t b, double squares, double clip) {
  return squares / m.counts[b] * clip * clip;
}

void step_rows(const Job& m, const Range& part, double clip) {
  const Scalars s = *m.scalars;
  for (int64_t r = part.begin / m.columns; r * m.columns < part.end; ++r) {
    float own = rate(m, r), shrunk = decay(m, r);
    if (has_blocks(m)) {
      const double squares = row_squares<float>(static_cast<const G*>(m.g) + r * m.pitch, m.columns);
      own = float(own / denominator(s, m, r, mean_square(m, r, squares, clip)));
    }
    if (is_bounded(m)) bound_row(s, m, r, own, shrunk);
    move(s, m, r, 0, m.columns, Same{own}, Same{shrunk}, m.first + r * m.stride);
  }
}

void step_columns(const Job& m, int64_t begin, int64_t end, const float* rates, const float* decays) {
  const Scalars s = *m.scalars;
  for (int64_t r = begin; r < end; ++r)
    move<const float*, const float*>(s, m, r, 0, m.columns, rates, decays, m.first + r * m.stride);
}

void step_columns_of_blocks(const Team& team, const Job& m, double clip, double* groups, double* parts, float* rates,
                            float* decays, double* sums) {
  const Scalars s = *m.scalars;
  all_column_squares<float>(team, static_cast<const G*>(m.g), m.rows, m.columns, m.pitch, groups, parts);
  if (m.block_of && team.thread == 0) {
    std::fill(sums, sums + m.blocks, 0.0);
    for (int64_t c = 0; c < m.columns; ++c) sums[m.block_of[c]] += added(team, parts, m.columns, c);
    for (int64_t b = 0; b < m.blocks; ++b) sums[b] = denominator(s, m, b, mean_square(m, b, sums[b], clip));
  }
  if (m.block_of) team.meet();
  for (int64_t c = team.begin(m.columns, 16), last = team.end(m.columns, 16); c < last; ++c) {
    const double below = m.block_of ? sums[m.block_of[c]]
                                    : denominator(s, m, c, mean_square(m, c, added(team, parts, m.columns, c), clip));
    rates[c] = float(rate(m, c) / below);
    decays[c] = decay(m, c);
  }
  team.meet();
  step_columns(m, team.begin(m.rows, STREAMS), team.end(m.rows, STREAMS), rates, decays);
}

// What a control bounds as a whole, or by its columns: summed up, by all of a team, then moved.
void step_units(const Team& team, const Job& m, double* parts, float* own, float* rates, float* decays) {
  const Scalars s = *m.scalars;
  if (!m.unit) {
    bound_columns(team, s, m, parts, own, rates, decays);
    step_columns(m, team.begin(m.rows, STREAMS), team.end(m.rows, STREAMS), rates, decays);
    return;
  }
  bound_unit(team, s, m, parts, rates, decays);
  for (int64_t r = team.begin(m.rows, 1), end = team.end(m.rows, 1); r < end; ++r)
    move(s, m, r, 0, m.columns, Same{*rates}, Same{*decays}, m.first + r * m.stride);
}

}  // namespace

// `widest` is the most columns, or blocks of columns, of any matrix: `groups` and `parts` hold as many per thread, `rates`
// twice as many, and `sums`; these two once more for what all threads do together.
extern "C" void step(const int64_t* gradients, const float* values, double clip, Job* matrices, int64_t count, int64_t total,
                      double* groups, double* parts, float* rates, double* sums, int64_t widest, int threads) {
  begin_step(matrices, count, gradients, values);
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads(), alone{0, 1};
    float* common = rates + 2 * widest * team.threads;
    const int64_t at = widest * team.thread;
    float *own = rates + 2 * at, *decays = own + widest;
    for (const Job* m = matrices; m < matrices + count; ++m) {
      if (m->before >= 0) continue;
      if (is_bounded(*m))
        step_units(team, *m, parts, own, common, common + widest);
      else if (BLOCKS)
        step_columns_of_blocks(team, *m, clip, groups, parts, common, common + widest, sums + widest * team.threads);
    }
    for (const Job* m = matrices; m < matrices + count; ++m) {
      const int64_t n = m->rows * m->columns;
      if (m->before < 0) continue;
      const bool units = is_bounded(*m) && (m->unit || !m->by_row), whole = units || (has_blocks(*m) && !m->by_row);
      const bool flat = m->by_row && m->rows == 1 && !has_blocks(*m) && !is_bounded(*m);
      const Range part(team, total, m->before, n, whole ? n : flat ? 64 : m->columns);
      if (part.begin >= part.end) continue;
      if (units) {
        step_units(alone, *m, parts + 5 * at, own, own, decays);
      } else if (whole) {
        step_columns_of_blocks(alone, *m, clip, groups + at, parts + at, own, decays, sums + at);
      } else if (flat) {
        step_flat(*m, part);
      } else if (m->by_row) {
        step_rows(*m, part, clip);
      } else {
        for (int64_t c = 0; c < m->columns; ++c) own[c] = rate(*m, c), decays[c] = decay(*m, c);
        step_columns(*m, part.begin / m->columns, part.end / m->columns, own, decays);
      }
    }
  }
}

// Sums of each matrix for a control, and nothing moves; arguments as of `step`.
extern "C" void sums(const int64_t* gradients, const float* values, double, Job* matrices, int64_t count, int64_t,
                     double*, double*, float* rates, double*, int64_t widest, int threads) {
  if (!AIMS) return;
  begin_step(matrices, count, gradients, values);
  #pragma omp parallel num_threads(threads)
  {
    const Team team = all_threads();
    for (const Job* m = matrices; m < matrices + count; ++m) sums_of(team, *m, rates + 2 * widest * team.thread);
  }
}
