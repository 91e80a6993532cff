// Sums over what a control bounds, its units: rows, columns, or matrices; in fp64, as little is left of an update that
// almost points along the weights.
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

template <typename T> Lanes<double> wide(const T* x) { return __builtin_convertvector(lanes(x), Lanes<double>); }
inline void add_to(double* at, const Lanes<double>& x) { *reinterpret_cast<Lanes<double>*>(at) += x; }

// Sums of u u and, if it has to be, of p u and p p. With vectors in so many words: of a loop over numbers of two types
// GCC makes one that takes four times as long.
template <bool SCALES> struct Products {
  Lanes<double> uu[2] = {}, pu[2] = {}, pp[2] = {};
  double rest[3] = {};

  void add(const float* u, const P* p, int64_t n) {
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
      for (int64_t k = 0; k < 2; ++k) add(wide(u + i + k * LANES), p + i + k * LANES, k);
    for (; i < n; ++i) {
      const double y = u[i], x = to<float>(p[i]);
      rest[0] += y * y, rest[1] += x * y, rest[2] += x * x;
    }
  }
  void add(const Lanes<double> y, const P* p, int64_t k) {
    uu[k] += y * y;
    if (SCALES) return;
    const Lanes<double> x = wide(p);
    pu[k] += x * y, pp[k] += x * x;
  }
  void store(double* sums) const {
    sums[0] = sum_of(uu[0] + uu[1]) + rest[0];
    sums[1] = sum_of(pu[0] + pu[1]) + rest[1], sums[2] = sum_of(pp[0] + pp[1]) + rest[2];
  }
};

template <bool SCALES> void add_row(const Scalars s, const Job& m, int64_t r, float rate, Products<SCALES>& sums) {
  float u[CHUNK];
  for (int64_t c = 0, size; c < m.columns; c += size) {
    size = chunk(c, m.columns - c);
    aim(s, m, r, c, size, Same{rate}, u);
    sums.add(u, static_cast<const P*>(m.p) + r * m.pitch + c, size);
  }
}

inline void bound_row(const Scalars s, const Job& m, int64_t r, float& rate, float& decay) {
  Products<SCALES> found;
  add_row(s, m, r, rate, found);
  double sums[3];
  found.store(sums);
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
          const Lanes<double> y = wide(u[k] + i);
          uu += y * y;
          if (SCALES) continue;
          const Lanes<double> x = wide(p + k * m.pitch + i);
          pu += x * y, pp += x * x;
        }
        add_to(sums + c + i, uu);
        if (!SCALES) add_to(sums + apart + c + i, pu), add_to(sums + 2 * apart + c + i, pp);
      }
      for (; i < size; ++i) {
        Products<SCALES> found;
        for (int64_t k = 0; k < rows; ++k) found.add(u[k] + i, p + k * m.pitch + i, 1);
        for (int64_t k = 0; k < 3; ++k) sums[k * apart + c + i] += found.rest[k];
      }
    }
  }
}

// Rates and factors of decay of all columns, for the team; `own` is a thread's.
void bound_columns(const Team& team, const Scalars s, const Job& m, double* parts, float* own, float* rates, float* decays) {
  const int64_t n = m.columns;
  for (int64_t c = 0; c < n; ++c) own[c] = rate(m, c);
  column_sums<SCALES>(s, m, team.begin(m.rows, STREAMS), team.end(m.rows, STREAMS), 0, n, own, parts + 3 * n * team.thread, n);
  team.meet();
  for (int64_t c = team.begin(n, 16), end = team.end(n, 16); c < end; ++c) {
    double sums[3];
    for (int64_t k = 0; k < 3; ++k) sums[k] = added(team, parts, 3 * n, k * n + c);
    rates[c] = own[c], decays[c] = decay(m, c);
    bound(m, c, m.rows, sums, rates[c], decays[c]);
  }
  team.meet();
}

// Rate and factor of decay of a matrix that is one unit, for the team.
void bound_unit(const Team& team, const Scalars s, const Job& m, double* parts, float* rates, float* decays) {
  Products<SCALES> found;
  for (int64_t r = team.begin(m.rows, 1), end = team.end(m.rows, 1); r < end; ++r)
    add_row(s, m, r, rate(m, 0), found);
  found.store(parts + 3 * team.thread);
  team.meet();
  if (team.thread == 0) {
    double sums[3];
    for (int64_t k = 0; k < 3; ++k) sums[k] = added(team, parts, 3, k);
    *rates = rate(m, 0), *decays = decay(m, 0);
    bound(m, 0, double(m.rows) * m.columns, sums, *rates, *decays);
  }
  team.meet();
}

// Sums of a matrix: threads share rows, or stripes of columns.
void sums_of(const Team& team, const Job& m, float* rates) {
  const Scalars s = *m.scalars;
  if (m.by_row) {
    for (int64_t r = team.begin(m.rows, 1), end = team.end(m.rows, 1); r < end; ++r) {
      Products<false> found;
      add_row(s, m, r, rate(m, r), found);
      double sums[3];
      found.store(sums);
      for (int64_t k = 0; k < 3; ++k) m.sums[k * m.apart + r] = sums[k];
    }
    return;
  }
  const int64_t unit = CODED ? CODED : 16, begin = team.begin(m.columns, unit), n = team.end(m.columns, unit) - begin;
  for (int64_t c = 0; c < n; ++c) rates[c] = rate(m, begin + c);
  column_sums<false>(s, m, 0, m.rows, begin, n, rates, m.sums + begin, m.apart);
}

}  // namespace
