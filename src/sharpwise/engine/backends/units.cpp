// Sums over what a control bounds, its units: rows, columns, or matrices. Little is left of an update that almost points along
// the weights: sums in fp32, of which fp64 takes over after some hundred numbers, are taken again in fp64 where that is so.
//
// Comes after sums.cpp and what loops.py writes, of which it takes
//   AIMS, CODED                                  whether a control may ask for sums; elements of a block of codes, or 0
//   aim(s, m, r, c, n, rates, u)                 what would be subtracted of n elements of row r from c on, into u
//   CONTROLLED, SCALES                           whether one bounds units here as they move, by the first sum alone, and then
//   bound(m, r, elements, sums, rate, decay)     what it makes of rate and factor of decay of a unit, the r-th here

namespace {

inline bool is_bounded(const Job& m) { return CONTROLLED && m.settings; }

constexpr int64_t CHUNK = CODED && CODED < 256 ? CODED : 256;

// How many of n elements are taken from the c-th of a line on: no more than a block has.
inline int64_t chunk(int64_t c, int64_t n) { return std::min(std::min(CHUNK, n), CODED ? CODED - c % CODED : n); }

inline void add_to(double* at, const Lanes<double>& x) { *reinterpret_cast<Lanes<double>*>(at) += x; }

// Sums of u u and, if it has to be, of p u and p p, of a chunk in the type A, and of chunks in fp64. With vectors in so many
// words: of a loop over numbers of two types GCC makes one that takes four times as long.
template <bool SCALES, typename A> struct Products {
  double uu = 0, pu = 0, pp = 0;

  void add(const float* u, const P* p, int64_t n) {
    Lanes<A> own[3][2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
      for (int64_t k = 0; k < 2; ++k) {
        const Lanes<A> y = as<A>(u + i + k * LANES);
        own[0][k] += y * y;
        if (SCALES) continue;
        const Lanes<A> x = as<A>(p + i + k * LANES);
        own[1][k] += x * y, own[2][k] += x * x;
      }
    uu += sum_of(own[0][0] + own[0][1]), pu += sum_of(own[1][0] + own[1][1]), pp += sum_of(own[2][0] + own[2][1]);
    for (; i < n; ++i) {
      const double y = u[i], x = to<float>(p[i]);
      uu += y * y, pu += x * y, pp += x * x;
    }
  }
  void store(double* sums) const { sums[0] = uu, sums[1] = pu, sums[2] = pp; }
};

// Whether sums of n products that were added in fp32 may be wrong: they went beyond its range, or little is left of an update
// that almost points along the weights.
inline bool unsure(const double* sums, double n) {
  const double least = 1e-30 * n, uu = sums[0], pu = sums[1], pp = sums[2];
  if (SCALES) return !(uu > least) || !std::isfinite(uu);
  return !(uu > least && pp > least && uu - pu * pu / pp > 1e-3 * uu) || !std::isfinite(uu + pp);
}

template <typename A, bool SCALES>
void add_row(const Scalars s, const Job& m, int64_t r, float rate, Products<SCALES, A>& sums) {
  float u[CHUNK];
  for (int64_t c = 0, size; c < m.columns; c += size) {
    size = chunk(c, m.columns - c);
    aim(s, m, r, c, size, Same{rate}, u);
    sums.add(u, static_cast<const P*>(m.p) + r * m.pitch + c, size);
  }
}
template <bool SCALES, typename A> void row_sums(const Scalars s, const Job& m, int64_t r, float rate, double* sums) {
  Products<SCALES, A> found;
  add_row(s, m, r, rate, found);
  found.store(sums);
}

inline void bound_row(const Scalars s, const Job& m, int64_t r, float& rate, float& decay) {
  double sums[3];
  row_sums<SCALES, float>(s, m, r, rate, sums);
  if (unsure(sums, m.columns)) row_sums<SCALES, double>(s, m, r, rate, sums);
  bound(m, r, m.columns, sums, rate, decay);
}

// Sums of n columns from `first` on over some rows, each kind `apart` from the last.
template <bool SCALES>
void column_sums(const Scalars s, const Job& m, int64_t begin, int64_t end, int64_t first, int64_t n, const float* rates,
                 double* sums, int64_t apart) {
  for (int64_t k = 0; k < 3; ++k) std::fill(sums + k * apart, sums + k * apart + n, 0.0);
  float u[STREAMS][CHUNK];
  for (int64_t r = begin; r < end; r += STREAMS) {
    const int64_t rows = std::min(STREAMS, end - r);
    for (int64_t c = 0, size; c < n; c += size) {
      size = chunk(first + c, n - c);
      for (int64_t k = 0; k < rows; ++k) aim(s, m, r + k, first + c, size, rates + c, u[k]);
      const P* p = static_cast<const P*>(m.p) + r * m.pitch + first + c;
      int64_t i = 0;
      for (; i + LANES <= size; i += LANES) {
        Lanes<double> uu = {}, pu = {}, pp = {};
        for (int64_t k = 0; k < rows; ++k) {
          const Lanes<double> y = as<double>(u[k] + i);
          uu += y * y;
          if (SCALES) continue;
          const Lanes<double> x = as<double>(p + k * m.pitch + i);
          pu += x * y, pp += x * x;
        }
        add_to(sums + c + i, uu);
        if (!SCALES) add_to(sums + apart + c + i, pu), add_to(sums + 2 * apart + c + i, pp);
      }
      for (; i < size; ++i) {
        Products<false, double> found;
        for (int64_t k = 0; k < rows; ++k) found.add(u[k] + i, p + k * m.pitch + i, 1);
        sums[c + i] += found.uu, sums[apart + c + i] += found.pu, sums[2 * apart + c + i] += found.pp;
      }
    }
  }
}

// The same of all columns, groups of rows in fp32, row by row: of three tensors the processor follows no more rows than one.
void quick_column_sums(const Scalars s, const Job& m, int64_t begin, int64_t end, const float* rates, double* sums, float* group) {
  const int64_t n = m.columns, kinds = SCALES ? 1 : 3;
  std::fill(sums, sums + 3 * n, 0.0);
  float u[CHUNK];
  for (int64_t first = begin; first < end; first += GROUP_ROWS) {
    std::fill(group, group + kinds * n, 0.0f);
    for (int64_t r = first; r < std::min(end, first + GROUP_ROWS); ++r)
      for (int64_t c = 0, size; c < n; c += size) {
        size = chunk(c, n - c);
        aim(s, m, r, c, size, rates + c, u);
        const P* p = static_cast<const P*>(m.p) + r * m.pitch + c;
        float *uu = group + c, *pu = uu + n, *pp = pu + n;
        #pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          uu[i] += u[i] * u[i];
          if (SCALES) continue;
          const float x = to<float>(p[i]);
          pu[i] += x * u[i], pp[i] += x * x;
        }
      }
    for (int64_t i = 0; i < kinds * n; ++i) sums[i] += group[i];
  }
}

// Rates and factors of decay of all columns, for the team; `own` is a thread's.
void bound_columns(const Team& team, const Scalars s, const Job& m, double* parts, float* own, float* rates, float* decays) {
  constexpr int64_t FEW = 16;
  const int64_t n = m.columns, begin = team.begin(m.rows, STREAMS), end = team.end(m.rows, STREAMS);
  for (int64_t c = 0; c < n; ++c) own[c] = rate(m, c);
  double* mine = parts + 5 * n * team.thread;
  quick_column_sums(s, m, begin, end, own, mine, reinterpret_cast<float*>(mine + 3 * n));
  team.meet();
  for (int64_t first = team.begin(n, FEW), last = team.end(n, FEW); first < last; first += FEW) {
    const int64_t few = std::min(FEW, last - first);
    double sums[FEW][3], again[3 * FEW];
    bool redo = false;
    for (int64_t c = 0; c < few; ++c) {
      for (int64_t k = 0; k < 3; ++k) sums[c][k] = added(team, parts, 5 * n, k * n + first + c);
      redo |= unsure(sums[c], m.rows);
    }
    if (redo) {
      column_sums<SCALES>(s, m, 0, m.rows, first, few, own + first, again, FEW);
      for (int64_t c = 0; c < few; ++c)
        for (int64_t k = 0; k < 3; ++k) sums[c][k] = again[k * FEW + c];
    }
    for (int64_t c = first; c < first + few; ++c) {
      rates[c] = own[c], decays[c] = decay(m, c);
      bound(m, c, m.rows, sums[c - first], rates[c], decays[c]);
    }
  }
  team.meet();
}

// Sums of a matrix that is one unit, for the team.
template <typename A> void unit_sums(const Team& team, const Scalars s, const Job& m, double* parts, double* sums) {
  Products<SCALES, A> found;
  for (int64_t r = team.begin(m.rows, 1), end = team.end(m.rows, 1); r < end; ++r) add_row(s, m, r, rate(m, 0), found);
  found.store(parts + 3 * team.thread);
  team.meet();
  for (int64_t k = 0; k < 3; ++k) sums[k] = added(team, parts, 3, k);
  team.meet();
}

// Rate and factor of decay of it.
void bound_unit(const Team& team, const Scalars s, const Job& m, double* parts, float* rates, float* decays) {
  double sums[3];
  unit_sums<float>(team, s, m, parts, sums);
  const double elements = double(m.rows) * m.columns;
  if (unsure(sums, elements)) unit_sums<double>(team, s, m, parts, sums);
  if (team.thread == 0) {
    *rates = rate(m, 0), *decays = decay(m, 0);
    bound(m, 0, elements, sums, *rates, *decays);
  }
  team.meet();
}

// Sums of a matrix: threads share rows, or stripes of columns.
void sums_of(const Team& team, const Job& m, float* rates) {
  const Scalars s = *m.scalars;
  if (m.by_row) {
    for (int64_t r = team.begin(m.rows, 1), end = team.end(m.rows, 1); r < end; ++r) {
      double sums[3];
      row_sums<false, double>(s, m, r, rate(m, r), sums);
      for (int64_t k = 0; k < 3; ++k) m.sums[k * m.apart + r] = sums[k];
    }
    return;
  }
  const int64_t unit = CODED ? CODED : 16, begin = team.begin(m.columns, unit), n = team.end(m.columns, unit) - begin;
  for (int64_t c = 0; c < n; ++c) rates[c] = rate(m, begin + c);
  column_sums<false>(s, m, 0, m.rows, begin, n, rates, m.sums + begin, m.apart);
}

}  // namespace
